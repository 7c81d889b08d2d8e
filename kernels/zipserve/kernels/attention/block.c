// One block for one tile of query heads: logits, online softmax, values.
#include "attention.h"

static const uint8_t *layer_of(const Attention *a, int row, int block) {
    return a->sealed + a->table[row * a->table_stride + block] * a->sealed_stride;
}

const uint8_t *zs_segment(const Attention *a, int row, int block, int kv_head) {
    return layer_of(a, row, block) + a->form->bitmap_bytes + kv_head * a->form->head_bytes;
}

// Hides tokens below the first visible position. `bitmap` tells which slots they stand in; NULL: those of their number.
static void hide(int hidden, int tokens, const uint8_t *bitmap, const Tile *tile) {
    int hi = 0, lo = tokens / 2;
    for (int t = 0; t < hidden; t++) {
        const int slot = !bitmap ? t : bitmap[t / 8] >> (t % 8) & 1 ? hi++ : lo++;
        for (int h = 0; h < tile->heads; h++) tile->logits[h * tile->stride + slot] = -INFINITY;
    }
}

// Turns the logits of a head into weights, and adds them to its total.
static void soften(float *logits, int slots, float *maximum, float *total, float *sums, int value_stride) {
    f32x16 highest = splat(*maximum), added = {0};
    for (int i = 0; i < slots; i += LANES) highest = max16(highest, load16(logits + i));
    const float higher = max_lanes(highest);
    for (int i = 0; i < slots; i += LANES) {
        const f32x16 weight = exp16(load16(logits + i) - higher);
        store16(logits + i, weight);
        added += weight;
    }
    if (higher > *maximum) {
        const float shrink = expf(*maximum - higher);
        *maximum = higher;
        *total *= shrink;
        for (int c = 0; c < value_stride; c += LANES) store16(sums + c, load16(sums + c) * shrink);
    }
    *total += sum_lanes(added);
}

static void cap(float *logits, int slots, float softcap) {
    for (int i = 0; i < slots; i += LANES) store16(logits + i, tanh16(load16(logits + i) / softcap) * softcap);
}

static void soften_tile(const Attention *a, int position, const uint8_t *bitmap, int tokens, const Tile *tile) {
    const int slots = PADDED(tokens), value_stride = PADDED(a->form->value_dim);
    if (a->softcap > 0)
        for (int h = 0; h < tile->heads; h++) cap(tile->logits + h * tile->stride, slots, a->softcap);
    hide(MIN(a->first[tile->row] - position, tokens), tokens, bitmap, tile);
    for (int h = 0; h < tile->heads; h++) {
        float *logits = tile->logits + h * tile->stride;
        for (int slot = tokens; slot < slots; slot++) logits[slot] = -INFINITY;
        soften(logits, slots, tile->maxima + h, tile->totals + h, tile->sums + h * value_stride, value_stride);
    }
}

static void attend_plain(const Attention *a, const uint8_t *keys, const uint8_t *values, enum content type, int tokens,
                         int position, const Tile *tile) {
    const int key_dim = a->form->key_dim, value_dim = a->form->value_dim;
    const float *numbers = zs_widen(keys, type, (int64_t)tokens * key_dim, tile->wide);
    zs_plain_logits(numbers, tokens, key_dim, tile->queries, tile);
    soften_tile(a, position, NULL, tokens, tile);
    numbers = zs_widen(values, type, (int64_t)tokens * value_dim, tile->wide);
    zs_plain_values(numbers, tokens, value_dim, tile);
}

// Sinks stand beside the first block, in whose first slots there is nothing.
static void attend_zip(const Attention *a, int block, int position, const Tile *tile) {
    const struct zip_format *form = a->form;
    const uint8_t *layer = layer_of(a, tile->row, block), *segment = zs_segment(a, tile->row, block, tile->kv_head);
    const int64_t border = SINK_TOKENS * form->key_dim, numbers = border + SINK_TOKENS * form->value_dim;
    if (position == 0) {
        const uint8_t *sinks = a->sinks + a->sink_slabs[tile->row] * a->sinks_stride + tile->kv_head * numbers * 2;
        zs_widen(sinks, FLOAT16, numbers, tile->wide);
    }
    zs_zip_logits(form, segment, tile);
    if (position == 0) zs_plain_logits(tile->wide, SINK_TOKENS, form->key_dim, tile->rotated, tile);
    soften_tile(a, position, layer, form->block_tokens, tile);
    if (position == 0) {
        zs_plain_values(tile->wide + border, SINK_TOKENS, form->value_dim, tile);
        for (int h = 0; h < tile->heads; h++) memset(tile->logits + h * tile->stride, 0, SINK_TOKENS * sizeof(float));
    }
    zs_zip_values(form, segment, tile);
}

void zs_attend_sealed(const Attention *a, const Tile *tile, int block) {
    const struct zip_format *form = a->form;
    const int position = a->starts[tile->row] + block * form->block_tokens;
    if (form->content == ZIPPED) return attend_zip(a, block, position, tile);
    const int64_t width = form->content == FLOAT32 ? 4 : 2;
    const uint8_t *keys = zs_segment(a, tile->row, block, tile->kv_head);
    const uint8_t *values = keys + width * form->block_tokens * form->key_dim;
    attend_plain(a, keys, values, form->content, form->block_tokens, position, tile);
}

void zs_attend_open(const Attention *a, const Tile *tile) {
    const int row = tile->row, slot = a->slots[row];
    const uint8_t *keys = a->open_keys + slot * a->open_key_strides[0] + tile->kv_head * a->open_key_strides[1];
    const uint8_t *values = a->open_values + slot * a->open_value_strides[0] + tile->kv_head * a->open_value_strides[1];
    const int position = a->starts[row] + a->counts[row] * a->form->block_tokens;
    attend_plain(a, keys, values, a->open_type, a->open_counts[row], position, tile);
}
