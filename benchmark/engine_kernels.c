/* Loops around the engine's integer kernels, and what the machine can do at most; compiled together with the engine's sources.
 *
 * A peak is the rate of the instructions that the kernels are made of, out of registers: nothing is loaded, decoded or kept.
 */
#include <stdint.h>

#include "kernels.h"

#define API __attribute__((visibility("default")))

/* Products of `count` matrices that follow each other in memory with `tokens` rows of codes. Returns 0, or 1 for an instruction
 * set that is not there. */
API int32_t bench_products(const char *isa, int32_t kind, const uint8_t *tiles, size_t count, size_t blocks, size_t block_bytes,
                           size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    const WfKernels *kernels = wf_kernels(isa);
    if (!kernels) return 1;
    for (size_t block = 0; block < count * blocks; block++)
        (kind == 2 ? kernels->nibbles : kind == 1 ? kernels->bytes : kernels->ternary)(tiles + block * block_bytes, groups, codes,
                                                                                       stride, tokens, sums);
    return 0;
}

#if defined(__x86_64__)
#include <immintrin.h>

/* Reads memory and fetches `ahead` bytes further on. */
__attribute__((target("avx2"))) API uint64_t bench_read(const uint8_t *memory, size_t bytes, size_t ahead) {
    __m256i sum = _mm256_setzero_si256(), other = sum;
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(memory + i + ahead);
        sum = _mm256_xor_si256(sum, _mm256_load_si256((const __m256i *)(memory + i)));
        other = _mm256_xor_si256(other, _mm256_load_si256((const __m256i *)(memory + i + 32)));
    }
    uint64_t lanes[4];
    _mm256_storeu_si256((__m256i *)lanes, _mm256_xor_si256(sum, other));
    return lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
}

/* Each loop runs twelve independent chains, as an instruction takes some cycles to give its result; KEEP hides from the compiler
 * that it multiplies the same numbers. Returns products (of two 8-bit numbers) a repeat. */
#define CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
#define PEAK(name, isa, vec, zero, bits, DO)                                                                            \
    __attribute__((target(isa))) static size_t name(size_t repeats) {                                                   \
        vec a = zero, b = zero, CHAINS(ZERO) last = zero;                                                               \
        KEEP(b);                                                                                                        \
        for (size_t r = 0; r < repeats; r++) { CHAINS(DO) }                                                             \
        CHAINS(KEEP_CHAIN)                                                                                              \
        KEEP(last);                                                                                                     \
        return 12 * bits / 8;                                                                                           \
    }
#define ZERO(i) s##i = a,
#define KEEP_CHAIN(i) KEEP(s##i);
#define KEEP(x) __asm__ volatile("" : "+x"(x))
#define ADD_AVX2(i) KEEP(a); s##i = _mm256_add_epi16(s##i, _mm256_maddubs_epi16(a, b));
#define ADD_AVXVNNI(i) KEEP(a); s##i = _mm256_dpbusd_avx_epi32(s##i, a, b);
#define ADD_AVX512(i) KEEP(a); s##i = _mm512_dpbusd_epi32(s##i, a, b);
PEAK(peak_avx2, "avx2", __m256i, _mm256_setzero_si256(), 256, ADD_AVX2)
PEAK(peak_avxvnni, "avx2,avxvnni", __m256i, _mm256_setzero_si256(), 256, ADD_AVXVNNI)
#undef KEEP
#define KEEP(x) __asm__ volatile("" : "+v"(x))
PEAK(peak_avx512, "avx512f,avx512vnni", __m512i, _mm512_setzero_si512(), 512, ADD_AVX512)

/* Products of `repeats` repeats, 0 where no peak is known. */
API size_t bench_peak(const char *isa, size_t repeats) {
    const WfKernels *kernels = wf_kernels(isa);
    if (kernels == &wf_avx2) return repeats * peak_avx2(repeats);
    if (kernels == &wf_avxvnni) return repeats * peak_avxvnni(repeats);
    if (kernels == &wf_avx512) return repeats * peak_avx512(repeats);
    return 0;
}
#else
API uint64_t bench_read(const uint8_t *memory, size_t bytes, size_t ahead) {
    uint64_t sums[8] = {0};
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch(memory + i + ahead);
        for (int k = 0; k < 8; k++) sums[k] ^= ((const uint64_t *)(const void *)(memory + i))[k];
    }
    return sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}
API size_t bench_peak(const char *isa, size_t repeats) { return (void)isa, (void)repeats, 0; }
#endif
