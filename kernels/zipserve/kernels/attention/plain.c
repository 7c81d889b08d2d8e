// Keys and values that are numbers: blocks of the raw codec, the open block, sinks.
#include "attention.h"

ALWAYS_INLINE native_f32 load_up_to(const float *p, int n) {
    return n >= NATIVE_LANES ? load_native(p) : load_part(p, n);
}

// Four tokens at a time; lanes are channels. Writes up to three logits behind the last one.
void zs_plain_logits(const float *keys, int tokens, int dim, const float *queries, const Tile *tile) {
    const int whole = dim / NATIVE_LANES * NATIVE_LANES;
    for (int token = 0; token < tokens; token += 4) {
        const float *rows[4];
        for (int i = 0; i < 4; i++) rows[i] = keys + (int64_t)MIN(token + i, tokens - 1) * dim;
        for (int h = 0; h < tile->heads; h++) {
            const float *query = queries + h * PADDED(dim);
            native_f32 sums[4] = {{0}};
            for (int c = 0; c < whole; c += NATIVE_LANES) {
                const native_f32 q = load_native(query + c);
                UNROLL for (int i = 0; i < 4; i++) sums[i] += q * load_native(rows[i] + c);
            }
            if (whole < dim)
                UNROLL for (int i = 0; i < 4; i++)
                    sums[i] += load_native(query + whole) * load_part(rows[i] + whole, dim - whole);
            const f32x4 found = sum_lanes4(sums);
            memcpy(tile->logits + h * tile->stride + token, &found, sizeof found);
        }
    }
}

// The first `columns` channels, which `vectors` vectors hold.
ALWAYS_INLINE void add_columns(const float *values, int tokens, int dim, int columns, const Tile *tile, float *sums,
                               const int heads, const int vectors) {
    native_f32 acc[TILE_HEADS][MAX_VECTORS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) acc[h][v] = load_native(sums + h * PADDED(dim) + NATIVE_LANES * v);
    const float *weights = tile->logits;
    const int64_t stride = tile->stride;
    for (int token = 0; token < tokens; token++, values += dim) {
        UNROLL for (int v = 0; v < vectors; v++) {
            const native_f32 x = load_up_to(values + NATIVE_LANES * v, columns - NATIVE_LANES * v);
            UNROLL for (int h = 0; h < heads; h++) acc[h][v] += x * weights[h * stride + token];
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) store_native(sums + h * PADDED(dim) + NATIVE_LANES * v, acc[h][v]);
}

ALWAYS_INLINE void add_values(const float *values, int tokens, int dim, const Tile *tile, const int heads) {
    const int vectors = TILE_VECTORS(heads), width = vectors * NATIVE_LANES;
    int c = 0;
    for (; c + width <= dim; c += width)
        add_columns(values + c, tokens, dim, width, tile, tile->sums + c, heads, vectors);
    for (; c < dim; c += NATIVE_LANES)
        add_columns(values + c, tokens, dim, MIN(dim - c, NATIVE_LANES), tile, tile->sums + c, heads, 1);
}

void zs_plain_values(const float *values, int tokens, int dim, const Tile *tile) {
    switch (tile->heads) {
        case 1: return add_values(values, tokens, dim, tile, 1);
        case 2: return add_values(values, tokens, dim, tile, 2);
        case 3: return add_values(values, tokens, dim, tile, 3);
        default: return add_values(values, tokens, dim, tile, 4);
    }
}

const float *zs_widen(const void *source, enum content type, int64_t count, float *scratch) {
    if (type == FLOAT32) return source;
    const uint16_t *halves = source;
    int64_t i = 0;
    for (; i < count; i += LANES) {
        uint16_t part[LANES] = {0};
        const uint16_t *p = halves + i;
        if (i + LANES > count) p = memcpy(part, p, (count - i) * sizeof *p);
        if (type == FLOAT16)
            store16(scratch + i, load_half(p));
        else
            store16(scratch + i, (f32x16)(__builtin_convertvector(*(const u16x16 *)p, u32x16) << 16));
    }
    return scratch;
}
