// Blocks of the zip format (zipformat.py), multiplied as they are.
//
// Keys:   logit_j = q.lo + sum_c q_c width_c (code_jc + 1/2) / 2^b
// Values: out_c = sum_j p_j scale_j step (code_jc - 2^(b-1) + 1/2)
// Both are one product of factors and codes, since words hold the contracted index and the columns (tokens of keys,
// channels of values) are contiguous. The constants are summed once.
#include "attention.h"

// sums[h][column] += sum over i of factors[h][i] * code[i][column]; strides in floats.
typedef struct {
    const struct zip_region *region;
    const uint8_t *segment;
    int64_t ahead;  // where to prefetch from
    int contracted, columns;
    const float *factors;
    int64_t factor_stride;
    float *sums;
    int64_t sum_stride;
} Product;

// `vectors` native vectors of columns from `column` on.
ALWAYS_INLINE void multiply_columns(const Product *p, int column, const int bits, const int heads, const int vectors) {
    const int per_word = bits == 4 ? 8 : 16;
    const uint32_t *upper_row = (const uint32_t *)(p->segment + p->region->plane[0].offset) + column;
    const uint32_t *lower_row = (const uint32_t *)(p->segment + p->region->plane[1].offset) + column;
    const float *factors = p->factors;
    const int64_t stride = p->factor_stride, ahead = p->ahead;
    native_f32 acc[TILE_HEADS][MAX_VECTORS];
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++)
            acc[h][v] = load_native(p->sums + h * p->sum_stride + column + NATIVE_LANES * v);
    for (int i = 0; i < p->contracted; i += per_word, factors += per_word) {
        native_u32 upper[MAX_VECTORS], lower[MAX_VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) {
            __builtin_prefetch((const uint8_t *)(upper_row + NATIVE_LANES * v) + ahead);
            upper[v] = *(const native_u32 *)(upper_row + NATIVE_LANES * v);
            if (bits == 3) lower[v] = *(const native_u32 *)(lower_row + NATIVE_LANES * v) >> (i % 32);
        }
        UNROLL for (int k = 0; k < per_word; k++) {
            native_f32 code[MAX_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++) code[v] = code_at(upper[v], lower[v], bits, k);
            UNROLL for (int h = 0; h < heads; h++)
                UNROLL for (int v = 0; v < vectors; v++) acc[h][v] += code[v] * factors[h * stride + k];
        }
        upper_row += p->columns;
        if (i % 32) lower_row += p->columns;  // a word of the plane of one bit lasts for two of the other
    }
    UNROLL for (int h = 0; h < heads; h++)
        UNROLL for (int v = 0; v < vectors; v++)
            store_native(p->sums + h * p->sum_stride + column + NATIVE_LANES * v, acc[h][v]);
}

ALWAYS_INLINE void multiply_tile(const Product *p, const int bits, const int heads) {
    const int vectors = TILE_VECTORS(heads, NATIVE_SUMS), width = vectors * NATIVE_LANES;
    int column = 0;
    for (; column + width <= p->columns; column += width) multiply_columns(p, column, bits, heads, vectors);
    for (; column < p->columns; column += NATIVE_LANES) multiply_columns(p, column, bits, heads, 1);
}

static void multiply(const Product *p, int heads) {
#define CASE(bits, heads) \
    case 8 * bits + heads: return multiply_tile(p, bits, heads);
    switch (8 * p->region->bits + heads) {
        CASE(2, 1) CASE(2, 2) CASE(2, 3) CASE(2, 4)
        CASE(3, 1) CASE(3, 2) CASE(3, 3) CASE(3, 4)
        CASE(4, 1) CASE(4, 2) CASE(4, 3) CASE(4, 4)
    }
#undef CASE
}

void zs_zip_logits(const struct zip_format *form, const uint8_t *segment, const Tile *tile) {
    const int dim = form->key_dim, heads = tile->heads;
    float bias[TILE_HEADS], half[TILE_HEADS];
    f32x16 of_lo[TILE_HEADS] = {{0}}, of_width[TILE_HEADS] = {{0}};
    for (int c = 0; c < dim; c += LANES) {
        const f32x16 lo = load_half(segment + 2 * c), width = load_half(segment + 2 * (dim + c));
        for (int h = 0; h < heads; h++) {
            const f32x16 q = load16(tile->rotated + h * dim + c), product = q * width;
            store16(tile->folded + h * dim + c, product);
            of_width[h] += product;
            of_lo[h] += q * lo;
        }
    }
    for (int h = 0; h < heads; h++) {
        bias[h] = sum_lanes(of_lo[h]);
        half[h] = sum_lanes(of_width[h]) / 2;
    }
    float *logits = tile->logits;
    for (const struct zip_region *region = form->keys; region < form->keys + 2; logits += region->tokens, region++) {
        for (int h = 0; h < heads; h++) memset(logits + h * tile->stride, 0, region->tokens * sizeof(float));
        const Product product = {region,       segment, tile->ahead, dim,         region->tokens,
                                 tile->folded, dim,     logits,      tile->stride};
        multiply(&product, heads);
        const float cell = 1.0f / (1 << region->bits);
        for (int h = 0; h < heads; h++)
            for (float *x = logits + h * tile->stride; x < logits + h * tile->stride + region->tokens; x += LANES)
                store16(x, load16(x) * cell + (bias[h] + half[h] * cell));
    }
}

void zs_zip_values(const struct zip_format *form, const uint8_t *segment, const Tile *tile) {
    const int dim = form->value_dim, heads = tile->heads;
    const uint8_t *exponents = segment + form->exponent_offset;
    float *weights = tile->logits, *of_slots = tile->wide;
    for (int slot = 0; slot < form->block_tokens; slot++) of_slots[slot] = scale_of(exponents[slot]);
    for (const struct zip_region *region = form->values; region < form->values + 2; region++) {
        f32x16 total[TILE_HEADS] = {{0}};
        for (int slot = 0; slot < region->tokens; slot += LANES) {
            const f32x16 scale = load16(of_slots + slot) * region->step;
            for (int h = 0; h < heads; h++) {
                const f32x16 factor = load16(weights + h * tile->stride + slot) * scale;
                store16(weights + h * tile->stride + slot, factor);
                total[h] += factor;
            }
        }
        const float centre = 0.5f - (1 << (region->bits - 1));
        for (int h = 0; h < heads; h++) {
            const float constant = centre * sum_lanes(total[h]);
            for (float *x = tile->sums + h * dim; x < tile->sums + (h + 1) * dim; x += LANES)
                store16(x, load16(x) + constant);
        }
        const Product product = {region,  segment,      tile->ahead, region->tokens, dim,
                                 weights, tile->stride, tile->sums,  dim};
        multiply(&product, heads);
        weights += region->tokens;
        of_slots += region->tokens;
    }
}
