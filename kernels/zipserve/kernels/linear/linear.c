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
    int next = 0;
#pragma omp parallel num_threads(l->threads) if (inputs * l->matrix->outputs * l->rows > WAKING_PRODUCTS)
    {
#pragma omp for
        for (int64_t row = 0; row < l->rows; row++) zs_pack_row(&strips, l->x + row * inputs, row, inputs, l->packed);
        zs_gemm(l->matrix, &strips, l->packed, &next, l->scratch + omp_get_thread_num() * scratch, put, (void *)l);
    }
}
