// Products of the same rows with one matrix or several, with a parallel region of their own.
#include <omp.h>

#include "gemm.h"

// See cpu.py.
typedef struct {
    const Matrix *const *matrices;  // [count], all with the same number of inputs
    float *const *outs;             // [count]: [rows][outputs], contiguous
    const float *x;                 // [rows][inputs], contiguous
    float *packed;                  // [rows][inputs]
    float *scratch;                 // [threads][zs_gemm_scratch]
    int64_t rows, count, threads;
} Linear;

typedef struct {
    float *out;
    int64_t outputs;
} Output;

static void put(void *context, const float *sums, int begin, int rows, int column, int count) {
    const Output *output = context;
    for (int r = 0; r < rows; r++)
        memcpy(output->out + (begin + r) * output->outputs + column, sums + r * PAIR, count * sizeof(float));
}

void zs_linear(const Linear *l) {
    const int64_t inputs = l->matrices[0]->inputs, scratch = zs_gemm_scratch(inputs, l->rows);
    const int64_t counters = zs_gemm_counters(l->rows, l->threads);
    const Rows rows = {.x = l->x, .count = l->rows, .stride = inputs, .inputs = inputs};
    int64_t outputs = 0;
    for (int i = 0; i < l->count; i++) outputs += l->matrices[i]->outputs;
    int next[l->count * counters];
    memset(next, 0, sizeof next);
#pragma omp parallel num_threads(l->threads) if (inputs * outputs * l->rows > WAKING_PRODUCTS)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), next};
        zs_pack(&rows, &team, l->packed);
#pragma omp barrier
        for (int i = 0; i < l->count; i++, team.next += counters) {
            Output output = {l->outs[i], l->matrices[i]->outputs};
            zs_gemm(l->matrices[i], l->rows, l->packed, &team, l->scratch + team.thread * scratch, put, &output);
        }
    }
}
