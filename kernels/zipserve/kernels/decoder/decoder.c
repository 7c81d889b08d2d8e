// Decoder layers: norms, products, rotary embedding, gated activation; and attention, where all rows are new tokens of
// as many sequences.
//
// A program is a list of operations over buffers of rows; one parallel region runs all of it, with a barrier behind
// every operation. program.py mirrors the structures.
#include <omp.h>
#include <stdlib.h>

#include "attention/attention.h"
#include "linear/gemm.h"

typedef enum { OP_LINEAR, OP_HEADS, OP_NORM_ADD, OP_ATTEND } Kind;
typedef enum { STORE, ADD, GLU_SILU, GLU_GELU_TANH } Epilogue;

typedef struct {
    int32_t kind, source, target;  // buffers
    int32_t epilogue;              // of OP_LINEAR
    int32_t index;                 // of OP_HEADS: which rotary table, or -1; of OP_ATTEND: which layer
    int32_t query_heads, key_heads, dim;
    float eps;
    const Matrix *matrix;  // of OP_LINEAR
    const float *norm;     // its weights [columns]: of the source of OP_LINEAR or NULL, of OP_NORM_ADD, of query heads or NULL
    const float *key_norm;
} Op;

typedef struct {
    float *data;
    int64_t stride;  // floats from row to row
} Buffer;

typedef struct {
    const float *cos, *sin;  // [rows][dim]
    int64_t dim;
} Rope;

// Attention of one layer: what it shares with all layers that see the same positions, and what is its own.
typedef struct {
    const Attention *step;  // without queries, fresh keys and values, output, and what follows here
    const uint8_t *sealed, *sinks, *open_keys, *open_values;
    const float *sink_logits;
    float *weights;
    float scale, softcap;
} LayerAttention;

typedef struct {
    const Op *ops;
    const Buffer *buffers;
    const Rope *ropes;
    const LayerAttention *layers;
    const Attention *const *steps;  // every one of the layers' once
    float *packed;   // [rows][most inputs]
    float *scratch;  // [threads][scratch_stride]
    int64_t scratch_stride;
    int32_t count, rows, threads, step_count;
} Program;

// ---- rows

static void normalize(const float *x, const float *weight, int64_t n, float eps, float *out) {
    const float scale = zs_inverse_rms(x, n, eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static void rotate(float *x, const float *cos, const float *sin, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t c = 0; c < half; c++) {
        const float a = x[c], b = x[c + half];
        x[c] = a * cos[c] - b * sin[c];
        x[c + half] = b * cos[c + half] + a * sin[c + half];
    }
}

static void prepare_heads(const Program *p, const Op *op, int row) {
    const Buffer *buffer = p->buffers + op->target;
    float *head = buffer->data + row * buffer->stride;
    for (int h = 0; h < op->query_heads + op->key_heads; h++, head += op->dim) {
        const float *norm = h < op->query_heads ? op->norm : op->key_norm;
        if (norm) normalize(head, norm, op->dim, op->eps, head);
        if (op->index >= 0) {
            const Rope *rope = p->ropes + op->index;
            rotate(head, rope->cos + row * rope->dim, rope->sin + row * rope->dim, rope->dim);
        }
    }
}

static void norm_add(const Program *p, const Op *op, int row, float *normal) {
    const Buffer *source = p->buffers + op->source, *target = p->buffers + op->target;
    float *out = target->data + row * target->stride;
    normalize(source->data + row * source->stride, op->norm, op->dim, op->eps, normal);
    for (int i = 0; i < op->dim; i++) out[i] += normal[i];
}

// ---- products

typedef struct {
    Buffer target;
    Epilogue epilogue;
} Output;

ALWAYS_INLINE f32x16 gated(Epilogue how, f32x16 gate, f32x16 up) {
    const f32x16 one = splat(1.0f);
    if (how == GLU_SILU) return gate / (one + exp16(-gate)) * up;
    const f32x16 inner = (gate + gate * gate * gate * splat(0.044715f)) * splat(0.7978845608f);
    return gate * splat(0.5f) * (one + tanh16(inner)) * up;
}

static void put(void *context, const float *sums, int begin, int rows, int column, int count) {
    const Output *output = context;
    for (int r = 0; r < rows; r++, sums += PAIR) {
        float *out = output->target.data + (begin + r) * output->target.stride;
        if (output->epilogue == STORE) {
            memcpy(out + column, sums, count * sizeof *out);
        } else if (output->epilogue == ADD && count == PAIR) {
            for (int c = 0; c < PAIR; c += LANES) store16(out + column + c, load16(out + column + c) + load16(sums + c));
        } else if (output->epilogue == ADD) {
            for (int c = 0; c < count; c++) out[column + c] += sums[c];
        } else {  // a pair holds the gates and the factors of the same columns
            const f32x16 product = gated(output->epilogue, load16(sums), load16(sums + PANEL));
            memcpy(out + column / 2, &product, count / 2 * sizeof *out);
        }
    }
}

// ---- attention

// The source's rows hold query heads, key heads and value heads.
static void attend(const Program *p, const Op *op, AttentionPlan *const *plans) {
    const Buffer *source = p->buffers + op->source;
    const LayerAttention *layer = p->layers + op->index;
    Attention a = *layer->step;
    int step = 0;
    while (p->steps[step] != layer->step) step++;
    const int64_t key_dim = a.form->key_dim, value_dim = a.form->value_dim;
    a.query = source->data;
    a.fresh_keys = a.query + a.heads * key_dim;
    a.fresh_values = a.fresh_keys + a.form->kv_heads * key_dim;
    a.query_strides[0] = a.fresh_key_strides[0] = a.fresh_value_strides[0] = source->stride;
    a.query_strides[1] = a.fresh_key_strides[1] = key_dim;
    a.fresh_value_strides[1] = value_dim;
    a.sealed = layer->sealed;
    a.sinks = layer->sinks;
    a.open_keys = layer->open_keys;
    a.open_values = layer->open_values;
    a.sink_logits = layer->sink_logits;
    a.weights = layer->weights;
    a.scale = layer->scale;
    a.softcap = layer->softcap;
    a.output = p->buffers[op->target].data;
    zs_attend(plans[step], &a);
}

// ---- the program

static int64_t rows_of(const Program *p, int64_t begin) {
    return MIN(p->rows - begin, BLOCK_ROWS);
}

// Block by block of rows, which stay in the cache while the weights pass by.
static void multiply(const Program *p, const Op *op, Team team) {
    const Buffer *source = p->buffers + op->source, *target = p->buffers + op->target;
    const int64_t inputs = op->matrix->inputs;
    for (int64_t begin = 0; begin < p->rows; begin += BLOCK_ROWS) {
        const Strips strips = zs_strips(rows_of(p, begin));
        const Rows rows = {source->data + begin * source->stride, source->stride, inputs, op->norm, op->eps};
        zs_pack(&rows, &strips, &team, p->packed + begin * inputs);
    }
#pragma omp barrier
    for (int64_t begin = 0; begin < p->rows; begin += BLOCK_ROWS, team.next += team.threads) {
        const Strips strips = zs_strips(rows_of(p, begin));
        Output output = {{target->data + begin * target->stride, target->stride}, op->epilogue};
        float *scratch = p->scratch + team.thread * p->scratch_stride;
        zs_gemm(op->matrix, &strips, p->packed + begin * inputs, &team, scratch, put, &output);
    }
}

static void run(const Program *p, const Op *op, const Team *team, AttentionPlan *const *plans) {
    if (op->kind == OP_LINEAR) return multiply(p, op, *team);
    if (op->kind == OP_ATTEND) return attend(p, op, plans);
#pragma omp for nowait
    for (int row = 0; row < p->rows; row++) {
        if (op->kind == OP_HEADS) prepare_heads(p, op, row);
        if (op->kind == OP_NORM_ADD) norm_add(p, op, row, p->scratch + team->thread * p->scratch_stride);
    }
}

static int run_all(const Program *p, AttentionPlan *const *plans) {
    int64_t products = 0;
    for (int i = 0; i < p->count; i++)
        if (p->ops[i].matrix) products += p->ops[i].matrix->inputs * p->ops[i].matrix->outputs * p->rows;
    const int64_t blocks = (p->rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    int *next = calloc(p->count * blocks * p->threads + 1, sizeof *next);
    if (!next) return -2;
#pragma omp parallel num_threads(p->threads) if (products > WAKING_PRODUCTS)
    for (int i = 0; i < p->count; i++) {
        const Team team = {omp_get_thread_num(), omp_get_num_threads(), next + i * blocks * p->threads};
        run(p, p->ops + i, &team, plans);
#pragma omp barrier
    }
    free(next);
    return -1;
}

// Returns -1; or the first row whose attention refers to what does not exist; or -2 where there is no memory.
int zs_decoder(const Program *p) {
    AttentionPlan *plans[p->step_count + 1];
    int wrong = -1, planned = 0;
    for (; wrong == -1 && planned < p->step_count; planned++) {
        wrong = zs_wrong_row(p->steps[planned]);
        plans[planned] = wrong == -1 ? zs_attention_plan(p->steps[planned]) : NULL;
        if (wrong == -1 && !plans[planned]) wrong = -2;
    }
    if (wrong == -1) wrong = run_all(p, plans);
    while (planned--) zs_attention_free(plans[planned]);
    return wrong;
}

// Floats of a thread's scratch for products of so many inputs.
int64_t zs_decoder_scratch(int64_t inputs, int rows) {
    const int64_t of_gemm = zs_gemm_scratch(inputs, MIN(rows, BLOCK_ROWS));
    return ((of_gemm > inputs ? of_gemm : inputs) + 15) / 16 * 16;
}
