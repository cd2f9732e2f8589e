/* Parts of the engine by themselves: one projection for other people's nets, products and codes for tests. */
#include <stdlib.h>
#include <string.h>

#include "engine.h"
#include "kernels.h"

int32_t wf_products(const char *isa, int32_t bytes, const uint8_t *tiles, int32_t groups, const int8_t *codes, int32_t stride,
                    int32_t tokens, int32_t *sums) {
    const WfKernels *kernels = wf_kernels(isa);
    if (!kernels || groups < 1 || stride < (int32_t)wf_padded((size_t)groups * 4, WF_ROWS) || tokens < 1) return 1;
    (bytes ? kernels->bytes : kernels->ternary)(tiles, (size_t)groups, codes, (size_t)stride, (size_t)tokens, sums);
    return 0;
}

int32_t wf_quantize(const char *isa, const float *x, int32_t tokens, int32_t width, int32_t stride, int32_t code_max, int8_t *codes,
                    float *scales) {
    const WfKernels *kernels = wf_kernels(isa);
    const size_t planes = code_max ? 1 : 2;
    if (!kernels || tokens < 1 || width < 1 || stride < width || code_max < 0 || code_max > 127) return 1;
    int32_t *sums = malloc((size_t)tokens * planes * sizeof *sums);
    if (!sums) return 1;
    WfCodes result = {.codes = codes, .scales = scales, .sums = sums, .stride = (size_t)stride, .planes = planes};
    for (size_t t = 0; t < (size_t)tokens; t++) kernels->quantize(x + t * (size_t)width, (size_t)width, code_max, t, &result);
    free(sums);
    return 0;
}
