// What this machine can do at most: multiply-adds that stay in registers, and a sum over memory that no cache holds.

#include <omp.h>
#include <stdint.h>

#if defined(__AVX512F__)
#define WIDTH 16
#elif defined(__AVX__)
#define WIDTH 8
#else
#define WIDTH 4
#endif
#define CHAINS 12 // enough to hide the latency of a multiply-add, and with two operands they fit 16 registers

typedef float Lanes __attribute__((vector_size(4 * WIDTH)));

static double sum(const Lanes *parts, int count) {
    double total = 0;
    for (int part = 0; part < count; part++)
        for (int lane = 0; lane < WIDTH; lane++) total += parts[part][lane];
    return total;
}

// Floating-point operations of one round on one thread.
int64_t multiply_add_flops(void) { return 2 * CHAINS * WIDTH; }

// The sum is returned so that the compiler must compute it.
double multiply_add(int64_t rounds, int threads) {
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        Lanes chains[CHAINS], factor = (Lanes){0} + 0.999f, term = (Lanes){0} + 1e-3f * (float)omp_get_thread_num();
        for (int chain = 0; chain < CHAINS; chain++) chains[chain] = (Lanes){0} + (float)chain;
        for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 12
            for (int chain = 0; chain < CHAINS; chain++) chains[chain] = chains[chain] * factor + term;
        total += sum(chains, CHAINS);
    }
    return total;
}

// `bytes`: a multiple of 512 for each thread; what is left over is not read.
double read_memory(const char *memory, int64_t bytes, int threads) {
    enum { STREAMS = 8 };
    double total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int64_t each = bytes / threads / (int64_t)(STREAMS * sizeof(Lanes));
        const Lanes *from = (const Lanes *)memory + omp_get_thread_num() * each * STREAMS;
        Lanes sums[STREAMS] = {0};
        for (int64_t at = 0; at < each; at++, from += STREAMS)
#pragma GCC unroll 8
            for (int stream = 0; stream < STREAMS; stream++) sums[stream] += from[stream];
        total += sum(sums, STREAMS);
    }
    return total;
}
