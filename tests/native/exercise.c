/* Runs the engine without Python: for sanitizers, and for processors that only an emulator has.
 *
 * usage: exercise SEED MODELS. Random models with random features take random steps, right and wrong ones. Every instruction
 * set must give plain C's integers; every schedule of a sequence must give the same bits; wrong steps must be refused.
 */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "engine.h"

static uint64_t state;

static uint32_t next_random(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33);
}

static int32_t between(int32_t low, int32_t high) { return low + (int32_t)(next_random() % (uint32_t)(high - low + 1)); }
static float uniform(float low, float high) { return low + (high - low) * (float)next_random() / 2147483648.0f; }

#define REQUIRE(condition)                                                                                              \
    do {                                                                                                                \
        if (!(condition)) {                                                                                             \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);                               \
            exit(1);                                                                                                    \
        }                                                                                                               \
    } while (0)

static void *allocate(size_t size) {
    void *memory = malloc(size ? size : 1); /* exactly as large as promised, so that a sanitizer sees one byte too many */
    REQUIRE(memory);
    return memory;
}

static size_t padded(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static void compare_products(void) {
    int32_t groups = between(1, 150), stride = (int32_t)padded((size_t)groups * 4, 64), tokens = between(1, 40), kind = between(0, 2);
    if (kind == 2) groups = groups / 8 * 8 + 8, stride = (int32_t)padded((size_t)groups * 4, 64);
    size_t tile_bytes = kind == 2 ? (size_t)groups / 8 * 1088 : (size_t)groups * (kind ? 256 : 64), code_bytes = (size_t)tokens * (size_t)stride;
    uint8_t *tiles = allocate(tile_bytes);
    int8_t *codes = allocate(code_bytes);
    int32_t *expected = allocate((size_t)tokens * 256), *sums = allocate((size_t)tokens * 256);
    for (size_t i = 0; i < tile_bytes; i++) /* planes hold 0, 1, 2; bytes 1 to 255; nibbles anything, their multipliers 0 to 63 */
        tiles[i] = kind == 2 ? (uint8_t)between(0, i % 1088 < 1024 ? 255 : 63)
                   : kind ? (uint8_t)between(1, 255) : (uint8_t)(between(0, 2) | between(0, 2) << 2 | between(0, 2) << 4 | between(0, 2) << 6);
    const int32_t largest = kind == 1 ? 64 : 127; /* the head's codes are small */
    for (size_t i = 0; i < code_bytes; i++) codes[i] = (int8_t)(i % (size_t)stride < (size_t)groups * 4 ? between(-largest, largest) : 0);
    REQUIRE(wf_products("plain", kind, tiles, groups, codes, stride, tokens, expected) == 0);
    for (int32_t i = 0; wf_isa_name(i); i++) {
        REQUIRE(wf_products(wf_isa_name(i), kind, tiles, groups, codes, stride, tokens, sums) == 0);
        REQUIRE(!memcmp(sums, expected, (size_t)tokens * 256));
    }
    free(tiles), free(codes), free(expected), free(sums);
}

/* What a training step is made of, on one instruction set with some threads. */
typedef struct {
    int8_t *codes, *ternary;
    float *scales;
    uint8_t *tiles;
    void *decoded, *weight, *product;
    size_t sizes[7];
} Parts;

static Parts run_parts(const char *isa, int32_t threads, int32_t tokens, int32_t rows, int32_t columns, int32_t type, int32_t code_max,
                       const void *x, const float *weights) {
    const size_t width = type == WF_BF16 ? 2 : 4, t = (size_t)tokens, r = (size_t)rows, c = (size_t)columns;
    Parts p = {.sizes = {t * c, r * c, t * 4, padded(r, 64) / 64 * (padded(c, 4) / 4) * 64, t * c * width, r * c * width, t * r * width}};
    void **buffers[] = {(void **)&p.codes, (void **)&p.ternary, (void **)&p.scales, (void **)&p.tiles, &p.decoded, &p.weight, &p.product};
    for (size_t i = 0; i < 7; i++) *buffers[i] = allocate(p.sizes[i]);
    WfRunner *runner = wf_runner_create(isa, threads, NULL);
    REQUIRE(runner);
    REQUIRE(wf_encode(runner, tokens, columns, type, x, code_max, p.codes, p.scales) == 0);
    REQUIRE(wf_decode(runner, tokens, columns, p.codes, p.scales, type, p.decoded) == 0);
    REQUIRE(wf_ternarize(runner, (int64_t)(r * c), weights, 0.4f, p.ternary) == 0);
    REQUIRE(wf_pack(runner, rows, columns, p.ternary, p.tiles) == 0);
    REQUIRE(wf_unpack(runner, rows, columns, p.tiles, 0.4f, type, p.weight) == 0);
    REQUIRE(wf_multiply(runner, p.tiles, 0.4f, rows, columns, tokens, p.codes, p.scales, type, p.product) == 0);
    REQUIRE(wf_encode(runner, 0, columns, type, x, code_max, p.codes, p.scales) == 1);
    REQUIRE(wf_multiply(runner, p.tiles, 0.4f, rows, columns, tokens, p.codes, p.scales, WF_F16, p.product) == 1);
    wf_runner_free(runner);
    return p;
}

static void compare_training(void) {
    const int32_t tokens = between(1, 300), rows = between(1, 200), columns = between(1, 300), type = between(0, 1) ? WF_BF16 : WF_F32;
    const int32_t code_max = between(0, 1) ? 127 : 7;
    const size_t count = (size_t)tokens * (size_t)columns, weight_count = (size_t)rows * (size_t)columns;
    uint16_t *narrow = allocate(count * 2);
    float *wide = allocate(count * 4), *weights = allocate(weight_count * 4);
    for (size_t i = 0; i < count; i++) {
        wide[i] = uniform(-3, 3);
        uint32_t bits;
        memcpy(&bits, &wide[i], 4);
        narrow[i] = (uint16_t)(bits >> 16);
    }
    for (size_t i = 0; i < weight_count; i++) weights[i] = between(0, 9) ? uniform(-1, 1) : 0.2f * (float)between(-3, 3);
    const void *x = type == WF_BF16 ? (void *)narrow : (void *)wide;
    Parts expected = run_parts("plain", 1, tokens, rows, columns, type, code_max, x, weights);
    void *wanted[] = {expected.codes, expected.ternary, expected.scales, expected.tiles, expected.decoded, expected.weight, expected.product};
    for (int32_t i = 0; wf_isa_name(i); i++) {
        Parts p = run_parts(wf_isa_name(i), between(1, 3), tokens, rows, columns, type, code_max, x, weights);
        void *found[] = {p.codes, p.ternary, p.scales, p.tiles, p.decoded, p.weight, p.product};
        for (size_t part = 0; part < 7; part++) {
            REQUIRE(!memcmp(found[part], wanted[part], p.sizes[part]));
            free(found[part]);
        }
    }
    for (size_t part = 0; part < 7; part++) free(wanted[part]);
    free(narrow), free(wide), free(weights);
}

/* Both passes over one block of logits; the gradient in float32. */
static float *logits_gradient(const char *isa, int32_t threads, WfLogitsBlock block) {
    const size_t rows = (size_t)block.rows, count = rows * (size_t)block.width;
    WfRunner *runner = wf_runner_create(isa, threads, NULL);
    REQUIRE(runner);
    block.sums = allocate(rows * sizeof *block.sums), block.teacher_sums = allocate(rows * sizeof *block.sums);
    block.values = allocate(rows * 4), block.gradient = allocate(count * (block.type == WF_BF16 ? 2 : 4));
    for (size_t row = 0; row < rows; row++)
        block.sums[row] = block.teacher_sums[row] = (WfRowSums){.largest = -INFINITY}, block.values[row] = 0;
    REQUIRE(wf_sum_logits(runner, &block) == 0);
    REQUIRE(wf_differentiate_logits(runner, &block) == 0);
    float *gradient = allocate((count + rows) * 4);
    for (size_t i = 0; i < count; i++) {
        if (block.type == WF_F32) gradient[i] = ((float *)block.gradient)[i];
        uint32_t bits = (uint32_t)((uint16_t *)block.gradient)[i] << 16;
        if (block.type == WF_BF16) memcpy(gradient + i, &bits, 4);
    }
    memcpy(gradient + count, block.values, rows * 4);
    block.rows = 0;
    REQUIRE(wf_sum_logits(runner, &block) == 1);
    wf_runner_free(runner);
    free(block.sums), free(block.teacher_sums), free(block.values), free(block.gradient);
    return gradient;
}

static void compare_logits(void) {
    WfLogitsBlock block = {.rows = between(1, 20), .width = between(1, 200), .first = 50, .type = between(0, 1) ? WF_BF16 : WF_F32,
                           .powers = between(1, 2), .factors = {1.44f, 0.29f}};
    const size_t rows = (size_t)block.rows, count = rows * (size_t)block.width;
    uint16_t *narrow[2];
    float *wide[2], *weights = allocate(rows * 4);
    int64_t *labels = allocate(rows * 8);
    for (int side = 0; side < 2; side++) {
        narrow[side] = allocate(count * 2), wide[side] = allocate(count * 4);
        for (size_t i = 0; i < count; i++) {
            wide[side][i] = uniform(-9, 9);
            uint32_t bits;
            memcpy(&bits, &wide[side][i], 4);
            narrow[side][i] = (uint16_t)(bits >> 16);
        }
    }
    for (size_t row = 0; row < rows; row++) weights[row] = uniform(0, 1), labels[row] = between(-100, 300);
    block.student = block.type == WF_BF16 ? (void *)narrow[0] : (void *)wide[0];
    if (block.powers == 2 || between(0, 1)) block.teacher = block.type == WF_BF16 ? (void *)narrow[1] : (void *)wide[1];
    if (between(0, 1)) block.labels = labels, block.hard = weights;
    block.soft = weights;
    float *expected = logits_gradient("plain", 1, block);
    for (int32_t i = 0; wf_isa_name(i); i++) {
        float *found = logits_gradient(wf_isa_name(i), between(1, 3), block);
        for (size_t k = 0; k < count + rows; k++)
            REQUIRE(fabsf(found[k] - expected[k]) <= (block.type == WF_BF16 && k < count ? 0.01f : 1e-5f) * (1 + fabsf(expected[k])));
        free(found);
    }
    for (int side = 0; side < 2; side++) free(narrow[side]), free(wide[side]);
    free(weights), free(labels), free(expected);
}

static void *kept[4096];
static size_t kept_count;

static void *keep(size_t size) {
    REQUIRE(kept_count < 4096);
    return kept[kept_count++] = allocate(size);
}

static const float *vector(size_t width, float low, float high) {
    float *values = keep(padded(width, 64) * sizeof(float));
    for (size_t i = 0; i < padded(width, 64); i++) values[i] = i < width ? uniform(low, high) : 0;
    return values;
}

static WfLinear linear(size_t columns, size_t rows, int bias, int norm) {
    WfLinear result = {.scale = uniform(0.05f, 0.2f), .rows = (int32_t)padded(rows, 64), .columns = (int32_t)padded(columns, 4)};
    size_t groups = (size_t)result.columns / 4, size = (size_t)result.rows / 64 * groups * 64;
    uint8_t *tiles = keep(size);
    for (size_t i = 0; i < size; i++) {
        size_t block = i / 64 / groups, group = i / 64 % groups, lane = i % 64 / 4, column = group * 4 + i % 4;
        tiles[i] = 0;
        for (size_t plane = 0; plane < 4; plane++) {
            int inside = block * 64 + plane * 16 + lane < rows && column < columns;
            tiles[i] |= (uint8_t)((inside ? between(0, 2) : 1) << 2 * plane);
        }
    }
    result.tiles = tiles;
    if (bias) result.bias = vector(rows, -0.3f, 0.3f);
    if (norm) result.norm = vector(columns, 0.5f, 1.5f);
    return result;
}

static uint16_t half(float value) { /* enough for embeddings between 2^-14 and 2 */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return fabsf(value) < 1e-4f ? 0 : (uint16_t)((bits >> 16 & 0x8000) | ((bits & 0x7fffffff) - (112u << 23)) >> 13);
}

static const void *rows_of(size_t rows, size_t width, int32_t type) {
    size_t size = type == WF_F32 ? 4 : 2;
    char *memory = keep(rows * width * size);
    for (size_t i = 0; i < rows * width; i++) {
        float value = uniform(-1, 1);
        uint16_t narrow = half(value);
        uint32_t bits;
        memcpy(&bits, &value, 4);
        if (type == WF_BF16) narrow = (uint16_t)(bits >> 16);
        memcpy(memory + i * size, type == WF_F32 ? (void *)&value : (void *)&narrow, size);
    }
    return memory;
}

static WfConfig random_config(WfLayer *layers) {
    WfConfig c = {.vocabulary = between(1, 200), .hidden = between(1, 150), .inner = between(1, 200), .layers = between(1, 3),
                  .key_heads = between(1, 3), .head_dim = 2 * between(1, 20), .squared_relu = between(0, 1), .eps = 1e-5f,
                  .context = between(20, 100), .slots = between(1, 3), .max_tokens = between(1, 40), .cache_type = (int32_t[]){WF_F32, WF_F16, WF_INT8}[between(0, 2)],
                  .embedding_type = between(0, 2), .threads = between(1, 3)};
    c.heads = c.key_heads * between(1, 5);
    c.code_max = (int32_t[]){127, 7, 0}[between(0, 2)];
    c.head_type = (int32_t[]){WF_F32, WF_F16, WF_INT8, WF_INT4}[between(0, 3)];
    size_t hidden = (size_t)c.hidden, inner = (size_t)c.inner, d = (size_t)c.head_dim, vocabulary = (size_t)c.vocabulary;
    size_t query = (size_t)c.heads * d, key = (size_t)c.key_heads * d;
    int placement = between(0, 2), bias = between(0, 1), qk_norm = between(0, 1), each = placement == 2, any = placement > 0;
    for (int32_t i = 0; i < c.layers; i++) {
        layers[i] = (WfLayer){vector(hidden, 0.5f, 1.5f), vector(hidden, 0.5f, 1.5f), NULL, NULL,
                              linear(hidden, query, bias, each), linear(hidden, key, bias, each), linear(hidden, key, bias, each),
                              linear(query, hidden, bias, any), linear(hidden, inner, 0, each), linear(hidden, inner, 0, each),
                              linear(inner, hidden, bias, any)};
        if (qk_norm) layers[i].query_norm = vector(d, 0.5f, 1.5f), layers[i].key_norm = vector(d, 0.5f, 1.5f);
    }
    c.embedding = rows_of(vocabulary, hidden, c.embedding_type);
    c.final_norm = vector(hidden, 0.5f, 1.5f);
    if (c.head_type == WF_INT8) {
        size_t size = padded(vocabulary, 64) / 64 * padded(hidden, 4) / 4 * 256;
        uint8_t *head = keep(size);
        for (size_t i = 0; i < size; i++) head[i] = (uint8_t)between(1, 255);
        c.head = head, c.head_scales = vector(vocabulary, 1e-3f, 2e-3f);
    } else if (c.head_type == WF_INT4) {
        size_t size = padded(vocabulary, 64) / 64 * (padded(hidden, 32) / 32) * 1088;
        uint8_t *head = keep(size);
        for (size_t i = 0; i < size; i++) head[i] = (uint8_t)(i % 1088 < 1024 ? between(0, 255) : between(0, 63));
        c.head = head, c.head_scales = vector(vocabulary, 1e-4f, 2e-4f);
    } else {
        c.head = rows_of(vocabulary, hidden, c.head_type);
    }
    float *cosines = keep((size_t)c.context * d / 2 * 4), *sines = keep((size_t)c.context * d / 2 * 4);
    for (size_t i = 0; i < (size_t)c.context * d / 2; i++) {
        double angle = (double)(i / (d / 2)) * pow(10000.0, -2.0 * (double)(i % (d / 2)) / (double)d);
        cosines[i] = (float)cos(angle), sines[i] = (float)sin(angle);
    }
    c.cosines = cosines, c.sines = sines;
    return c;
}

/* Feed `ids` from position 0 in chunks of at most `chunk`; logits of all of them. */
static void feed(WfModel *model, const WfConfig *c, const int32_t *ids, int32_t count, int32_t slot, int32_t chunk, float *logits) {
    int32_t *numbers = allocate((size_t)c->max_tokens * 3 * 4), *slots = numbers, *positions = slots + c->max_tokens;
    int32_t *wanted = positions + c->max_tokens;
    for (int32_t start = 0, size; start < count; start += size) {
        size = between(1, chunk < c->max_tokens ? chunk : c->max_tokens);
        size = size < count - start ? size : count - start;
        for (int32_t i = 0; i < size; i++) slots[i] = slot, positions[i] = start + i, wanted[i] = i;
        REQUIRE(wf_step(model, size, ids + start, slots, positions, size, wanted, logits + (size_t)start * (size_t)c->vocabulary) == 0);
    }
    free(numbers);
}

static double error_of(const float *found, const float *expected, size_t count) {
    double difference = 0, size = 0;
    for (size_t i = 0; i < count; i++) {
        REQUIRE(isfinite(found[i]));
        difference += ((double)found[i] - expected[i]) * ((double)found[i] - expected[i]), size += (double)expected[i] * expected[i];
    }
    return sqrt(difference / (size + 1e-30));
}

/* Any numbers at all: refused or carried out, never a crash. */
static void send_nonsense(WfModel *model, const WfConfig *c, float *logits) {
    int32_t ids[8], slots[8], positions[8], wanted[8], count = between(-1, 8), wanted_count = between(-1, 8);
    for (int i = 0; i < 8; i++) {
        ids[i] = between(-2, c->vocabulary + 1), slots[i] = between(-1, c->slots), positions[i] = between(-1, c->context);
        wanted[i] = between(-1, 8);
        if (between(0, 1)) ids[i] = between(0, c->vocabulary - 1), slots[i] = 0, positions[i] = i, wanted[i] = 0;
    }
    int32_t result = wf_step(model, count, ids, slots, positions, wanted_count, wanted, logits);
    REQUIRE(result >= 0 && result <= 4);
    if (count < 1 || count > c->max_tokens || wanted_count > count || wanted_count < 0) REQUIRE(result == 1);
    result = wf_copy_prefix(model, between(-1, c->slots), between(-1, c->slots), between(-1, c->context + 1));
    REQUIRE(result == 0 || result == 3 || result == 4);
}

static void refuse_contradictions(const WfConfig *good, const WfLayer *layers) {
    WfConfig c = *good;
    WfLayer changed[3];
    memcpy(changed, layers, (size_t)c.layers * sizeof *layers);
    switch (between(0, 9)) {
    case 0: c.heads = 0; break;
    case 1: c.vocabulary = -1; break;
    case 2: c.head_dim += 1; break;
    case 3: c.code_max = 128; break;
    case 4: c.cache_type = 2; break;
    case 5: c.isa = "z80"; break;
    case 6: c.embedding = NULL; break;
    case 7: changed[c.layers - 1].down.rows += 64; break;
    case 8: changed[0].query.tiles = NULL; break;
    case 9: c.hidden = 1 << 20; break;
    }
    REQUIRE(!wf_create(&c, changed));
}

static void exercise_model(void) {
    WfLayer layers[3];
    WfConfig c = random_config(layers);
    const int32_t count = between(1, c.context);
    const size_t values = (size_t)count * (size_t)c.vocabulary;
    int32_t *ids = allocate((size_t)count * 4);
    float *expected = allocate(values * 4), *found = allocate(values * 4), *spare = allocate((size_t)c.vocabulary * 8 * 4);
    for (int32_t i = 0; i < count; i++) ids[i] = between(0, c.vocabulary - 1);
    WfModel *model = wf_create(&c, layers);
    REQUIRE(model);
    feed(model, &c, ids, count, 0, c.max_tokens, expected);
    for (int round = 0; round < 4; round++) {
        for (int i = 0; i < 8; i++) send_nonsense(model, &c, spare);
        feed(model, &c, ids, count, between(0, c.slots - 1), between(1, c.max_tokens), found);
        REQUIRE(!memcmp(found, expected, values * 4));
    }
    wf_free(model);
    for (int32_t i = 0; wf_isa_name(i); i++) {
        c.isa = wf_isa_name(i), c.threads = between(1, 3);
        model = wf_create(&c, layers);
        REQUIRE(model);
        feed(model, &c, ids, count, 0, c.max_tokens, found);
        if (strcmp(c.isa, "plain")) REQUIRE(!memcmp(found, expected, values * 4));
        else REQUIRE(error_of(found, expected, values) < 0.3); /* other last bits, now and then another code; 4 bits: a big one */
        wf_free(model);
    }
    refuse_contradictions(&c, layers);
    while (kept_count) free(kept[--kept_count]);
    free(ids), free(expected), free(found), free(spare);
}

int main(int count, char **arguments) {
    REQUIRE(count == 3);
    state = strtoull(arguments[1], NULL, 10);
    for (long i = strtol(arguments[2], NULL, 10); i > 0; i--) {
        compare_products();
        compare_training();
        compare_logits();
        exercise_model();
    }
    for (int32_t i = 0; wf_isa_name(i); i++) printf("%s ", wf_isa_name(i));
    printf("done\n");
    return 0;
}
