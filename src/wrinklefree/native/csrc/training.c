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
    const int8_t *codes;
    uint8_t *tiles;
    size_t rows, columns, groups;
} Pack;

/* Four codes plus one; bytes do not carry into each other. */
static uint32_t stored(const Pack *job, size_t row, size_t column) {
    uint32_t four = 0;
    if (row < job->rows) {
        const int8_t *codes = job->codes + row * job->columns + column;
        if (column + 4 <= job->columns) memcpy(&four, codes, 4);
        else memcpy(&four, codes, job->columns - column);
    }
    return ((four & 0x7f7f7f7fu) + 0x01010101u) ^ (four & 0x80808080u);
}

static void pack_block(void *argument, size_t block, size_t worker) {
    (void)worker;
    const Pack *job = argument;
    uint8_t *tiles = job->tiles + block * job->groups * 64;
    for (size_t r = 0; r < 16; r++)
        for (size_t g = 0; g < job->groups; g++) {
            const size_t row = block * WF_ROWS + r, column = 4 * g;
            const uint32_t byte = stored(job, row, column) | stored(job, row + 16, column) << 2 | stored(job, row + 32, column) << 4 |
                                  stored(job, row + 48, column) << 6;
            memcpy(tiles + 64 * g + 4 * r, &byte, 4);
        }
}

int32_t wf_pack(WfRunner *runner, int32_t rows, int32_t columns, const int8_t *codes, uint8_t *tiles) {
    if (rows < 1 || columns < 1) return 1;
    Pack job = {codes, tiles, (size_t)rows, (size_t)columns, wf_padded((size_t)columns, 4) / 4};
    wf_pool_run(runner->pool, wf_padded((size_t)rows, WF_ROWS) / WF_ROWS, pack_block, &job);
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
