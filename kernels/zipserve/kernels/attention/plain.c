// Keys and values that are numbers: blocks of the raw codec, the open block, sinks.
#include "attention.h"

#define AHEAD_ROWS 8  // rows that are prefetched: values follow their keys, and the next head's keys these

// Sums that stay in registers beside their operands: of 4 tokens by some heads, and of heads by some vectors of columns.
#if NATIVE_LANES == 16
#define MAX_QUERIES 4
#define VALUE_SUMS 16
#else
#define MAX_QUERIES 3
#define VALUE_SUMS 12
#endif

ALWAYS_INLINE native_f32 load_up_to(const float *p, int n) {
    return n >= NATIVE_LANES ? load_native(p) : load_part(p, n);
}

// What is read next of a stream of rows, one row at a time.
ALWAYS_INLINE void prefetch_row(const float *row, int dim) {
    for (int c = 0; c < dim; c += 64 / sizeof *row) __builtin_prefetch(row + AHEAD_ROWS * dim + c);
}

// Four tokens and some heads at a time; lanes are channels. Writes up to three logits behind the last one.
ALWAYS_INLINE void multiply_queries(const float *keys, int tokens, int dim, const float *queries, float *logits,
                                    int64_t stride, const int heads) {
    const int whole = dim / NATIVE_LANES * NATIVE_LANES, rest = dim - whole;
    for (int token = 0; token < tokens; token += 4) {
        const float *rows[4];
        native_f32 sums[TILE_HEADS][4] = {{{0}}};
        UNROLL for (int i = 0; i < 4; i++) {
            rows[i] = keys + (int64_t)MIN(token + i, tokens - 1) * dim;
            prefetch_row(rows[i], dim);
        }
        for (int c = 0; c < whole; c += NATIVE_LANES) {
            native_f32 query[TILE_HEADS];
            UNROLL for (int h = 0; h < heads; h++) query[h] = load_native(queries + h * PADDED(dim) + c);
            UNROLL for (int i = 0; i < 4; i++) {
                const native_f32 key = load_native(rows[i] + c);
                UNROLL for (int h = 0; h < heads; h++) sums[h][i] += query[h] * key;
            }
        }
        if (rest)
            UNROLL for (int i = 0; i < 4; i++)
                UNROLL for (int h = 0; h < heads; h++)
                    sums[h][i] += load_native(queries + h * PADDED(dim) + whole) * load_part(rows[i] + whole, rest);
        UNROLL for (int h = 0; h < heads; h++) {
            const f32x4 found = sum_lanes4(sums[h]);
            memcpy(logits + h * stride + token, &found, sizeof found);
        }
    }
}

void zs_plain_logits(const float *keys, int tokens, int dim, const float *queries, const Tile *tile) {
    for (int h = 0, heads; h < tile->heads; h += heads) {
        heads = tile->heads - h <= MAX_QUERIES ? tile->heads - h : TILE_HEADS / 2;
        const float *of_heads = queries + h * PADDED(dim);
        float *logits = tile->logits + h * tile->stride;
        switch (heads) {
            case 1: multiply_queries(keys, tokens, dim, of_heads, logits, tile->stride, 1); break;
            case 2: multiply_queries(keys, tokens, dim, of_heads, logits, tile->stride, 2); break;
            case 3: multiply_queries(keys, tokens, dim, of_heads, logits, tile->stride, 3); break;
            default: multiply_queries(keys, tokens, dim, of_heads, logits, tile->stride, 4);
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
            if (v * NATIVE_LANES % 16 == 0) __builtin_prefetch(values + AHEAD_ROWS * dim + v * NATIVE_LANES);
            const native_f32 x = load_up_to(values + NATIVE_LANES * v, columns - NATIVE_LANES * v);
            UNROLL for (int h = 0; h < heads; h++) acc[h][v] += x * weights[h * stride + token];
        }
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++) store_native(sums + h * PADDED(dim) + NATIVE_LANES * v, acc[h][v]);
}

ALWAYS_INLINE void add_values(const float *values, int tokens, int dim, const Tile *tile, const int heads) {
    const int vectors = TILE_VECTORS(heads, VALUE_SUMS), width = vectors * NATIVE_LANES;
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
