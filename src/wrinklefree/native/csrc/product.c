#include "product.h"

enum {
    ITEM_BYTES = 16 << 10,      /* weights of an item: enough to be worth a claim */
    ITEM_TOKENS = 2 * WF_CALL_ROWS, /* their codes stay in the second-level cache while all weights pass */
};

static void product_item(void *argument, size_t item, size_t worker) {
    const WfProducts *job = argument;
    const WfProduct *p = job->products;
    for (; item >= p->items * p->parts; p++) item -= p->items * p->parts;
    const WfLinear *linear = p->linear;
    const size_t groups = (size_t)linear->columns / 4, planes = p->codes->planes, per_call = WF_CALL_ROWS / planes;
    const size_t blocks = (size_t)linear->rows / WF_ROWS, first = item % p->items * p->blocks_per_item, end = first + p->blocks_per_item;
    const size_t start = item / p->items * ITEM_TOKENS, stop = start + ITEM_TOKENS < job->tokens ? start + ITEM_TOKENS : job->tokens;
    int32_t *sums = job->sums + worker * WF_SUMS;
    float exact[WF_SUMS];
    for (size_t block = first; block < (end < blocks ? end : blocks); block++) {
        size_t row = block * WF_ROWS;
        if (row >= p->rows) return;
        WfFinish finish = {.bias = linear->bias ? linear->bias + row : NULL, .scale = linear->scale, .offset = 1, .add = p->add,
                           .rows = p->rows - row < WF_ROWS ? p->rows - row : WF_ROWS, .y = exact, .stride = WF_ROWS};
        for (size_t t = start; t < stop; t += per_call) {
            const size_t tokens = stop - t < per_call ? stop - t : per_call;
            WfCodes codes = *p->codes; /* from token t on */
            codes.codes += t * planes * codes.stride, codes.scales += t, codes.sums += t * planes;
            job->kernels->ternary(linear->tiles + block * groups * 64, groups, codes.codes, codes.stride, tokens * planes, sums);
            if (!p->rounded) finish.y = p->y + t * p->stride + row, finish.stride = p->stride;
            job->kernels->finish(sums, 0, tokens, &codes, &finish);
            for (size_t i = 0; p->rounded && i < tokens; i++)
                for (size_t r = 0; r < finish.rows; r++) p->rounded[(t + i) * p->stride + row + r] = wf_bfloat16(exact[i * WF_ROWS + r]);
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
        p->parts = (job->tokens + ITEM_TOKENS - 1) / ITEM_TOKENS;
        items += p->items * p->parts;
    }
    wf_pool_run(pool, items, product_item, job);
}
