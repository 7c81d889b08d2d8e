// Encodes one layer of blocks into the zip format. One task is the keys or the values of one head of one block.
//
// A task reads its rows in the order of positions and rotates them into scratch in the order of slots, with channels as
// lanes. A word of V holds consecutive slots of one channel, so V is packed lane by lane; a word of K holds consecutive
// channels of one slot, so lanes are reduced. While a task encodes it fetches the rows of the thread's next task.
#include <float.h>
#include <math.h>
#include <string.h>

#include "lanes.h"
#include "zipformat.h"

#define NON_FINITE 1
#define OUT_OF_RANGE 2
#define WIDTH_MIN 1e-4f
#define SCALE_MAX 3922.343f  // 2^((255 - 160 + 1/2) / 8), the largest scale that rounds to a byte
#define TINY 1e-30f          // least divisor
#define TILE 32              // slots of V, which fill whole words of every plane

struct zip_rows {
    const float *data;
    int64_t block, head, token;  // strides in floats
};

// The rows of one task.
struct rows {
    const float *data;
    int64_t stride;
    int dim;
};

struct task {
    const struct zip_format *form;
    struct rows rows, next;  // its own, and those of the thread's next task or null
    const int32_t *slots;    // of each token
    uint8_t *segment;        // of the head
    half *sinks;             // of the head, or null
};

// Fetches one row into the second-level cache.
static inline void fetch(const struct rows *rows, int token) {
    if (rows->data)
        for (int c = 0; c < rows->dim; c += 16) __builtin_prefetch(rows->data + token * rows->stride + c, 0, 2);
}

// Why rows are refused whose squares have no finite sum.
static int refusal(const float *x, int count) {
    for (int i = 0; i < count; i++)
        if (!isfinite(x[i])) return NON_FINITE;
    return OUT_OF_RANGE;
}

// Writes the rows, rotated, in the order of slots, and the sinks in float16. Returns why a sink is refused, or 0.
static int rotate_rows(const struct task *task, const float *factors, int dim, float *out) {
    for (int t = 0; t < task->form->block_tokens; t++)
        rotate_row_into(out + task->slots[t] * dim, task->rows.data + t * task->rows.stride, factors, dim, 0);
    int refused = 0;
    for (int t = 0; t < SINK_TOKENS && task->sinks; t++)
        for (int c = 0; c < dim; c++) {
            const float x = out[task->slots[t] * dim + c];
            const half stored = to_half(x);
            task->sinks[t * dim + c] = stored;
            refused |= !isfinite(x) ? NON_FINITE : !is_finite(stored) ? OUT_OF_RANGE : 0;
        }
    return refused;
}

// `x`, but no less than 0 and no more than `top`.
static inline float clip(float x, float top) {
    x = x > 0 ? x : 0;
    return x < top ? x : top;
}

// Lowest and highest of each channel over `count` rows, a multiple of 4. Returns whether all of them are finite.
static int channel_range(const float *rows, int count, int dim, float *lowest, float *highest) {
    ALIGNED float odd[dim];  // becomes NaN by any NaN or infinity
    for (int c = 0; c < dim; c++) lowest[c] = INFINITY, highest[c] = -INFINITY, odd[c] = 0;
    for (int slot = 0; slot < count; slot += 4)
#pragma omp simd
        for (int c = 0; c < dim; c++) {
            float low = lowest[c], high = highest[c], sum = odd[c];
            for (int s = 0; s < 4; s++) {
                const float x = rows[(slot + s) * dim + c];
                low = x < low ? x : low;
                high = x > high ? x : high;
                sum += x * 0.0f;
            }
            lowest[c] = low, highest[c] = high, odd[c] = sum;
        }
    int finite = 1;
    for (int c = 0; c < dim; c++) finite &= odd[c] == 0;
    return finite;
}

// One plane of the codes [NARROW slots][dim] of K, to NARROW columns of words.
INLINE void pack_keys(const uint32_t *codes, int dim, const int bits, int shift, uint8_t *words, int columns) {
    const i32xn lane = LANE_INDEX;
    const int per_word = 32 / bits;
    for (int first = 0; first < dim; first += per_word, words += 4 * columns) {
        i32xn w[NARROW] = {0};
        for (int k = 0; k < per_word && first + k < dim; k += NARROW)
            for (int s = 0; s < NARROW; s++) {
                const i32xn code = *(const i32xn *)(codes + s * dim + first + k) >> shift;
                w[s] |= (bits == 1 ? code & 1 : code) << (bits * (lane + k));
            }
        const i32xn reduced = reduce_lanes(w, 0);
        memcpy(words, &reduced, sizeof reduced);
    }
}

// Encodes one class of keys, whose rows these are and whose first slot is `start`.
static void encode_keys(
    const struct task *task, const struct zip_region *region, int start, const float *rows, int dim, const float *lo,
    const float *width
) {
    ALIGNED uint32_t codes[NARROW * dim];
    ALIGNED float cells[dim];  // per unit
    const float top = (float)((1 << region->bits) - 1);
    for (int c = 0; c < dim; c++) cells[c] = (top + 1) / width[c];
    for (int slot = 0; slot < region->tokens; slot += NARROW) {
        for (int s = 0; s < NARROW; s++) {
            fetch(&task->next, start + slot + s);
            for (int c = 0; c < dim; c++) {
                const float cell = (rows[(slot + s) * dim + c] - lo[c]) * cells[c];
                codes[s * dim + c] = (uint32_t)(int32_t)clip(cell, top);
            }
        }
        for (int p = 0; p < region->planes; p++) {
            const struct zip_plane *plane = &region->plane[p];
            uint8_t *words = task->segment + plane->offset + 4 * slot;
            switch (plane->bits) {
                case 4: pack_keys(codes, dim, 4, 0, words, region->tokens); break;
                case 2: pack_keys(codes, dim, 2, plane->shift, words, region->tokens); break;
                default: pack_keys(codes, dim, 1, 0, words, region->tokens);
            }
        }
    }
}

static int quantize_keys(const struct task *task) {
    const struct zip_format *form = task->form;
    const int dim = task->rows.dim & -HEAD_DIM_MULTIPLE, tokens = form->block_tokens;
    const int sinks = task->sinks ? SINK_TOKENS : 0;  // which stand in the first slots
    ALIGNED float rows[tokens * dim], lo[dim], width[dim];
    int refused = rotate_rows(task, form->key_factors, dim, rows);
    if (!channel_range(rows + sinks * dim, tokens - sinks, dim, lo, width)) refused |= NON_FINITE;
    half *stored = (half *)task->segment;
    for (int c = 0; c < dim; c++) {
        stored[c] = to_half(lo[c]);
        lo[c] = from_half(stored[c]);
        const float wide = width[c] - lo[c];
        stored[dim + c] = to_half(wide > WIDTH_MIN ? wide : WIDTH_MIN);
        width[c] = from_half(stored[dim + c]);
        if (!is_finite(stored[c]) || !is_finite(stored[dim + c])) refused |= OUT_OF_RANGE;
    }
    if (refused) return refused;
    const int hi_tokens = form->keys[0].tokens;
    encode_keys(task, &form->keys[0], 0, rows, dim, lo, width);
    encode_keys(task, &form->keys[1], hi_tokens, rows + hi_tokens * dim, dim, lo, width);
    return 0;
}

// Sum of each of TILE rows, or of its squares.
INLINE void sum_rows(const float *rows, int dim, const int squared, float *sums) {
    for (int first = 0; first < TILE; first += NARROW) {
        f32xn v[NARROW] = {0};
        for (int c = 0; c < dim; c += NARROW)
            for (int s = 0; s < NARROW; s++) {
                const f32xn x = *(const f32xn *)(rows + (first + s) * dim + c);
                v[s] += squared ? x * x : x;
            }
        i32xn w[NARROW];
#pragma GCC unroll 8
        for (int s = 0; s < NARROW; s++) w[s] = (i32xn)v[s];
        *(f32xn *)(sums + first) = (f32xn)reduce_lanes(w, 1);
    }
}

// Codes of one row of V. The row becomes its products with the centres of its cells, in cells.
static inline void encode_value(float *row, int dim, float cells, float middle, uint32_t *codes) {
    for (int c = 0; c < dim; c++) {
        const int32_t code = (int32_t)clip(row[c] * cells + middle, 2 * middle - 1);
        codes[c] = (uint32_t)code;
        row[c] *= (float)code + (0.5f - middle);
    }
}

// Nearest e with scale = 2^((e - 160) / 8): the octave, and how many borders between its eighths the mantissa exceeds.
static inline uint8_t exponent_of(float scale) {
    static const float borders[8] = {1.04427378f, 1.13878863f, 1.24185781f, 1.35425555f,
                                     1.47682615f, 1.61049033f, 1.75625216f, 1.91520656f};  // 2^((k + 1/2) / 8)
    const uint32_t bits = bits_of(scale);
    const float mantissa = float_from((bits & 0x7fffff) | 0x3f800000);
    int e = 160 + 8 * ((int)(bits >> 23) - 127);
    for (int k = 0; k < 8; k++) e += mantissa >= borders[k];
    return (uint8_t)(e < 0 ? 0 : e > 255 ? 255 : e);
}

// One plane of the codes [TILE slots][dim] of V, to rows of words.
INLINE void pack_values(const uint32_t *codes, int dim, const int bits, int shift, uint8_t *words) {
    const int per_word = 32 / bits;
    for (int first = 0; first < TILE; first += per_word, codes += per_word * dim, words += 4 * dim)
#pragma omp simd
        for (int c = 0; c < dim; c++) {
            uint32_t word = 0;
#pragma GCC unroll 32
            for (int k = 0; k < per_word; k++) {
                const uint32_t code = codes[k * dim + c] >> shift;
                word |= (bits == 1 ? code & 1 : code) << (k * bits);
            }
            memcpy(words + 4 * c, &word, 4);
        }
}

// Encodes the rows of TILE slots from `start` on, the first of which is the `index`-th of its class; overwrites
// the rows. Returns why they are refused, or 0.
static int encode_values(
    const struct task *task, const struct zip_region *region, int start, int index, float *rows, int dim
) {
    ALIGNED uint32_t codes[TILE * dim];
    ALIGNED float squares[TILE], cells[TILE], dots[TILE], scales[TILE];
    const float middle = (float)(1 << (region->bits - 1));  // the first code of positive values
    sum_rows(rows, dim, 1, squares);
    int over = 0;
    for (int s = 0; s < TILE; s++) over |= !(squares[s] <= FLT_MAX);
    if (over) return refusal(rows, TILE * dim);
    for (int s = 0; s < TILE; s++) {
        const float cell = region->step * sqrtf(squares[s] / (float)dim);
        cells[s] = 1 / (cell > TINY ? cell : TINY);
    }
    for (int s = 0; s < TILE; s++) {
        fetch(&task->next, start + s);
        encode_value(rows + s * dim, dim, cells[s], middle, codes + s * dim);
    }
    sum_rows(rows, dim, 0, dots);
    for (int s = 0; s < TILE; s++) {
        const float dot = region->step * dots[s];
        scales[s] = squares[s] / (dot > TINY ? dot : TINY);
        over |= !(scales[s] <= SCALE_MAX);
    }
    uint8_t *exponents = task->segment + task->form->exponent_offset + start;
    for (int s = 0; s < TILE; s++) exponents[s] = exponent_of(scales[s]);
    for (int p = 0; p < region->planes; p++) {
        const struct zip_plane *plane = &region->plane[p];
        uint8_t *words = task->segment + plane->offset + index * plane->bits / 32 * 4 * dim;
        switch (plane->bits) {
            case 4: pack_values(codes, dim, 4, 0, words); break;
            case 2: pack_values(codes, dim, 2, plane->shift, words); break;
            default: pack_values(codes, dim, 1, 0, words);
        }
    }
    return over ? OUT_OF_RANGE : 0;
}

static int quantize_values(const struct task *task) {
    const struct zip_format *form = task->form;
    const int dim = task->rows.dim & -HEAD_DIM_MULTIPLE, tokens = form->block_tokens;
    const int hi_tokens = form->values[0].tokens;
    ALIGNED float rows[tokens * dim];
    int refused = rotate_rows(task, form->value_factors, dim, rows);
    for (int start = 0; start < tokens; start += TILE) {
        const int is_lo = start >= hi_tokens;
        const int index = is_lo ? start - hi_tokens : start;
        refused |= encode_values(task, &form->values[is_lo], start, index, rows + start * dim, dim);
    }
    return refused;
}

// Of the keys (even numbers) or the values (odd ones) of each head of each block.
static struct rows rows_of(
    const struct zip_format *form, const struct zip_rows *keys, const struct zip_rows *values, int64_t number
) {
    const int of_values = number % 2, head = number / 2 % form->kv_heads;
    const struct zip_rows *all = of_values ? values : keys;
    const float *data = all->data + number / (2 * form->kv_heads) * all->block + head * all->head;
    return (struct rows){data, all->token, of_values ? form->value_dim : form->key_dim};
}

// Returns the first block whose slab or sinks' slab does not exist, in which case nothing is written, or -1.
int zs_quantize(
    const struct zip_format *form, const struct zip_rows *keys, const struct zip_rows *values, const uint8_t *hi,
    const struct zip_slabs *out, const struct zip_slabs *sinks, int blocks, int threads, int32_t *status
) {
    const int wrong = missing_slab(out, blocks, 0), wrong_sinks = missing_slab(sinks, blocks, INT64_MIN);
    if (wrong >= 0 || wrong_sinks >= 0) return wrong >= 0 ? wrong : wrong_sinks;
    const int heads = form->kv_heads, tokens = form->block_tokens;
    const int64_t tasks = 2 * (int64_t)heads * blocks;
    for (int block = 0; block < blocks; block++) status[block] = 0;
#pragma omp parallel for num_threads(threads) schedule(static) if (tasks > 0)
    for (int64_t number = 0; number < tasks; number++) {
        const int64_t block = number / (2 * heads);
        const int head = number / 2 % heads, of_values = number % 2;
        uint8_t bitmap[tokens / 8];
        int32_t slots[tokens];
        memset(bitmap, 0, sizeof bitmap);
        for (int t = 0; t < tokens; t++) bitmap[t / 8] |= hi[block * tokens + t] << t % 8;
        slots_of(bitmap, tokens, slots);
        uint8_t *layer = slab_of(out, block);
        if (number % (2 * heads) == 0) memcpy(layer, bitmap, sizeof bitmap);
        const struct task task = {
            .form = form,
            .rows = rows_of(form, keys, values, number),
            .next = number + 1 < tasks ? rows_of(form, keys, values, number + 1) : (struct rows){0},
            .slots = slots,
            .segment = layer + form->bitmap_bytes + head * form->head_bytes,
            .sinks = head_sinks(form, slab_of(sinks, block), head, of_values),
        };
        const int refused = of_values ? quantize_values(&task) : quantize_keys(&task);
#pragma omp atomic
        status[block] |= refused;
    }
    for (int block = 0; block < blocks; block++)
        if (status[block] & NON_FINITE) status[block] = NON_FINITE;
    return -1;
}
