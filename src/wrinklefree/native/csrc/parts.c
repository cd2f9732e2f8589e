/* Parts of the engine by themselves: one projection for other people's nets, products and codes for tests. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "kernels.h"
#include "pool.h"
#include "product.h"

int32_t wf_products(const char *isa, int32_t kind, const uint8_t *tiles, int32_t groups, const int8_t *codes, int32_t stride,
                    int32_t tokens, int32_t *sums) {
    const WfKernels *kernels = wf_kernels(isa);
    if (!kernels || groups < 1 || stride < (int32_t)wf_padded((size_t)groups * 4, WF_ROWS) || tokens < 1 ||
        kind < 0 || kind > 2 || (kind == 2 && groups % WF_NIBBLE_GROUP))
        return 1;
    (kind == 2 ? kernels->nibbles : kind == 1 ? kernels->bytes : kernels->ternary)(tiles, (size_t)groups, codes, (size_t)stride, (size_t)tokens, sums);
    return 0;
}

int32_t wf_quantize(const char *isa, const float *x, int32_t tokens, int32_t width, int32_t stride, int32_t steps, int8_t *codes,
                    float *scales) {
    const WfKernels *kernels = wf_kernels(isa);
    const size_t planes = steps > 127 ? 2 : 1;
    if (!kernels || tokens < 1 || width < 1 || stride < width || steps < 1 || steps > WF_WIDE_STEPS) return 1;
    int32_t *sums = malloc((size_t)tokens * planes * sizeof *sums);
    if (!sums) return 1;
    WfCodes result = {.codes = codes, .scales = scales, .sums = sums, .stride = (size_t)stride, .planes = planes, .steps = steps};
    for (size_t t = 0; t < (size_t)tokens; t++) kernels->quantize(x + t * (size_t)width, (size_t)width, t, &result);
    free(sums);
    return 0;
}

struct WfRunner {
    const WfKernels *kernels;
    WfPool *pool;
    int32_t *sums;   /* [worker][WF_SUMS] */
    WfCodes codes;   /* room for `capacity` bytes of codes and `tokens` tokens */
    size_t capacity, tokens;
};

WfRunner *wf_runner_create(const char *isa, int32_t threads) {
    const WfKernels *kernels = wf_kernels(isa);
    WfRunner *runner = kernels && threads > 0 ? calloc(1, sizeof *runner) : NULL;
    if (!runner) return NULL;
    runner->kernels = kernels;
    runner->pool = wf_pool_create((size_t)threads);
    runner->sums = calloc((size_t)threads * WF_SUMS, sizeof(int32_t));
    if (!runner->pool || !runner->sums) {
        wf_runner_free(runner);
        return NULL;
    }
    return runner;
}

static int reserve(WfRunner *runner, size_t tokens, int32_t steps, size_t stride) {
    const size_t planes = steps > 127 ? 2 : 1;
    if (tokens * planes * stride > runner->capacity || tokens > runner->tokens) {
        free(runner->codes.codes), free(runner->codes.scales), free(runner->codes.sums);
        runner->codes.codes = malloc(tokens * planes * stride);
        runner->codes.scales = malloc(tokens * sizeof(float));
        runner->codes.sums = malloc(tokens * 2 * sizeof(int32_t));
        runner->capacity = tokens * planes * stride, runner->tokens = tokens;
        if (!runner->codes.codes || !runner->codes.scales || !runner->codes.sums) {
            runner->capacity = runner->tokens = 0;
            return 0;
        }
    }
    runner->codes.stride = stride, runner->codes.planes = planes, runner->codes.steps = steps;
    return 1;
}

typedef struct {
    WfRunner *runner;
    const float *x;
    size_t width;
} Quantize;

static void quantize_token(void *argument, size_t token, size_t worker) {
    (void)worker;
    const Quantize *job = argument;
    job->runner->kernels->quantize(job->x + token * job->width, job->width, token, &job->runner->codes);
}

int32_t wf_linear(WfRunner *runner, const WfLinear *linear, int32_t code_max, int32_t tokens, const float *x, int32_t in_features,
                  float *y, int32_t out_features) {
    const size_t width = (size_t)in_features, rows = (size_t)out_features, count = (size_t)tokens;
    if (tokens < 1 || in_features < 1 || out_features < 1 || in_features > WF_MAX_COLUMNS || code_max < 0 || code_max > 127 ||
        (size_t)linear->columns != wf_padded(width, 4) || (size_t)linear->rows != wf_padded(rows, WF_ROWS) || linear->norm)
        return 1;
    if (!reserve(runner, count, code_max ? code_max : WF_WIDE_STEPS, wf_padded(width, WF_ROWS))) return 1;
    Quantize quantize = {runner, x, width};
    wf_pool_run(runner->pool, count, quantize_token, &quantize);
    WfProducts job = {.kernels = runner->kernels, .count = 1, .tokens = count, .sums = runner->sums};
    job.products[0] = (WfProduct){.linear = linear, .codes = &runner->codes, .y = y, .stride = rows, .rows = rows};
    wf_products_run(runner->pool, &job);
    return 0;
}

void wf_runner_free(WfRunner *runner) {
    if (!runner) return;
    wf_pool_free(runner->pool);
    free(runner->sums), free(runner->codes.codes), free(runner->codes.scales), free(runner->codes.sums);
    free(runner);
}
