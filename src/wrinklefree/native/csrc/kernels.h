/* The inner loops that differ between instruction sets, behind one table.
 *
 * Ternary weights lie in tiles of 64 rows x 4 columns, 64 bytes each; the tiles of one block of 64 rows follow each other
 * along the columns, so a product reads memory once, in order. Byte 4 r + j of a tile (r < 16, j < 4) holds the codes
 * (weight + 1) of column j for the rows r, 16 + r, 32 + r, 48 + r in bits 0-1, 2-3, 4-5, 6-7. A lane is a row: nothing
 * is summed across lanes, four activations are broadcast at a time, and one 64-byte load feeds four dot instructions.
 * Masks replace shifts: code * 4^p is still an unsigned byte, and the sums are shifted once at the end, exactly
 * (2 * 64 * 127 * columns < 2^31, so columns <= WF_MAX_COLUMNS).
 *
 * 8-bit weights lie in tiles of 64 rows x 4 columns, 256 bytes each: byte 4 r + j is (weight + 128) of row r, column j.
 *
 * 4-bit weights have a multiplier (0 to 63) for every row and 32 columns: value = multiplier * (nibble - 8) * scale of the row,
 * so that sums stay integers. 64 rows x 32 columns take 1088 bytes: 8 tiles of 4 columns, 128 bytes each, then the 64
 * multipliers. Byte 4 r + j of a tile holds column j of the rows r and 16 + r in its low and high nibble; byte 64 + 4 r + j
 * that of the rows 32 + r and 48 + r. (8 * 63 * 127 * columns < 2^31, so columns <= WF_MAX_NIBBLE_COLUMNS.)
 *
 * Integer products are the same for every instruction set. Float sums have a fixed order (16 partial sums, or along the
 * sequence), so the sets with fused multiply-add agree bit for bit; plain C has none and differs in the last bits.
 */
#ifndef WRINKLEFREE_KERNELS_H
#define WRINKLEFREE_KERNELS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "engine.h"

#define WF_ROWS 64         /* rows a block; also what widths are padded to */
#define WF_KEY_BLOCK 32    /* positions a block of the key cache */
#define WF_VALUE_PAD 16    /* a head's values are padded to this */
#define WF_QUERY_ROWS 4    /* query rows that share one read of keys and values */
#define WF_MAX_COLUMNS 131072
#define WF_WIDE_STEPS (127 * 128) /* of two planes that stand in for activations without quantization */
#define WF_HEAD_STEPS (63 * 128)  /* of the head's: neither plane leaves -64..64, so that two products with bytes fit 16 bits */
#define WF_NIBBLE_GROUP 8    /* tiles that share their rows' multipliers */
#define WF_NIBBLE_BYTES 1088 /* of such a group */
#define WF_MAX_NIBBLE_COLUMNS 32768
/* Bytes from what is read to what is fetched: the CPU's own prefetcher stops at page borders, and this gains 10 to 20 % (with
 * four tokens, whose arithmetic hides the wait, twice). Beyond the end nothing happens. */
#define WF_AHEAD 2048

/* Activation codes of some tokens. Two planes hold codes of up to 15 bits, high * 128 + low, as two rows of int8. */
typedef struct {
    int8_t *codes;  /* [tokens][planes][stride] */
    float *scales;  /* [tokens] */
    int32_t *sums;  /* [tokens][planes], of the codes */
    size_t stride;
    size_t planes;
    int32_t steps; /* the largest magnitude's code: up to 127 of one plane, up to 127 * 128 of two */
} WfCodes;

/* Where integer products go: y = (sum - offset * sum of codes) * scale of token * scale of row (+ bias) (+ y). */
typedef struct {
    const float *row_scales; /* or NULL: `scale` for all */
    const float *bias;       /* or NULL */
    float scale;
    int32_t offset;
    int32_t add;
    size_t rows; /* valid rows of this block */
    float *y;
    size_t stride;
} WfFinish;

/* A row of logits whose gradient is wanted, see vocabulary.h. */
typedef struct {
    const float *student, *teacher; /* [width]; teacher or NULL */
    size_t width;
    int32_t powers; /* of the student: 1 or 2 */
    float factors[2], weights[2], student_largest;
    float teacher_factor, teacher_weight, teacher_largest;
    float *gradient;
} WfRowGradient;

typedef struct {
    const char *name;
    /* sums[t][row] = sum over columns of stored code * codes[t][column], t < tokens. */
    void (*ternary)(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums);
    /* The same of bytes and codes of at most 64. */
    void (*bytes)(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums);
    /* sums of multiplier * (nibble - 8) * code; `groups` is a multiple of WF_NIBBLE_GROUP. */
    void (*nibbles)(const uint8_t *tiles, size_t groups, const int8_t *codes, size_t stride, size_t tokens, int32_t *sums);
    void (*finish)(const int32_t *sums, size_t first, size_t tokens, const WfCodes *codes, const WfFinish *finish);
    void (*quantize)(const float *x, size_t width, size_t token, const WfCodes *codes);
    void (*decode)(const int8_t *codes, float scale, size_t width, float *y);
    void (*ternarize)(const float *weights, float scale, size_t count, int8_t *codes);
    /* code * scale of the rows r, 16 + r, ... of a block: `planes` rows of so many columns, y a row of `stride`. */
    void (*unpack)(const uint8_t *tiles, size_t r, size_t planes, size_t columns, float scale, float *y, size_t stride);
    void (*rms_norm)(const float *x, const float *gain, size_t width, float eps, float *y);
    void (*rotate)(float *x, const float *cosines, const float *sines, size_t half);
    void (*gate)(const float *gate, const float *up, size_t width, int squared_relu, float *y);
    /* By type of the cache. Attention of up to WF_QUERY_ROWS rows to one head's cache; row r sees lengths[r] positions, which do not decrease. */
    void (*attend[4])(const void *keys, const void *values, size_t head_dim, const float *queries, size_t rows,
                      const size_t *lengths, float *scores, size_t scores_stride, float *y);
    void (*store[4])(void *keys, void *values, size_t head_dim, size_t position, const float *key, const float *value);
    void (*load_row[3])(const void *row, size_t width, float *y);
    void (*dot_row[2])(const void *row, size_t width, const float *x, size_t stride, size_t tokens, float *y, size_t y_stride);
    /* Of logits, see vocabulary.h. */
    void (*add_powers)(const float *x, size_t width, size_t count, const float *factors, WfRowSums *row);
    float (*logits_gradient)(const WfRowGradient *row);
} WfKernels;

extern const WfKernels wf_plain;
#if defined(__x86_64__)
extern const WfKernels wf_avx2, wf_avxvnni, wf_avx512, wf_amx;
#elif defined(__aarch64__)
extern const WfKernels wf_neon;
#endif

/* By name, or the best; NULL where this CPU lacks it. */
const WfKernels *wf_kernels(const char *name);

static inline size_t wf_padded(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

/* Half to even; a NaN stays one. Without a branch, so that loops become vectors. */
static inline uint16_t wf_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
    return (uint16_t)((int32_t)(bits & 0x7fffffffu) > 0x7f800000 ? nan : rounded);
}

/* Bytes of WF_KEY_BLOCK positions of one head: keys, or values with padded width. */
static inline size_t wf_cache_block(int32_t type, size_t width) {
    return WF_KEY_BLOCK * (type == WF_F32 ? width * 4 : type == WF_F16 ? width * 2 : width + sizeof(float));
}

#endif
