/* ARM with the dot product extension: sdot adds groups of four signed products into four sums, a quarter of a tile's rows. */
#if defined(__aarch64__)
#include <arm_neon.h>
#include <string.h>

#include "kernels.h"

#define SET(name) neon_##name
#define TARGET __attribute__((target("arch=armv8.2-a+dotprod")))
#define LANES 4
#define MIX_VECTORS 4
#define vec_fma(a, b, c) ((VEC)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define load_halves(pointer) neon_load_halves(pointer)
#define half_of(value) neon_half_of(value)
#define load_codes(pointer) neon_load_codes(pointer)

typedef float neon_four __attribute__((vector_size(16), aligned(4), may_alias));

TARGET static inline __attribute__((always_inline)) neon_four neon_load_halves(const uint16_t *halves) {
    return (neon_four)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
}

TARGET static inline __attribute__((always_inline)) uint16_t neon_half_of(float value) {
    return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(value))), 0);
}

TARGET static inline __attribute__((always_inline)) neon_four neon_load_codes(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    int16x8_t wide = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(four)));
    return (neon_four)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}

#include "floats.h"

INLINE int8x16_t broadcast(const int8_t *codes) {
    int32_t four;
    memcpy(&four, codes, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* Planes 0-2 stay where they are; plane 3 would be negative as a signed byte and is shifted down. */
INLINE void ternary_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    int32x4_t s[4][4];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) s[t][p] = vdupq_n_s32(0);
    for (size_t g = 0; g < groups; g++) {
        uint8x16_t w = vld1q_u8(tiles + 64 * g);
        int8x16_t w0 = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(3))), w1 = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(12)));
        int8x16_t w2 = vreinterpretq_s8_u8(vandq_u8(w, vdupq_n_u8(48))), w3 = vreinterpretq_s8_u8(vshrq_n_u8(w, 6));
#pragma GCC unroll 4
        for (int t = 0; t < tokens; t++) {
            int8x16_t x = broadcast(codes + t * stride + 4 * g);
            s[t][0] = vdotq_s32(s[t][0], w0, x), s[t][1] = vdotq_s32(s[t][1], w1, x);
            s[t][2] = vdotq_s32(s[t][2], w2, x), s[t][3] = vdotq_s32(s[t][3], w3, x);
        }
    }
    for (int t = 0; t < tokens; t++) {
        vst1q_s32(sums + t * WF_ROWS, s[t][0]), vst1q_s32(sums + t * WF_ROWS + 16, vshrq_n_s32(s[t][1], 2));
        vst1q_s32(sums + t * WF_ROWS + 32, vshrq_n_s32(s[t][2], 4)), vst1q_s32(sums + t * WF_ROWS + 48, s[t][3]);
    }
}

INLINE void bytes_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens, int32_t *sums) {
    int32x4_t s[4][4], sum[4];
    for (int t = 0; t < tokens; t++) {
        sum[t] = vdupq_n_s32(0);
        for (int p = 0; p < 4; p++) s[t][p] = vdupq_n_s32(0);
    }
    for (size_t g = 0; g < groups; g++)
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            int8x16_t w = vreinterpretq_s8_u8(veorq_u8(vld1q_u8(tiles + 256 * g + 16 * p), vdupq_n_u8(128)));
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                int8x16_t x = broadcast(codes + t * stride + 4 * g);
                s[t][p] = vdotq_s32(s[t][p], w, x);
                if (p == 0) sum[t] = vdotq_s32(sum[t], vdupq_n_s8(1), x);
            }
        }
    for (int t = 0; t < tokens; t++) /* the table's sums are of weight + 128 */
        for (int p = 0; p < 4; p++) vst1q_s32(sums + t * WF_ROWS + 4 * p, vaddq_s32(s[t][p], vshlq_n_s32(sum[t], 7)));
}

/* 4 bits: nibble - 8 is a signed byte; a group's sums are multiplied by the rows' multipliers. */
INLINE void nibbles_quarter(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, const int tokens,
                            size_t multipliers, int32_t *sums) {
    const int8x16_t eights = vdupq_n_s8(8);
    int32x4_t total[4][4];
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) total[t][p] = vdupq_n_s32(0);
    for (size_t first = 0; first < groups; first += WF_NIBBLE_GROUP, tiles += WF_NIBBLE_BYTES) {
        int32x4_t s[4][4];
        for (int t = 0; t < tokens; t++)
            for (int p = 0; p < 4; p++) s[t][p] = vdupq_n_s32(0);
        for (size_t g = 0; g < WF_NIBBLE_GROUP; g++) {
            uint8x16_t a = vld1q_u8(tiles + 128 * g), b = vld1q_u8(tiles + 128 * g + 64), low = vdupq_n_u8(15);
            int8x16_t w0 = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(a, low)), eights);
            int8x16_t w1 = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(a, 4)), eights);
            int8x16_t w2 = vsubq_s8(vreinterpretq_s8_u8(vandq_u8(b, low)), eights);
            int8x16_t w3 = vsubq_s8(vreinterpretq_s8_u8(vshrq_n_u8(b, 4)), eights);
#pragma GCC unroll 4
            for (int t = 0; t < tokens; t++) {
                int8x16_t x = broadcast(codes + t * stride + 4 * (first + g));
                s[t][0] = vdotq_s32(s[t][0], w0, x), s[t][1] = vdotq_s32(s[t][1], w1, x);
                s[t][2] = vdotq_s32(s[t][2], w2, x), s[t][3] = vdotq_s32(s[t][3], w3, x);
            }
        }
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            int32_t by[4];
            for (int i = 0; i < 4; i++) by[i] = tiles[multipliers + 16 * p + i];
            for (int t = 0; t < tokens; t++) total[t][p] = vmlaq_s32(total[t][p], vld1q_s32(by), s[t][p]);
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int p = 0; p < 4; p++) vst1q_s32(sums + t * WF_ROWS + 16 * p, total[t][p]);
}

#define IN_FOURS_AND_ONES(call)                                                                                         \
    for (; tokens >= 4; tokens -= 4, codes += 4 * stride, sums += 4 * WF_ROWS) { call(4); }                             \
    for (; tokens; tokens--, codes += stride, sums += WF_ROWS) { call(1); }

TARGET static void ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define QUARTERS(count)                                                                                                 \
    for (int q = 0; q < 4; q++) ternary_quarter(tiles + 16 * q, groups, codes, stride, count, sums + 4 * q)
    IN_FOURS_AND_ONES(QUARTERS)
}

TARGET static void bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define BYTE_QUARTERS(count)                                                                                            \
    for (int q = 0; q < 4; q++) bytes_quarter(tiles + 64 * q, groups, codes, stride, count, sums + 16 * q)
    IN_FOURS_AND_ONES(BYTE_QUARTERS)
}

TARGET static void nibbles(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
#define NIBBLE_QUARTERS(count)                                                                                          \
    for (size_t q = 0; q < 4; q++) nibbles_quarter(tiles + 16 * q, groups, codes, stride, count, 1024 - 12 * q, sums + 4 * q)
    IN_FOURS_AND_ONES(NIBBLE_QUARTERS)
}

KERNELS(wf_neon, "neon-dotprod", ternary, bytes, nibbles);
#else
typedef int wf_not_arm;
#endif
