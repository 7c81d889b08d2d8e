// Vectors of sixteen floats, which the compiler maps to what the CPU has, and what every kernel needs on them.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float f32x16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t i32x16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t u32x16 __attribute__((vector_size(64), aligned(4)));
typedef _Float16 f16x16 __attribute__((vector_size(32), aligned(2)));

static inline f32x16 splat(float x) { return x - (f32x16){0}; }
static inline f32x16 load16(const float *p) { return *(const f32x16 *)p; }
static inline void store16(float *p, f32x16 x) { *(f32x16 *)p = x; }
static inline u32x16 load_words(const void *p) { return *(const u32x16 *)p; }
static inline f32x16 load_half(const void *p) { return __builtin_convertvector(*(const f16x16 *)p, f32x16); }

static inline f32x16 select16(i32x16 mask, f32x16 yes, f32x16 no) {
    return (f32x16)((mask & (i32x16)yes) | (~mask & (i32x16)no));
}

static inline f32x16 max16(f32x16 a, f32x16 b) { return select16(a > b, a, b); }

static inline float sum_lanes(f32x16 x) {
    float s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

static inline float max_lanes(f32x16 x) {
    float m = x[0];
    for (int i = 1; i < LANES; i++) m = x[i] > m ? x[i] : m;
    return m;
}

// e^x, relative error 2e-7; 0 below -87, also for -infinity. Reduction to |r| <= ln 2 / 2, then a Taylor polynomial.
static inline f32x16 exp16(f32x16 x) {
    const i32x16 tiny = x < splat(-87.0f);
    x = select16(tiny, splat(-87.0f), x);
    x = select16(x > splat(88.0f), splat(88.0f), x);
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
    return select16(tiny, splat(0.0f), p * (f32x16)power);
}

// x R or, with `inverse`, x R^T, in place; see rotation.py. `signs` holds dim floats of +-1.
static inline void rotate_row(float *x, const float *signs, int dim, int inverse) {
    int size = dim & -dim;
    if (!inverse)
        for (int c = 0; c < dim; c++) x[c] *= signs[c];
    for (int span = 1; span < size; span *= 2)
        for (int base = 0; base < dim; base += 2 * span)
            for (int c = base; c < base + span; c++) {
                const float a = x[c], b = x[c + span];
                x[c] = a + b;
                x[c + span] = a - b;
            }
    const float scale = 1.0f / sqrtf((float)size);
    for (int c = 0; c < dim; c++) x[c] *= inverse ? scale * signs[c] : scale;
}
