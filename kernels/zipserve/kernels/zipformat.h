// Sealed blocks as the kernels see them: sizes and offsets, filled in by abi.py. zipformat.py says what they mean.
#pragma once
#include <stdint.h>

#include "half.h"

#define SINK_TOKENS 4
#define HEAD_DIM_MULTIPLE 16  // compilers that know it make no loops for the rest

// What blocks are made of; the first three are also the types of other keys and values.
enum content { FLOAT32, FLOAT16, BFLOAT16, ZIPPED };

// One plane of the codes of a class: (code >> shift) & (2^bits - 1), in words from `offset` of the head's segment on.
struct zip_plane {
    int64_t offset;
    int32_t bits, shift;
};

// The codes of one class, of keys or of values.
struct zip_region {
    int32_t bits, tokens, planes;
    float step;  // width of a cell of the values' quantizer, in units of the row's root mean square
    struct zip_plane plane[2];
};

// Of blocks of numbers (RawFormat) only the sizes count; there is no bitmap, and a head's segment is its keys, then its
// values.
struct zip_format {
    int64_t bitmap_bytes, head_bytes, exponent_offset;
    int32_t kv_heads, block_tokens, key_dim, value_dim, content;
    const float *key_factors, *value_factors;  // of the rotation: its signs over sqrt(p)
    struct zip_region keys[2], values[2];  // hi, lo
};

// Scale of a slot's values: 2^((e - 160) / 8).
static inline float scale_of(uint8_t e) {
    static const float eighths[8] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                                     1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
    return float_from((uint32_t)(127 - 20 + e / 8) << 23) * eighths[e % 8];
}

// One layer of all slabs, `stride` bytes apart, and which of them each block uses; below 0 for none.
struct zip_slabs {
    uint8_t *data;
    int64_t stride, count;
    const int64_t *index;
};

static inline uint8_t *slab_of(const struct zip_slabs *slabs, int64_t block) {
    return slabs->index[block] < 0 ? 0 : slabs->data + slabs->stride * slabs->index[block];
}

// The first of the blocks whose slab is not between `lowest` and the last one, or -1.
static inline int missing_slab(const struct zip_slabs *slabs, int blocks, int64_t lowest) {
    for (int block = 0; block < blocks; block++)
        if (slabs->index[block] < lowest || slabs->index[block] >= slabs->count) return block;
    return -1;
}

// A head's sinks of its keys or values, [SINK_TOKENS][dim], in the sinks' layer of its block; null stays null.
static inline half *head_sinks(const struct zip_format *form, uint8_t *layer, int head, int of_values) {
    const int64_t elements = (int64_t)head * (form->key_dim + form->value_dim) + (of_values ? form->key_dim : 0);
    return layer ? (half *)layer + SINK_TOKENS * elements : 0;
}

// The slot of each token: the hi class first, ascending positions inside a class.
static inline void slots_of(const uint8_t *bitmap, int tokens, int32_t *slots) {
    int next[2] = {0, 0};  // of lo, of hi
    for (int t = 0; t < tokens; t++) next[0] += bitmap[t / 8] >> t % 8 & 1;
    for (int t = 0; t < tokens; t++) slots[t] = next[bitmap[t / 8] >> t % 8 & 1]++;
}
