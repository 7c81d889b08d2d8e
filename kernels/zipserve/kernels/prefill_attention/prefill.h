// Prefill attention on the CPU: its arguments, which cpu.py mirrors, and the parts of the work.
//
// An item is a KV head and a tile of new tokens. Its rows are the tile's queries of all heads that share the KV head,
// token by token. Keys pass in strips, which are unpacked once for all rows: keys into panels [key_dim][PANEL], values
// into panels [keys][PANEL]. Rows are computed TILE_ROWS at a time, with an online softmax in powers of two.
#pragma once
#include "blocks.h"

#define PANEL (2 * NATIVE_LANES)  // columns that are summed at once, beside TILE_ROWS rows
#if NATIVE_LANES == 16
#define TILE_ROWS 12
#else
#define TILE_ROWS 6
#endif
#define TILE_LANES ((TILE_ROWS + NATIVE_LANES - 1) / NATIVE_LANES * NATIVE_LANES)
#define PANELS(n) (((n) + PANEL - 1) / PANEL)
#define STRIP 128      // keys
#define LOWEST -1e30f  // below every score, yet no infinity, so that differences are numbers

// See zipserve.kernels.prefill_attention; strides in elements, of heads and of tokens.
typedef struct {
    const struct zip_format *form;   // of the prefix
    struct zip_slabs blocks, sinks;  // the prefix
    const void *query, *key, *value;
    const int32_t *first;      // [tokens] or NULL
    const float *sink_logits;  // [heads] or NULL
    float *output;             // [tokens, heads, value_dim]
    float *lse;                // [heads, tokens] or NULL
    int64_t query_strides[2], key_strides[2], value_strides[2];
    int32_t prefix_blocks, tokens, keys, heads, kv_heads, key_dim, value_dim;
    int32_t start;  // position of the first query
    int32_t query_type, key_type, threads;
    float scale, softcap;  // softcap 0: none
} Prefill;

// Position of the first new key, and of the first token of a block of the prefix.
static inline int key_position(const Prefill *a) { return a->start + a->tokens - a->keys; }

static inline int block_position(const Prefill *a, int block) {
    return a->prefix_blocks ? key_position(a) - (a->prefix_blocks - block) * a->form->block_tokens : key_position(a);
}

// What a thread keeps of an item. Rows behind the last one are zeros, and nobody reads what becomes of them.
typedef struct {
    int rows, value_stride;
    float softcap;         // in units of the scores; 0: none
    float *queries;        // [tiles][key_dim][TILE_ROWS], scaled
    float *sums;           // [rows][value_stride]: values, weighted relative to the maximum
    float *totals;         // [rows][NATIVE_LANES]: sums of these weights, spread over lanes
    float *maxima;         // [tiles][TILE_LANES]: highest score so far
    int32_t *first, *own;  // [rows]: positions that the row sees
    float *weights;        // [TILE_ROWS][STRIP]
} Rows;

// Some keys of a KV head, and their values.
typedef struct {
    int count, key_dim;
    int lowest, highest;  // of their positions
    int in_order;         // whether they stand in the order of positions
    int32_t *positions;   // [STRIP]; behind the last key INT32_MAX
    float *keys;          // [panels][key_dim][PANEL]
    float *values;        // [panels of channels][STRIP][PANEL]
    float *wide;          // scratch [4][the longer row, padded]
} Strip;

// Fills a strip with tokens [from, from + count) of the prefix's block, by slots where it is zipped, or with new keys.
void zs_load_sealed(const Prefill *a, int block, int kv_head, int from, int count, Strip *strip);
void zs_load_plain(const Prefill *a, int kv_head, int from, int count, Strip *strip);

// Adds a strip to the sums of the rows of a tile.
void zs_attend_strip(const Rows *rows, const Strip *strip, int tile);
