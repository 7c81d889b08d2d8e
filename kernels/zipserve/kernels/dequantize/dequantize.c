// Decodes one layer of blocks of the zip format. One task is the keys or the values of one head of one block.
//
// Rows are decoded in the order of positions, with channels as lanes, and rotated back into the output. A word of V is
// one lane; a word of K is spread over the lanes of its channels.
#include <string.h>

#include "lanes.h"
#include "zipformat.h"

struct task {
    const struct zip_format *form;
    const int32_t *slots;    // of each token
    const uint8_t *segment;  // of the head
    const half *sinks;       // of the head, or null
    float *out;              // [block_tokens][dim]
};

// One plane of the codes of a slot of K. The plane of 1 bit is appended to the one before.
INLINE void unpack_key(const uint8_t *words, int columns, int dim, const int bits, int32_t *codes) {
    const i32xn lane = LANE_INDEX;
    const int per_word = 32 / bits;
    for (int first = 0; first < dim; first += per_word, words += 4 * columns) {
        int32_t word;
        memcpy(&word, words, 4);
        for (int k = 0; k < per_word && first + k < dim; k += NARROW) {
            i32xn *code = (i32xn *)(codes + first + k);
            const i32xn plane = (word >> (bits * (lane + k))) & ((1 << bits) - 1);
            *code = bits == 1 ? *code << 1 | plane : plane;
        }
    }
}

// The same of V, whose words hold the slot's codes from bit `shift` on.
INLINE void unpack_value(const uint8_t *words, int dim, const int bits, int shift, int32_t *codes) {
    for (int c = 0; c < dim; c++) {
        uint32_t word;
        memcpy(&word, words + 4 * c, 4);
        const int32_t plane = (int32_t)(word >> shift & ((1u << bits) - 1));
        codes[c] = bits == 1 ? codes[c] << 1 | plane : plane;
    }
}

// Rotates a row back to where it belongs; those of the sinks are in float16 instead.
static inline void put_row(const struct task *task, int token, float *row, const float *factors, int dim) {
    if (task->sinks && token < SINK_TOKENS)
        for (int c = 0; c < dim; c++) row[c] = from_half(task->sinks[token * dim + c]);
    rotate_row_into(task->out + token * dim, row, factors, dim, 1);
}

static void dequantize_keys(const struct task *task) {
    const struct zip_format *form = task->form;
    const int dim = form->key_dim & -HEAD_DIM_MULTIPLE, hi_tokens = form->keys[0].tokens;
    const half *lo = (const half *)task->segment, *width = lo + dim;
    ALIGNED float cell[2][dim], middle[2][dim];  // of each class: width of a cell, and the middle of the lowest one
    for (int is_lo = 0; is_lo < 2; is_lo++)
        for (int c = 0; c < dim; c++) {
            cell[is_lo][c] = from_half(width[c]) / (float)(1 << form->keys[is_lo].bits);
            middle[is_lo][c] = from_half(lo[c]) + 0.5f * cell[is_lo][c];
        }
    for (int t = 0; t < form->block_tokens; t++) {
        const int is_lo = task->slots[t] >= hi_tokens;
        const struct zip_region *region = &form->keys[is_lo];
        ALIGNED int32_t codes[dim];
        for (int p = 0; p < region->planes; p++) {
            const struct zip_plane *plane = &region->plane[p];
            const uint8_t *words = task->segment + plane->offset + 4 * (task->slots[t] - is_lo * hi_tokens);
            switch (plane->bits) {
                case 4: unpack_key(words, region->tokens, dim, 4, codes); break;
                case 2: unpack_key(words, region->tokens, dim, 2, codes); break;
                default: unpack_key(words, region->tokens, dim, 1, codes);
            }
        }
        ALIGNED float row[dim];
        for (int c = 0; c < dim; c++) row[c] = middle[is_lo][c] + (float)codes[c] * cell[is_lo][c];
        put_row(task, t, row, form->key_factors, dim);
    }
}

static void dequantize_values(const struct task *task) {
    const struct zip_format *form = task->form;
    const int dim = form->value_dim & -HEAD_DIM_MULTIPLE, hi_tokens = form->values[0].tokens;
    for (int t = 0; t < form->block_tokens; t++) {
        const int slot = task->slots[t], is_lo = slot >= hi_tokens, index = slot - is_lo * hi_tokens;
        const struct zip_region *region = &form->values[is_lo];
        ALIGNED int32_t codes[dim];
        for (int p = 0; p < region->planes; p++) {
            const int bits = region->plane[p].bits, per_word = 32 / bits, shift = index % per_word * bits;
            const uint8_t *words = task->segment + region->plane[p].offset + 4 * (index / per_word * dim);
            switch (bits) {
                case 4: unpack_value(words, dim, 4, shift, codes); break;
                case 2: unpack_value(words, dim, 2, shift, codes); break;
                default: unpack_value(words, dim, 1, shift, codes);
            }
        }
        const float scale = region->step * scale_of(task->segment[form->exponent_offset + slot]);
        const float offset = 0.5f - (float)(1 << (region->bits - 1));
        ALIGNED float row[dim];
        for (int c = 0; c < dim; c++) row[c] = ((float)codes[c] + offset) * scale;
        put_row(task, t, row, form->value_factors, dim);
    }
}

// Returns the first block whose slab or sinks' slab does not exist, or -1.
int zs_dequantize(
    const struct zip_format *form, const struct zip_slabs *slabs, const struct zip_slabs *sinks, int blocks,
    int threads, float *keys, float *values
) {
    const int wrong = missing_slab(slabs, blocks, 0), wrong_sinks = missing_slab(sinks, blocks, INT64_MIN);
    if (wrong >= 0 || wrong_sinks >= 0) return wrong >= 0 ? wrong : wrong_sinks;
    const int heads = form->kv_heads, tokens = form->block_tokens;
    const int64_t tasks = 2 * (int64_t)heads * blocks;
#pragma omp parallel for num_threads(threads) schedule(static) if (tasks > 0)
    for (int64_t number = 0; number < tasks; number++) {
        const int64_t block = number / (2 * heads), rows = number / 2 * tokens;
        const int head = number / 2 % heads, of_values = number % 2;
        int32_t slots[tokens];
        const uint8_t *layer = slab_of(slabs, block);
        slots_of(layer, tokens, slots);
        const struct task task = {
            .form = form,
            .slots = slots,
            .segment = layer + form->bitmap_bytes + head * form->head_bytes,
            .sinks = head_sinks(form, slab_of(sinks, block), head, of_values),
            .out = of_values ? values + rows * form->value_dim : keys + rows * form->key_dim,
        };
        if (of_values)
            dequantize_values(&task);
        else
            dequantize_keys(&task);
    }
    return -1;
}
