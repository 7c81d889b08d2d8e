// A tile of rows and a strip of keys: scores, online softmax, values.
#include "prefill.h"

ALWAYS_INLINE native_f32 select_native(native_i32 mask, native_f32 yes, native_f32 no) {
    return (native_f32)((mask & (native_i32)yes) | (~mask & (native_i32)no));
}

// 2^x for x up to 0, relative error 2e-7; 0 below -125, NaN of NaN. Source of the polynomial: Cephes.
ALWAYS_INLINE native_f32 exp2_native(native_f32 x) {
    const float magic = 12582912.0f + 127;  // 1.5 * 2^23: adding it rounds; the exponent's bias stands ready behind it
    const native_i32 tiny = x < -125.0f;
    const native_f32 shifted = x + magic, r = x - (shifted - magic);
    native_f32 p = r * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * r + 9.618437357674640e-3f;
    p = p * r + 5.550332471162809e-2f;
    p = p * r + 2.402264791363012e-1f;
    p = p * r + 6.931472028550421e-1f;
    p = p * r + 1.0f;
    return (native_f32)(~tiny & (native_i32)(p * (native_f32)((native_i32)shifted << 23)));
}

static inline float highest_lane(native_f32 x) {
    float lanes[NATIVE_LANES];
    store_native(lanes, x);
    for (int n = NATIVE_LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = lanes[i] < lanes[i + n] ? lanes[i + n] : lanes[i];
    return lanes[0];
}

// out[row][column] = shrink[row] * out[row][column] + sum over k of a(row, k) * b[k][column], for one panel of columns;
// without `shrink` it is overwritten.
ALWAYS_INLINE void multiply(const float *a, const int row_step, const int depth_step, const float *b, int depth,
                            float *out, int64_t out_stride, const float *shrink) {
    native_f32 sums[TILE_ROWS][2] = {{{0}}};
    if (shrink)
        UNROLL for (int r = 0; r < TILE_ROWS; r++)
            UNROLL for (int v = 0; v < 2; v++)
                sums[r][v] = load_native(out + r * out_stride + v * NATIVE_LANES) * shrink[r];
    for (int k = 0; k < depth; k++, a += depth_step, b += PANEL) {
        const native_f32 left = load_native(b), right = load_native(b + NATIVE_LANES);
        UNROLL for (int r = 0; r < TILE_ROWS; r++) {
            const float factor = a[r * row_step];
            sums[r][0] += left * factor;
            sums[r][1] += right * factor;
        }
    }
    UNROLL for (int r = 0; r < TILE_ROWS; r++)
        UNROLL for (int v = 0; v < 2; v++) store_native(out + r * out_stride + v * NATIVE_LANES, sums[r][v]);
}

#define STEP MAX(PANEL, LANES)  // of loops over keys

static void cap(float *weights, int from, int to, float softcap) {
    for (int r = 0; r < TILE_ROWS; r++)
        for (int i = from; i < to; i += LANES) {
            float *x = weights + r * STRIP + i;
            store16(x, tanh16(load16(x)) * softcap);
        }
}

// Hides what a row does not see, and what stands behind the last key.
static void hide(const Rows *rows, const Strip *strip, int tile, int from, int to) {
    for (int r = 0; r < TILE_ROWS; r++) {
        const int32_t first = rows->first[tile * TILE_ROWS + r], own = rows->own[tile * TILE_ROWS + r];
        for (int i = from; i < to; i += NATIVE_LANES) {
            float *x = rows->weights + r * STRIP + i;
            const native_i32 position = *(const native_i32 *)(strip->positions + i);
            const native_i32 hidden = ((position - first) | (own - position)) >> 31;
            store_native(x, select_native(hidden, (native_f32){0} - INFINITY, load_native(x)));
        }
    }
}

// Turns scores into weights relative to the highest score so far, and adds them to the totals. `shrink` is what makes
// earlier weights relative to it.
static void soften(const Rows *rows, int tile, int from, int to, float *shrink) {
    float *maxima = rows->maxima + tile * TILE_LANES, higher[TILE_LANES];
    memcpy(higher, maxima, sizeof higher);
    for (int r = 0; r < TILE_ROWS; r++) {
        const float *scores = rows->weights + r * STRIP;
        native_f32 highest = (native_f32){0} + maxima[r];
        for (int i = from; i < to; i += NATIVE_LANES) {
            const native_f32 x = load_native(scores + i);
            highest = select_native(highest < x, x, highest);
        }
        higher[r] = highest_lane(highest);
    }
    for (int r = 0; r < TILE_LANES; r += NATIVE_LANES) {
        const native_f32 maximum = load_native(higher + r);
        store_native(shrink + r, exp2_native(load_native(maxima + r) - maximum));
        store_native(maxima + r, maximum);
    }
    for (int r = 0; r < TILE_ROWS; r++) {
        float *weights = rows->weights + r * STRIP, *total = rows->totals + (tile * TILE_ROWS + r) * NATIVE_LANES;
        native_f32 added = load_native(total) * shrink[r];
        for (int i = from; i < to; i += NATIVE_LANES) {
            const native_f32 weight = exp2_native(load_native(weights + i) - higher[r]);
            store_native(weights + i, weight);
            added += weight;
        }
        store_native(total, added);
    }
}

void zs_attend_strip(const Rows *rows, const Strip *strip, int tile) {
    const int row = tile * TILE_ROWS, last = MIN(row + TILE_ROWS, rows->rows) - 1;
    const int lowest = rows->first[row], highest = rows->own[last];  // both ascend with the rows
    if (strip->lowest > highest || strip->highest < lowest) return;
    int from = 0, count = strip->count;
    if (strip->in_order) {
        from = MAX(lowest - strip->lowest, 0) / STEP * STEP;
        count = MIN(highest - strip->lowest + 1, count);
    }
    const int to = PANELS(count) * PANEL, dim = strip->key_dim;
    const float *queries = rows->queries + (int64_t)row * dim;
    for (int i = from; i < to; i += PANEL)
        multiply(queries, 1, TILE_ROWS, strip->keys + (int64_t)i * dim, dim, rows->weights + i, STRIP, NULL);
    if (rows->softcap > 0) cap(rows->weights, from, to, rows->softcap);
    if (strip->lowest < rows->first[last] || strip->highest > rows->own[row] || count < to)
        hide(rows, strip, tile, from, to);
    float shrink[TILE_LANES];
    soften(rows, tile, from, to, shrink);
    for (int c = 0; c < rows->value_stride; c += PANEL)
        multiply(rows->weights + from, STRIP, 1, strip->values + (int64_t)c * STRIP + from * PANEL, count - from,
                 rows->sums + (int64_t)row * rows->value_stride + c, rows->value_stride, shrink);
}
