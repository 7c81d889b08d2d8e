// Decode attention: splits all rows into items, attends over each, and merges them.
//
// An item is a span of a row's sealed blocks, or its open block, and is done in shares of a few KV heads. Spans have a
// fixed length, so that results do not depend on the number of threads.
#include "attention.h"
#include <omp.h>
#include <stdlib.h>

#define SPAN_TOKENS 512
#define SHARE_TILES 4
#define LOWEST -1e30f  // below every logit, yet no infinity, so that differences are numbers

// Sealed blocks [begin, end) of a row; or its open block, where they are none.
typedef struct {
    int32_t row, begin, end;
} Item;

struct AttentionPlan {
    const Attention *a;
    int key_stride, value_stride, slots;  // floats of a query and of a sum; slots of a block, padded
    int tiles;                            // of a KV head
    int shares;                           // in which an item's tiles are done
    int64_t *row_items;                   // [rows + 1]: first item of each row, which is its open block
    int64_t *left;                        // [rows]: shares of the row's items that are not done
    Item *items;
    float *queries, *rotated;  // [rows, heads, key_stride]: see Tile
    float *maxima, *totals;    // [items, heads]
    float *sums;               // [items, heads, value_stride]
    float *open_weights;       // [rows, heads, slots]: relative to the open block's maximum
    float *open_shares;        // [rows, heads]: what makes them parts of the whole
    float *scratch;            // [threads, scratch_size]
    int64_t scratch_size;
    void *memory;  // all of these
};
typedef AttentionPlan Plan;

static int is_open(const Item *item) { return item->begin == item->end; }

static int span_blocks(const struct zip_format *form) { return MAX(1, SPAN_TOKENS / form->block_tokens); }

// Sealed blocks of a row that lie wholly below its first visible position.
static int hidden_blocks(const Attention *a, int row) {
    return MIN(MAX(a->first[row] - a->starts[row], 0) / a->form->block_tokens, a->counts[row]);
}

static int64_t count_items(const Attention *a) {
    const int span = span_blocks(a->form);
    int64_t count = a->rows;
    for (int row = 0; row < a->rows; row++) count += (a->counts[row] - hidden_blocks(a, row) + span - 1) / span;
    return count;
}

static void list_items(const Plan *plan) {
    const Attention *a = plan->a;
    const int span = span_blocks(a->form);
    Item *item = plan->items;
    for (int row = 0; row < a->rows; row++) {
        plan->row_items[row] = item - plan->items;
        *item++ = (Item){row, 0, 0};
        for (int block = hidden_blocks(a, row); block < a->counts[row]; block += span)
            *item++ = (Item){row, block, MIN(block + span, a->counts[row])};
    }
    plan->row_items[a->rows] = item - plan->items;
}

static void *carve(int64_t *size, void *memory, int64_t bytes) {
    void *found = (char *)memory + *size;
    *size += (bytes + 63) / 64 * 64;
    return found;
}

// Lays the plan out in `memory`, and returns the bytes that it takes there.
static int64_t lay_out(Plan *plan, char *memory, int64_t items) {
    const Attention *a = plan->a;
    const int64_t heads = a->heads, queries = a->rows * heads, number = sizeof(float);
    const int block_tokens = a->form->block_tokens, wide = MAX(plan->key_stride, plan->value_stride);
    int64_t size = 0;
    plan->row_items = carve(&size, memory, (a->rows + 1) * sizeof *plan->row_items);
    plan->left = carve(&size, memory, a->rows * sizeof *plan->left);
    plan->items = carve(&size, memory, items * sizeof *plan->items);
    plan->queries = carve(&size, memory, queries * plan->key_stride * number);
    plan->rotated = carve(&size, memory, queries * plan->key_stride * number);
    plan->maxima = carve(&size, memory, items * heads * number);
    plan->totals = carve(&size, memory, items * heads * number);
    plan->sums = carve(&size, memory, items * heads * plan->value_stride * number);
    plan->open_weights = carve(&size, memory, queries * plan->slots * number);
    plan->open_shares = carve(&size, memory, queries * number);
    plan->scratch_size = TILE_HEADS * (plan->slots + plan->key_stride) + (int64_t)block_tokens * wide;
    plan->scratch = carve(&size, memory, a->threads * plan->scratch_size * number);
    return size;
}

static void store_as(int type, const float *source, int dim, uint8_t *target) {
    if (type == FLOAT32) {
        memcpy(target, source, dim * sizeof *source);
        return;
    }
    half *halves = (half *)target;
    for (int c = 0; c < dim; c++) halves[c] = type == FLOAT16 ? to_half(source[c]) : to_bfloat(source[c]);
}

// A row's new token, to the last place of its open block.
static void append(const Attention *a, int row) {
    const struct zip_format *form = a->form;
    const int64_t width = a->open_type == FLOAT32 ? 4 : 2, token = a->open_counts[row] - 1, slot = a->slots[row];
    for (int head = 0; head < form->kv_heads; head++) {
        uint8_t *key = (uint8_t *)a->open_keys + slot * a->open_key_strides[0] + head * a->open_key_strides[1];
        uint8_t *value = (uint8_t *)a->open_values + slot * a->open_value_strides[0] + head * a->open_value_strides[1];
        store_as(a->open_type, a->fresh_keys + row * a->fresh_key_strides[0] + head * a->fresh_key_strides[1],
                 form->key_dim, key + token * width * form->key_dim);
        store_as(a->open_type, a->fresh_values + row * a->fresh_value_strides[0] + head * a->fresh_value_strides[1],
                 form->value_dim, value + token * width * form->value_dim);
    }
}

static void prepare_query(const Plan *plan, int64_t index) {
    const Attention *a = plan->a;
    const int dim = a->form->key_dim;
    const float *given = a->query + index / a->heads * a->query_strides[0] + index % a->heads * a->query_strides[1];
    float *query = plan->queries + index * plan->key_stride, *rotated = plan->rotated + index * plan->key_stride;
    for (int c = 0; c < plan->key_stride; c++) query[c] = c < dim ? given[c] * a->scale : 0;
    if (a->form->content == ZIPPED) rotate_row_into(rotated, query, a->form->key_factors, dim, 0);
}

// Query heads of a KV head are split into tiles of nearly equal size; tiles are numbered through all KV heads.
static Tile tile_of(const Plan *plan, int64_t at, int index, float *scratch) {
    const Attention *a = plan->a;
    const Item *item = plan->items + at;
    const int group = a->heads / a->form->kv_heads, kv_head = index / plan->tiles, part = index % plan->tiles;
    const int begin = part * group / plan->tiles, head = kv_head * group + begin;
    const int64_t query = (int64_t)item->row * a->heads + head, result = at * a->heads + head;
    return (Tile){
        .row = item->row,
        .kv_head = kv_head,
        .heads = (part + 1) * group / plan->tiles - begin,
        .queries = plan->queries + query * plan->key_stride,
        .rotated = plan->rotated + query * plan->key_stride,
        .maxima = plan->maxima + result,
        .totals = plan->totals + result,
        .sums = plan->sums + result * plan->value_stride,
        .logits = is_open(item) && a->weights ? plan->open_weights + query * plan->slots : scratch,
        .stride = plan->slots,
        .folded = scratch + TILE_HEADS * plan->slots,
        .wide = scratch + TILE_HEADS * (plan->slots + plan->key_stride),
    };
}

// Some tiles of an item: block by block, since one block's KV heads are neighbours in memory.
static void attend(const Plan *plan, int64_t index, float *scratch) {
    const Attention *a = plan->a;
    const int64_t at = index / plan->shares;
    const Item *item = plan->items + at;
    const int tiles = plan->tiles * a->form->kv_heads, share = index % plan->shares;
    const int from = tiles * share / plan->shares, to = tiles * (share + 1) / plan->shares;
    for (int t = from; t < to; t++) {
        const Tile tile = tile_of(plan, at, t, scratch);
        for (int h = 0; h < tile.heads; h++) {
            tile.maxima[h] = LOWEST;
            tile.totals[h] = 0;
        }
        memset(tile.sums, 0, tile.heads * plan->value_stride * sizeof *tile.sums);
        if (is_open(item)) zs_attend_open(a, &tile);
    }
    for (int block = item->begin; block < item->end; block++)
        for (int t = from; t < to; t++) {
            Tile tile = tile_of(plan, at, t, scratch);
            const int is_last = t + 1 == to, next_head = (is_last ? from : t + 1) / plan->tiles;
            if (!is_last || block + 1 < item->end)
                tile.ahead = zs_segment(a, item->row, block + is_last, next_head) -
                             zs_segment(a, item->row, block, tile.kv_head);
            zs_attend_sealed(a, &tile, block);
        }
}

// Adds an item's values and total, which are relative to its own maximum, to those relative to `maximum`.
static void add_item(const Plan *plan, int64_t result, float maximum, float *total, float *values) {
    const float share = expf(plan->maxima[result] - maximum);
    const float *sums = plan->sums + result * plan->value_stride;
    *total += share * plan->totals[result];
    for (int c = 0; c < plan->value_stride; c++) values[c] += share * sums[c];
}

// Sealed values of the zip format are rotated; those of the open block are not.
static void merge(const Plan *plan, int row, int head) {
    const Attention *a = plan->a;
    const int dim = a->form->value_dim;
    const int64_t index = (int64_t)row * a->heads + head;
    const int64_t open = plan->row_items[row], end = plan->row_items[row + 1];
    float maximum = a->sink_logits ? a->sink_logits[head] : LOWEST;
    for (int64_t item = open; item < end; item++) maximum = MAX(maximum, plan->maxima[item * a->heads + head]);
    float total = a->sink_logits ? expf(a->sink_logits[head] - maximum) : 0;
    float values[plan->value_stride], turned[plan->value_stride];
    memset(values, 0, sizeof values);
    for (int64_t item = open + 1; item < end; item++) add_item(plan, item * a->heads + head, maximum, &total, values);
    if (a->form->content == ZIPPED && end > open + 1) {
        rotate_row_into(turned, values, a->form->value_factors, dim, 1);
        memcpy(values, turned, sizeof values);
    }
    add_item(plan, open * a->heads + head, maximum, &total, values);
    for (int c = 0; c < dim; c++) a->output[index * dim + c] = values[c] / total;
    plan->open_shares[index] = expf(plan->maxima[open * a->heads + head] - maximum) / total;
}

// Mean over heads of the open block's weights, after all of them are merged.
static void average(const Plan *plan, int row) {
    const Attention *a = plan->a;
    float *weights = a->weights + (int64_t)row * a->form->block_tokens;
    memset(weights, 0, a->form->block_tokens * sizeof *weights);
    for (int64_t index = (int64_t)row * a->heads; index < (int64_t)(row + 1) * a->heads; index++) {
        const float share = plan->open_shares[index] / a->heads;
        for (int t = 0; t < a->open_counts[row]; t++) weights[t] += share * plan->open_weights[index * plan->slots + t];
    }
}

// Multiplications of queries and keys, about.
static int64_t products(const Attention *a) {
    int64_t blocks = a->rows;
    for (int row = 0; row < a->rows; row++) blocks += a->counts[row];
    return blocks * a->form->block_tokens * a->heads * a->form->key_dim;
}

// The thread that does the last share of a row's items merges them.
static void work(const Plan *plan, int64_t index, float *scratch) {
    const Attention *a = plan->a;
    const int row = plan->items[index / plan->shares].row;
    attend(plan, index, scratch);
    if (__atomic_sub_fetch(plan->left + row, 1, __ATOMIC_ACQ_REL)) return;
    for (int head = 0; head < a->heads; head++) merge(plan, row, head);
    if (a->weights) average(plan, row);
}

static int outside(int64_t index, int64_t lowest, int64_t highest) { return index < lowest || index > highest; }

int zs_wrong_row(const Attention *a) {
    const int size = a->form->block_tokens;
    for (int row = 0; row < a->rows; row++) {
        const int count = a->counts[row], start = a->starts[row];
        if (outside(count, 0, a->columns) || outside(a->slots[row], 0, a->open_slots - 1)) return row;
        if (outside(a->open_counts[row], 1, size) || start < 0 || start % size) return row;
        if (a->first[row] >= (int64_t)start + (int64_t)count * size + a->open_counts[row]) return row;
        for (int block = 0; block < count; block++)
            if (outside(a->table[row * a->table_stride + block], 0, a->slabs - 1)) return row;
        if (a->form->content == ZIPPED && start == 0 && count && outside(a->sink_slabs[row], 0, a->sinks_slabs - 1))
            return row;
    }
    return -1;
}

AttentionPlan *zs_attention_plan(const Attention *a) {
    const int group = a->heads / a->form->kv_heads;
    Plan plan = {
        .a = a,
        .key_stride = PADDED(a->form->key_dim),
        .value_stride = PADDED(a->form->value_dim),
        .slots = PADDED(a->form->block_tokens),
        .tiles = (group + TILE_HEADS - 1) / TILE_HEADS,
    };
    plan.shares = (plan.tiles * a->form->kv_heads + SHARE_TILES - 1) / SHARE_TILES;
    const int64_t items = count_items(a);
    Plan *kept = malloc(sizeof plan);
    plan.memory = aligned_alloc(64, lay_out(&plan, NULL, items));
    if (!kept || !plan.memory) {
        free(plan.memory);
        free(kept);
        return NULL;
    }
    lay_out(&plan, plan.memory, items);
    list_items(&plan);
    *kept = plan;
    return kept;
}

void zs_attention_free(AttentionPlan *plan) {
    if (plan) free(plan->memory);
    free(plan);
}

void zs_attend(const AttentionPlan *common, const Attention *a) {
    Plan plan = *common;
    plan.a = a;
    const int64_t queries = (int64_t)a->rows * a->heads, items = plan.row_items[a->rows];
    float *scratch = plan.scratch + omp_get_thread_num() * plan.scratch_size;
#pragma omp for schedule(static) nowait
    for (int row = 0; row < a->rows; row++) {
        plan.left[row] = (plan.row_items[row + 1] - plan.row_items[row]) * plan.shares;
        if (a->fresh_keys) append(a, row);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < queries; index++) prepare_query(&plan, index);
#pragma omp for schedule(dynamic) nowait
    for (int64_t index = 0; index < items * plan.shares; index++) work(&plan, index, scratch);
}

int zs_attention(const Attention *a) {
    const int wrong = zs_wrong_row(a);
    if (wrong >= 0) return wrong;
    AttentionPlan *plan = zs_attention_plan(a);
    if (!plan) return -2;
#pragma omp parallel num_threads(a->threads) if (products(a) > WAKING_PRODUCTS)
    zs_attend(plan, a);
    zs_attention_free(plan);
    return -1;
}
