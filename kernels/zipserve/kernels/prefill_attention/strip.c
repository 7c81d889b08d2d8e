// Fills strips: keys become panels of columns, values panels of channels; codes become numbers, still rotated.
#include "prefill.h"

ALWAYS_INLINE void transpose4(f32x4 x[4]) {
    const f32x4 a = SHUFFLE4(x[0], x[1], 0, 4, 1, 5), b = SHUFFLE4(x[2], x[3], 0, 4, 1, 5);
    const f32x4 c = SHUFFLE4(x[0], x[1], 2, 6, 3, 7), d = SHUFFLE4(x[2], x[3], 2, 6, 3, 7);
    x[0] = SHUFFLE4(a, b, 0, 1, 4, 5);
    x[1] = SHUFFLE4(a, b, 2, 3, 6, 7);
    x[2] = SHUFFLE4(c, d, 0, 1, 4, 5);
    x[3] = SHUFFLE4(c, d, 2, 3, 6, 7);
}

// Four keys at a time; behind the last one it is repeated.
static void put_keys(const void *keys, enum content type, int64_t stride, int count, int dim, const Strip *strip) {
    const int width = type == FLOAT32 ? 4 : 2;
    for (int key = 0; key < count; key += 4) {
        float *column = strip->keys + (int64_t)(key / PANEL) * PANEL * dim + key % PANEL;
        const float *rows[4];
        for (int i = 0; i < 4; i++)
            rows[i] = zs_widen((const uint8_t *)keys + MIN(key + i, count - 1) * stride * width, type, dim,
                               strip->wide + i * PADDED(dim));
        int c = 0;
        for (; c + 4 <= dim; c += 4) {
            f32x4 part[4];
            UNROLL for (int i = 0; i < 4; i++) part[i] = *(const f32x4 *)(rows[i] + c);
            transpose4(part);
            UNROLL for (int i = 0; i < 4; i++) *(f32x4 *)(column + (c + i) * PANEL) = part[i];
        }
        for (; c < dim; c++)
            for (int i = 0; i < 4; i++) column[c * PANEL + i] = rows[i][c];
    }
}

static void put_values(const void *values, enum content type, int64_t stride, int count, int dim, const Strip *strip) {
    const int width = type == FLOAT32 ? 4 : 2;
    for (int key = 0; key < count; key++) {
        const float *row = zs_widen((const uint8_t *)values + key * stride * width, type, dim, strip->wide);
        for (int c = 0; c < dim; c += PANEL)
            memcpy(strip->values + (int64_t)c * STRIP + key * PANEL, row + c, MIN(PANEL, dim - c) * sizeof *row);
    }
}

static void number(Strip *strip, int position, int count, int key_dim) {
    strip->count = count;
    strip->key_dim = key_dim;
    strip->in_order = 1;
    strip->lowest = position;
    strip->highest = position + count - 1;
    for (int i = 0; i < STRIP; i++) strip->positions[i] = i < count ? position + i : INT32_MAX;
}

void zs_load_plain(const Prefill *a, int kv_head, int from, int count, Strip *strip) {
    const int width = a->key_type == FLOAT32 ? 4 : 2;
    const int64_t key = kv_head * a->key_strides[0] + from * a->key_strides[1];
    const int64_t value = kv_head * a->value_strides[0] + from * a->value_strides[1];
    number(strip, key_position(a) + from, count, a->key_dim);
    put_keys((const uint8_t *)a->key + key * width, a->key_type, a->key_strides[1], count, a->key_dim, strip);
    put_values((const uint8_t *)a->value + value * width, a->key_type, a->value_strides[1], count, a->value_dim, strip);
}

// A panel of slots of K, from number `from` of their region on: lo + (code + 1/2) width / 2^b.
ALWAYS_INLINE void unpack_keys(const uint8_t *segment, const struct zip_region *region, int from, int dim,
                               const float *lo, const float *width, float *panel, const int bits) {
    const int per_word = bits == 4 ? 8 : 16;
    const uint32_t *upper_row = (const uint32_t *)(segment + region->plane[0].offset) + from;
    const uint32_t *lower_row = (const uint32_t *)(segment + region->plane[1].offset) + from;
    const float cell = 1.0f / (1 << bits);
    for (int c = 0; c < dim; c += per_word, upper_row += region->tokens)
        UNROLL for (int v = 0; v < 2; v++) {
            const native_u32 upper = *(const native_u32 *)(upper_row + v * NATIVE_LANES);
            native_u32 lower = upper;
            if (bits == 3)
                lower = *(const native_u32 *)(lower_row + c / 32 * region->tokens + v * NATIVE_LANES) >> c % 32;
            UNROLL for (int k = 0; k < per_word; k++) {
                const float step = width[c + k] * cell;
                store_native(panel + (c + k) * PANEL + v * NATIVE_LANES,
                             code_at(upper, lower, bits, k) * step + (lo[c + k] + step / 2));
            }
        }
}

// 32 slots of V, from number `from` of their region on: (code - 2^(b-1) + 1/2) step scale.
ALWAYS_INLINE void unpack_values(const uint8_t *segment, const struct zip_region *region, int from, int dim,
                                 const uint8_t *exponents, float *rows, const int bits) {
    const int per_word = bits == 4 ? 8 : 16;
    const uint32_t *upper_row = (const uint32_t *)(segment + region->plane[0].offset) + from / per_word * dim;
    const uint32_t *lower_row = (const uint32_t *)(segment + region->plane[1].offset) + from / 32 * dim;
    const float centre = 0.5f - (1 << (bits - 1));
    for (int slot = 0; slot < 32; slot += per_word, upper_row += dim) {
        float scale[16];
        for (int k = 0; k < per_word; k++) scale[k] = region->step * scale_of(exponents[slot + k]);
        for (int c = 0; c < dim; c += NATIVE_LANES) {
            const native_u32 upper = *(const native_u32 *)(upper_row + c);
            native_u32 lower = upper;
            if (bits == 3) lower = *(const native_u32 *)(lower_row + c) >> slot;
            float *row = rows + (int64_t)(c / PANEL * PANEL) * STRIP + slot * PANEL + c % PANEL;
            UNROLL for (int k = 0; k < per_word; k++)
                store_native(row + k * PANEL, (code_at(upper, lower, bits, k) + centre) * scale[k]);
        }
    }
}

static void put_codes(const struct zip_format *form, const uint8_t *segment, int from, int count, const Strip *strip) {
    const int key_dim = form->key_dim, value_dim = form->value_dim, hi_tokens = form->keys[0].tokens;
    float *lo = strip->wide, *width = lo + key_dim;
    for (int c = 0; c < 2 * key_dim; c += LANES) store16(lo + c, load_half(segment + 2 * c));
    for (int i = 0; i < count; i += 32) {
        const int is_lo = from + i >= hi_tokens, index = from + i - is_lo * hi_tokens;
        for (int j = 0; j < 32; j += PANEL) {
            const struct zip_region *region = &form->keys[is_lo];
            float *panel = strip->keys + (i + j) * key_dim;
            switch (region->bits) {
                case 2: unpack_keys(segment, region, index + j, key_dim, lo, width, panel, 2); break;
                case 3: unpack_keys(segment, region, index + j, key_dim, lo, width, panel, 3); break;
                default: unpack_keys(segment, region, index + j, key_dim, lo, width, panel, 4);
            }
        }
        const struct zip_region *region = &form->values[is_lo];
        const uint8_t *exponents = segment + form->exponent_offset + from + i;
        float *rows = strip->values + i * PANEL;
        switch (region->bits) {
            case 2: unpack_values(segment, region, index, value_dim, exponents, rows, 2); break;
            case 3: unpack_values(segment, region, index, value_dim, exponents, rows, 3); break;
            default: unpack_values(segment, region, index, value_dim, exponents, rows, 4);
        }
    }
}

// Sinks stand in the first slots of their block.
static void load_zip(const Prefill *a, int block, int kv_head, int from, int count, Strip *strip) {
    const struct zip_format *form = a->form;
    const int size = form->block_tokens, position = block_position(a, block);
    uint8_t *layer = slab_of(&a->blocks, block), *sinks = slab_of(&a->sinks, block);
    put_codes(form, layer + form->bitmap_bytes + kv_head * form->head_bytes, from, count, strip);
    if (sinks && from == 0) {
        const half *keys = head_sinks(form, sinks, kv_head, 0), *values = head_sinks(form, sinks, kv_head, 1);
        put_keys(keys, FLOAT16, form->key_dim, SINK_TOKENS, form->key_dim, strip);
        put_values(values, FLOAT16, form->value_dim, SINK_TOKENS, form->value_dim, strip);
    }
    int32_t slots[size];
    slots_of(layer, size, slots);
    for (int t = 0; t < size; t++)
        if (slots[t] >= from && slots[t] < from + count) strip->positions[slots[t] - from] = position + t;
    strip->in_order = 0;
    strip->lowest = position;
    strip->highest = position + size - 1;
}

void zs_load_sealed(const Prefill *a, int block, int kv_head, int from, int count, Strip *strip) {
    const struct zip_format *form = a->form;
    const int key_dim = form->key_dim, value_dim = form->value_dim;
    number(strip, block_position(a, block) + from, count, key_dim);
    if (form->content == ZIPPED) return load_zip(a, block, kv_head, from, count, strip);
    const int width = form->content == FLOAT32 ? 4 : 2;
    const uint8_t *keys = slab_of(&a->blocks, block) + kv_head * form->head_bytes;
    const uint8_t *values = keys + (int64_t)width * form->block_tokens * key_dim;
    put_keys(keys + (int64_t)width * from * key_dim, form->content, key_dim, count, key_dim, strip);
    put_values(values + (int64_t)width * from * value_dim, form->content, value_dim, count, value_dim, strip);
}
