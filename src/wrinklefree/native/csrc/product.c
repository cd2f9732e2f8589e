#include "product.h"

enum { ITEM_BYTES = 16 << 10 /* weights of an item: enough to be worth a claim */ };

static void product_item(void *argument, size_t item, size_t worker) {
    const WfProducts *job = argument;
    const WfProduct *p = job->products;
    while (item >= p->items) item -= p++->items;
    const WfLinear *linear = p->linear;
    const size_t groups = (size_t)linear->columns / 4, planes = p->codes->planes, per_call = WF_CALL_ROWS / planes;
    const size_t blocks = (size_t)linear->rows / WF_ROWS, first = item * p->blocks_per_item, end = first + p->blocks_per_item;
    int32_t *sums = job->sums + worker * WF_SUMS;
    for (size_t block = first; block < (end < blocks ? end : blocks); block++) {
        size_t row = block * WF_ROWS;
        if (row >= p->rows) return;
        WfFinish finish = {.bias = linear->bias ? linear->bias + row : NULL, .scale = linear->scale, .offset = 1, .add = p->add,
                           .rows = p->rows - row < WF_ROWS ? p->rows - row : WF_ROWS, .y = p->y + row, .stride = p->stride};
        for (size_t t = 0; t < job->tokens; t += per_call) {
            size_t tokens = job->tokens - t < per_call ? job->tokens - t : per_call;
            const int8_t *codes = p->codes->codes + t * planes * p->codes->stride;
            job->kernels->ternary(linear->tiles + block * groups * 64, groups, codes, p->codes->stride, tokens * planes, sums);
            job->kernels->finish(sums, t, tokens, p->codes, &finish);
        }
    }
}

void wf_products_run(WfPool *pool, WfProducts *job) {
    size_t items = 0;
    for (size_t i = 0; i < job->count; i++) {
        WfProduct *p = &job->products[i];
        size_t bytes = (size_t)p->linear->columns * (WF_ROWS / 4), blocks = (size_t)p->linear->rows / WF_ROWS;
        p->blocks_per_item = bytes < ITEM_BYTES ? ITEM_BYTES / bytes : 1;
        p->items = (blocks + p->blocks_per_item - 1) / p->blocks_per_item;
        items += p->items;
    }
    wf_pool_run(pool, items, product_item, job);
}
