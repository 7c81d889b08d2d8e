// Probe scores: full-context softmax of a few query rows per block, of which the columns of the block itself are kept.
//
// Query rows (probe rows times the heads that share a KV head) are lanes, so that maxima and sums need no reduction;
// keys are read as they lie. Earlier keys pass in chunks with an online softmax, the block's own keys come last. An
// item is a block's tile of query rows; items are added in a fixed order, so that threads do not change the result.
#include <omp.h>
#include <stdlib.h>

#include "vector.h"

#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define MAX(a, b) ((a) > (b) ? (a) : (b))
#if NATIVE_LANES == 16
#define TILE_VECTORS 3  // of query rows
#define TILE_KEYS 8
#else
#define TILE_VECTORS 1
#define TILE_KEYS 4
#endif
#define CHUNK 128
#define LOWEST -1e30f  // below every score, yet no infinity, so that differences are numbers

// See zipserve.kernels.saliency.probe_scores, and cpu.py, which mirrors this; strides in floats.
typedef struct {
    const float *query;  // [heads, rows, dim]
    const float *keys;   // [kv_heads, n, dim]
    const int64_t *own, *first, *block, *starts;
    const float *sinks;  // [heads] or NULL
    const float *lse;    // [heads, rows] or NULL
    float *scores;       // [blocks, block_tokens]
    int64_t query_strides[2], key_strides[2];
    int32_t heads, kv_heads, rows, keys_count, dim, blocks, block_tokens, threads;
    float scale, softcap;  // softcap 0: none
} Saliency;

// Query rows [lane, lane + vectors * LANES) of a block and a KV head; a lane is head-in-group * block's rows + row.
typedef struct {
    int32_t block, kv_head, lane, vectors;
    int32_t begin, rows;  // the block's probe rows
} Item;

// What a thread keeps of an item.
typedef struct {
    i32x16 first[TILE_VECTORS], own[TILE_VECTORS];  // keys that each query row sees
    f32x16 maximum[TILE_VECTORS], total[TILE_VECTORS];
    int64_t lowest, all_from, all_to, highest;  // keys that any row sees, and those among them that all see
    float *queries;                             // [dim][vectors][LANES], scaled
    float *scores;                              // [keys][vectors][LANES]
} Tile;

static int list_items(const Saliency *s, Item *items) {
    const int group = s->heads / s->kv_heads;
    int count = 0;
    for (int begin = 0, end; begin < s->rows; begin = end) {
        for (end = begin; end < s->rows && s->block[end] == s->block[begin]; end++) continue;
        const int vectors = ((end - begin) * group + LANES - 1) / LANES;
        const int tiles = (vectors + TILE_VECTORS - 1) / TILE_VECTORS, each = (vectors + tiles - 1) / tiles;
        for (int kv_head = 0; kv_head < s->kv_heads; kv_head++)
            for (int v = 0; v < vectors; v += each, count++)
                if (items) items[count] = (Item){s->block[begin], kv_head, v * LANES, MIN(each, vectors - v),
                                                 begin, end - begin};
    }
    return count;
}

// Lanes behind the last query row see nothing.
static void fill_tile(const Saliency *s, const Item *item, Tile *tile) {
    const int group = s->heads / s->kv_heads, width = item->vectors * LANES;
    const int lanes = MIN(width, group * item->rows - item->lane);
    tile->lowest = tile->all_to = INT32_MAX;
    tile->all_from = tile->highest = 0;
    for (int v = 0; v < item->vectors; v++) {
        tile->first[v] = (i32x16){0};
        tile->own[v] = (i32x16){0} - 1;
        tile->maximum[v] = splat(LOWEST);
        tile->total[v] = splat(0);
    }
    memset(tile->queries, 0, (int64_t)s->dim * width * sizeof(float));
    for (int l = 0; l < lanes; l++) {
        const int row = item->begin + (item->lane + l) % item->rows;
        const int head = item->kv_head * group + (item->lane + l) / item->rows;
        const float *query = s->query + head * s->query_strides[0] + row * s->query_strides[1];
        for (int c = 0; c < s->dim; c++) tile->queries[c * width + l] = query[c] * s->scale;
        tile->first[l / LANES][l % LANES] = s->first[row];
        tile->own[l / LANES][l % LANES] = s->own[row];
        tile->lowest = MIN(tile->lowest, s->first[row]);
        tile->all_from = MAX(tile->all_from, s->first[row]);
        tile->all_to = MIN(tile->all_to, s->own[row]);
        tile->highest = MAX(tile->highest, s->own[row]);
        if (s->lse) {
            tile->maximum[l / LANES][l % LANES] = s->lse[(int64_t)head * s->rows + row];
            tile->total[l / LANES][l % LANES] = 1;
        } else if (s->sinks) {
            tile->maximum[l / LANES][l % LANES] = s->sinks[head];
            tile->total[l / LANES][l % LANES] = 1;
        }
    }
}

ALWAYS_INLINE void multiply_keys(const float *keys, int64_t stride, int dim, const float *queries, float *scores,
                                 const int count, const int width) {
    const int vectors = width / NATIVE_LANES;
    native_f32 sums[TILE_KEYS][TILE_VECTORS * LANES / NATIVE_LANES] = {{{0}}};
    for (int c = 0; c < dim; c++) {
        UNROLL for (int v = 0; v < vectors; v++) {
            const native_f32 q = load_native(queries + c * width + v * NATIVE_LANES);
            UNROLL for (int k = 0; k < count; k++) sums[k][v] += q * keys[k * stride + c];
        }
    }
    UNROLL for (int k = 0; k < count; k++)
        UNROLL for (int v = 0; v < vectors; v++) store_native(scores + k * width + v * NATIVE_LANES, sums[k][v]);
}

ALWAYS_INLINE void multiply_tile(const float *keys, int64_t stride, int count, int dim, const Tile *tile,
                                 const int width) {
    int k = 0;
    for (; k + TILE_KEYS <= count; k += TILE_KEYS)
        multiply_keys(keys + k * stride, stride, dim, tile->queries, tile->scores + k * width, TILE_KEYS, width);
    for (; k < count; k++)
        multiply_keys(keys + k * stride, stride, dim, tile->queries, tile->scores + k * width, 1, width);
}

// Scores of keys [begin, begin + count): capped, and -infinity where a row does not see the key.
static void score(const Saliency *s, const Item *item, const Tile *tile, int64_t begin, int count) {
    const float *keys = s->keys + item->kv_head * s->key_strides[0] + begin * s->key_strides[1];
    switch (item->vectors) {
        case 1: multiply_tile(keys, s->key_strides[1], count, s->dim, tile, 1 * LANES); break;
#if TILE_VECTORS == 3
        case 2: multiply_tile(keys, s->key_strides[1], count, s->dim, tile, 2 * LANES); break;
        case 3: multiply_tile(keys, s->key_strides[1], count, s->dim, tile, 3 * LANES); break;
#endif
    }
    const int64_t size = (int64_t)count * item->vectors * LANES;
    if (s->softcap > 0)
        for (float *x = tile->scores; x < tile->scores + size; x += LANES)
            store16(x, tanh16(load16(x) / s->softcap) * s->softcap);
    if (begin >= tile->all_from && begin + count - 1 <= tile->all_to) return;
    for (int k = 0; k < count; k++)
        for (int v = 0; v < item->vectors; v++) {
            float *x = tile->scores + (k * item->vectors + v) * LANES;
            const int32_t key = begin + k;
            const i32x16 hidden = ((key - tile->first[v]) | (tile->own[v] - key)) >> 31;
            store16(x, select16(hidden, splat(-INFINITY), load16(x)));
        }
}

// Turns scores into weights relative to the highest one so far, and adds them to the totals.
static void soften(const Item *item, Tile *tile, int count) {
    const int width = item->vectors * LANES;
    for (int v = 0; v < item->vectors; v++) {
        float *scores = tile->scores + v * LANES, *end = scores + count * width;
        f32x16 maximum = tile->maximum[v], added = {0};
        for (const float *x = scores; x < end; x += width) maximum = max16(maximum, load16(x));
        for (float *x = scores; x < end; x += width) {
            const f32x16 weight = exp16(load16(x) - maximum);
            store16(x, weight);
            added += weight;
        }
        tile->total[v] = tile->total[v] * exp16(tile->maximum[v] - maximum) + added;
        tile->maximum[v] = maximum;
    }
}

// Turns scores into shares of the whole, whose logarithm is known.
static void divide(const Item *item, const Tile *tile, int count) {
    for (int i = 0; i < count * item->vectors; i++) {
        float *x = tile->scores + i * LANES;
        store16(x, exp16(load16(x) - tile->maximum[i % item->vectors]));
    }
}

// The item's part of its block's scores: [block_tokens], sums over its query rows.
static void attend(const Saliency *s, const Item *item, Tile *tile, float *part) {
    fill_tile(s, item, tile);
    const int64_t start = s->starts[item->block], end = MIN(tile->highest + 1, start + s->block_tokens);
    for (int64_t key = s->lse ? end : tile->lowest; key < MIN(start, end); key += CHUNK) {
        const int count = MIN(CHUNK, MIN(start, end) - key);
        score(s, item, tile, key, count);
        soften(item, tile, count);
    }
    memset(part, 0, s->block_tokens * sizeof *part);
    const int64_t begin = MAX(start, tile->lowest);
    if (begin >= end) return;
    score(s, item, tile, begin, end - begin);
    if (s->lse)
        divide(item, tile, end - begin);
    else
        soften(item, tile, end - begin);
    f32x16 shares[TILE_VECTORS];
    for (int v = 0; v < item->vectors; v++)  // 0 for lanes behind the last query row, whose `own` is -1
        shares[v] = select16(tile->own[v] >> 31, splat(0), splat(1.0f / s->heads) / tile->total[v]);
    for (int64_t key = begin; key < end; key++) {
        const float *weights = tile->scores + (key - begin) * item->vectors * LANES;
        f32x16 sum = {0};
        for (int v = 0; v < item->vectors; v++) sum += load16(weights + v * LANES) * shares[v];
        part[key - start] = sum_lanes(sum);
    }
}

static int64_t products(const Saliency *s) {
    int64_t keys = 0;
    for (int row = 0; row < s->rows; row++) keys += s->lse ? s->block_tokens : s->own[row] + 1 - s->first[row];
    return keys * s->heads * s->dim;
}

// The first row whose token or block does not exist, or whose block stands before the last row's; or -1.
static int wrong_row(const Saliency *s) {
    for (int row = 0; row < s->rows; row++) {
        const int64_t block = s->block[row];
        if (block < (row ? s->block[row - 1] : 0) || block >= s->blocks) return row;
        if (s->starts[block] < 0 || s->own[row] < s->starts[block] || s->own[row] >= s->keys_count) return row;
        if (s->own[row] >= s->starts[block] + s->block_tokens || (!s->lse && s->first[row] < 0)) return row;
    }
    return -1;
}

// Returns -1; or the first row whose indices are wrong; or -2 where there is no memory.
int zs_saliency(const Saliency *s) {
    const int wrong = wrong_row(s);
    if (wrong >= 0) return wrong;
    const int count = list_items(s, NULL), size = s->block_tokens;
    const int64_t tile_floats = (int64_t)TILE_VECTORS * LANES * (s->dim + MAX(CHUNK, size));
    Item *items = malloc((count + 1) * sizeof *items);
    float *parts = malloc(((int64_t)count * size + s->threads * tile_floats) * sizeof *parts);
    const int failed = !items || !parts;
    if (!failed) {
        list_items(s, items);
#pragma omp parallel num_threads(s->threads) if (products(s) > WAKING_PRODUCTS)
        {
            Tile tile;
            tile.queries = parts + (int64_t)count * size + omp_get_thread_num() * tile_floats;
            tile.scores = tile.queries + TILE_VECTORS * LANES * s->dim;
#pragma omp for schedule(dynamic)
            for (int i = count - 1; i >= 0; i--)  // later blocks have more keys, and go first
                attend(s, items + i, &tile, parts + (int64_t)i * size);
        }
        memset(s->scores, 0, (int64_t)s->blocks * size * sizeof *s->scores);
        for (int i = 0; i < count; i++) {
            float *scores = s->scores + (int64_t)items[i].block * size;
            for (int t = 0; t < size; t++) scores[t] += parts[(int64_t)i * size + t];
        }
    }
    free(items);
    free(parts);
    return failed ? -2 : -1;
}
