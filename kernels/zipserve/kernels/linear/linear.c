// A product by itself, with a parallel region of its own.
#include <omp.h>

#include "gemm.h"

// See cpu.py.
typedef struct {
    const Matrix *matrix;
    const float *x;  // [rows][inputs], contiguous
    float *out;      // [rows][outputs], contiguous
    float *packed;   // [rows][inputs]
    float *scratch;  // [threads][zs_gemm_scratch]
    int64_t rows, threads;
} Linear;

static void put(void *context, const float *sums, int begin, int rows, int column, int count) {
    const Linear *l = context;
    for (int r = 0; r < rows; r++)
        memcpy(l->out + (begin + r) * l->matrix->outputs + column, sums + r * PAIR, count * sizeof(float));
}

void zs_linear(const Linear *l) {
    const Strips strips = zs_strips(l->rows);
    const int64_t inputs = l->matrix->inputs, scratch = zs_gemm_scratch(inputs, l->rows);
    const Rows rows = {.x = l->x, .stride = inputs, .inputs = inputs};
    int next[l->threads];
    memset(next, 0, sizeof next);
#pragma omp parallel num_threads(l->threads) if (inputs * l->matrix->outputs * l->rows > WAKING_PRODUCTS)
    {
        const Team team = {omp_get_thread_num(), omp_get_num_threads(), next};
        zs_pack(&rows, &strips, &team, l->packed);
#pragma omp barrier
        zs_gemm(l->matrix, &strips, l->packed, &team, l->scratch + team.thread * scratch, put, (void *)l);
    }
}
