// Vectors whose lanes trade places: the rotation (rotation.py), and reductions across lanes.
#pragma once
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))  // what must be unrolled for a constant argument
#define ALIGNED __attribute__((aligned(64)))                 // scratch: a vector across two cache lines costs twice

// Shuffles of vectors wider than the CPU's own are taken apart lane by lane, so those that shuffle are narrower.
#ifdef __AVX__
#define NARROW 8
#define LANE_INDEX \
    { 0, 1, 2, 3, 4, 5, 6, 7 }
#else
#define NARROW 4
#define LANE_INDEX \
    { 0, 1, 2, 3 }
#endif
typedef float f32xn __attribute__((vector_size(4 * NARROW), aligned(4)));
typedef int32_t i32xn __attribute__((vector_size(4 * NARROW), aligned(4)));

// Lanes of a, or of b from number NARROW on. `from` must be known to the compiler after inlining.
INLINE i32xn shuffle(i32xn a, i32xn b, i32xn from) {
#ifdef __clang__
    i32xn found;
    for (int i = 0; i < NARROW; i++) found[i] = from[i] < NARROW ? a[from[i]] : b[from[i] - NARROW];
    return found;
#else
    return __builtin_shuffle(a, b, from);
#endif
}

// Hadamard transform across `count` vectors, a power of two.
INLINE void hadamard(f32xn *v, const int count) {
    for (int span = 1; span < count; span *= 2)
        for (int k = 0; k < count; k++)
            if (!(k & span)) {
                const f32xn a = v[k], b = v[k + span];
                v[k] = a + b;
                v[k + span] = a - b;
            }
}

// Hadamard transform of the lanes of one vector.
INLINE f32xn hadamard_lanes(f32xn x) {
    const i32xn lane = LANE_INDEX;
    for (int span = 1; span < NARROW; span *= 2) {
        const f32xn sign = __builtin_convertvector(1 + 2 * ((lane & span) != 0), f32xn);  // true is -1
        x = (f32xn)shuffle((i32xn)x, (i32xn)x, lane ^ span) + x * sign;
    }
    return x;
}

INLINE i32xn combine(i32xn a, i32xn b, i32xn from, const int behind, const int floats) {
    const i32xn x = shuffle(a, b, from), y = shuffle(a, b, from + behind);
    return floats ? (i32xn)((f32xn)x + (f32xn)y) : x | y;
}

// Lane i of the result combines all lanes of vector i of NARROW: their sum or, of integers, their bitwise or. It
// overwrites the vectors. Each step joins two of them: the lanes listed, with those that stand behind them.
INLINE i32xn reduce_lanes(i32xn *v, const int floats) {
    const i32xn lane = LANE_INDEX, quad = lane & ~3;
    const i32xn halves = (lane & 3) + (lane >> 2) * NARROW;              // a0 a1 a2 a3 b0 b1 b2 b3 with a4 .. b7
    const i32xn singles = quad + (lane >> 1 & 1) + (lane & 1) * NARROW;  // of each four a0 b0 a1 b1 with a2 b2 a3 b3
    const i32xn pairs = quad + (lane & 1) + (lane >> 1 & 1) * NARROW;    // of each four a0 a1 b0 b1 with a2 a3 b2 b3
#pragma GCC unroll 4
    for (int i = 0; i < NARROW - 4; i++) v[i] = combine(v[i], v[i + 4], halves, 4, floats);
    v[0] = combine(v[0], v[1], singles, 2, floats);
    v[2] = combine(v[2], v[3], singles, 2, floats);
    return combine(v[0], v[2], pairs, 2, floats);
}

INLINE f32xn rotation_input(const float *x, const float *factors, int c, const int inverse) {
    const f32xn y = *(const f32xn *)(x + c);
    return inverse ? y : y * *(const f32xn *)(factors + c);
}

// One of the pieces, of `count` vectors, of a group of channels that are rotated together. In terms of whole pieces the
// transform is one of their signed sums; the rest of it stays in registers.
INLINE void rotate_piece(
    float *out, const float *x, const float *factors, const int inverse, int piece, int pieces, const int count
) {
    f32xn v[8];
#pragma GCC unroll 8
    for (int k = 0; k < count; k++) v[k] = rotation_input(x, factors, k * NARROW, inverse);
    for (int from = 1; from < pieces; from++) {
        const int c = from * count * NARROW;
        if (__builtin_parity(piece & from))
#pragma GCC unroll 8
            for (int k = 0; k < count; k++) v[k] -= rotation_input(x, factors, c + k * NARROW, inverse);
        else
#pragma GCC unroll 8
            for (int k = 0; k < count; k++) v[k] += rotation_input(x, factors, c + k * NARROW, inverse);
    }
#pragma GCC unroll 8
    for (int k = 0; k < count; k++) v[k] = hadamard_lanes(v[k]);
    hadamard(v, count);
#pragma GCC unroll 8
    for (int k = 0; k < count; k++) {
        const int c = (piece * count + k) * NARROW;
        if (inverse) v[k] *= *(const f32xn *)(factors + c);
        *(f32xn *)(out + c) = v[k];
    }
}

// out = x R or, with `inverse`, x R^T; see rotation.py. `factors` are the dim signs over sqrt(p).
INLINE void rotate_row_into(
    float *restrict out, const float *restrict x, const float *factors, int dim, const int inverse
) {
    const int size = dim & -dim, pieces = size <= 8 * NARROW ? 1 : size / (8 * NARROW);  // size is p
    for (int c = 0; c < dim; c += size)
        for (int piece = 0; piece < pieces; piece++)
            if (size >= 8 * NARROW)
                rotate_piece(out + c, x + c, factors + c, inverse, piece, pieces, 8);
            else if (size == 4 * NARROW)
                rotate_piece(out + c, x + c, factors + c, inverse, 0, 1, 4);
            else
                rotate_piece(out + c, x + c, factors + c, inverse, 0, 1, 2);
}
