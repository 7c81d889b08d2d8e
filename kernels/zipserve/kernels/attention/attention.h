// Decode attention on the CPU: its arguments, which cpu.py mirrors, and the parts of the work.
//
// A KV head's query heads are computed in tiles of up to TILE_HEADS, so that keys and values are read and unpacked once
// for all of a tile. Rows of floats are padded to whole vectors: queries with 0, logits with -infinity.
#pragma once
#include "blocks.h"

#define TILE_HEADS 4

// How many native vectors of columns to sum at once for a tile of `heads`, which is a constant, where so many `sums` stay
// in registers.
#define MAX_VECTORS (64 / NATIVE_LANES)
#define TILE_VECTORS(heads, sums) \
    ((heads) * MAX_VECTORS <= (sums)       ? MAX_VECTORS \
     : (heads) * MAX_VECTORS / 2 <= (sums) ? MAX_VECTORS / 2 \
                                           : MAX_VECTORS / 4)

// See zipserve.kernels.attention.decode_attention; strides in bytes unless a comment says otherwise.
typedef struct {
    const struct zip_format *form;
    const float *query;  // [rows, heads, key_dim]
    const float *fresh_keys, *fresh_values;  // [rows, kv_heads, dim]: to be written to the open blocks, or NULL
    const uint8_t *sealed;
    const int32_t *table, *counts, *starts;
    const uint8_t *sinks;
    const int32_t *sink_slabs;
    const uint8_t *open_keys, *open_values;
    const int32_t *slots, *open_counts, *first;
    const float *sink_logits;  // [heads] or NULL
    float *output;             // [rows, heads, value_dim]
    float *weights;            // [rows, block_tokens] or NULL
    int64_t sealed_stride, sinks_stride;
    int64_t table_stride;  // in elements
    int64_t open_key_strides[2], open_value_strides[2];                      // of slots, of heads
    int64_t query_strides[2], fresh_key_strides[2], fresh_value_strides[2];  // of rows, of heads; in elements
    int64_t slabs, sinks_slabs, columns, open_slots;                         // how many there are
    int64_t sealed_layer, sinks_layer, open_key_layer, open_value_layer;     // from layer to layer
    int32_t rows, heads, open_type, threads;
    float scale, softcap;  // softcap 0: none
} Attention;

// Returns -1; or the first row that refers to what does not exist, or sees nothing; or -2 where there is no memory.
int zs_attention(const Attention *a);

// The parts of it, for the layers of a step: a plan serves all that have the same rows and see the same positions.
typedef struct AttentionPlan AttentionPlan;
int zs_wrong_row(const Attention *a);                     // or -1
AttentionPlan *zs_attention_plan(const Attention *a);     // NULL where there is no memory
void zs_attend(const AttentionPlan *plan, const Attention *a);  // by all threads of a region; a barrier must follow
void zs_attention_free(AttentionPlan *plan);

// One item's work on a tile of query heads, which share a KV head.
typedef struct {
    int row, kv_head, heads;
    const float *queries, *rotated;  // [heads][PADDED(key_dim)], scaled; the same again, rotated, for zip
    float *maxima, *totals;          // [heads]: highest logit so far; sum of the weights relative to it
    float *sums;                     // [heads][PADDED(value_dim)]: values, weighted likewise
    float *logits;                   // scratch [heads][stride], which turn into weights
    int64_t stride;                  // PADDED(block_tokens)
    int64_t ahead;                   // from this segment to the one that will be read next, in bytes
    float *folded, *wide;            // scratch: [heads][key_dim]; a block's keys or values
} Tile;

// What a row's sealed block holds for a KV head.
const uint8_t *zs_segment(const Attention *a, int row, int block, int kv_head);

// Adds a sealed block of the tile's row to its sums, or the row's open block.
void zs_attend_sealed(const Attention *a, const Tile *tile, int block);
void zs_attend_open(const Attention *a, const Tile *tile);

// Logits of the slots of a block in the zip format, whose head's segment this is.
void zs_zip_logits(const struct zip_format *form, const uint8_t *segment, const Tile *tile);

// Adds its values to the sums. Changes the weights.
void zs_zip_values(const struct zip_format *form, const uint8_t *segment, const Tile *tile);

// Logits of keys [tokens][dim], for queries [heads][PADDED(dim)].
void zs_plain_logits(const float *keys, int tokens, int dim, const float *queries, const Tile *tile);

// Adds values [tokens][dim] to the sums.
void zs_plain_values(const float *values, int tokens, int dim, const Tile *tile);
