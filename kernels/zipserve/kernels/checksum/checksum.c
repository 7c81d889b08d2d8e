// Sums of a buffer's 32-bit words: sums[0] = sum(w_i), sums[1] = sum(i * w_i), modulo 2^64.
//
// Eight lanes a row: lane l of row r holds word 8 r + l. Adding the running row sum after every row weights each row by
// the rows behind it, so that no multiplication stands in the loop. A row is two vectors of four lanes: where a CPU has
// no vectors as long as ours, the compiler would take them apart word by word.
#include <stdint.h>
#include <string.h>

typedef uint32_t u32x4 __attribute__((vector_size(16)));
typedef uint64_t u64x4 __attribute__((vector_size(32)));

void zs_checksum(const uint8_t *data, uint64_t size, uint64_t *sums) {
    const uint64_t rows = size / 32;
    u64x4 plain[2] = {0}, behind[2] = {0};
    for (uint64_t r = 0; r < rows; r++) {
        for (int half = 0; half < 2; half++) {
            u32x4 words;
            memcpy(&words, data + 32 * r + 16 * half, 16);
            behind[half] += plain[half];  // each row so far moves one row further from the end
            plain[half] += __builtin_convertvector(words, u64x4);
        }
    }
    uint64_t total = 0, weighted = 0;
    for (int lane = 0; lane < 8; lane++) {
        const uint64_t sum = plain[lane / 4][lane % 4];
        // sum over rows of r * w = (rows - 1) * sum(w) - sum of (rows - 1 - r) * w, and `behind` is the latter
        uint64_t by_row = rows ? (rows - 1) * sum - behind[lane / 4][lane % 4] : 0;
        total += sum;
        weighted += 8 * by_row + (uint64_t)lane * sum;
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
