// RMS norms of rows.
#include "linear/gemm.h"

#define WAKING_NUMBERS (1 << 16)  // waking other threads costs more than this many

// See cpu.py.
typedef struct {
    const float *x, *weight;  // [rows][columns] and [columns], contiguous
    float *out;               // [rows][columns]
    int64_t rows, columns, threads;
    float eps;
} Norm;

void zs_rms_norm(const Norm *n) {
#pragma omp parallel for num_threads(n->threads) if (n->rows * n->columns > WAKING_NUMBERS)
    for (int64_t row = 0; row < n->rows; row++)
        zs_normalize(n->x + row * n->columns, n->weight, n->columns, n->eps, n->out + row * n->columns);
}
