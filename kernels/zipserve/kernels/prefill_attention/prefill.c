// Prefill attention: splits the work into items, and passes the keys that an item's rows see by them.
//
// What becomes of a row does not depend on the rows beside it, so that threads do not change results.
#include "prefill.h"
#include <omp.h>
#include <stdlib.h>

#define ITEM_ROWS 192      // share an unpacked strip
#define ITEM_ROWS_MIN 48   // where there are many threads
#define ITEMS_PER_THREAD 4
#define LOG2_E 1.44269504f

typedef struct {
    const Prefill *a;
    int group, tile_tokens;  // query heads of a KV head; new tokens of an item
    int64_t items;
} Plan;

// One thread's scratch.
typedef struct {
    Rows rows;
    Strip strip;
} Thread;

static Plan plan_of(const Prefill *a) {
    Plan plan = {.a = a, .group = a->heads / a->kv_heads};
    for (int rows = ITEM_ROWS; rows >= ITEM_ROWS_MIN; rows /= 2) {
        plan.tile_tokens = MAX(rows / plan.group, 1);
        plan.items = (int64_t)a->kv_heads * ((a->tokens + plan.tile_tokens - 1) / plan.tile_tokens);
        if (plan.items >= ITEMS_PER_THREAD * a->threads) break;
    }
    return plan;
}

static void *carve(int64_t *size, char *memory, int64_t count) {
    void *found = memory + *size;
    *size += (count * sizeof(float) + 63) / 64 * 64;
    return found;
}

// Lays a thread's scratch out in `memory`, and returns the bytes that it takes there.
static int64_t lay_out(const Plan *plan, char *memory, Thread *thread) {
    const Prefill *a = plan->a;
    const int64_t tiles = (plan->tile_tokens * plan->group + TILE_ROWS - 1) / TILE_ROWS, rows = tiles * TILE_ROWS;
    const int value_stride = PANELS(a->value_dim) * PANEL, widest = PADDED(MAX(a->key_dim, a->value_dim));
    int64_t size = 0;
    thread->rows.value_stride = value_stride;
    thread->rows.softcap = a->softcap * LOG2_E;
    thread->rows.queries = carve(&size, memory, rows * a->key_dim);
    thread->rows.sums = carve(&size, memory, rows * value_stride);
    thread->rows.totals = carve(&size, memory, rows * NATIVE_LANES);
    thread->rows.maxima = carve(&size, memory, tiles * TILE_LANES);
    thread->rows.first = carve(&size, memory, rows);
    thread->rows.own = carve(&size, memory, rows);
    thread->rows.weights = carve(&size, memory, TILE_ROWS * STRIP);
    thread->strip.positions = carve(&size, memory, STRIP);
    thread->strip.keys = carve(&size, memory, STRIP * a->key_dim);
    thread->strip.values = carve(&size, memory, STRIP * value_stride);
    thread->strip.wide = carve(&size, memory, 4 * widest);
    return size;
}

// Queries of an item's rows, scaled for scores in powers of two or for the softcap's tanh; rotated for zipped blocks.
static void pack_queries(const Plan *plan, int kv_head, int token, const Thread *thread, int rotated) {
    const Prefill *a = plan->a;
    const int dim = a->key_dim, rows = thread->rows.rows, width = a->query_type == FLOAT32 ? 4 : 2;
    const float scale = a->softcap > 0 ? a->scale / a->softcap : a->scale * LOG2_E;
    float *turned = thread->strip.wide + PADDED(dim);
    for (int r = 0; r < (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS; r++) {
        float *column = thread->rows.queries + (int64_t)(r / TILE_ROWS) * TILE_ROWS * dim + r % TILE_ROWS;
        if (r >= rows) {
            for (int c = 0; c < dim; c++) column[c * TILE_ROWS] = 0;
            continue;
        }
        const int head = kv_head * plan->group + r % plan->group;
        const int64_t at = head * a->query_strides[0] + (token + r / plan->group) * a->query_strides[1];
        const float *query = zs_widen((const uint8_t *)a->query + at * width, a->query_type, dim, thread->strip.wide);
        if (rotated) {
            rotate_row_into(turned, query, a->form->key_factors, dim, 0);
            query = turned;
        }
        for (int c = 0; c < dim; c++) column[c * TILE_ROWS] = query[c] * scale;
    }
}

static void start_rows(const Plan *plan, int kv_head, int token, Rows *rows) {
    const Prefill *a = plan->a;
    const int group = plan->group, padded = (rows->rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    memset(rows->sums, 0, (int64_t)padded * rows->value_stride * sizeof(float));
    memset(rows->totals, 0, (int64_t)padded * NATIVE_LANES * sizeof(float));
    for (int i = 0; i < padded / TILE_ROWS * TILE_LANES; i++) rows->maxima[i] = LOWEST;
    for (int r = 0; r < padded; r++) {
        const int t = token + MIN(r, rows->rows - 1) / group;
        rows->first[r] = a->first ? a->first[t] : 0;
        rows->own[r] = a->start + t;
        if (!a->sink_logits) continue;
        rows->maxima[r / TILE_ROWS * TILE_LANES + r % TILE_ROWS] =
            a->sink_logits[kv_head * group + r % group] * LOG2_E;
        rows->totals[r * NATIVE_LANES] = 1;
    }
}

static void attend_strip(const Thread *thread) {
    for (int tile = 0; tile * TILE_ROWS < thread->rows.rows; tile++)
        zs_attend_strip(&thread->rows, &thread->strip, tile);
}

// The prefix; returns whether any of it was seen.
static int attend_sealed(const Plan *plan, int kv_head, Thread *thread) {
    const Prefill *a = plan->a;
    if (!a->prefix_blocks) return 0;
    const int size = a->form->block_tokens, hidden = MAX(thread->rows.first[0] - block_position(a, 0), 0) / size;
    for (int block = hidden; block < a->prefix_blocks; block++)
        for (int from = 0; from < size; from += STRIP) {
            zs_load_sealed(a, block, kv_head, from, MIN(STRIP, size - from), &thread->strip);
            attend_strip(thread);
        }
    return hidden < a->prefix_blocks;
}

static void unrotate_sums(const Plan *plan, const Thread *thread) {
    const int dim = plan->a->value_dim;
    for (int r = 0; r < thread->rows.rows; r++) {
        float *sums = thread->rows.sums + (int64_t)r * thread->rows.value_stride;
        memcpy(thread->strip.wide, sums, dim * sizeof *sums);
        rotate_row_into(sums, thread->strip.wide, plan->a->form->value_factors, dim, 1);
    }
}

static void attend_new(const Plan *plan, int kv_head, Thread *thread) {
    const Prefill *a = plan->a;
    const int begin = key_position(a);
    const int hidden = MAX(thread->rows.first[0] - begin, 0) / STRIP * STRIP;
    const int end = thread->rows.own[thread->rows.rows - 1] - begin + 1;
    for (int from = hidden; from < end; from += STRIP) {
        zs_load_plain(a, kv_head, from, MIN(STRIP, end - from), &thread->strip);
        attend_strip(thread);
    }
}

static void finish(const Plan *plan, int kv_head, int token, const Rows *rows) {
    const Prefill *a = plan->a;
    for (int r = 0; r < rows->rows; r++) {
        const int head = kv_head * plan->group + r % plan->group, t = token + r / plan->group;
        float total = 0;
        for (int i = 0; i < NATIVE_LANES; i++) total += rows->totals[r * NATIVE_LANES + i];
        const float *sums = rows->sums + (int64_t)r * rows->value_stride, share = 1 / total;
        float *output = a->output + ((int64_t)t * a->heads + head) * a->value_dim;
        for (int c = 0; c < a->value_dim; c++) output[c] = sums[c] * share;
        if (a->lse)
            a->lse[(int64_t)head * a->tokens + t] =
                (rows->maxima[r / TILE_ROWS * TILE_LANES + r % TILE_ROWS] + log2f(total)) / LOG2_E;
    }
}

static void attend_item(const Plan *plan, int64_t item, Thread *thread) {
    const Prefill *a = plan->a;
    const int kv_head = item % a->kv_heads, token = item / a->kv_heads * plan->tile_tokens;
    const int is_zip = a->prefix_blocks && a->form->content == ZIPPED;
    thread->rows.rows = MIN(plan->tile_tokens, a->tokens - token) * plan->group;
    start_rows(plan, kv_head, token, &thread->rows);
    pack_queries(plan, kv_head, token, thread, is_zip);
    if (attend_sealed(plan, kv_head, thread) && is_zip) unrotate_sums(plan, thread);
    if (is_zip) pack_queries(plan, kv_head, token, thread, 0);
    attend_new(plan, kv_head, thread);
    finish(plan, kv_head, token, &thread->rows);
}

// Multiplications of queries and keys, at most.
static int64_t products(const Prefill *a) {
    const int64_t sealed = a->prefix_blocks ? (int64_t)a->prefix_blocks * a->form->block_tokens : 0;
    return (sealed + a->keys) * a->tokens * a->heads * a->key_dim;
}

// Whether the first positions that queries see have no keys, descend, or lie behind the queries.
static int first_is_wrong(const Prefill *a) {
    for (int t = 0; t < (a->first ? a->tokens : 0); t++)
        if (a->first[t] > a->start + t || a->first[t] < (t ? a->first[t - 1] : block_position(a, 0))) return 1;
    return 0;
}

// Returns -1; or the first block whose slab, or whose sinks' slab, does not exist; or -2 where there is no memory; or
// -3 where what queries see is wrong.
int zs_prefill_attention(const Prefill *a) {
    if (first_is_wrong(a)) return -3;
    const int wrong = missing_slab(&a->blocks, a->prefix_blocks, 0);
    if (wrong >= 0) return wrong;
    if (a->prefix_blocks && a->form->content == ZIPPED) {
        const int without = missing_slab(&a->sinks, a->prefix_blocks, INT64_MIN);
        if (without >= 0) return without;
    }
    const Plan plan = plan_of(a);
    Thread sizes;
    const int64_t size = lay_out(&plan, NULL, &sizes);
    char *memory = aligned_alloc(64, size * a->threads);
    if (!memory) return -2;
#pragma omp parallel num_threads(a->threads) if (products(a) > WAKING_PRODUCTS)
    {
        Thread thread;
        lay_out(&plan, memory + size * omp_get_thread_num(), &thread);
#pragma omp for schedule(dynamic) nowait
        for (int64_t item = plan.items - 1; item >= 0; item--)  // later tokens see more keys, and go first
            attend_item(&plan, item, &thread);
    }
    free(memory);
    return -1;
}
