#include "gemm.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

// Tiles whose sums stay in registers: rows x one or two panels.
#if NATIVE_LANES == 16
#define PAIR_ROWS 12
#define SINGLE_ROWS 24
#else
#define PAIR_ROWS 3
#define SINGLE_ROWS 6
#endif
#define VECTORS (PANEL / NATIVE_LANES)  // of a panel
#define BLOCK_ROWS 120                  // that are multiplied together: packed, they stay in the second-level cache
#define DEPTH 1024                      // inputs of a pair that stay in the second-level cache
#define PACK_INPUTS 64                  // of a strip that are packed together: they stay in the first-level cache
#define AHEAD 4096                      // bytes that are prefetched of the stream of weights
#define DIRECT_STRIPS 3                 // as many read weights as they are stored; more, what was widened once
#define UNROLL24 _Pragma("GCC unroll 24")

typedef uint16_t native_u16 __attribute__((vector_size(2 * NATIVE_LANES), aligned(2)));
typedef int8_t native_i8 __attribute__((vector_size(NATIVE_LANES), aligned(1)));

static const int type_bytes[] = {4, 2, 2, 1};

ALWAYS_INLINE native_f32 half_native(const uint16_t *p) {
#if defined(__F16C__) && NATIVE_LANES == 16
    return (native_f32)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__F16C__) && NATIVE_LANES == 8
    return (native_f32)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    const native_u32 bits = __builtin_convertvector(*(const native_u16 *)p, native_u32), magnitude = bits & 0x7fff;
    const native_f32 finite = (native_f32)(magnitude << 13) * 0x1p112f;
    const native_u32 special = (native_u32)((native_i32)(0x7bff - magnitude) >> 31) & 0x7f800000;
    return (native_f32)((native_u32)finite | special | (bits & 0x8000) << 16);
#endif
}

ALWAYS_INLINE native_f32 int8_native(const int8_t *p) {
#if NATIVE_LANES == 16
    const native_i32 wide = (native_i32)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif defined(__AVX2__)
    const native_i32 wide = (native_i32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    const native_i32 wide = __builtin_convertvector(*(const native_i8 *)p, native_i32);
#endif
    return __builtin_convertvector(wide, native_f32);
}

ALWAYS_INLINE native_f32 bfloat_native(const uint16_t *p) {
#if NATIVE_LANES == 16
    const native_u32 wide = (native_u32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
    const native_u32 wide = (native_u32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
#else
    const native_u32 wide = __builtin_convertvector(*(const native_u16 *)p, native_u32);
#endif
    return (native_f32)(wide << 16);
}

// NATIVE_LANES weights from element `at` on.
ALWAYS_INLINE native_f32 weights_at(const void *weights, int64_t at, const WeightType type) {
    if (type == WEIGHT_FLOAT32) return load_native((const float *)weights + at);
    if (type == WEIGHT_FLOAT16) return half_native((const uint16_t *)weights + at);
    if (type == WEIGHT_INT8) return int8_native((const int8_t *)weights + at);
    return bfloat_native((const uint16_t *)weights + at);
}

// One tile: sums[row][panel * PANEL ..] (+)= strip [depth][rows] times `panels` panels, which lie panel_bytes apart.
typedef struct {
    const float *strip;
    const char *weights;
    int64_t depth, panel_bytes;
    float *sums;
    const char *ahead;    // where to prefetch from
    int64_t ahead_bytes;  // by how much it goes on with each input
    int adds;
} Tile;

ALWAYS_INLINE void multiply(const Tile *t, const WeightType type, const int rows, const int panels) {
    const int bytes = PANEL * (type == WEIGHT_FLOAT32 ? 4 : type == WEIGHT_INT8 ? 1 : 2);
    const float *x = t->strip;
    const char *w = t->weights;
    native_f32 sums[SINGLE_ROWS][2 * VECTORS];
    UNROLL24 for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < panels * VECTORS; v++)
            sums[r][v] = t->adds ? load_native(t->sums + r * PAIR + v * NATIVE_LANES) : (native_f32){0};
    // Behind its last input a panel of a pair goes on with that of the next pair.
    const char *ahead = t->ahead;
    const int64_t turn = t->depth - AHEAD / bytes, jump = (panels - 1) * t->panel_bytes;
    const int64_t ahead_bytes = t->ahead_bytes;
    for (int64_t i = 0; i < t->depth; i++) {
        native_f32 weight[2 * VECTORS];
        if (panels > 1 && i == turn) ahead += jump;
        UNROLL for (int p = 0; p < panels; p++) {
            __builtin_prefetch(ahead + p * t->panel_bytes);
            UNROLL for (int v = 0; v < VECTORS; v++)
                weight[p * VECTORS + v] = weights_at(w + p * t->panel_bytes, v * NATIVE_LANES, type);
        }
        UNROLL24 for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < panels * VECTORS; v++) sums[r][v] += x[r] * weight[v];
        x += rows;
        w += bytes;
        ahead += ahead_bytes;
    }
    UNROLL24 for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < panels * VECTORS; v++)
            store_native(t->sums + r * PAIR + v * NATIVE_LANES, sums[r][v]);
}

#define CASE(rows, type, panels) \
    case rows: return multiply(t, type, rows, panels);
#define CASES_3(...) CASE(1, __VA_ARGS__) CASE(2, __VA_ARGS__) CASE(3, __VA_ARGS__)
#define CASES_6(...) CASES_3(__VA_ARGS__) CASE(4, __VA_ARGS__) CASE(5, __VA_ARGS__) CASE(6, __VA_ARGS__)
#define CASES_12(...)                                                                                              \
    CASES_6(__VA_ARGS__) CASE(7, __VA_ARGS__) CASE(8, __VA_ARGS__) CASE(9, __VA_ARGS__) CASE(10, __VA_ARGS__) \
    CASE(11, __VA_ARGS__) CASE(12, __VA_ARGS__)
#define CASES_24(...)                                                                                                 \
    CASES_12(__VA_ARGS__) CASE(13, __VA_ARGS__) CASE(14, __VA_ARGS__) CASE(15, __VA_ARGS__) CASE(16, __VA_ARGS__) \
    CASE(17, __VA_ARGS__) CASE(18, __VA_ARGS__) CASE(19, __VA_ARGS__) CASE(20, __VA_ARGS__) CASE(21, __VA_ARGS__) \
    CASE(22, __VA_ARGS__) CASE(23, __VA_ARGS__) CASE(24, __VA_ARGS__)
#if PAIR_ROWS == 12
#define PAIR_CASES CASES_12
#define SINGLE_CASES CASES_24
#else
#define PAIR_CASES CASES_3
#define SINGLE_CASES CASES_6
#endif

// For each type of weights, one and two panels by every number of rows that fits the registers.
#define MULTIPLY(name, type)                                                                         \
    static void single_##name(const Tile *t, int rows) { switch (rows) { SINGLE_CASES(type, 1) } } \
    static void pair_##name(const Tile *t, int rows) { switch (rows) { PAIR_CASES(type, 2) } }
MULTIPLY(float32, WEIGHT_FLOAT32)
MULTIPLY(bfloat16, WEIGHT_BFLOAT16)
MULTIPLY(float16, WEIGHT_FLOAT16)
MULTIPLY(int8, WEIGHT_INT8)

typedef void Multiply(const Tile *t, int rows);
static Multiply *const singles[] = {single_float32, single_bfloat16, single_float16, single_int8};
static Multiply *const doubles[] = {pair_float32, pair_bfloat16, pair_float16, pair_int8};

// A block of the rows of a product, cut into strips.
typedef struct {
    int64_t first;                 // row
    int rows, strips, strip_rows;  // all strips have strip_rows rows but the last ones, which may have one less
    int is_paired;                 // a tile takes two panels at once, else one
} Strips;

// The block that begins with row `first` of `count`.
static Strips strips_of(int64_t count, int64_t first) {
    const int rows = count - first < BLOCK_ROWS ? count - first : BLOCK_ROWS, is_single = rows > PAIR_ROWS;
    const int most = is_single ? SINGLE_ROWS : PAIR_ROWS, strips = (rows + most - 1) / most;
    return (Strips){first, rows, strips, (rows + strips - 1) / strips, !is_single};
}

// First row of a strip, counted from the block's; what all strips before it take of the block's part of a packed buffer
// of `inputs` columns is that many times it.
static int strip_begin(const Strips *s, int strip) {
    const int longer = s->rows - s->strips * (s->strip_rows - 1);  // strips that have strip_rows rows
    return strip * s->strip_rows - (strip > longer ? strip - longer : 0);
}

int64_t zs_gemm_scratch(int64_t inputs, int rows) {
    const Strips s = strips_of(rows, 0);
    return PAIR * (s.rows + (inputs < DEPTH || s.strips == 1 ? inputs : DEPTH));
}

int64_t zs_gemm_counters(int64_t rows, int threads) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS * threads; }

// Both panels of a pair as floats, one after the other.
static void widen(const char *weights, int64_t panel_bytes, int64_t depth, WeightType type, float *out) {
    for (int p = 0; p < 2; p++, weights += panel_bytes)
        for (int64_t i = 0; i < depth * PANEL; i += NATIVE_LANES) {
            __builtin_prefetch(weights + (i * type_bytes[type]) + AHEAD);
            store_native(out + p * depth * PANEL + i, weights_at(weights, i, type));
        }
}

static void finish(const Matrix *m, float *sums, int rows, int column) {
    if (!m->scales && !m->bias) return;
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < PAIR; c += NATIVE_LANES) {
            float *at = sums + r * PAIR + c;
            native_f32 x = load_native(at);
            if (m->scales) x *= load_native(m->scales + column + c);
            if (m->bias) x += load_native(m->bias + column + c);
            store_native(at, x);
        }
}

// Several strips read a pair of panels several times, from the cache. Meanwhile, evenly, the next pair comes from memory.
static void multiply_rows(const Matrix *m, const Strips *s, const float *packed, const char *pair, float *sums,
                          float *wide) {
    const int bytes = PANEL * type_bytes[m->type], is_streamed = s->strips == 1;
    const int64_t panel_bytes = m->inputs * bytes;
    const int64_t most = is_streamed ? m->inputs : DEPTH;
    const int is_direct = m->type == WEIGHT_FLOAT32 || s->strips <= DIRECT_STRIPS;
    const char *next = pair + 2 * panel_bytes;
    for (int64_t from = 0; from < m->inputs; from += most) {
        const int64_t depth = from + most < m->inputs ? most : m->inputs - from;
        Tile tile = {.weights = pair + from * bytes, .depth = depth, .panel_bytes = panel_bytes, .adds = from > 0};
        tile.ahead_bytes = is_streamed ? bytes : (bytes + s->strips - 1) / s->strips;
        if (!is_direct) {
            widen(tile.weights, panel_bytes, depth, m->type, wide);
            tile.weights = (const char *)wide;
            tile.panel_bytes = depth * PANEL * sizeof(float);
        }
        const WeightType type = is_direct ? m->type : WEIGHT_FLOAT32;
        for (int p = 0; p < (s->is_paired ? 1 : 2); p++, tile.weights += tile.panel_bytes)
            for (int strip = 0; strip < s->strips; strip++) {
                const int begin = strip_begin(s, strip), rows = strip_begin(s, strip + 1) - begin;
                tile.strip = packed + begin * m->inputs + from * rows;
                tile.sums = sums + begin * PAIR + p * PANEL;
                tile.ahead = is_streamed ? tile.weights + AHEAD : next;
                next += depth * tile.ahead_bytes;
                (s->is_paired ? doubles : singles)[type](&tile, rows);
            }
    }
}

// A pair of panels by the rows of a block, to the sink.
static void multiply_panels(const Matrix *m, const Strips *s, const float *packed, int64_t pair, float *scratch,
                            Sink *sink, void *context) {
    const int64_t pair_bytes = m->inputs * PAIR * type_bytes[m->type], column = pair * PAIR;
    const int64_t left = m->outputs - column;
    float *sums = scratch, *wide = scratch + s->rows * PAIR;
    multiply_rows(m, s, packed, (const char *)m->panels + pair * pair_bytes, sums, wide);
    finish(m, sums, s->rows, column);
    for (int strip = 0; strip < s->strips; strip++) {
        const int begin = strip_begin(s, strip), rows = strip_begin(s, strip + 1) - begin;
        sink(context, sums + begin * PAIR, s->first + begin, rows, column, left < PAIR ? left : PAIR);
    }
}

// Every thread begins with a run of neighbours, which is one stream of memory; who is done helps the others.
static void multiply_block(const Matrix *m, const Strips *s, const float *packed, const Team *team, float *scratch,
                           Sink *sink, void *context) {
    const int64_t pairs = (m->outputs + PAIR - 1) / PAIR, threads = team->threads;
    for (int i = 0; i < threads; i++) {
        const int64_t owner = (team->thread + i) % threads;
        const int64_t begin = pairs * owner / threads, end = pairs * (owner + 1) / threads;
        for (;;) {
            const int64_t pair = begin + __atomic_fetch_add(team->next + owner, 1, __ATOMIC_RELAXED);
            if (pair >= end) break;
            multiply_panels(m, s, packed, pair, scratch, sink, context);
        }
    }
}

void zs_gemm(const Matrix *m, int64_t rows, const float *packed, const Team *team, float *scratch, Sink *sink,
             void *context) {
    Team of_block = *team;
    for (int64_t first = 0; first < rows; first += BLOCK_ROWS, of_block.next += team->threads) {
        const Strips s = strips_of(rows, first);
        multiply_block(m, &s, packed + first * m->inputs, &of_block, scratch, sink, context);
    }
}

static float inverse_rms(const float *x, int64_t n, float eps) {
    f32x16 squares = {0};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load16(x + i) * load16(x + i);
    float sum = sum_lanes(squares);
    for (; i < n; i++) sum += x[i] * x[i];
    return 1.0f / sqrtf(sum / n + eps);
}

void zs_normalize(const float *x, const float *weight, int64_t n, float eps, float *out) {
    const float scale = inverse_rms(x, n, eps);
    for (int64_t i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

static float packed_value(const Rows *rows, const float *x, int r, int64_t i, float scale) {
    const float value = x[r * rows->stride + i];
    return rows->norm ? value * scale * rows->norm[i] : value;
}

// Four inputs of four rows, turned over: scattered stores of single floats would take several times as long.
ALWAYS_INLINE void pack_square(const Rows *rows, const float *x, int count, int64_t i, const float *scales, float *at) {
    f32x4 of[4];
    UNROLL for (int r = 0; r < 4; r++) {
        of[r] = *(const f32x4 *)(x + r * rows->stride + i);
        if (rows->norm) of[r] = of[r] * scales[r] * *(const f32x4 *)(rows->norm + i);
    }
    const f32x4 ab_low = SHUFFLE4(of[0], of[1], 0, 4, 1, 5), ab_high = SHUFFLE4(of[0], of[1], 2, 6, 3, 7);
    const f32x4 cd_low = SHUFFLE4(of[2], of[3], 0, 4, 1, 5), cd_high = SHUFFLE4(of[2], of[3], 2, 6, 3, 7);
    *(f32x4 *)(at + i * count) = SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5);
    *(f32x4 *)(at + (i + 1) * count) = SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7);
    *(f32x4 *)(at + (i + 2) * count) = SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5);
    *(f32x4 *)(at + (i + 3) * count) = SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7);
}

// Inputs [from, to) of a strip's rows.
static void pack_strip(const Rows *rows, const float *x, int count, int64_t from, int64_t to, float *packed) {
    float scales[SINGLE_ROWS];
    for (int r = 0; r < count; r++)
        scales[r] = rows->norm ? inverse_rms(x + r * rows->stride, rows->inputs, rows->eps) : 1;
    for (int64_t block = from; block < to; block += PACK_INPUTS) {
        const int64_t end = block + PACK_INPUTS < to ? block + PACK_INPUTS : to;
        for (int r = 0; r < count; r += 4) {
            int64_t i = block;
            if (r + 4 <= count)
                for (; i + 4 <= end; i += 4) pack_square(rows, x + r * rows->stride, count, i, scales + r, packed + r);
            for (; i < end; i++)
                for (int k = r; k < r + 4 && k < count; k++)
                    packed[i * count + k] = packed_value(rows, x, k, i, scales[k]);
        }
    }
}

// Few strips are shared by their inputs and many as a whole: two threads that wrote rows of the same strip would write
// the same cache lines.
static void pack_block(const Rows *rows, const Strips *s, const Team *team, float *packed) {
    const int thread = team->thread, threads = team->threads;
    const int is_shared = s->strips < threads;
    const int begin = is_shared ? 0 : s->strips * thread / threads;
    const int end = is_shared ? s->strips : s->strips * (thread + 1) / threads;
    const int64_t from = is_shared ? rows->inputs * thread / threads : 0;
    const int64_t to = is_shared ? rows->inputs * (thread + 1) / threads : rows->inputs;
    for (int strip = begin; strip < end; strip++) {
        const int64_t row = s->first + strip_begin(s, strip);
        const int count = strip_begin(s, strip + 1) - strip_begin(s, strip);
        pack_strip(rows, rows->x + row * rows->stride, count, from, to, packed + row * rows->inputs);
    }
}

void zs_pack(const Rows *rows, const Team *team, float *packed) {
    for (int64_t first = 0; first < rows->count; first += BLOCK_ROWS) {
        const Strips s = strips_of(rows->count, first);
        pack_block(rows, &s, team, packed);
    }
}
