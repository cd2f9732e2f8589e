/* Threads and buffers of operations outside a model. */
#ifndef WRINKLEFREE_RUNNER_H
#define WRINKLEFREE_RUNNER_H

#include "engine.h"
#include "kernels.h"
#include "pool.h"

struct WfRunner {
    const WfKernels *kernels;
    WfPool *pool;
    size_t threads;
    int32_t *sums;           /* [worker][WF_SUMS] */
    WfCodes codes;           /* room for `capacity` bytes of codes and `tokens` tokens */
    size_t capacity, tokens;
    float *rows;             /* [worker][width] */
    size_t width;
};

/* Room for codes of so many tokens; 0 without memory. */
int wf_runner_reserve(WfRunner *runner, size_t tokens, int32_t steps, size_t stride);
/* Room for a row of floats for every worker; 0 without memory. */
int wf_runner_reserve_rows(WfRunner *runner, size_t width);

#endif
