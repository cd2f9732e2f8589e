/* AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned by 64 signed bytes and adds groups of four into 16 sums. */
#if defined(__x86_64__)
#include <immintrin.h>
#include <string.h>

#include "kernels.h"

#define SET(name) avx512_##name
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")))
#define LANES 16
#define MIX_VECTORS 4
#define vec_fma(a, b, c) ((VEC)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define load_halves(pointer) ((VEC)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(pointer))))
#define half_of(value) _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)
#define load_codes(pointer) ((VEC)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(pointer)))))
#include "floats.h"

INLINE __m512i broadcast(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return _mm512_set1_epi32(four);
}

/* Scalars by macro: compilers spill arrays of registers here, at half the speed. */
#define SUMS(t) __m512i s##t##0 = zero, s##t##1 = zero, s##t##2 = zero, s##t##3 = zero
#define DOT(t)                                                                                                          \
    do {                                                                                                                \
        __m512i x = broadcast(codes + (t) * stride + 4 * g);                                                            \
        s##t##0 = _mm512_dpbusd_epi32(s##t##0, w0, x), s##t##1 = _mm512_dpbusd_epi32(s##t##1, w1, x);                   \
        s##t##2 = _mm512_dpbusd_epi32(s##t##2, w2, x), s##t##3 = _mm512_dpbusd_epi32(s##t##3, w3, x);                   \
    } while (0)
#define KEEP(t, shift)                                                                                                  \
    do {                                                                                                                \
        _mm512_storeu_si512(sums + (t) * WF_ROWS, s##t##0);                                                             \
        _mm512_storeu_si512(sums + (t) * WF_ROWS + 16, _mm512_srai_epi32(s##t##1, shift));                              \
        _mm512_storeu_si512(sums + (t) * WF_ROWS + 32, _mm512_srai_epi32(s##t##2, 2 * shift));                          \
        _mm512_storeu_si512(sums + (t) * WF_ROWS + 48, _mm512_srai_epi32(s##t##3, 3 * shift));                          \
    } while (0)
#define TERNARY_PLANES                                                                                                  \
    __builtin_prefetch(tiles + 64 * g + WF_AHEAD);                                                                      \
    __m512i w = _mm512_loadu_si512(tiles + 64 * g);                                                                     \
    __m512i w0 = _mm512_and_si512(w, mask0), w1 = _mm512_and_si512(w, mask1);                                           \
    __m512i w2 = _mm512_and_si512(w, mask2), w3 = _mm512_and_si512(w, mask3)
#define BYTE_PLANES                                                                                                     \
    __builtin_prefetch(tiles + 256 * g + WF_AHEAD), __builtin_prefetch(tiles + 256 * g + WF_AHEAD + 64);                \
    __builtin_prefetch(tiles + 256 * g + WF_AHEAD + 128), __builtin_prefetch(tiles + 256 * g + WF_AHEAD + 192);         \
    __m512i w0 = _mm512_loadu_si512(tiles + 256 * g), w1 = _mm512_loadu_si512(tiles + 256 * g + 64);                    \
    __m512i w2 = _mm512_loadu_si512(tiles + 256 * g + 128), w3 = _mm512_loadu_si512(tiles + 256 * g + 192)

/* Four tokens share each load (16 sums of 32 registers); what is left goes in twos and ones. */
#define PRODUCTS(name, planes, shift)                                                                                   \
    TARGET static void name(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens,     \
                            int32_t *sums) {                                                                            \
        const __m512i zero = _mm512_setzero_si512(), mask0 = _mm512_set1_epi8(3), mask1 = _mm512_set1_epi8(12);         \
        const __m512i mask2 = _mm512_set1_epi8(48), mask3 = _mm512_set1_epi8((char)192);                                \
        (void)mask0, (void)mask1, (void)mask2, (void)mask3;                                                             \
        for (; tokens >= 4; tokens -= 4, codes += 4 * stride, sums += 4 * WF_ROWS) {                                    \
            SUMS(0); SUMS(1); SUMS(2); SUMS(3);                                                                         \
            for (size_t g = 0; g < groups; g++) { planes; DOT(0); DOT(1); DOT(2); DOT(3); }                             \
            KEEP(0, shift); KEEP(1, shift); KEEP(2, shift); KEEP(3, shift);                                             \
        }                                                                                                               \
        for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) {                                    \
            SUMS(0); SUMS(1);                                                                                           \
            for (size_t g = 0; g < groups; g++) { planes; DOT(0); DOT(1); }                                             \
            KEEP(0, shift); KEEP(1, shift);                                                                             \
        }                                                                                                               \
        if (tokens) {                                                                                                   \
            SUMS(0); SUMS(1); /* two chains a plane hide the latency */                                                 \
            size_t g = 0;                                                                                               \
            for (; g + 2 <= groups; g++) {                                                                              \
                { planes; DOT(0); }                                                                                     \
                g++;                                                                                                    \
                { planes; ODD(); }                                                                                      \
            }                                                                                                           \
            if (g < groups) { planes; DOT(0); }                                                                         \
            s00 = _mm512_add_epi32(s00, s10), s01 = _mm512_add_epi32(s01, s11);                                         \
            s02 = _mm512_add_epi32(s02, s12), s03 = _mm512_add_epi32(s03, s13);                                         \
            KEEP(0, shift);                                                                                             \
        }                                                                                                               \
    }
#define ODD()                                                                                                           \
    do {                                                                                                                \
        __m512i x = broadcast(codes + 4 * g);                                                                           \
        s10 = _mm512_dpbusd_epi32(s10, w0, x), s11 = _mm512_dpbusd_epi32(s11, w1, x);                                   \
        s12 = _mm512_dpbusd_epi32(s12, w2, x), s13 = _mm512_dpbusd_epi32(s13, w3, x);                                   \
    } while (0)

PRODUCTS(ternary, TERNARY_PLANES, 2)
PRODUCTS(bytes, BYTE_PLANES, 0)

/* 4 bits: a group's sums, less eight times those of the codes, times the rows' multipliers. Two tokens share each load. */
#define NIBBLE_TOTALS(t) __m512i total##t##0 = zero, total##t##1 = zero, total##t##2 = zero, total##t##3 = zero
#define NIBBLE_DOT(t)                                                                                                   \
    do {                                                                                                                \
        DOT(t);                                                                                                         \
        n##t = _mm512_dpbusd_epi32(n##t, eights, broadcast(codes + (t) * stride + 4 * g));                              \
    } while (0)
#define SCALED(t, p, shift)                                                                                             \
    total##t##p = _mm512_add_epi32(total##t##p, _mm512_mullo_epi32(m##p, _mm512_sub_epi32(_mm512_srai_epi32(s##t##p, shift), n##t)))
#define NIBBLE_ADD(t) SCALED(t, 0, 0), SCALED(t, 1, 4), SCALED(t, 2, 0), SCALED(t, 3, 4)
#define NIBBLE_KEEP(t)                                                                                                  \
    _mm512_storeu_si512(sums + (t) * WF_ROWS, total##t##0), _mm512_storeu_si512(sums + (t) * WF_ROWS + 16, total##t##1),        \
    _mm512_storeu_si512(sums + (t) * WF_ROWS + 32, total##t##2), _mm512_storeu_si512(sums + (t) * WF_ROWS + 48, total##t##3)
#define MULTIPLIERS(p) _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + 1024 + 16 * (p))))
#define NIBBLES(sums_of, dots, adds)                                                                                    \
    for (size_t first = 0; first < groups; first += WF_NIBBLE_GROUP) {                                                  \
        const uint8_t *from = tiles + first / WF_NIBBLE_GROUP * WF_NIBBLE_BYTES;                                        \
        sums_of;                                                                                                        \
        for (size_t g = first; g < first + WF_NIBBLE_GROUP; g++) {                                                      \
            const uint8_t *tile = from + 128 * (g - first);                                                             \
            __builtin_prefetch(tile + WF_AHEAD), __builtin_prefetch(tile + WF_AHEAD + 64);                              \
            __m512i a = _mm512_loadu_si512(tile), b = _mm512_loadu_si512(tile + 64);                                    \
            __m512i w0 = _mm512_and_si512(a, low), w1 = _mm512_and_si512(a, high);                                      \
            __m512i w2 = _mm512_and_si512(b, low), w3 = _mm512_and_si512(b, high);                                      \
            dots;                                                                                                       \
        }                                                                                                               \
        __m512i m0 = MULTIPLIERS(0), m1 = MULTIPLIERS(1), m2 = MULTIPLIERS(2), m3 = MULTIPLIERS(3);                     \
        adds;                                                                                                           \
    }

TARGET static void nibbles(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    const __m512i zero = _mm512_setzero_si512(), low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)240);
    const __m512i eights = _mm512_set1_epi8(8);
    for (; tokens >= 2; tokens -= 2, codes += 2 * stride, sums += 2 * WF_ROWS) {
        NIBBLE_TOTALS(0);
        NIBBLE_TOTALS(1);
        NIBBLES(SUMS(0); SUMS(1); __m512i n0 = zero; __m512i n1 = zero, NIBBLE_DOT(0); NIBBLE_DOT(1), NIBBLE_ADD(0); NIBBLE_ADD(1))
        NIBBLE_KEEP(0), NIBBLE_KEEP(1);
    }
    if (tokens) {
        NIBBLE_TOTALS(0);
        NIBBLES(SUMS(0); __m512i n0 = zero, NIBBLE_DOT(0), NIBBLE_ADD(0))
        NIBBLE_KEEP(0);
    }
}

KERNELS(wf_avx512, "avx512-vnni", ternary, bytes, nibbles);

/* AMX: one instruction multiplies 16 tokens x 64 columns by 64 columns x 16 rows of the weight. The order that it wants of
 * its second operand, 16 times 16 rows x 4 columns in 64 bytes, is what masking one plane of 16 of our tiles gives. A slab of
 * columns is unpacked once for all tokens of a call and stays in the first-level cache. Few tokens are faster without. */
#define AMX_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c,amx-tile,amx-int8")))
enum { AMX_MIN_TOKENS = 12, SLAB = 8 /* operands of 64 columns */ };

typedef struct __attribute__((aligned(64))) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} TileConfig;

/* Tiles 0-3 hold sums (two groups of tokens x two planes of rows), 4 and 5 codes, 6 and 7 weights. */
AMX_TARGET static void configure(size_t first, size_t second) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) config.row_bytes[tile] = 64, config.rows[tile] = 16;
    config.rows[0] = config.rows[1] = config.rows[4] = (uint8_t)first;
    config.rows[2] = config.rows[3] = config.rows[5] = (uint8_t)(second ? second : 16);
    _tile_loadconfig(&config);
}

/* Where the operands of a slab lie: row `i` of plane `p` of operand `k` at weights + 4096 k + p * plane + i * row. */
typedef struct {
    const uint8_t *weights;
    size_t operands, plane, row;
} Operands;

/* Groups beyond the last become zero and add nothing. */
AMX_TARGET static Operands unpack(const uint8_t *tiles, size_t groups, size_t operands, int wide, uint8_t *weights) {
    const __m512i mask = _mm512_set1_epi8(3), zero = _mm512_setzero_si512();
    for (size_t g = 0; g < 16 * operands; g++) {
        uint8_t *to = weights + g / 16 * 4096 + g % 16 * 64;
        __m512i w0 = zero, w1 = zero, w2 = zero, w3 = zero;
        if (g < groups && wide) {
            const uint8_t *from = tiles + 256 * g;
            w0 = _mm512_loadu_si512(from), w1 = _mm512_loadu_si512(from + 64);
            w2 = _mm512_loadu_si512(from + 128), w3 = _mm512_loadu_si512(from + 192);
        } else if (g < groups) {
            __builtin_prefetch(tiles + 64 * g + WF_AHEAD);
            __m512i packed = _mm512_loadu_si512(tiles + 64 * g);
            w0 = _mm512_and_si512(packed, mask), w1 = _mm512_and_si512(_mm512_srli_epi16(packed, 2), mask);
            w2 = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask), w3 = _mm512_and_si512(_mm512_srli_epi16(packed, 6), mask);
        }
        _mm512_store_si512(to, w0), _mm512_store_si512(to + 1024, w1);
        _mm512_store_si512(to + 2048, w2), _mm512_store_si512(to + 3072, w3);
    }
    return (Operands){weights, operands, 1024, 64};
}

AMX_TARGET static void tiled(Operands from, const int8_t *codes, size_t stride, int two, int32_t *sums) {
    const size_t row = WF_ROWS * sizeof(int32_t);
    for (int plane = 0; plane < 4; plane += 2) {
        int32_t *first = sums + 16 * plane, *second = first + 16 * WF_ROWS;
        _tile_loadd(0, first, row);
        _tile_loadd(1, first + 16, row);
        if (two) {
            _tile_loadd(2, second, row);
            _tile_loadd(3, second + 16, row);
        }
        for (size_t k = 0; k < from.operands; k++) {
            const uint8_t *w = from.weights + 4096 * k + plane * from.plane;
            _tile_loadd(4, codes + 64 * k, stride);
            _tile_loadd(6, w, from.row);
            _tile_loadd(7, w + from.plane, from.row);
            _tile_dpbsud(0, 4, 6);
            _tile_dpbsud(1, 4, 7);
            if (two) {
                _tile_loadd(5, codes + 16 * stride + 64 * k, stride);
                _tile_dpbsud(2, 5, 6);
                _tile_dpbsud(3, 5, 7);
            }
        }
        _tile_stored(0, first, row);
        _tile_stored(1, first + 16, row);
        if (two) {
            _tile_stored(2, second, row);
            _tile_stored(3, second + 16, row);
        }
    }
}

/* Rows of codes are read up to a multiple of 64 columns, which is what `stride` is padded to. */
AMX_TARGET static void amx_products(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens,
                                    int32_t *sums, int wide) {
    uint8_t weights[SLAB * 4096] __attribute__((aligned(64)));
    memset(sums, 0, tokens * WF_ROWS * sizeof(int32_t));
    for (size_t g = 0, count; g < groups; g += count) {
        const uint8_t *from = tiles + (wide ? 256 : 64) * g;
        const size_t left = groups - g < 16 * SLAB ? groups - g : 16 * SLAB;
        Operands operands;
        if (wide && left >= 16) { /* 8-bit tiles are operands as they lie, all but a last incomplete one */
            operands = (Operands){from, left / 16, 64, 256};
            for (size_t line = 0; line < 64 * operands.operands; line++) __builtin_prefetch(from + 4096 + 64 * line);
        } else {
            operands = unpack(from, left, (left + 15) / 16, wide, weights);
        }
        count = 16 * operands.operands;
        size_t first = 0, second = 0;
        for (size_t t = 0; t < tokens; t += 32) {
            size_t rest = tokens - t, wanted = rest < 16 ? rest : 16, more = rest < 16 ? 0 : rest < 32 ? rest - 16 : 16;
            if (wanted != first || more != second) configure(first = wanted, second = more);
            tiled(operands, codes + t * stride + 4 * g, stride, more > 0, sums + t * WF_ROWS);
        }
    }
    _tile_release();
}

TARGET static void amx_ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    if (tokens < AMX_MIN_TOKENS) ternary(tiles, groups, codes, stride, tokens, sums);
    else amx_products(tiles, groups, codes, stride, tokens, sums, 0);
}

TARGET static void amx_bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    if (tokens < AMX_MIN_TOKENS) bytes(tiles, groups, codes, stride, tokens, sums);
    else amx_products(tiles, groups, codes, stride, tokens, sums, 1);
}

KERNELS(wf_amx, "amx-int8", amx_ternary, amx_bytes, nibbles);
#else
typedef int wf_not_x86;
#endif
