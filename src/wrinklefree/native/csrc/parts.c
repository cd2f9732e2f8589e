/* Parts of the engine by themselves: one projection for other people's nets, products and codes for tests. */
#include <stdlib.h>

#include "engine.h"
#include "kernels.h"
#include "pool.h"
#include "product.h"
#include "runner.h"

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
    if (!wf_runner_reserve(runner, count, code_max ? code_max : WF_WIDE_STEPS, wf_padded(width, WF_ROWS))) return 1;
    Quantize quantize = {runner, x, width};
    wf_pool_run(runner->pool, count, quantize_token, &quantize);
    WfProducts job = {.kernels = runner->kernels, .count = 1, .tokens = count, .sums = runner->sums};
    job.products[0] = (WfProduct){.linear = linear, .codes = &runner->codes, .y = y, .stride = rows, .rows = rows};
    wf_products_run(runner->pool, &job);
    return 0;
}
