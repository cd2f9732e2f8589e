/* Float loops, compiled once for every instruction set that includes this file.
 *
 * The includer defines SET(name), TARGET, LANES (floats a register), vec_fma, load_halves, half_of and load_codes. Buffers are padded
 * to 64 floats, so loops over widths need no tail; per-head loops, whose widths are not padded, have one.
 */
#include <math.h>
#include <string.h>

#include "kernels.h"

typedef float SET(vec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t SET(ivec) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int8_t SET(bytes) __attribute__((vector_size(LANES), aligned(1), may_alias));
#define VEC SET(vec)
#define IVEC SET(ivec)
#define INLINE TARGET static inline __attribute__((always_inline))
#define PARTS (16 / LANES)

INLINE VEC SET(load)(const float *x) { return *(const VEC *)x; }
INLINE void SET(save)(float *x, VEC value) { *(VEC *)x = value; }
INLINE VEC SET(splat)(float x) { return x - (VEC){0}; }
INLINE VEC SET(choose)(IVEC mask, VEC yes, VEC no) { return (VEC)((mask & (IVEC)yes) | (~mask & (IVEC)no)); }

/* Sum of 16 partial sums, in one order for all instruction sets. */
INLINE float SET(total)(const VEC *parts) {
    float lanes[16];
    for (int part = 0; part < PARTS; part++) SET(save)(lanes + part * LANES, parts[part]);
    for (int step = 8; step; step /= 2)
        for (int lane = 0; lane < step; lane++) lanes[lane] += lanes[lane + step];
    return lanes[0];
}

/* e^x to about a unit in the last place for -87 <= x <= 88, beyond clamped (Cody-Waite reduction, Taylor to degree 7). */
INLINE VEC SET(exponential)(VEC x) {
    x = SET(choose)(x > 88.0f, SET(splat)(88.0f), x);
    x = SET(choose)(x < -87.0f, SET(splat)(-87.0f), x);
    const VEC magic = SET(splat)(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    VEC shifted = vec_fma(x, SET(splat)(1.44269504f), magic);
    VEC n = shifted - magic;
    VEC r = vec_fma(n, SET(splat)(-0.693145751953125f), x);
    r = vec_fma(n, SET(splat)(-1.42860677e-6f), r);
    VEC y = SET(splat)(1.0f / 5040);
    y = vec_fma(y, r, SET(splat)(1.0f / 720));
    y = vec_fma(y, r, SET(splat)(1.0f / 120));
    y = vec_fma(y, r, SET(splat)(1.0f / 24));
    y = vec_fma(y, r, SET(splat)(1.0f / 6));
    y = vec_fma(y, r, SET(splat)(0.5f));
    y = vec_fma(y, r, SET(splat)(1.0f));
    y = vec_fma(y, r, SET(splat)(1.0f));
    return (VEC)((IVEC)y + (((IVEC)shifted - (IVEC)magic) << 23));
}

TARGET static void SET(rms_norm)(const float *x, const float *gain, size_t width, float eps, float *y) {
    VEC squares[PARTS] = {{0}};
    size_t i = 0;
    for (; i + 16 <= width; i += 16)
        for (int part = 0; part < PARTS; part++) {
            VEC value = SET(load)(x + i + part * LANES);
            squares[part] = vec_fma(value, value, squares[part]);
        }
    float sum = SET(total)(squares);
    for (; i < width; i++) sum += x[i] * x[i];
    float inverse = 1.0f / sqrtf(sum / (float)width + eps);
    for (i = 0; i < width; i++) y[i] = x[i] * inverse * gain[i];
}

/* codes = round_half_even(x * steps / g) with g = max(max |x|, 1e-5), as quantization/activation_quant.py rounds. */
INLINE void SET(quantize_vector)(VEC x, float steps, float range, size_t place, size_t count, const WfCodes *codes, int8_t *row,
                                 IVEC *sums) {
    VEC rounded = x * SET(splat)(steps) / SET(splat)(range) + SET(splat)(12582912.0f);
    IVEC code = (IVEC)rounded - (IVEC)SET(splat)(12582912.0f), high = code;
    if (codes->planes == 2) {
        high = (code + 64) >> 7;
        IVEC low = code - (high << 7);
        SET(bytes) narrow = __builtin_convertvector(low, SET(bytes));
        memcpy(row + codes->stride + place, &narrow, count);
        sums[1] += low;
    }
    SET(bytes) narrow = __builtin_convertvector(high, SET(bytes));
    memcpy(row + place, &narrow, count);
    sums[0] += high;
}

TARGET static void SET(quantize)(const float *x, size_t width, size_t token, const WfCodes *codes) {
    int8_t *row = codes->codes + token * codes->planes * codes->stride;
    const size_t whole = width / LANES * LANES;
    float tail[LANES] = {0};
    memcpy(tail, x + whole, (width - whole) * sizeof(float));
    const IVEC magnitude = (IVEC){0} + 0x7fffffff; /* without the sign, bits of floats order as integers do, NaN above all */
    IVEC largest = *(const IVEC *)tail & magnitude, sums[2] = {{0}, {0}};
    for (size_t i = 0; i < whole; i += LANES) {
        IVEC bits = *(const IVEC *)(x + i) & magnitude, greater = bits > largest;
        largest = (bits & greater) | (largest & ~greater);
    }
    int32_t lanes[LANES], most = 0;
    float range;
    *(IVEC *)lanes = largest;
    for (int lane = 0; lane < LANES; lane++) most = lanes[lane] > most ? lanes[lane] : most;
    memcpy(&range, &most, 4);
    range = range < 1e-5f ? 1e-5f : range;
    const float steps = (float)codes->steps;
    codes->scales[token] = range / steps;
    int32_t *totals = codes->sums + token * codes->planes;
    for (size_t plane = 0; plane < codes->planes; plane++) totals[plane] = 0;
    if (!isfinite(range)) { /* the scale carries it on: 0 * inf and 0 * NaN are NaN */
        memset(row, 0, codes->planes * codes->stride);
        return;
    }
    for (size_t i = 0; i < whole; i += LANES) SET(quantize_vector)(SET(load)(x + i), steps, range, i, LANES, codes, row, sums);
    if (whole < width) SET(quantize_vector)(SET(load)(tail), steps, range, whole, width - whole, codes, row, sums);
    for (size_t plane = 0; plane < codes->planes; plane++) {
        memset(row + plane * codes->stride + width, 0, codes->stride - width);
        *(IVEC *)lanes = sums[plane];
        for (int lane = 0; lane < LANES; lane++) totals[plane] += lanes[lane];
    }
}

TARGET static void SET(decode)(const int8_t *codes, float scale, size_t width, float *y) {
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) SET(save)(y + i, load_codes(codes + i) * SET(splat)(scale));
    for (; i < width; i++) y[i] = (float)codes[i] * scale;
}

/* clip(round_half_even(w / scale), -1, 1), as quantization/weight_quant.py rounds. */
INLINE IVEC SET(ternary_codes)(VEC w, VEC scale) {
    const VEC magic = SET(splat)(12582912.0f), most = SET(splat)(1.0f);
    VEC x = w / scale;
    x = SET(choose)(x > most, most, x);
    x = SET(choose)(x < -most, -most, x);
    return (IVEC)(x + magic) - (IVEC)magic;
}

TARGET static void SET(ternarize)(const float *weights, float scale, size_t count, int8_t *codes) {
    size_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        SET(bytes) narrow = __builtin_convertvector(SET(ternary_codes)(SET(load)(weights + i), SET(splat)(scale)), SET(bytes));
        memcpy(codes + i, &narrow, LANES);
    }
    if (i == count) return;
    float tail[LANES] = {0};
    memcpy(tail, weights + i, (count - i) * sizeof(float));
    SET(bytes) narrow = __builtin_convertvector(SET(ternary_codes)(SET(load)(tail), SET(splat)(scale)), SET(bytes));
    memcpy(codes + i, &narrow, count - i);
}

TARGET static void SET(unpack)(const uint8_t *tiles, size_t r, size_t planes, size_t columns, float scale, float *y, size_t stride) {
    typedef float Eight __attribute__((vector_size(32), aligned(4), may_alias));
    typedef uint8_t Bytes __attribute__((vector_size(8), aligned(1), may_alias));
    for (size_t i = 0; i < columns; i += 8) {
        uint32_t pair[2] = {0, 0};
        memcpy(&pair[0], tiles + 16 * i + 4 * r, 4);
        if (i + 4 < columns) memcpy(&pair[1], tiles + 16 * i + 64 + 4 * r, 4);
        const uint64_t stored = pair[0] | (uint64_t)pair[1] << 32;
        for (size_t plane = 0; plane < planes; plane++) {
            const uint64_t codes = stored >> 2 * plane & 0x0303030303030303u;
            const Eight values = __builtin_convertvector(*(const Bytes *)&codes, Eight) * scale - scale; /* exact */
            if (i + 8 <= columns) *(Eight *)(y + plane * stride + i) = values;
            else memcpy(y + plane * stride + i, &values, (columns - i) * sizeof(float));
        }
    }
}

INLINE VEC SET(finished)(const int32_t *sums, const int32_t *offsets, size_t planes, float scale, const WfFinish *to, size_t row) {
    VEC y = __builtin_convertvector(*(const IVEC *)(sums + row) - offsets[0], VEC);
    if (planes == 2) y = y * 128.0f + __builtin_convertvector(*(const IVEC *)(sums + WF_ROWS + row) - offsets[1], VEC);
    if (to->row_scales) y *= scale * SET(load)(to->row_scales + row);
    else y *= SET(splat)(scale * to->scale);
    if (to->bias) y += SET(load)(to->bias + row);
    return y;
}

TARGET static void SET(finish)(const int32_t *sums, size_t first, size_t tokens, const WfCodes *codes, const WfFinish *to) {
    for (size_t t = 0; t < tokens; t++, sums += codes->planes * WF_ROWS) {
        const int32_t *totals = codes->sums + (first + t) * codes->planes;
        const int32_t offsets[2] = {to->offset * totals[0], codes->planes == 2 ? to->offset * totals[1] : 0};
        const float scale = codes->scales[first + t];
        float *out = to->y + (first + t) * to->stride;
        size_t row = 0;
        for (; row + LANES <= to->rows; row += LANES) {
            VEC y = SET(finished)(sums, offsets, codes->planes, scale, to, row);
            if (to->add) y += SET(load)(out + row);
            SET(save)(out + row, y);
        }
        if (row < to->rows) {
            float tail[LANES];
            SET(save)(tail, SET(finished)(sums, offsets, codes->planes, scale, to, row));
            for (size_t i = row; i < to->rows; i++) out[i] = to->add ? out[i] + tail[i - row] : tail[i - row];
        }
    }
}

/* Rotary positions of one head in Hugging Face's order: pair i is (x[i], x[half + i]). */
TARGET static void SET(rotate)(float *x, const float *cosines, const float *sines, size_t half) {
    for (size_t i = 0; i < half; i++) {
        float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

TARGET static void SET(gate)(const float *gate, const float *up, size_t width, int squared_relu, float *y) {
    for (size_t i = 0; i < width; i += LANES) {
        VEC g = SET(load)(gate + i), activated;
        if (squared_relu) {
            VEC positive = SET(choose)(g < 0.0f, SET(splat)(0.0f), g); /* NaN stays */
            activated = positive * positive;
        } else {
            activated = g / (1.0f + SET(exponential)(-g));
        }
        SET(save)(y + i, activated * SET(load)(up + i));
    }
}

/* Scores to probabilities, in place; returns 1 / their sum (the mixture is divided, not the probabilities). The `end - length`
 * places after `length` become zero. `end` is a multiple of 16. */
TARGET static float SET(softmax)(float *scores, size_t length, size_t end, float scale) {
    size_t covered = wf_padded(length, 16);
    for (size_t i = length; i < covered; i++) scores[i] = -INFINITY;
    VEC largest = SET(splat)(-INFINITY);
    for (size_t i = 0; i < covered; i += LANES) {
        VEC value = SET(load)(scores + i);
        largest = SET(choose)(largest > value, largest, value);
    }
    float lanes[LANES], maximum = -INFINITY;
    SET(save)(lanes, largest);
    for (int lane = 0; lane < LANES; lane++) maximum = lanes[lane] > maximum ? lanes[lane] : maximum;
    VEC sums[PARTS] = {{0}};
    for (size_t i = 0; i < covered; i += 16)
        for (int part = 0; part < PARTS; part++) {
            VEC value = SET(exponential)((SET(load)(scores + i + part * LANES) - SET(splat)(maximum)) * SET(splat)(scale));
            SET(save)(scores + i + part * LANES, value);
            sums[part] += value; /* the padding adds less than 1e-36 to a sum of at least 1: nothing */
        }
    memset(scores + length, 0, (end - length) * sizeof(float));
    return 1.0f / SET(total)(sums);
}

#define KV(name) SET(name##_f32)
#define KV_KIND WF_F32
#define KV_TYPE float
#define KV_LOAD(pointer) SET(load)(pointer)
#define KV_STORE(value) (value)
#include "attention.h"
#undef KV
#undef KV_KIND
#undef KV_TYPE
#undef KV_LOAD
#undef KV_STORE
#define KV(name) SET(name##_f16)
#define KV_KIND WF_F16
#define KV_TYPE uint16_t
#define KV_LOAD(pointer) load_halves(pointer)
#define KV_STORE(value) half_of((value) > 65504.0f ? 65504.0f : (value) < -65504.0f ? -65504.0f : (value)) /* never infinity; NaN stays */
#include "attention.h"
#undef KV
#undef KV_KIND
#undef KV_TYPE
#undef KV_LOAD
#undef KV_STORE
#define KV(name) SET(name##_int8)
#define KV_KIND WF_INT8
#define KV_TYPE int8_t
#define KV_LOAD(pointer) load_codes(pointer)
#include "attention.h"

TARGET static void SET(load_row_bf16)(const void *row, size_t width, float *y) {
    for (size_t i = 0; i < width; i++) {
        uint32_t bits = (uint32_t)((const uint16_t *)row)[i] << 16;
        memcpy(y + i, &bits, 4);
    }
}

#include "vocabulary.h"

#define KERNELS(symbol, label, ternary_function, bytes_function, nibbles_function)                                                        \
    const WfKernels symbol = {                                                                                          \
        .name = label, .ternary = ternary_function, .bytes = bytes_function, .nibbles = nibbles_function,                   \
        .finish = SET(finish),                                                                                          \
        .quantize = SET(quantize), .decode = SET(decode), .ternarize = SET(ternarize), .unpack = SET(unpack), .rms_norm = SET(rms_norm), .rotate = SET(rotate), .gate = SET(gate),                 \
        .attend = {[WF_F32] = SET(attend_f32), [WF_F16] = SET(attend_f16), [WF_INT8] = SET(attend_int8)},                   \
        .store = {[WF_F32] = SET(store_f32), [WF_F16] = SET(store_f16), [WF_INT8] = SET(store_int8)},                       \
        .load_row = {SET(load_row_f32), SET(load_row_f16), SET(load_row_bf16)},                                         \
        .dot_row = {SET(dot_row_f32), SET(dot_row_f16)},                                                                \
        .add_powers = SET(add_powers), .logits_gradient = SET(logits_gradient),                                         \
    }
