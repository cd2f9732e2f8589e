/* AVX2 with and without VNNI.
 *
 * Without VNNI, vpmaddubsw sums two products into 16 bits: after one 4-bit shift the planes are code and 4 * code, so 16 steps
 * stay below 16 * 2 * 8 * 127 = 32512, then they are widened. 8-bit weights have codes of at most 64, so 2 * 255 * 64 fits.
 *
 * Sixteen registers hold eight sums: of a whole tile for one token, of half a tile (8 rows of each plane) for two, of two planes
 * of half a tile for four. They are named by macro, since compilers spill arrays of registers at half the speed. Weights are
 * walked in chunks that stay in the first-level cache, so memory is read once and in order, and the sums of a chunk are added
 * to totals in memory.
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

enum { CHUNK = 16 /* steps that 16 bits hold; also what is widened at once */ };

#define HOLD(x) ({ __asm__ volatile("" : "+x"(x)); })
#define EIGHT(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define ZERO(i) __m256i s##i = _mm256_setzero_si256();
#define ADD(i, w, x) s##i = _mm256_add_epi16(s##i, _mm256_maddubs_epi16(w, x)), HOLD(s##i)
#define WIDEN(i) total[i] = _mm256_add_epi32(total[i], _mm256_madd_epi16(s##i, ones));
#define CODES(t) broadcast(codes + (t) * stride + 4 * g)

/* `tokens` is 1, 2 or 4, and so is the number of parts of a tile: all of it; a half; a half + 2 * (its upper two planes). */
INLINE void ternary_part(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, const int part,
                         __m256i *total) {
    const __m256i low = _mm256_set1_epi8(3), high = _mm256_set1_epi8(12), ones = _mm256_set1_epi16(1);
    EIGHT(ZERO)
    tiles += 32 * (part & 1);
    for (size_t g = 0; g < groups; g++) {
        __builtin_prefetch(tiles + 64 * g + WF_AHEAD);
        __m256i w = LOAD(tiles + 64 * g);
        if (tokens == 1) {
            __m256i x = CODES(0), v = LOAD(tiles + 64 * g + 32);
            ADD(0, _mm256_and_si256(w, low), x), ADD(1, _mm256_and_si256(w, high), x);
            ADD(4, _mm256_and_si256(v, low), x), ADD(5, _mm256_and_si256(v, high), x);
            w = _mm256_srli_epi16(w, 4), v = _mm256_srli_epi16(v, 4);
            ADD(2, _mm256_and_si256(w, low), x), ADD(3, _mm256_and_si256(w, high), x);
            ADD(6, _mm256_and_si256(v, low), x), ADD(7, _mm256_and_si256(v, high), x);
        } else if (tokens == 2) {
            __m256i x = CODES(0), y = CODES(1), c = _mm256_and_si256(w, low);
            ADD(0, c, x), ADD(4, c, y);
            c = _mm256_and_si256(w, high), w = _mm256_srli_epi16(w, 4);
            ADD(1, c, x), ADD(5, c, y);
            c = _mm256_and_si256(w, low);
            ADD(2, c, x), ADD(6, c, y);
            c = _mm256_and_si256(w, high);
            ADD(3, c, x), ADD(7, c, y);
        } else {
            if (part & 2) w = _mm256_srli_epi16(w, 4);
            __m256i c = _mm256_and_si256(w, low), d = _mm256_and_si256(w, high), x = CODES(0);
            ADD(0, c, x), ADD(1, d, x), x = CODES(1);
            ADD(2, c, x), ADD(3, d, x), x = CODES(2);
            ADD(4, c, x), ADD(5, d, x), x = CODES(3);
            ADD(6, c, x), ADD(7, d, x);
        }
    }
    EIGHT(WIDEN)
}

/* Sum `i` of `ternary_part` holds 8 rows from 16 * plane + 8 * half on. */
INLINE void ternary_tokens(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    __m256i total[4][8];
    for (int part = 0; part < tokens; part++)
        for (int i = 0; i < 8; i++) total[part][i] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g += CHUNK) {
        const size_t count = groups - g < CHUNK ? groups - g : CHUNK;
#pragma GCC unroll 4
        for (int part = 0; part < tokens; part++)
            ternary_part(tiles + 64 * g, count, codes + 4 * g, stride, tokens, part, total[part]);
    }
    for (int part = 0; part < tokens; part++)
        for (int i = 0; i < 8; i++) {
            const int half = tokens == 1 ? i / 4 : part & 1, token = tokens == 4 ? i / 2 : tokens == 2 ? i / 4 : 0;
            const int plane = tokens == 4 ? i % 2 + (part & 2) : i % 4;
            STORE(sums + token * WF_ROWS + 16 * plane + 8 * half, _mm256_srai_epi32(total[part][i], plane % 2 ? 2 : 0));
        }
}

#define IN_FOURS_TWOS_AND_ONES(call)                                                                                    \
    for (; tokens >= 4; tokens -= 4, codes += 4 * stride, sums += 4 * WF_ROWS) call(tiles, groups, codes, stride, 4, sums); \
    for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) call(tiles, groups, codes, stride, 2, sums); \
    if (tokens) call(tiles, groups, codes, stride, 1, sums);

TARGET static void ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    IN_FOURS_TWOS_AND_ONES(ternary_tokens)
}

#define ADD_WIDE(i, w, x) s##i = _mm256_add_epi32(s##i, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones)), HOLD(s##i)
#define TAKE(i) __m256i s##i = total[i];
#define GIVE(i) total[i] = s##i;

/* The eight sums are 8 / tokens vectors of 8 rows for each token. */
INLINE void bytes_part(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, __m256i *total) {
    const __m256i ones = _mm256_set1_epi16(1);
    EIGHT(TAKE)
    for (size_t g = 0; g < groups; g++) {
        for (int line = 0; line < 4 / tokens; line++) __builtin_prefetch(tiles + 256 * g + WF_AHEAD + 64 * line);
#define VECTOR(i) LOAD(tiles + 256 * g + 32 * (i))
        __m256i x = CODES(0);
        if (tokens == 1) {
            ADD_WIDE(0, VECTOR(0), x), ADD_WIDE(1, VECTOR(1), x), ADD_WIDE(2, VECTOR(2), x), ADD_WIDE(3, VECTOR(3), x);
            ADD_WIDE(4, VECTOR(4), x), ADD_WIDE(5, VECTOR(5), x), ADD_WIDE(6, VECTOR(6), x), ADD_WIDE(7, VECTOR(7), x);
        } else if (tokens == 2) {
            __m256i y = CODES(1), w = VECTOR(0);
            ADD_WIDE(0, w, x), ADD_WIDE(4, w, y), w = VECTOR(1);
            ADD_WIDE(1, w, x), ADD_WIDE(5, w, y), w = VECTOR(2);
            ADD_WIDE(2, w, x), ADD_WIDE(6, w, y), w = VECTOR(3);
            ADD_WIDE(3, w, x), ADD_WIDE(7, w, y);
        } else {
            __m256i v = VECTOR(0), w = VECTOR(1);
            ADD_WIDE(0, v, x), ADD_WIDE(1, w, x), x = CODES(1);
            ADD_WIDE(2, v, x), ADD_WIDE(3, w, x), x = CODES(2);
            ADD_WIDE(4, v, x), ADD_WIDE(5, w, x), x = CODES(3);
            ADD_WIDE(6, v, x), ADD_WIDE(7, w, x);
        }
    }
    EIGHT(GIVE)
}

INLINE void bytes_tokens(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    __m256i total[4][8];
    const int vectors = 8 / tokens;
    for (int part = 0; part < tokens; part++)
        for (int i = 0; i < 8; i++) total[part][i] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g += CHUNK) {
        const size_t count = groups - g < CHUNK ? groups - g : CHUNK;
        for (int part = 0; part < tokens; part++)
            bytes_part(tiles + 256 * g + 32 * vectors * part, count, codes + 4 * g, stride, tokens, total[part]);
    }
    for (int part = 0; part < tokens; part++)
        for (int i = 0; i < 8; i++) STORE(sums + i / vectors * WF_ROWS + 8 * (vectors * part + i % vectors), total[part][i]);
}

TARGET static void bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    IN_FOURS_TWOS_AND_ONES(bytes_tokens)
}

/* 4 bits: a group's 8 steps stay below 8 * 2 * 15 * 127 = 30480 in 16 bits; one vpmaddwd then widens them and multiplies by the
 * rows' multipliers. Stored are nibbles, so eight times the group's sum of codes (32512 at most) is taken off in the same way. */
#define SCALE(i, m, off)                                                                                                \
    total[i] = _mm256_add_epi32(total[i], _mm256_sub_epi32(_mm256_madd_epi16(s##i, m), _mm256_madd_epi16(off, m)))

INLINE __m256i eightfold_sum(const int8_t *codes) {
    __m256i sum = _mm256_maddubs_epi16(_mm256_set1_epi8(8), LOAD(codes)); /* [16] of two codes each */
    sum = _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4e));
    half = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0xb1));
    return _mm256_and_si256(_mm256_broadcastd_epi32(half), _mm256_set1_epi32(0xffff)); /* the other 16 bits add nothing */
}

INLINE __m256i multipliers_of(const uint8_t *rows) {
    __m256i m = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)rows));
    return _mm256_or_si256(m, _mm256_slli_epi32(m, 16));
}

/* One group for 32 of the rows: four vectors of 8 rows for each token. */
INLINE void nibbles_part(const uint8_t *tiles, const int8_t *codes, size_t stride, const int tokens, const int half, __m256i *total) {
    const __m256i low = _mm256_set1_epi8(15);
    EIGHT(ZERO)
    for (size_t g = 0; g < WF_NIBBLE_GROUP; g++) {
        const uint8_t *tile = tiles + 128 * g + 64 * half;
        __builtin_prefetch(tile + WF_AHEAD);
        __m256i a = LOAD(tile), b = LOAD(tile + 32), x = CODES(0), y = tokens == 2 ? CODES(1) : x, w = _mm256_and_si256(a, low);
#define BOTH(first, second)                                                                                             \
    ADD(first, w, x);                                                                                                   \
    if (tokens == 2) ADD(second, w, y)
        BOTH(0, 4);
        w = _mm256_and_si256(b, low);
        BOTH(1, 5);
        w = _mm256_and_si256(_mm256_srli_epi16(a, 4), low);
        BOTH(2, 6);
        w = _mm256_and_si256(_mm256_srli_epi16(b, 4), low);
        BOTH(3, 7);
    }
    const __m256i off = eightfold_sum(codes), other = tokens == 2 ? eightfold_sum(codes + stride) : off;
    const uint8_t *rows = tiles + 128 * WF_NIBBLE_GROUP + 32 * half;
    __m256i m = multipliers_of(rows);
    SCALE(0, m, off);
    if (tokens == 2) SCALE(4, m, other);
    m = multipliers_of(rows + 8);
    SCALE(1, m, off);
    if (tokens == 2) SCALE(5, m, other);
    m = multipliers_of(rows + 16);
    SCALE(2, m, off);
    if (tokens == 2) SCALE(6, m, other);
    m = multipliers_of(rows + 24);
    SCALE(3, m, off);
    if (tokens == 2) SCALE(7, m, other);
}

INLINE void nibbles_tokens(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    __m256i total[2][8];
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 8; i++) total[half][i] = _mm256_setzero_si256();
    for (size_t g = 0; g < groups; g += WF_NIBBLE_GROUP, tiles += WF_NIBBLE_BYTES)
        for (int half = 0; half < 2; half++) nibbles_part(tiles, codes + 4 * g, stride, tokens, half, total[half]);
    for (int half = 0; half < 2; half++)
        for (int i = 0; i < 4 * tokens; i++) STORE(sums + i / 4 * WF_ROWS + 32 * half + 8 * (i % 4), total[half][i]);
}

TARGET static void nibbles(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) nibbles_tokens(tiles, groups, codes, stride, 2, sums);
    if (tokens) nibbles_tokens(tiles, groups, codes, stride, 1, sums);
}

KERNELS(wf_avx2, "avx2", ternary, bytes, nibbles);

#define IN_TWOS_AND_ONES(call)                                                                                          \
    for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) { call(2); }                             \
    if (tokens) { call(1); }

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
