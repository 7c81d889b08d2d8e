// float16 by integers: on x86 only GCC 12 and later know _Float16.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t half;

static inline int is_finite(half x) { return (x & 0x7c00) != 0x7c00; }

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

static inline float float_from(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

// Of a finite one. 2^112 makes up for the exponents' biases.
static inline float from_half(half x) {
    const float magnitude = float_from((uint32_t)(x & 0x7fff) << 13) * 0x1p112f;
    return float_from(bits_of(magnitude) | (uint32_t)(x & 0x8000) << 16);
}

// bfloat16, rounded likewise.
static inline half to_bfloat(float x) {
    const uint32_t bits = bits_of(x);
    if ((bits & 0x7fffffff) > 0x7f800000) return bits >> 16 | 0x40;  // NaN
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Rounds to the nearest, to the even one of two.
static inline half to_half(float x) {
    const uint32_t bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    uint32_t found;
    if (magnitude > 0x7f800000)
        found = 0x7e00;  // NaN
    else if (magnitude >= 0x47800000)
        found = 0x7c00;  // from 2^16 on
    else if (magnitude < 0x38800000)
        found = bits_of(fabsf(x) + 0.5f) - 0x3f000000;  // below 2^-14: the last place of 1/2 is that of these numbers
    else
        found = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return (half)(sign | found);
}
