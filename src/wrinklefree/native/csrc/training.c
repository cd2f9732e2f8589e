/* What a training step is made of: codes of activations, tiles of weights, their product. */
#include <string.h>

#include "engine.h"
#include "kernels.h"
#include "pool.h"
#include "product.h"
#include "runner.h"

typedef struct {
    WfRunner *runner;
    WfCodes codes;
    const void *x;
    size_t width;
    int32_t type;
} Encode;

static void encode_token(void *argument, size_t token, size_t worker) {
    const Encode *job = argument;
    const float *x = (const float *)job->x + token * job->width;
    if (job->type == WF_BF16) {
        float *row = job->runner->rows + worker * job->runner->width;
        job->runner->kernels->load_row[WF_BF16]((const uint16_t *)job->x + token * job->width, job->width, row);
        x = row;
    }
    job->runner->kernels->quantize(x, job->width, token, &job->codes);
}

enum { TOKENS_AT_ONCE = 16 };

/* Calls of `work` for groups of tokens: a claim costs more than a short row. */
typedef struct {
    WfWork work;
    void *job;
    size_t tokens;
} Groups;

static void group_of_tokens(void *argument, size_t item, size_t worker) {
    const Groups *groups = argument;
    size_t end = (item + 1) * TOKENS_AT_ONCE;
    for (size_t token = item * TOKENS_AT_ONCE; token < (end < groups->tokens ? end : groups->tokens); token++)
        groups->work(groups->job, token, worker);
}

static void for_tokens(WfPool *pool, size_t tokens, WfWork work, void *job) {
    Groups groups = {work, job, tokens};
    wf_pool_run(pool, (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE, group_of_tokens, &groups);
}

static int is_float(int32_t type) { return type == WF_F32 || type == WF_BF16; }

int32_t wf_encode(WfRunner *runner, int32_t tokens, int32_t width, int32_t type, const void *x, int32_t code_max, int8_t *codes,
                  float *scales) {
    if (tokens < 1 || width < 1 || code_max < 1 || code_max > 127 || !is_float(type)) return 1;
    if (!wf_runner_reserve(runner, (size_t)tokens, code_max, WF_ROWS)) return 1; /* for the sums, which nobody reads */
    if (type == WF_BF16 && !wf_runner_reserve_rows(runner, (size_t)width)) return 1;
    Encode job = {.runner = runner, .x = x, .width = (size_t)width, .type = type};
    job.codes = (WfCodes){codes, scales, runner->codes.sums, (size_t)width, 1, code_max};
    for_tokens(runner->pool, (size_t)tokens, encode_token, &job);
    return 0;
}

typedef struct {
    WfRunner *runner;
    const int8_t *codes;
    const float *scales;
    void *y;
    size_t width;
    int32_t type;
} Decode;

static void decode_token(void *argument, size_t token, size_t worker) {
    const Decode *job = argument;
    const int half = job->type == WF_BF16;
    float *row = half ? job->runner->rows + worker * job->runner->width : (float *)job->y + token * job->width;
    job->runner->kernels->decode(job->codes + token * job->width, job->scales[token], job->width, row);
    uint16_t *y = (uint16_t *)job->y + token * job->width;
    for (size_t i = 0; half && i < job->width; i++) y[i] = wf_bfloat16(row[i]);
}

int32_t wf_decode(WfRunner *runner, int32_t tokens, int32_t width, const int8_t *codes, const float *scales, int32_t type, void *y) {
    if (tokens < 1 || width < 1 || !is_float(type)) return 1;
    if (type == WF_BF16 && !wf_runner_reserve_rows(runner, (size_t)width)) return 1;
    Decode job = {runner, codes, scales, y, (size_t)width, type};
    for_tokens(runner->pool, (size_t)tokens, decode_token, &job);
    return 0;
}

typedef struct {
    WfRunner *runner;
    const float *weights;
    int8_t *codes;
    size_t count;
    float scale;
} Ternarize;

enum { WEIGHTS_AT_ONCE = 1 << 15 };

static void ternarize_part(void *argument, size_t part, size_t worker) {
    (void)worker;
    const Ternarize *job = argument;
    const size_t start = part * WEIGHTS_AT_ONCE, left = job->count - start;
    const size_t count = left < WEIGHTS_AT_ONCE ? left : WEIGHTS_AT_ONCE;
    job->runner->kernels->ternarize(job->weights + start, job->scale, count, job->codes + start);
}

int32_t wf_ternarize(WfRunner *runner, int64_t count, const float *weights, float scale, int8_t *codes) {
    if (count < 1) return 1;
    Ternarize job = {runner, weights, codes, (size_t)count, scale};
    wf_pool_run(runner->pool, ((size_t)count + WEIGHTS_AT_ONCE - 1) / WEIGHTS_AT_ONCE, ternarize_part, &job);
    return 0;
}

typedef struct {
    const int8_t *codes;
    uint8_t *tiles;
    size_t rows, columns, groups;
} Pack;

/* Codes plus one; bytes do not carry into each other. */
static inline uint64_t plus_one(const int8_t *codes, size_t count) {
    uint64_t eight = 0;
    memcpy(&eight, codes, count);
    return ((eight & 0x7f7f7f7f7f7f7f7fu) + 0x0101010101010101u) ^ (eight & 0x8080808080808080u);
}

static void pack_block(void *argument, size_t block, size_t worker) {
    (void)worker;
    const Pack *job = argument;
    uint8_t *tiles = job->tiles + block * job->groups * 64;
    for (size_t r = 0; r < 16; r++) {
        const size_t first = block * WF_ROWS + r, left = job->rows - (first < job->rows ? first : job->rows);
        const size_t planes = left > 48 ? 4 : (left + 15) / 16;
        const int8_t *codes = job->codes + first * job->columns;
        for (size_t g = 0; g < job->groups; g += 2) {
            const size_t rest = job->columns - 4 * g, count = rest < 8 ? rest : 8;
            uint64_t pair = 0;
            for (size_t plane = planes; plane < 4; plane++) pair |= (uint64_t)0x0101010101010101u << 2 * plane; /* zeros */
            if (count == 8)
                for (size_t plane = 0; plane < planes; plane++) pair |= plus_one(codes + 16 * plane * job->columns + 4 * g, 8) << 2 * plane;
            else
                for (size_t plane = 0; plane < planes; plane++) pair |= plus_one(codes + 16 * plane * job->columns + 4 * g, count) << 2 * plane;
            const uint32_t two[2] = {(uint32_t)pair, (uint32_t)(pair >> 32)};
            memcpy(tiles + 64 * g + 4 * r, &two[0], 4);
            if (g + 1 < job->groups) memcpy(tiles + 64 * (g + 1) + 4 * r, &two[1], 4);
        }
    }
}

int32_t wf_pack(WfRunner *runner, int32_t rows, int32_t columns, const int8_t *codes, uint8_t *tiles) {
    if (rows < 1 || columns < 1) return 1;
    Pack job = {codes, tiles, (size_t)rows, (size_t)columns, wf_padded((size_t)columns, 4) / 4};
    wf_pool_run(runner->pool, wf_padded((size_t)rows, WF_ROWS) / WF_ROWS, pack_block, &job);
    return 0;
}

typedef struct {
    WfRunner *runner;
    const uint8_t *tiles;
    void *y;
    size_t rows, columns, groups;
    float scale;
    int32_t type;
} Unpack;

static void unpack_block(void *argument, size_t block, size_t worker) {
    const Unpack *job = argument;
    const size_t columns = job->columns;
    const uint8_t *tiles = job->tiles + block * job->groups * 64;
    for (size_t r = 0; r < 16; r++) {
        const size_t first = block * WF_ROWS + r;
        if (first >= job->rows) return;
        const size_t left = job->rows - first, planes = left > 48 ? 4 : (left + 15) / 16;
        if (job->type == WF_F32) {
            job->runner->kernels->unpack(tiles, r, planes, columns, job->scale, (float *)job->y + first * columns, 16 * columns);
            continue;
        }
        float *values = job->runner->rows + worker * job->runner->width;
        job->runner->kernels->unpack(tiles, r, planes, columns, job->scale, values, columns);
        for (size_t plane = 0; plane < planes; plane++) {
            uint16_t *y = (uint16_t *)job->y + (first + 16 * plane) * columns;
            for (size_t i = 0; i < columns; i++) y[i] = wf_bfloat16(values[plane * columns + i]);
        }
    }
}

int32_t wf_unpack(WfRunner *runner, int32_t rows, int32_t columns, const uint8_t *tiles, float scale, int32_t type, void *y) {
    if (rows < 1 || columns < 1 || !is_float(type)) return 1;
    Unpack job = {runner, tiles, y, (size_t)rows, (size_t)columns, wf_padded((size_t)columns, 4) / 4, scale, type};
    if (type == WF_BF16 && !wf_runner_reserve_rows(runner, 4 * job.columns)) return 1;
    wf_pool_run(runner->pool, wf_padded(job.rows, WF_ROWS) / WF_ROWS, unpack_block, &job);
    return 0;
}

typedef struct {
    const int8_t *codes;
    WfCodes *to;
    size_t width;
} Sums;

static void sum_of_token(void *argument, size_t token, size_t worker) {
    (void)worker;
    const Sums *job = argument;
    const int8_t *codes = job->codes + token * job->width;
    int8_t *row = job->to->codes + token * job->to->stride;
    if (row != codes) memcpy(row, codes, job->width), memset(row + job->width, 0, job->to->stride - job->width);
    int32_t sum = 0;
    for (size_t i = 0; i < job->width; i++) sum += codes[i];
    job->to->sums[token] = sum;
}

int32_t wf_multiply(WfRunner *runner, const uint8_t *tiles, float scale, int32_t rows, int32_t columns, int32_t tokens,
                    const int8_t *codes, const float *scales, int32_t type, void *y) {
    if (tokens < 1 || rows < 1 || columns < 1 || columns > WF_MAX_COLUMNS || !is_float(type)) return 1;
    const size_t width = (size_t)columns, count = (size_t)tokens, stride = wf_padded(width, WF_ROWS);
    /* Kernels read whole padded rows: codes of another width are copied. */
    if (!wf_runner_reserve(runner, count, 127, stride == width ? WF_ROWS : stride)) return 1;
    WfCodes view = runner->codes;
    view.stride = stride, view.scales = (float *)scales;
    if (stride == width) view.codes = (int8_t *)codes;
    Sums sums = {codes, &view, width};
    for_tokens(runner->pool, count, sum_of_token, &sums);
    const WfLinear linear = {.tiles = tiles, .scale = scale, .rows = (int32_t)wf_padded((size_t)rows, WF_ROWS),
                             .columns = (int32_t)wf_padded(width, 4)};
    WfProducts job = {.kernels = runner->kernels, .count = 1, .tokens = count, .sums = runner->sums};
    job.products[0] = (WfProduct){.linear = &linear, .codes = &view, .stride = (size_t)rows, .rows = (size_t)rows};
    if (type == WF_BF16) job.products[0].rounded = y;
    else job.products[0].y = y;
    wf_products_run(runner->pool, &job);
    return 0;
}
