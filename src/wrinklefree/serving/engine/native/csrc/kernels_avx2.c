/* AVX2 with and without VNNI. 32 bytes are half a tile (8 rows of each plane), so each half has its own pass.
 *
 * Without VNNI, vpmaddubsw sums two products into 16 bits: after one 4-bit shift the planes are code and 4 * code, so 16 steps
 * stay below 16 * 2 * 8 * 127 = 32512, then they are widened. 8-bit weights would saturate; |w| * sign(x, w) does not.
 */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

#define SET(name) avx2_##name
#define TARGET __attribute__((target("avx2,fma,f16c")))
#define LANES 8
#define MIX_VECTORS 2
#define vec_fma(a, b, c) ((VEC)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define load_halves(pointer) ((VEC)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(pointer))))
#define half_of(value) _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)
#define load_codes(pointer) ((VEC)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(pointer)))))
#include "floats.h"

#define LOAD(pointer) _mm256_loadu_si256((const __m256i *)(pointer))
#define STORE(pointer, value) _mm256_storeu_si256((__m256i *)(pointer), value)

INLINE __m256i broadcast(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return _mm256_set1_epi32(four);
}

/* Half a tile for one token, or for two that share the loads. */
INLINE void ternary_half(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), ones = _mm256_set1_epi16(1);
    __m256i total[2][4];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) total[t][p] = _mm256_setzero_si256();
    for (size_t start = 0; start < groups; start += 16) {
        __m256i part[2][4];
        for (int t = 0; t < tokens; t++)
            for (int p = 0; p < 4; p++) part[t][p] = _mm256_setzero_si256();
        size_t end = start + 16 < groups ? start + 16 : groups;
        for (size_t g = start; g < end; g++) {
            __builtin_prefetch(tiles + 64 * g + WF_AHEAD);
            __m256i w = LOAD(tiles + 64 * g), shifted = _mm256_srli_epi16(w, 4);
            __m256i w0 = _mm256_and_si256(w, low), w1 = _mm256_and_si256(w, high);
            __m256i w2 = _mm256_and_si256(shifted, low), w3 = _mm256_and_si256(shifted, high);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                __m256i x = broadcast(codes + t * stride + 4 * g);
                part[t][0] = _mm256_add_epi16(part[t][0], _mm256_maddubs_epi16(w0, x));
                part[t][1] = _mm256_add_epi16(part[t][1], _mm256_maddubs_epi16(w1, x));
                part[t][2] = _mm256_add_epi16(part[t][2], _mm256_maddubs_epi16(w2, x));
                part[t][3] = _mm256_add_epi16(part[t][3], _mm256_maddubs_epi16(w3, x));
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 4
            for (int p = 0; p < 4; p++) total[t][p] = _mm256_add_epi32(total[t][p], _mm256_madd_epi16(part[t][p], ones));
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) STORE(sums + t * WF_ROWS + 16 * p, _mm256_srai_epi32(total[t][p], p % 2 ? 2 : 0));
}

INLINE void bytes_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    const __m256i flip = _mm256_set1_epi8((char)128), ones = _mm256_set1_epi16(1);
    __m256i total[2][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g++) {
        __builtin_prefetch(tiles + 256 * g + WF_AHEAD);
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __m256i w = _mm256_xor_si256(LOAD(tiles + 256 * g + 32 * h), flip), magnitude = _mm256_abs_epi8(w);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                __m256i x = _mm256_sign_epi8(broadcast(codes + t * stride + 4 * g), w);
                total[t][h] = _mm256_add_epi32(total[t][h], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
            }
        }
    }
    for (int t = 0; t < tokens; t++) { /* the table's sums are of weight + 128 */
        int32_t sum = 0;
        for (size_t i = 0; i < 4 * groups; i++) sum += codes[t * stride + i];
        for (int h = 0; h < 2; h++)
            STORE(sums + t * WF_ROWS + 8 * h, _mm256_add_epi32(total[t][h], _mm256_set1_epi32(128 * sum)));
    }
}

#define IN_TWOS_AND_ONES(call)                                                                                          \
    for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) { call(2); }                             \
    if (tokens) { call(1); }

TARGET static void ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define HALVES(count)                                                                                                   \
    for (int h = 0; h < 2; h++) ternary_half(tiles + 32 * h, groups, codes, stride, count, sums + 8 * h)
    IN_TWOS_AND_ONES(HALVES)
}

TARGET static void bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define QUARTERS(count)                                                                                                 \
    for (int q = 0; q < 4; q++) bytes_quarter(tiles + 64 * q, groups, codes, stride, count, sums + 16 * q)
    IN_TWOS_AND_ONES(QUARTERS)
}

/* 4 bits: a group's 8 steps stay below 8 * 2 * 15 * 127 = 30480 in 16 bits. A quarter of a tile is 8 rows of two planes. */
INLINE void nibbles_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens,
                            size_t multipliers, int32_t *sums) {
    const __m256i low = _mm256_set1_epi8(15), eights = _mm256_set1_epi8(8), ones = _mm256_set1_epi16(1);
    __m256i total[2][2];
    for (int t = 0; t < tokens; t++) total[t][0] = total[t][1] = _mm256_setzero_si256();
    for (size_t first = 0; first < groups; first += WF_NIBBLE_GROUP, tiles += WF_NIBBLE_BYTES) {
        __m256i part[2][3];
        for (int t = 0; t < tokens; t++) part[t][0] = part[t][1] = part[t][2] = _mm256_setzero_si256();
        for (size_t g = 0; g < WF_NIBBLE_GROUP; g++) {
            __builtin_prefetch(tiles + 128 * g + WF_AHEAD);
            __m256i w = LOAD(tiles + 128 * g), w0 = _mm256_and_si256(w, low), w1 = _mm256_and_si256(_mm256_srli_epi16(w, 4), low);
#pragma GCC unroll 2
            for (int t = 0; t < tokens; t++) {
                __m256i x = broadcast(codes + t * stride + 4 * (first + g));
                part[t][0] = _mm256_add_epi16(part[t][0], _mm256_maddubs_epi16(w0, x));
                part[t][1] = _mm256_add_epi16(part[t][1], _mm256_maddubs_epi16(w1, x));
                part[t][2] = _mm256_add_epi16(part[t][2], _mm256_maddubs_epi16(eights, x));
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++)
#pragma GCC unroll 2
            for (int p = 0; p < 2; p++) {
                __m256i by = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(tiles + multipliers + 16 * p)));
                __m256i sum = _mm256_sub_epi32(_mm256_madd_epi16(part[t][p], ones), _mm256_madd_epi16(part[t][2], ones));
                total[t][p] = _mm256_add_epi32(total[t][p], _mm256_mullo_epi32(by, sum));
            }
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 2; p++) STORE(sums + t * WF_ROWS + 16 * p, total[t][p]);
}

TARGET static void nibbles(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define NIBBLE_QUARTERS(count)                                                                                          \
    for (size_t q = 0, row; q < 4; q++)                                                                                 \
        row = q / 2 * 32 + q % 2 * 8,                                                                                   \
        nibbles_quarter(tiles + 32 * q, groups, codes, stride, count, 1024 + row - 32 * q, sums + row)
    IN_TWOS_AND_ONES(NIBBLE_QUARTERS)
}

KERNELS(wf_avx2, "avx2", ternary, bytes, nibbles);

#define VNNI_TARGET __attribute__((target("avx2,fma,f16c,avxvnni")))
#define VNNI_INLINE VNNI_TARGET static inline __attribute__((always_inline))

VNNI_INLINE void vnni_half(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    const __m256i mask0 = _mm256_set1_epi8(3), mask1 = _mm256_set1_epi8(12), mask2 = _mm256_set1_epi8(48);
    const __m256i mask3 = _mm256_set1_epi8((char)192);
    __m256i s[2][4];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) s[t][p] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g++) {
        __builtin_prefetch(tiles + 64 * g + WF_AHEAD);
        __m256i w = LOAD(tiles + 64 * g), w0 = _mm256_and_si256(w, mask0), w1 = _mm256_and_si256(w, mask1);
        __m256i w2 = _mm256_and_si256(w, mask2), w3 = _mm256_and_si256(w, mask3);
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++) {
            int32_t four;
            memcpy(&four, codes + t * stride + 4 * g, 4);
            __m256i x = _mm256_set1_epi32(four);
            s[t][0] = _mm256_dpbusd_avx_epi32(s[t][0], w0, x), s[t][1] = _mm256_dpbusd_avx_epi32(s[t][1], w1, x);
            s[t][2] = _mm256_dpbusd_avx_epi32(s[t][2], w2, x), s[t][3] = _mm256_dpbusd_avx_epi32(s[t][3], w3, x);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) STORE(sums + t * WF_ROWS + 16 * p, _mm256_srai_epi32(s[t][p], 2 * p));
}

VNNI_INLINE void vnni_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    __m256i s[2][2];
    for (int t = 0; t < tokens; t++) s[t][0] = s[t][1] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g++) {
        __builtin_prefetch(tiles + 256 * g + WF_AHEAD);
        __m256i w0 = LOAD(tiles + 256 * g), w1 = LOAD(tiles + 256 * g + 32);
#pragma GCC unroll 2
        for (int t = 0; t < tokens; t++) {
            int32_t four;
            memcpy(&four, codes + t * stride + 4 * g, 4);
            __m256i x = _mm256_set1_epi32(four);
            s[t][0] = _mm256_dpbusd_avx_epi32(s[t][0], w0, x), s[t][1] = _mm256_dpbusd_avx_epi32(s[t][1], w1, x);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int h = 0; h < 2; h++) STORE(sums + t * WF_ROWS + 8 * h, s[t][h]);
}

VNNI_TARGET static void vnni_ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define VNNI_HALVES(count)                                                                                              \
    for (int h = 0; h < 2; h++) vnni_half(tiles + 32 * h, groups, codes, stride, count, sums + 8 * h)
    IN_TWOS_AND_ONES(VNNI_HALVES)
}

VNNI_TARGET static void vnni_bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define VNNI_QUARTERS(count)                                                                                            \
    for (int q = 0; q < 4; q++) vnni_quarter(tiles + 64 * q, groups, codes, stride, count, sums + 16 * q)
    IN_TWOS_AND_ONES(VNNI_QUARTERS)
}

KERNELS(wf_avxvnni, "avx-vnni", vnni_ternary, vnni_bytes, nibbles);
#else
typedef int wf_not_x86;
#endif
