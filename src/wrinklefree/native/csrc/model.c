/* A decoder over packed weights: embedding, blocks, head; the key-value cache of several sequences.
 *
 * A step goes through every layer in phases: prepare (norm, activation codes) and product (codes times weights) before and
 * after attention. A phase is a job of independent items (tokens, blocks of rows, heads) for the pool, and each output is
 * computed by one item in one way, whatever shares the step: results do not depend on batch, chunks or threads.
 */
#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "engine.h"
#include "kernels.h"
#include "pool.h"
#include "product.h"

enum {
    MAX_OWNED = 64,
    HUGE_PAGE = 1 << 21,
    TILE = 8, /* tokens of a sequence that attend as one item */
};

typedef struct {
    size_t first, count; /* tokens of one slot that follow each other */
} Tile;

typedef struct {
    float *scores, *queries, *mixture, *norms;
} Scratch; /* of one worker */

struct WfModel {
    WfConfig config;
    const WfKernels *kernels;
    WfPool *pool;
    WfLayer *layers;
    size_t hidden, inner, query, key; /* padded widths */
    size_t cache_key_bytes, cache_value_bytes, cache_layer_bytes; /* of one head; of one layer of one slot */
    uint8_t *cache;                   /* [slot][layer][keys of all heads, values of all heads] */
    int32_t *filled;                  /* [slot]: positions that the cache holds */
    int32_t *last;                    /* [slot]: last position in the step under way, -1 for none */
    float *residual, *q, *k, *v, *mixed, *gate, *up;
    WfCodes codes[3], head_codes;
    Tile *tiles;
    Scratch *scratch;
    int32_t *sums; /* [worker][WF_SUMS] */
    void *owned[MAX_OWNED];
    size_t owned_count;
};

/* Zeroed memory aligned to 64 bytes, freed with the model, in huge pages if it is large; notes a failure for wf_create. */
static void *own(WfModel *model, size_t size, int *failed) {
    const size_t alignment = size < HUGE_PAGE ? 64 : HUGE_PAGE;
    void *memory = model->owned_count < MAX_OWNED ? calloc(1, size + alignment) : NULL;
    if (!memory) {
        *failed = 1;
        return NULL;
    }
    model->owned[model->owned_count++] = memory;
    void *aligned = (void *)(((uintptr_t)memory + alignment - 1) & ~(uintptr_t)(alignment - 1));
#if defined(MADV_HUGEPAGE)
    if (alignment == HUGE_PAGE) madvise(aligned, size, MADV_HUGEPAGE);
#endif
    return aligned;
}

static WfCodes own_codes(WfModel *model, size_t tokens, int32_t steps, size_t stride, int *failed) {
    const size_t planes = steps > 127 ? 2 : 1;
    return (WfCodes){.codes = own(model, tokens * planes * stride, failed), .scales = own(model, tokens * sizeof(float), failed),
                     .sums = own(model, tokens * planes * sizeof(int32_t), failed), .stride = stride, .planes = planes, .steps = steps};
}

/* ---- prepare: what a projection reads ---- */

typedef struct {
    WfModel *model;
    float *x;         /* [tokens][stride] */
    const float *up;  /* x = activation(x) * up first, or NULL */
    const float *norm; /* then this gain, or NULL */
    size_t width, stride;
    const WfLinear *linears[3];
    size_t count;
    WfCodes *codes;
} Prepare;

static void prepare_token(void *argument, size_t token, size_t worker) {
    const Prepare *job = argument;
    const WfModel *model = job->model;
    const WfKernels *k = model->kernels;
    float *x = job->x + token * job->stride, *outer = model->scratch[worker].norms, *inner = outer + job->stride;
    const float *source = x;
    if (job->up) k->gate(x, job->up + token * job->stride, job->stride, model->config.squared_relu, x);
    if (job->norm) {
        k->rms_norm(x, job->norm, job->width, model->config.eps, outer);
        source = outer;
    }
    for (size_t i = 0; i < job->count; i++) {
        const float *norm = job->linears[i]->norm, *input = source;
        if (i && !norm) continue; /* shares the codes of the first */
        if (norm) {
            k->rms_norm(source, norm, job->width, model->config.eps, inner);
            input = inner;
        }
        k->quantize(input, job->width, token, &job->codes[i]);
    }
}

/* ---- product: codes times weights ---- */

/* Prepare `tokens` rows of x and multiply them by up to three projections. */
static void project(WfModel *model, size_t tokens, Prepare prepare, float *const *y, const size_t *strides, int add) {
    prepare.model = model;
    prepare.codes = model->codes;
    for (size_t i = 0; i < 3; i++) model->codes[i].stride = wf_padded(prepare.width, WF_ROWS);
    wf_pool_run(model->pool, tokens, prepare_token, &prepare);
    WfProducts job = {.kernels = model->kernels, .count = prepare.count, .tokens = tokens, .sums = model->sums};
    for (size_t i = 0; i < prepare.count; i++) {
        const WfLinear *linear = prepare.linears[i];
        job.products[i] = (WfProduct){.linear = linear, .codes = &model->codes[linear->norm ? i : 0], .y = y[i],
                                      .stride = strides[i], .rows = (size_t)linear->rows, .add = add};
    }
    wf_products_run(model->pool, &job);
}

/* ---- attention ---- */

typedef struct {
    WfModel *model;
    const WfLayer *layer;
    const int32_t *slots, *positions;
    size_t index; /* of the layer */
} Attention;

static uint8_t *keys_of(const WfModel *model, size_t slot, size_t layer, size_t head) {
    size_t layers = (size_t)model->config.layers;
    return model->cache + (slot * layers + layer) * model->cache_layer_bytes + head * model->cache_key_bytes;
}

static uint8_t *values_of(const WfModel *model, size_t slot, size_t layer, size_t head) {
    return keys_of(model, slot, layer, (size_t)model->config.key_heads) + head * model->cache_value_bytes;
}

/* QK-norm and rotation of a token's heads; its keys and values go to the cache. */
static void place_token(void *argument, size_t token, size_t worker) {
    (void)worker;
    const Attention *job = argument;
    const WfModel *model = job->model;
    const WfConfig *c = &model->config;
    size_t d = (size_t)c->head_dim, heads = (size_t)c->heads, all = heads + (size_t)c->key_heads;
    size_t position = (size_t)job->positions[token], slot = (size_t)job->slots[token];
    for (size_t head = 0; head < all; head++) {
        int is_query = head < heads;
        float *x = is_query ? model->q + token * model->query + head * d : model->k + token * model->key + (head - heads) * d;
        const float *norm = is_query ? job->layer->query_norm : job->layer->key_norm;
        if (norm) model->kernels->rms_norm(x, norm, d, c->eps, x);
        model->kernels->rotate(x, c->cosines + position * (d / 2), c->sines + position * (d / 2), d / 2);
        if (!is_query)
            model->kernels->store[c->cache_type](keys_of(model, slot, job->index, head - heads),
                                                 values_of(model, slot, job->index, head - heads), d, position, x,
                                                 model->v + token * model->key + (head - heads) * d);
    }
}

/* All query heads of one key head, for the tokens of a tile: rows that share each load of the cache. */
static void attend_tile(void *argument, size_t item, size_t worker) {
    const Attention *job = argument;
    const WfModel *model = job->model;
    const WfConfig *c = &model->config;
    size_t d = (size_t)c->head_dim, padded = wf_padded(d, WF_VALUE_PAD), key_heads = (size_t)c->key_heads;
    size_t group = (size_t)c->heads / key_heads, head = item % key_heads;
    Tile tile = model->tiles[item / key_heads];
    size_t slot = (size_t)job->slots[tile.first], rows = tile.count * group, lengths[WF_QUERY_ROWS];
    const Scratch *scratch = &model->scratch[worker];
    for (size_t row = 0; row < rows; row += WF_QUERY_ROWS) {
        size_t count = rows - row < WF_QUERY_ROWS ? rows - row : WF_QUERY_ROWS;
        for (size_t i = 0; i < count; i++) {
            size_t token = tile.first + (row + i) / group, query = head * group + (row + i) % group;
            memcpy(scratch->queries + i * d, model->q + token * model->query + query * d, d * sizeof(float));
            lengths[i] = (size_t)job->positions[token] + 1;
        }
        model->kernels->attend[c->cache_type](keys_of(model, slot, job->index, head), values_of(model, slot, job->index, head), d,
                                              scratch->queries, count, lengths, scratch->scores,
                                              wf_padded((size_t)c->context, WF_KEY_BLOCK), scratch->mixture);
        for (size_t i = 0; i < count; i++) {
            size_t token = tile.first + (row + i) / group, query = head * group + (row + i) % group;
            memcpy(model->mixed + token * model->query + query * d, scratch->mixture + i * padded, d * sizeof(float));
        }
    }
}

static size_t make_tiles(WfModel *model, size_t count, const int32_t *slots) {
    size_t tiles = 0;
    for (size_t i = 0; i < count; i++) {
        Tile *tile = tiles ? &model->tiles[tiles - 1] : NULL;
        if (tile && slots[i] == slots[i - 1] && tile->count < TILE) tile->count++;
        else model->tiles[tiles++] = (Tile){i, 1};
    }
    return tiles;
}

/* ---- embedding and head ---- */

typedef struct {
    WfModel *model;
    const int32_t *tokens; /* ids, or rows of which logits are wanted */
    size_t count;
    float *logits;
} Outer;

static void embed_token(void *argument, size_t token, size_t worker) {
    (void)worker;
    const Outer *job = argument;
    const WfModel *model = job->model;
    size_t width = (size_t)model->config.hidden, size = model->config.embedding_type == WF_F32 ? 4 : 2;
    const char *row = (const char *)model->config.embedding + (size_t)job->tokens[token] * width * size;
    model->kernels->load_row[model->config.embedding_type](row, width, model->residual + token * model->hidden);
}

static int is_tiled(int32_t head_type) { return head_type == WF_INT8 || head_type == WF_INT4; }

/* The final norm of a wanted row, into `gate`, which is free by then. */
static void finish_token(void *argument, size_t index, size_t worker) {
    (void)worker;
    const Outer *job = argument;
    WfModel *model = job->model;
    const WfConfig *c = &model->config;
    float *y = model->gate + index * model->hidden;
    model->kernels->rms_norm(model->residual + (size_t)job->tokens[index] * model->hidden, c->final_norm, (size_t)c->hidden, c->eps, y);
    if (is_tiled(c->head_type)) model->kernels->quantize(y, (size_t)c->hidden, index, &model->head_codes);
}

static void head_item(void *argument, size_t block, size_t worker) {
    const Outer *job = argument;
    const WfModel *model = job->model;
    const WfConfig *c = &model->config;
    size_t row = block * WF_ROWS, width = (size_t)c->hidden, vocabulary = (size_t)c->vocabulary;
    size_t rows = vocabulary - row < WF_ROWS ? vocabulary - row : WF_ROWS;
    if (!is_tiled(c->head_type)) {
        size_t size = c->head_type == WF_F32 ? 4 : 2;
        for (size_t i = row; i < row + rows; i++)
            model->kernels->dot_row[c->head_type]((const char *)c->head + i * width * size, width, model->gate, model->hidden,
                                                  job->count, job->logits + i, vocabulary);
        return;
    }
    const WfCodes *codes = &model->head_codes;
    int32_t *sums = model->sums + worker * WF_SUMS;
    const int narrow = c->head_type == WF_INT4;
    size_t groups = wf_padded(width, narrow ? 4 * WF_NIBBLE_GROUP : 4) / 4, planes = codes->planes;
    size_t size = narrow ? groups / WF_NIBBLE_GROUP * WF_NIBBLE_BYTES : groups * 256;
    WfFinish finish = {.row_scales = c->head_scales + row, .offset = narrow ? 0 : 128, .rows = rows, .y = job->logits + row, .stride = vocabulary};
    for (size_t t = 0; t < job->count; t += WF_CALL_ROWS / 2) {
        size_t count = job->count - t < WF_CALL_ROWS / 2 ? job->count - t : WF_CALL_ROWS / 2;
        (narrow ? model->kernels->nibbles : model->kernels->bytes)((const uint8_t *)c->head + block * size, groups,
                                                                   codes->codes + t * planes * codes->stride, codes->stride,
                                                                   count * planes, sums);
        model->kernels->finish(sums, t, count, codes, &finish);
    }
}

/* ---- the step ---- */

static int32_t check_step(WfModel *model, int32_t count, const int32_t *ids, const int32_t *slots, const int32_t *positions,
                          int32_t wanted_count, const int32_t *wanted) {
    const WfConfig *c = &model->config;
    if (count < 1 || count > c->max_tokens || wanted_count < 0 || wanted_count > count) return 1;
    for (int32_t i = 0; i < wanted_count; i++)
        if (wanted[i] < 0 || wanted[i] >= count) return 1;
    for (int32_t i = 0; i < count; i++) {
        if (ids[i] < 0 || ids[i] >= c->vocabulary) return 2;
        if (slots[i] < 0 || slots[i] >= c->slots) return 3;
    }
    for (int32_t i = 0; i < count; i++) model->last[slots[i]] = -1;
    for (int32_t i = 0; i < count; i++) {
        int32_t last = model->last[slots[i]], position = positions[i];
        if (position < 0 || position >= c->context) return 4;
        if (last < 0 ? position > model->filled[slots[i]] : position != last + 1) return 4;
        model->last[slots[i]] = position;
    }
    return 0;
}

int32_t wf_step(WfModel *model, int32_t count, const int32_t *ids, const int32_t *slots, const int32_t *positions,
                int32_t wanted_count, const int32_t *wanted, float *logits) {
    int32_t wrong = check_step(model, count, ids, slots, positions, wanted_count, wanted);
    if (wrong) return wrong;
    const WfConfig *c = &model->config;
    const size_t tokens = (size_t)count, hidden = model->hidden, inner = model->inner, tiles = make_tiles(model, tokens, slots);
    for (size_t i = 0; i < tokens; i++) model->filled[slots[i]] = positions[i] + 1;
    Outer outer = {.model = model, .tokens = ids, .count = tokens};
    wf_pool_run(model->pool, tokens, embed_token, &outer);
    for (size_t index = 0; index < (size_t)c->layers; index++) {
        const WfLayer *layer = &model->layers[index];
        Prepare states = {.x = model->residual, .norm = layer->attention_norm, .width = (size_t)c->hidden, .stride = hidden,
                          .linears = {&layer->query, &layer->key, &layer->value}, .count = 3};
        project(model, tokens, states, (float *[]){model->q, model->k, model->v}, (size_t[]){model->query, model->key, model->key}, 0);
        Attention attention = {.model = model, .layer = layer, .slots = slots, .positions = positions, .index = index};
        wf_pool_run(model->pool, tokens, place_token, &attention);
        wf_pool_run(model->pool, tiles * (size_t)c->key_heads, attend_tile, &attention);
        Prepare mixture = {.x = model->mixed, .width = (size_t)(c->heads * c->head_dim), .stride = model->query,
                           .linears = {&layer->output}, .count = 1};
        project(model, tokens, mixture, (float *[]){model->residual}, &hidden, 1);
        Prepare gates = {.x = model->residual, .norm = layer->mlp_norm, .width = (size_t)c->hidden, .stride = hidden,
                         .linears = {&layer->gate, &layer->up}, .count = 2};
        project(model, tokens, gates, (float *[]){model->gate, model->up}, (size_t[]){inner, inner}, 0);
        Prepare product = {.x = model->gate, .up = model->up, .width = (size_t)c->inner, .stride = inner,
                           .linears = {&layer->down}, .count = 1};
        project(model, tokens, product, (float *[]){model->residual}, &hidden, 1);
    }
    if (wanted_count) {
        outer = (Outer){.model = model, .tokens = wanted, .count = (size_t)wanted_count, .logits = logits};
        wf_pool_run(model->pool, outer.count, finish_token, &outer);
        wf_pool_run(model->pool, ((size_t)c->vocabulary + WF_ROWS - 1) / WF_ROWS, head_item, &outer);
    }
    return 0;
}

int32_t wf_copy_prefix(WfModel *model, int32_t from, int32_t to, int32_t length) {
    const WfConfig *c = &model->config;
    if (from < 0 || from >= c->slots || to < 0 || to >= c->slots) return 3;
    if (length < 0 || length > model->filled[from]) return 4;
    size_t positions = wf_padded((size_t)length, WF_KEY_BLOCK), whole = wf_padded((size_t)c->context, WF_KEY_BLOCK);
    for (size_t layer = 0; from != to && layer < (size_t)c->layers; layer++)
        for (size_t head = 0; head < (size_t)c->key_heads; head++) {
            memcpy(keys_of(model, (size_t)to, layer, head), keys_of(model, (size_t)from, layer, head),
                   model->cache_key_bytes / whole * positions);
            memcpy(values_of(model, (size_t)to, layer, head), values_of(model, (size_t)from, layer, head),
                   model->cache_value_bytes / whole * positions);
        }
    model->filled[to] = length;
    return 0;
}

/* ---- life ---- */

static int fits(const WfLinear *linear, size_t columns, size_t rows) {
    return linear->tiles && linear->rows > 0 && linear->columns > 0 && (size_t)linear->columns == wf_padded(columns, 4) &&
           (size_t)linear->rows == wf_padded(rows, WF_ROWS);
}

static int is_consistent(const WfConfig *c, const WfLayer *layers) {
    const int32_t sizes[] = {c->vocabulary, c->hidden, c->inner, c->layers, c->heads, c->key_heads, c->head_dim, c->context, c->slots,
                             c->max_tokens, c->threads};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        if (sizes[i] < 1 || sizes[i] > 1 << 24) return 0;
    size_t query = (size_t)c->heads * (size_t)c->head_dim, key = (size_t)c->key_heads * (size_t)c->head_dim;
    if (c->heads % c->key_heads || c->head_dim % 2 || query > WF_MAX_COLUMNS || c->hidden > WF_MAX_COLUMNS || c->inner > WF_MAX_COLUMNS)
        return 0;
    if (c->code_max < 0 || c->code_max > 127 || (c->cache_type != WF_F32 && c->cache_type != WF_F16 && c->cache_type != WF_INT8)) return 0;
    if (c->embedding_type < WF_F32 || c->embedding_type > WF_BF16 || !c->embedding || !c->head || !c->final_norm) return 0;
    if (c->head_type != WF_F32 && c->head_type != WF_F16 && !(is_tiled(c->head_type) && c->head_scales)) return 0;
    if (c->head_type == WF_INT4 && c->hidden > WF_MAX_NIBBLE_COLUMNS) return 0;
    for (int32_t i = 0; i < c->layers; i++) {
        const WfLayer *l = &layers[i];
        size_t hidden = (size_t)c->hidden, inner = (size_t)c->inner;
        if (!fits(&l->query, hidden, query) || !fits(&l->key, hidden, key) || !fits(&l->value, hidden, key) ||
            !fits(&l->output, query, hidden) || !fits(&l->gate, hidden, inner) || !fits(&l->up, hidden, inner) ||
            !fits(&l->down, inner, hidden) || !l->attention_norm || !l->mlp_norm)
            return 0;
    }
    return c->cosines && c->sines;
}

WfModel *wf_create(const WfConfig *config, const WfLayer *layers) {
    const WfKernels *kernels = wf_kernels(config->isa);
    if (!kernels || !is_consistent(config, layers)) return NULL;
    WfModel *model = calloc(1, sizeof *model);
    if (!model) return NULL;
    int failed = 0;
    const size_t tokens = (size_t)config->max_tokens, slots = (size_t)config->slots, layer_count = (size_t)config->layers;
    const size_t heads = (size_t)config->key_heads, d = (size_t)config->head_dim;
    const size_t context = wf_padded((size_t)config->context, WF_KEY_BLOCK);
    const int32_t steps = config->code_max ? config->code_max : WF_WIDE_STEPS;
    model->config = *config;
    model->kernels = kernels;
    model->hidden = wf_padded((size_t)config->hidden, WF_ROWS), model->inner = wf_padded((size_t)config->inner, WF_ROWS);
    model->query = wf_padded((size_t)config->heads * d, WF_ROWS), model->key = wf_padded(heads * d, WF_ROWS);
    model->cache_key_bytes = context / WF_KEY_BLOCK * wf_cache_block(config->cache_type, d);
    model->cache_value_bytes = context / WF_KEY_BLOCK * wf_cache_block(config->cache_type, wf_padded(d, WF_VALUE_PAD));
    model->cache_layer_bytes = heads * (model->cache_key_bytes + model->cache_value_bytes);
    size_t widest = model->hidden > model->inner ? model->hidden : model->inner;
    widest = model->query > widest ? model->query : widest;
    model->layers = own(model, layer_count * sizeof *layers, &failed);
    if (model->layers) memcpy(model->layers, layers, layer_count * sizeof *layers);
    model->cache = own(model, slots * layer_count * model->cache_layer_bytes, &failed);
    model->filled = own(model, slots * sizeof(int32_t), &failed);
    model->last = own(model, slots * sizeof(int32_t), &failed);
    float **rows[] = {&model->residual, &model->q, &model->mixed, &model->k, &model->v, &model->gate, &model->up};
    const size_t widths[] = {model->hidden, model->query, model->query, model->key, model->key, widest, widest};
    for (size_t i = 0; i < sizeof widths / sizeof *widths; i++) *rows[i] = own(model, tokens * widths[i] * sizeof(float), &failed);
    for (size_t i = 0; i < 3; i++) model->codes[i] = own_codes(model, tokens, steps, widest, &failed);
    model->head_codes = own_codes(model, tokens, WF_HEAD_STEPS, model->hidden, &failed);
    model->tiles = own(model, tokens * sizeof(Tile), &failed);
    model->sums = own(model, (size_t)config->threads * WF_SUMS * sizeof(int32_t), &failed);
    model->pool = wf_pool_create((size_t)config->threads);
    model->scratch = own(model, (size_t)config->threads * sizeof(Scratch), &failed);
    const size_t scores = WF_QUERY_ROWS * context, small = WF_QUERY_ROWS * wf_padded(d, WF_VALUE_PAD);
    for (size_t i = 0; model->scratch && i < (size_t)config->threads; i++) {
        size_t floats = scores + 2 * small + 2 * widest;
        /* All workers' scratch is one allocation: there are more workers than places in `owned`. */
        float *memory = i ? model->scratch[0].scores + i * floats : own(model, (size_t)config->threads * floats * sizeof(float), &failed);
        if (!memory) break;
        model->scratch[i] = (Scratch){memory, memory + scores, memory + scores + small, memory + scores + 2 * small};
    }
    if (failed || !model->pool) {
        wf_free(model);
        return NULL;
    }
    return model;
}

void wf_free(WfModel *model) {
    if (!model) return;
    wf_pool_free(model->pool);
    for (size_t i = 0; i < model->owned_count; i++) free(model->owned[i]);
    free(model);
}
