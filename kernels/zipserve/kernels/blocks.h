// Blocks of keys and values as attention reads them: zipped, or as numbers.
#pragma once
#include "vector.h"
#include "zipformat.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#define PADDED(n) (((n) + LANES - 1) / LANES * LANES)

// Element k of words of codes; of 3 bits `lower` holds the lowest bit, and `upper` the others.
ALWAYS_INLINE native_f32 code_at(native_u32 upper, native_u32 lower, const int bits, const int k) {
    native_u32 code;
    if (bits == 3)
        code = ((k ? upper >> (2 * k - 1) : upper << 1) & 6) | ((lower >> k) & 1);
    else
        code = (upper >> (bits * k)) & ((1 << bits) - 1);
    return __builtin_convertvector((native_i32)code, native_f32);
}

// `source` as floats: itself, or converted to `scratch`, which has room for PADDED(count).
const float *zs_widen(const void *source, enum content type, int64_t count, float *scratch);
