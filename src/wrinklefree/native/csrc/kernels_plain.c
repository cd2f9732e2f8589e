/* Plain C: runs anywhere, and is what the others are tested against. */
#include "kernels.h"

static void ternary(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    for (size_t t = 0; t < tokens; t++, codes += stride, sums += WF_ROWS) {
        for (int row = 0; row < WF_ROWS; row++) sums[row] = 0;
        for (size_t g = 0; g < groups; g++)
            for (int plane = 0; plane < 4; plane++)
                for (int r = 0; r < 16; r++)
                    for (int j = 0; j < 4; j++)
                        sums[16 * plane + r] += (tiles[64 * g + 4 * r + j] >> 2 * plane & 3) * codes[4 * g + j];
    }
}

static void bytes(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    for (size_t t = 0; t < tokens; t++, codes += stride, sums += WF_ROWS) {
        for (int row = 0; row < WF_ROWS; row++) sums[row] = 0;
        for (size_t g = 0; g < groups; g++)
            for (int row = 0; row < WF_ROWS; row++)
                for (int j = 0; j < 4; j++) sums[row] += tiles[256 * g + 4 * row + j] * codes[4 * g + j];
    }
}

static void nibbles(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums) {
    for (size_t t = 0; t < tokens; t++, codes += stride, sums += WF_ROWS) {
        for (int row = 0; row < WF_ROWS; row++) sums[row] = 0;
        for (size_t g = 0; g < groups; g++) {
            const uint8_t *group = tiles + g / WF_NIBBLE_GROUP * WF_NIBBLE_BYTES, *tile = group + g % WF_NIBBLE_GROUP * 128;
            const uint8_t *multipliers = group + WF_NIBBLE_GROUP * 128;
            for (int row = 0; row < WF_ROWS; row++)
                for (int j = 0; j < 4; j++) {
                    int nibble = tile[row / 32 * 64 + row % 16 * 4 + j] >> row / 16 % 2 * 4 & 15;
                    sums[row] += multipliers[row] * (nibble - 8) * codes[4 * g + j];
                }
        }
    }
}

#define SET(name) plain_##name
#define TARGET
#define LANES 4
#define MIX_VECTORS 2
#define vec_fma(a, b, c) ((a) * (b) + (c))
#define load_halves(pointer) plain_load_halves(pointer)
#define half_of(value) plain_half_of(value)
#define load_codes(pointer) plain_load_codes(pointer)

typedef float plain_four __attribute__((vector_size(16), aligned(4), may_alias));

static float float_of(uint16_t half) {
    union { uint32_t bits; float value; } result, magic = {.bits = 113u << 23};
    result.bits = (half & 0x7fffu) << 13;
    uint32_t exponent = result.bits & 0x0f800000u;
    result.bits += 112u << 23;
    if (exponent == 0x0f800000u) result.bits += 112u << 23; /* infinity and NaN */
    if (!exponent) { /* zero and subnormal */
        result.bits += 1u << 23;
        result.value -= magic.value;
    }
    result.bits |= (half & 0x8000u) << 16;
    return result.value;
}

/* Round half to even; the caller keeps |value| within the halves' range or NaN. */
static uint16_t plain_half_of(float value) {
    union { float value; uint32_t bits; } in = {.value = value}, magic = {.bits = 126u << 23};
    uint32_t sign = in.bits >> 16 & 0x8000u, half;
    in.bits &= 0x7fffffffu;
    if (in.bits > 0x7f800000u) half = 0x7e00u;
    else if (in.bits < 113u << 23) { /* subnormal: let the adder round */
        in.value += magic.value;
        half = in.bits - magic.bits;
    } else {
        half = (in.bits - (112u << 23) + 0xfffu + (in.bits >> 13 & 1)) >> 13;
    }
    return (uint16_t)(half | sign);
}

static inline plain_four plain_load_halves(const uint16_t *halves) {
    return (plain_four){float_of(halves[0]), float_of(halves[1]), float_of(halves[2]), float_of(halves[3])};
}

static inline plain_four plain_load_codes(const int8_t *codes) { return (plain_four){codes[0], codes[1], codes[2], codes[3]}; }

#include "floats.h"

KERNELS(wf_plain, "plain", ternary, bytes, nibbles);
