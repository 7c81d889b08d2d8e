// Prefill attention: splits the work into items, and passes the keys that an item's rows see by them.
//
// A long prefix is passed in spans, each an item's part of its own, so that few rows keep all threads busy. What becomes
// of a row does not depend on the rows beside it, nor on the number of threads.
#include "prefill.h"
#include <omp.h>
#include <stdlib.h>

#define ITEM_ROWS 192      // share an unpacked strip
#define ITEM_ROWS_MIN 48   // where there are many threads
#define ITEMS_PER_THREAD 4
#define SPAN_TOKENS 1024   // of the prefix, at positions that are multiples of it where blocks allow that
#define LOG2_E 1.44269504f

typedef struct {
    const Prefill *a;
    int group, tile_tokens;  // query heads of a KV head; new tokens of an item
    int64_t items;
    int span_blocks, first_span, spans;  // blocks of a span; number of the prefix's first one; how many there are
    int64_t state_size;                  // bytes of what is kept of an item's rows
    char *states;                        // [items][spans], or [threads] where there is one span
    int *left;                           // [items]: spans that are not done
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
    plan.spans = 1;
    if (a->prefix_blocks) {
        plan.span_blocks = MAX(SPAN_TOKENS / a->form->block_tokens, 1);
        const int begin = block_position(a, 0) / a->form->block_tokens;
        plan.first_span = begin / plan.span_blocks;
        plan.spans = (begin + a->prefix_blocks - 1) / plan.span_blocks - plan.first_span + 1;
    }
    return plan;
}

static void *carve(int64_t *size, char *memory, int64_t count) {
    void *found = memory + *size;
    *size += (count * sizeof(float) + 63) / 64 * 64;
    return found;
}

static int64_t tiles_of(const Plan *plan) { return (plan->tile_tokens * plan->group + TILE_ROWS - 1) / TILE_ROWS; }

// Lays out what is kept of an item's rows, and returns the bytes that it takes.
static int64_t lay_out_state(const Plan *plan, char *memory, Rows *rows) {
    const int64_t tiles = tiles_of(plan);
    int64_t size = 0;
    rows->value_stride = PANELS(plan->a->value_dim) * PANEL;
    rows->sums = carve(&size, memory, tiles * TILE_ROWS * rows->value_stride);
    rows->totals = carve(&size, memory, tiles * TILE_ROWS * NATIVE_LANES);
    rows->maxima = carve(&size, memory, tiles * TILE_LANES);
    return size;
}

// Lays a thread's scratch out in `memory`, and returns the bytes that it takes there.
static int64_t lay_out(const Plan *plan, char *memory, Thread *thread) {
    const Prefill *a = plan->a;
    const int64_t rows = tiles_of(plan) * TILE_ROWS;
    const int value_stride = PANELS(a->value_dim) * PANEL, widest = PADDED(MAX(a->key_dim, a->value_dim));
    int64_t size = 0;
    thread->rows.softcap = a->softcap * LOG2_E;
    thread->rows.queries = carve(&size, memory, rows * a->key_dim);
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

// Sink logits count in the last span only.
static void start_rows(const Plan *plan, int kv_head, int token, int is_last, Rows *rows) {
    const Prefill *a = plan->a;
    const int group = plan->group, padded = (rows->rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS;
    memset(rows->sums, 0, (int64_t)padded * rows->value_stride * sizeof(float));
    memset(rows->totals, 0, (int64_t)padded * NATIVE_LANES * sizeof(float));
    for (int i = 0; i < padded / TILE_ROWS * TILE_LANES; i++) rows->maxima[i] = LOWEST;
    for (int r = 0; r < padded; r++) {
        const int t = token + MIN(r, rows->rows - 1) / group;
        rows->first[r] = a->first ? a->first[t] : 0;
        rows->own[r] = a->start + t;
        if (!a->sink_logits || !is_last) continue;
        rows->maxima[r / TILE_ROWS * TILE_LANES + r % TILE_ROWS] =
            a->sink_logits[kv_head * group + r % group] * LOG2_E;
        rows->totals[r * NATIVE_LANES] = 1;
    }
}

static void attend_strip(const Thread *thread) {
    for (int tile = 0; tile * TILE_ROWS < thread->rows.rows; tile++)
        zs_attend_strip(&thread->rows, &thread->strip, tile);
}

// A span of the prefix; returns whether any of it was seen.
static int attend_sealed(const Plan *plan, int kv_head, int span, Thread *thread) {
    const Prefill *a = plan->a;
    if (!a->prefix_blocks) return 0;
    const int size = a->form->block_tokens, begin = block_position(a, 0);
    const int from_span = (plan->first_span + span) * plan->span_blocks - begin / size;
    const int first = MAX(from_span, MAX(thread->rows.first[0] - begin, 0) / size);
    const int last = MIN(from_span + plan->span_blocks, a->prefix_blocks);
    for (int block = MAX(first, 0); block < last; block++)
        for (int from = 0; from < size; from += STRIP) {
            zs_load_sealed(a, block, kv_head, from, MIN(STRIP, size - from), &thread->strip);
            attend_strip(thread);
        }
    return first < last;
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

// Adds what a later span has found for the same rows.
static void add_state(const Rows *rows, const Rows *other) {
    for (int r = 0; r < rows->rows; r++) {
        float *maximum = rows->maxima + r / TILE_ROWS * TILE_LANES + r % TILE_ROWS;
        const float theirs = other->maxima[r / TILE_ROWS * TILE_LANES + r % TILE_ROWS];
        const float higher = MAX(*maximum, theirs), shrink = exp2f(*maximum - higher), share = exp2f(theirs - higher);
        float *sums = rows->sums + (int64_t)r * rows->value_stride, *totals = rows->totals + r * NATIVE_LANES;
        const float *of_other = other->sums + (int64_t)r * rows->value_stride;
        for (int c = 0; c < rows->value_stride; c++) sums[c] = sums[c] * shrink + of_other[c] * share;
        for (int i = 0; i < NATIVE_LANES; i++)
            totals[i] = totals[i] * shrink + other->totals[r * NATIVE_LANES + i] * share;
        *maximum = higher;
    }
}

static void attend_span(const Plan *plan, int64_t item, int span, Thread *thread) {
    const Prefill *a = plan->a;
    const int kv_head = item % a->kv_heads, token = item / a->kv_heads * plan->tile_tokens;
    const int is_zip = a->prefix_blocks && a->form->content == ZIPPED, is_last = span + 1 == plan->spans;
    thread->rows.rows = MIN(plan->tile_tokens, a->tokens - token) * plan->group;
    start_rows(plan, kv_head, token, is_last, &thread->rows);
    pack_queries(plan, kv_head, token, thread, is_zip);
    if (attend_sealed(plan, kv_head, span, thread) && is_zip) unrotate_sums(plan, thread);
    if (!is_last) return;
    if (is_zip) pack_queries(plan, kv_head, token, thread, 0);
    attend_new(plan, kv_head, thread);
}

// The thread that does the last span of an item adds up all of them, in their order.
static void attend_item(const Plan *plan, int64_t index, Thread *thread) {
    const int64_t item = index / plan->spans;
    const int span = index % plan->spans, kv_head = item % plan->a->kv_heads;
    const int64_t at = plan->spans > 1 ? index : omp_get_thread_num();
    lay_out_state(plan, plan->states + at * plan->state_size, &thread->rows);
    attend_span(plan, item, span, thread);
    if (plan->spans > 1) {
        if (__atomic_sub_fetch(plan->left + item, 1, __ATOMIC_ACQ_REL)) return;
        Rows other = thread->rows;
        lay_out_state(plan, plan->states + item * plan->spans * plan->state_size, &thread->rows);
        for (int i = 1; i < plan->spans; i++) {
            lay_out_state(plan, plan->states + (item * plan->spans + i) * plan->state_size, &other);
            add_state(&thread->rows, &other);
        }
    }
    finish(plan, kv_head, item / plan->a->kv_heads * plan->tile_tokens, &thread->rows);
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
    Plan plan = plan_of(a);
    Thread sizes;
    const int64_t size = lay_out(&plan, NULL, &sizes);
    plan.state_size = lay_out_state(&plan, NULL, &sizes.rows);
    const int64_t states = plan.spans > 1 ? plan.items * plan.spans : a->threads;
    const int64_t before = (plan.items * sizeof *plan.left + 63) / 64 * 64;
    char *memory = aligned_alloc(64, before + states * plan.state_size + size * a->threads);
    if (!memory) return -2;
    plan.left = (int *)memory;
    plan.states = memory + before;
    char *scratch = plan.states + states * plan.state_size;
    for (int64_t item = 0; item < plan.items; item++) plan.left[item] = plan.spans;
#pragma omp parallel num_threads(a->threads) if (products(a) > WAKING_PRODUCTS)
    {
        Thread thread;
        lay_out(&plan, scratch + size * omp_get_thread_num(), &thread);
#pragma omp for schedule(dynamic) nowait
        for (int64_t index = plan.items * plan.spans - 1; index >= 0; index--)  // later tokens see more, and go first
            attend_item(&plan, index, &thread);
    }
    free(memory);
    return -1;
}
