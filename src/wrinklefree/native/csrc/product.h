/* Activation codes times packed weights, over the pool: a job of up to three matrices, an item is some blocks of rows. */
#ifndef WRINKLEFREE_PRODUCT_H
#define WRINKLEFREE_PRODUCT_H

#include "engine.h"
#include "kernels.h"
#include "pool.h"

enum {
    WF_CALL_ROWS = 128, /* rows of codes a call of an integer kernel */
    WF_SUMS = WF_CALL_ROWS * WF_ROWS,
};

typedef struct {
    const WfLinear *linear;
    const WfCodes *codes;
    float *y; /* [tokens][stride] */
    size_t stride, rows; /* rows that y has room for: all, or those without padding */
    int add;             /* to what y holds, else it is overwritten */
    uint16_t *rounded;   /* or NULL: bfloat16 [tokens][stride] that gets the result instead of y */
    size_t blocks_per_item, items, parts; /* of the weights, and of the tokens; set when it runs */
} WfProduct;

typedef struct {
    const WfKernels *kernels;
    WfProduct products[3];
    size_t count, tokens;
    int32_t *sums; /* [worker][WF_SUMS] */
} WfProducts;

void wf_products_run(WfPool *pool, WfProducts *job);

#endif
