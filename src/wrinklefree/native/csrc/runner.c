#include "runner.h"

#include <stdlib.h>

#include "product.h"

WfRunner *wf_runner_create(const char *isa, int32_t threads, WfParallel parallel) {
    const WfKernels *kernels = wf_kernels(isa);
    WfRunner *runner = kernels && threads > 0 ? calloc(1, sizeof *runner) : NULL;
    if (!runner) return NULL;
    runner->kernels = kernels;
    runner->threads = (size_t)threads;
    runner->pool = parallel ? wf_pool_borrow(runner->threads, parallel) : wf_pool_create(runner->threads);
    runner->sums = calloc((size_t)threads * WF_SUMS, sizeof(int32_t));
    if (!runner->pool || !runner->sums) {
        wf_runner_free(runner);
        return NULL;
    }
    return runner;
}

int wf_runner_reserve(WfRunner *runner, size_t tokens, int32_t steps, size_t stride) {
    const size_t planes = steps > 127 ? 2 : 1;
    const size_t bytes = tokens * planes * stride;
    if (bytes > runner->capacity || tokens > runner->tokens) {
        runner->capacity = bytes > runner->capacity ? bytes : runner->capacity;
        runner->tokens = tokens > runner->tokens ? tokens : runner->tokens;
        free(runner->codes.codes), free(runner->codes.scales), free(runner->codes.sums);
        runner->codes.codes = malloc(runner->capacity);
        runner->codes.scales = malloc(runner->tokens * sizeof(float));
        runner->codes.sums = malloc(runner->tokens * 2 * sizeof(int32_t));
        if (!runner->codes.codes || !runner->codes.scales || !runner->codes.sums) {
            runner->capacity = runner->tokens = 0;
            return 0;
        }
    }
    runner->codes.stride = stride, runner->codes.planes = planes, runner->codes.steps = steps;
    return 1;
}

int wf_runner_reserve_rows(WfRunner *runner, size_t width) {
    if (width > runner->width) {
        free(runner->rows);
        runner->rows = malloc(runner->threads * width * sizeof(float));
        runner->width = runner->rows ? width : 0;
    }
    return runner->rows != NULL;
}

void wf_runner_free(WfRunner *runner) {
    if (!runner) return;
    wf_pool_free(runner->pool);
    free(runner->sums), free(runner->codes.codes), free(runner->codes.scales), free(runner->codes.sums), free(runner->rows);
    free(runner);
}
