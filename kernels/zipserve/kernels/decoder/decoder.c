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

// How one layer attends.
typedef struct {
    const float *sink_logits;
    float scale, softcap;
    int32_t step, pad;  // which of the program's steps: what all layers that see the same positions have in common
} LayerAttention;

typedef struct {
    const Op *ops;
    const Buffer *buffers;
    const Rope *ropes;
    const LayerAttention *layers;
    const Attention *const *steps;  // of layer 0, without queries, fresh keys and values, output and LayerAttention
    float *weights;                 // of the open blocks: [layers][rows][block_tokens], or NULL
    float *packed;   // [rows][most inputs]
    float *scratch;  // [threads][scratch_stride]
    int64_t scratch_stride;
    int32_t count, rows, threads, step_count;
} Program;

// ---- rows

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
        if (norm) zs_normalize(head, norm, op->dim, op->eps, head);
        if (op->index >= 0) {
            const Rope *rope = p->ropes + op->index;
            rotate(head, rope->cos + row * rope->dim, rope->sin + row * rope->dim, rope->dim);
        }
    }
}

static void norm_add(const Program *p, const Op *op, int row, float *normal) {
    const Buffer *source = p->buffers + op->source, *target = p->buffers + op->target;
    float *out = target->data + row * target->stride;
    zs_normalize(source->data + row * source->stride, op->norm, op->dim, op->eps, normal);
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
    Attention a = *p->steps[layer->step];
    const int64_t key_dim = a.form->key_dim, value_dim = a.form->value_dim;
    a.query = source->data;
    a.fresh_keys = a.query + a.heads * key_dim;
    a.fresh_values = a.fresh_keys + a.form->kv_heads * key_dim;
    a.query_strides[0] = a.fresh_key_strides[0] = a.fresh_value_strides[0] = source->stride;
    a.query_strides[1] = a.fresh_key_strides[1] = key_dim;
    a.fresh_value_strides[1] = value_dim;
    a.sealed += op->index * a.sealed_layer;
    a.sinks += op->index * a.sinks_layer;
    a.open_keys += op->index * a.open_key_layer;
    a.open_values += op->index * a.open_value_layer;
    a.sink_logits = layer->sink_logits;
    if (p->weights) a.weights = p->weights + (int64_t)op->index * a.rows * a.form->block_tokens;
    a.scale = layer->scale;
    a.softcap = layer->softcap;
    a.output = p->buffers[op->target].data;
    zs_attend(plans[layer->step], &a);
}

// ---- the program

static void multiply(const Program *p, const Op *op, const Team *team) {
    const Buffer *source = p->buffers + op->source;
    const Rows rows = {source->data, p->rows, source->stride, op->matrix->inputs, op->norm, op->eps};
    zs_pack(&rows, team, p->packed);
#pragma omp barrier
    Output output = {p->buffers[op->target], op->epilogue};
    float *scratch = p->scratch + team->thread * p->scratch_stride;
    zs_gemm(op->matrix, p->rows, p->packed, team, scratch, put, &output);
}

static void run(const Program *p, const Op *op, const Team *team, AttentionPlan *const *plans) {
    if (op->kind == OP_LINEAR) return multiply(p, op, team);
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
    const int64_t counters = zs_gemm_counters(p->rows, p->threads);
    int *next = calloc(p->count * counters + 1, sizeof *next);
    if (!next) return -2;
#pragma omp parallel num_threads(p->threads) if (products > WAKING_PRODUCTS)
    for (int i = 0; i < p->count; i++) {
        const Team team = {omp_get_thread_num(), omp_get_num_threads(), next + i * counters};
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
    const int64_t of_gemm = zs_gemm_scratch(inputs, rows);
    return ((of_gemm > inputs ? of_gemm : inputs) + 15) / 16 * 16;
}
