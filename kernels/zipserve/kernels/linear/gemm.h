// Products of a few to many rows with a packed matrix, computed by all threads of a parallel region together.
//
// A matrix [outputs][inputs] is stored in panels of 16 outputs, [panel][input][16]: one thread's share is one long
// stream, whatever the number of rows. Outputs are padded to whole pairs of panels. Rows are gathered in strips,
// [strip][input][rows of the strip], so that a tile reads both of its operands one after another.
#pragma once
#include "vector.h"

#define PANEL 16
#define PAIR (2 * PANEL)
#define BLOCK_ROWS 120  // of a product that are multiplied together: packed, they stay in the second-level cache

typedef enum { WEIGHT_FLOAT32, WEIGHT_BFLOAT16, WEIGHT_FLOAT16, WEIGHT_INT8 } WeightType;

// cpu.py mirrors it.
typedef struct {
    const void *panels;
    const float *scales;  // [outputs padded], of int8; else NULL
    const float *bias;    // [outputs padded] or NULL
    int64_t inputs, outputs;
    int32_t type, pad;
} Matrix;

// How the rows of a product are cut into strips.
typedef struct {
    int rows, strips, strip_rows;  // all strips have strip_rows rows but the last ones, which may have one less
    int is_paired;                 // a tile takes two panels at once, else one
} Strips;

Strips zs_strips(int rows);

// First row of a strip, and what all strips before it take in a packed buffer of `inputs` columns is that many times it.
static inline int strip_begin(const Strips *s, int strip) {
    const int longer = s->rows - s->strips * (s->strip_rows - 1);  // strips that have strip_rows rows
    return strip * s->strip_rows - (strip > longer ? strip - longer : 0);
}

// Takes `count` columns, which start at `column`, of rows [begin, begin + rows): sums[row][column], stride PAIR.
typedef void Sink(void *context, const float *sums, int begin, int rows, int column, int count);

// The threads of a parallel region, as one of them sees it.
typedef struct {
    int thread, threads;
    int *next;  // [threads], shared, 0 before each product
} Team;

// This thread's part of a product; all threads call it with the same arguments. `packed` is the strips' buffer,
// `scratch` this thread's own, of zs_gemm_scratch floats. A pair of panels is multiplied by all rows at once.
void zs_gemm(const Matrix *m, const Strips *s, const float *packed, const Team *team, float *scratch, Sink *sink,
             void *context);
int64_t zs_gemm_scratch(int64_t inputs, int rows);

// What becomes a packed buffer: rows of `inputs` floats, `stride` apart, as they are or by an RMS norm with these weights.
typedef struct {
    const float *x;
    int64_t stride, inputs;
    const float *norm;  // [inputs] or NULL
    float eps;
} Rows;

// Packs this thread's part of the rows; all threads call it, and need a barrier behind it.
void zs_pack(const Rows *rows, const Strips *s, const Team *team, float *packed);

float zs_inverse_rms(const float *x, int64_t n, float eps);
