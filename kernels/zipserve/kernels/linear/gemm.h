// Products of a few to many rows with a packed matrix, computed by all threads of a parallel region together.
//
// A matrix [outputs][inputs] is stored in panels of 16 outputs, [panel][input][16]: one thread's share is one long
// stream, whatever the number of rows. Outputs are padded to whole pairs of panels. Rows are gathered in strips,
// [strip][input][rows of the strip], so that a tile reads both of its operands one after another.
#pragma once
#include "vector.h"

#define PANEL 16
#define PAIR (2 * PANEL)

typedef enum { WEIGHT_FLOAT32, WEIGHT_BFLOAT16, WEIGHT_FLOAT16, WEIGHT_INT8 } WeightType;

// cpu.py mirrors it.
typedef struct {
    const void *panels;
    const float *scales;  // [outputs padded], of int8; else NULL
    const float *bias;    // [outputs padded] or NULL
    int64_t inputs, outputs;
    int32_t type, pad;
} Matrix;

// Takes `count` columns, which start at `column`, of rows [begin, begin + rows): sums[row][column], stride PAIR.
typedef void Sink(void *context, const float *sums, int begin, int rows, int column, int count);

// The threads of a parallel region, as one of them sees it.
typedef struct {
    int thread, threads;
    int *next;  // [zs_gemm_counters], shared, 0 before each product
} Team;

// This thread's part of a product; all threads call it with the same arguments. `packed` holds the rows as zs_pack leaves
// them, `scratch` is this thread's own, of zs_gemm_scratch floats.
void zs_gemm(const Matrix *m, int64_t rows, const float *packed, const Team *team, float *scratch, Sink *sink,
             void *context);
int64_t zs_gemm_scratch(int64_t inputs, int rows);
int64_t zs_gemm_counters(int64_t rows, int threads);

// What becomes a packed buffer, [count][inputs] floats: rows `stride` apart, as they are or by an RMS norm with these
// weights.
typedef struct {
    const float *x;
    int64_t count, stride, inputs;
    const float *norm;  // [inputs] or NULL
    float eps;
} Rows;

// Packs this thread's part of the rows; all threads call it, and need a barrier behind it.
void zs_pack(const Rows *rows, const Team *team, float *packed);

// out = x / rms(x) * weight; it may be x.
void zs_normalize(const float *x, const float *weight, int64_t n, float eps, float *out);
