// Sums of a buffer's 32-bit words: sums[0] = sum(w_i), sums[1] = sum(i * w_i), modulo 2^64.
//
// Eight lanes a row: lane l of row r holds word 8 r + l. Adding the running row sum after every row weights each row by
// the rows behind it, so that no multiplication stands in the loop.
#include <stdint.h>
#include <string.h>

typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));

void zs_checksum(const uint8_t *data, uint64_t size, uint64_t *sums) {
    const uint64_t rows = size / 32;
    u64x8 plain = {0}, behind = {0};
    for (uint64_t r = 0; r < rows; r++) {
        u32x8 words;
        memcpy(&words, data + 32 * r, 32);
        behind += plain;  // each row so far moves one row further from the end
        plain += __builtin_convertvector(words, u64x8);
    }
    uint64_t total = 0, weighted = 0;
    for (int lane = 0; lane < 8; lane++) {
        // sum over rows of r * w = (rows - 1) * sum(w) - sum of (rows - 1 - r) * w, and `behind` is the latter
        uint64_t by_row = rows ? (rows - 1) * plain[lane] - behind[lane] : 0;
        total += plain[lane];
        weighted += 8 * by_row + (uint64_t)lane * plain[lane];
    }
    for (uint64_t offset = 32 * rows, i = 8 * rows; offset < size; offset += 4, i++) {
        uint32_t word = 0;
        memcpy(&word, data + offset, size - offset < 4 ? size - offset : 4);
        total += word;
        weighted += i * word;
    }
    sums[0] = total;
    sums[1] = weighted;
}
