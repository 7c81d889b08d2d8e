// Vectors of sixteen floats, which the compiler maps to what the CPU has, and what every kernel needs on them.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "lanes.h"

#define LANES 16
#define WAKING_PRODUCTS (1 << 18)  // waking other threads costs more than this many multiplications
#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")  // of a short loop over vectors: otherwise they live in memory

typedef float f32x4 __attribute__((vector_size(16), aligned(4)));
typedef int32_t i32x4 __attribute__((vector_size(16), aligned(4)));
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t u16x16 __attribute__((vector_size(32), aligned(2)));

// The CPU's own vectors, for inner loops over sums: compilers keep wider ones in memory. NATIVE_SUMS is how many sums
// stay in registers beside their operands.
#if defined(__AVX512F__)
#define NATIVE_LANES 16
#define NATIVE_SUMS 16
#elif defined(__AVX__)
#define NATIVE_LANES 8
#define NATIVE_SUMS 8
#else
#define NATIVE_LANES 4
#define NATIVE_SUMS 8
#endif
typedef float native_f32 __attribute__((vector_size(4 * NATIVE_LANES), aligned(4)));
typedef int32_t native_i32 __attribute__((vector_size(4 * NATIVE_LANES), aligned(4)));
typedef uint32_t native_u32 __attribute__((vector_size(4 * NATIVE_LANES), aligned(4)));

static inline native_f32 load_native(const float *p) { return *(const native_f32 *)p; }
static inline void store_native(float *p, native_f32 x) { *(native_f32 *)p = x; }

// The first n lanes; the others are 0 and not read.
static inline native_f32 load_part(const float *p, int n) {
    float lanes[NATIVE_LANES] = {0};
    memcpy(lanes, p, n * sizeof(float));
    return load_native(lanes);
}

static inline f32x16 splat(float x) { return x - (f32x16){0}; }
static inline f32x16 load16(const float *p) { return *(const f32x16 *)p; }
static inline void store16(float *p, f32x16 x) { *(f32x16 *)p = x; }

// float16, by integers: compilers convert _Float16 lane by lane. 2^112 makes up for the exponents' biases.
static inline f32x16 load_half(const void *p) {
    const u32x16 bits = __builtin_convertvector(*(const u16x16 *)p, u32x16);
    const u32x16 magnitude = bits & 0x7fff;
    const u32x16 special = (u32x16)((i32x16)(0x7bff - magnitude) >> 31) & 0x7f800000;  // infinity or NaN
    const f32x16 finite = (f32x16)(magnitude << 13) * splat(0x1p112f);
    return (f32x16)((u32x16)finite | special | (bits & 0x8000) << 16);
}

static inline f32x16 select16(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

// a < b. Vectors wider than the CPU's are compared lane by lane, so there the difference's sign decides, which says the
// same except about NaN.
static inline i32x16 less16(f32x16 a, f32x16 b) {
#ifdef __AVX512F__
    return a < b;
#else
    return (i32x16)(a - b) >> 31;
#endif
}

// All bits of the lanes that less16 misjudges: those of NaN.
static inline i32x16 misjudged16(f32x16 x) {
#ifdef __AVX512F__
    return (i32x16){0};
#else
    return (0x7f800000 - ((i32x16)x & 0x7fffffff)) >> 31;
#endif
}

static inline f32x16 max16(f32x16 a, f32x16 b) { return select16(less16(b, a), a, b); }

static inline float sum_lanes(f32x16 x) {
    f32x4 part[4];
    memcpy(part, &x, sizeof part);
    const f32x4 s = (part[0] + part[1]) + (part[2] + part[3]);
    return (s[0] + s[1]) + (s[2] + s[3]);
}

static inline float max_lanes(f32x16 x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

#ifdef __clang__
#define SHUFFLE4(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE4(a, b, ...) __builtin_shuffle(a, b, (i32x4){__VA_ARGS__})  // GCC has the other from 12 on only
#endif

// Sum of the lanes of each of four vectors.
ALWAYS_INLINE f32x4 sum_lanes4(const native_f32 of[4]) {
    f32x4 q[4];
    UNROLL for (int i = 0; i < 4; i++) {
        f32x4 part[NATIVE_LANES / 4];
        memcpy(part, &of[i], sizeof part);
        q[i] = part[0];
        UNROLL for (int j = 1; j < NATIVE_LANES / 4; j++) q[i] += part[j];
    }
    const f32x4 ab = SHUFFLE4(q[0], q[1], 0, 4, 1, 5) + SHUFFLE4(q[0], q[1], 2, 6, 3, 7);
    const f32x4 cd = SHUFFLE4(q[2], q[3], 0, 4, 1, 5) + SHUFFLE4(q[2], q[3], 2, 6, 3, 7);
    return SHUFFLE4(ab, cd, 0, 1, 4, 5) + SHUFFLE4(ab, cd, 2, 3, 6, 7);
}

// e^x, relative error 2e-7; 0 below -87, also for -infinity; NaN of NaN. Reduction to |r| <= ln 2 / 2, then a Taylor polynomial.
static inline f32x16 exp16(f32x16 x) {
    const i32x16 tiny = less16(x, splat(-87.0f)), misjudged = misjudged16(x);
    x = select16(tiny, splat(-87.0f), x);
    x = select16(less16(splat(88.0f), x), splat(88.0f), x);
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32x16 n = (x * splat(1.44269504f) + magic) - magic;
    const f32x16 r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
    f32x16 p = splat(1.0f / 5040);
    p = p * r + splat(1.0f / 720);
    p = p * r + splat(1.0f / 120);
    p = p * r + splat(1.0f / 24);
    p = p * r + splat(1.0f / 6);
    p = p * r + splat(0.5f);
    p = p * r + splat(1.0f);
    p = p * r + splat(1.0f);
    const i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return (f32x16)((i32x16)select16(tiny, splat(0.0f), p * (f32x16)power) | misjudged);
}

// tanh x, relative error 3e-7. Near 0 by a polynomial, for 1 - 2 / (e^2x + 1) cancels there.
static inline f32x16 tanh16(f32x16 x) {
    const f32x16 square = x * x;
    f32x16 p = splat(-5.70498872745e-3f);
    p = p * square + splat(2.06390887954e-2f);
    p = p * square + splat(-5.37397155531e-2f);
    p = p * square + splat(1.33314422036e-1f);
    p = p * square + splat(-3.33332819422e-1f);
    const f32x16 near = x + x * square * p;
    const f32x16 far = splat(1.0f) - splat(2.0f) / (exp16(x + x) + splat(1.0f));
    return select16(less16(square, splat(0.625f * 0.625f)), near, far);
}
