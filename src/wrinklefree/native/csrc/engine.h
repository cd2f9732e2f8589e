/* The border between Python and C: what a model is, and the one call that runs it.
 *
 * Python lays weights out (pack.py) and keeps them alive; C reads them, owns the key-value cache and the work buffers.
 * Widths are padded: rows of every matrix to 64, work rows to 64 values. Padding holds zeros and stays zero.
 */
#ifndef WRINKLEFREE_ENGINE_H
#define WRINKLEFREE_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#define WF_API __attribute__((visibility("default")))

/* A ternary projection, y = scale * (codes @ q(norm(x))) + bias. */
typedef struct {
    const uint8_t *tiles; /* [rows / 64][columns / 4][64], see kernels.h */
    const float *bias;    /* [rows] or NULL */
    const float *norm;    /* gain [columns, padded to 64] of the SubLN in front, or NULL */
    float scale;
    int32_t rows;    /* padded to 64 */
    int32_t columns; /* padded to 4 */
} WfLinear;

typedef struct {
    const float *attention_norm, *mlp_norm; /* gains [hidden, padded to 64] */
    const float *query_norm, *key_norm;     /* gains [head_dim], or NULL: no QK-norm */
    WfLinear query, key, value, output, gate, up, down;
} WfLayer;

/* Types of numbers. */
#define WF_F32 0
#define WF_F16 1
#define WF_BF16 2
#define WF_INT8 3
#define WF_INT4 4

typedef struct {
    int32_t vocabulary, hidden, inner, layers, heads, key_heads, head_dim;
    int32_t squared_relu; /* else SiLU */
    int32_t code_max;     /* largest activation code: 127, 7, or 0 for activations that are not quantized */
    float eps;
    int32_t context, slots, max_tokens; /* positions a slot, sequences, tokens a step */
    int32_t cache_type;                 /* WF_F32, WF_F16, or WF_INT8 with a scale a position and head */
    int32_t embedding_type;             /* WF_F32, WF_F16 or WF_BF16 */
    int32_t head_type;                  /* WF_F32, WF_F16, WF_INT8 or WF_INT4 */
    int32_t threads;
    const char *isa; /* a name of wf_isa_name, or NULL for the best */
    const void *embedding;         /* [vocabulary][hidden] */
    const void *head;              /* rows as the embedding's, or tiles, see kernels.h */
    const float *head_scales;      /* [vocabulary padded to 64], of tiles only */
    const float *final_norm;       /* [hidden padded to 64] */
    const float *cosines, *sines;  /* [context][head_dim / 2] */
} WfConfig;

typedef struct WfModel WfModel;

/* A number that the build derives from the sources (build.py); library.py refuses a library of others. */
WF_API int32_t wf_sources(void);
/* Names of the instruction sets that this CPU can run, best first; NULL after the last. */
WF_API const char *wf_isa_name(int32_t index);

/* NULL where memory or threads cannot be had, or the config contradicts itself. `layers` is copied, what it points to is not. */
WF_API WfModel *wf_create(const WfConfig *config, const WfLayer *layers);
WF_API void wf_free(WfModel *model);

/* Run tokens through the model: prefill and decode, of one sequence or of many.
 *
 * Token i is `ids[i]` at `positions[i]` of sequence `slots[i]`. In one call the tokens of a slot follow each other; the
 * first may go back, which forgets what came after it. Logits of the tokens `wanted` are written to
 * [wanted_count][vocabulary]. What a token gets does not depend, in any bit, on the tokens that it shares a call with.
 * Returns 0, or the number (1 to 4) of what was wrong, with nothing changed: count, token, slot, position.
 */
WF_API int32_t wf_step(WfModel *model, int32_t count, const int32_t *ids, const int32_t *slots, const int32_t *positions,
                       int32_t wanted_count, const int32_t *wanted, float *logits);
/* Let `to` hold the first `length` positions of `from`. Returns 0, or 3 or 4 as wf_step. */
WF_API int32_t wf_copy_prefix(WfModel *model, int32_t from, int32_t to, int32_t length);

/* Call body(data) on up to `threads` threads at once, this one among them, and return when all have returned: OpenMP's GOMP_parallel. */
typedef void (*WfParallel)(void (*body)(void *), void *data, unsigned threads, unsigned flags);
/* Threads and buffers for operations outside a model; not for two callers at once. `parallel` lends threads, NULL: its own.
 * NULL as wf_create. */
typedef struct WfRunner WfRunner;
WF_API WfRunner *wf_runner_create(const char *isa, int32_t threads, WfParallel parallel);
WF_API void wf_runner_free(WfRunner *runner);

/* What a training step is made of; 0, or 1 for sizes that do not fit or too little memory. Floats are WF_F32 or WF_BF16.
 *
 * Codes [tokens][width] and scales [tokens] of activations x [tokens][width], as wf_quantize. */
WF_API int32_t wf_encode(WfRunner *runner, int32_t tokens, int32_t width, int32_t type, const void *x, int32_t code_max,
                         int8_t *codes, float *scales);
/* codes * scale of the token. */
WF_API int32_t wf_decode(WfRunner *runner, int32_t tokens, int32_t width, const int8_t *codes, const float *scales, int32_t type,
                         void *y);
/* Codes -1, 0, 1 of weights with a scale. */
WF_API int32_t wf_ternarize(WfRunner *runner, int64_t count, const float *weights, float scale, int8_t *codes);
/* Tiles (kernels.h) of ternary codes [rows][columns], padded with zero weights. */
WF_API int32_t wf_pack(WfRunner *runner, int32_t rows, int32_t columns, const int8_t *codes, uint8_t *tiles);
/* y [rows][columns] = code * scale. */
WF_API int32_t wf_unpack(WfRunner *runner, int32_t rows, int32_t columns, const uint8_t *tiles, float scale, int32_t type, void *y);
/* y [tokens][rows] = codes [tokens][columns] times tiles, times the token's scale times `scale`. */
WF_API int32_t wf_multiply(WfRunner *runner, const uint8_t *tiles, float scale, int32_t rows, int32_t columns, int32_t tokens,
                           const int8_t *codes, const float *scales, int32_t type, void *y);

/* What is known of a row of logits, in whatever blocks its words came. */
typedef struct {
    float largest, target; /* logits: of all words, and of the label */
    float sums[2];         /* of 2^(factor * (logit - largest)) */
} WfRowSums;

/* A block of logits [rows][width], the words from `first` on, of a student and perhaps a teacher. */
typedef struct {
    int32_t rows, width, first;
    int32_t type;            /* WF_F32 or WF_BF16: of logits and gradient */
    int32_t powers;          /* 1, or 2 with a teacher: cross-entropy's factor beside the KL's */
    float factors[2];        /* log2 e / temperature; the last is the teacher's too */
    const void *student;
    const void *teacher;     /* or NULL */
    const int64_t *labels;   /* [rows], or NULL; below 0: none */
    WfRowSums *sums;         /* [rows] of the student: cross-entropy's sum, the KL's */
    WfRowSums *teacher_sums; /* [rows] */
    const float *hard;       /* [rows] weights of cross-entropy's gradient, or NULL */
    const float *soft;       /* [rows] of the KL's, or NULL */
    void *gradient;          /* [rows][width] */
    float *values;           /* [rows], to which sum of teacher's probability * (teacher - student) is added */
} WfLogitsBlock;

/* First pass: count a block in its rows' sums, and find the targets. Both passes return 0, or 1 as above. */
WF_API int32_t wf_sum_logits(WfRunner *runner, const WfLogitsBlock *block);
/* Second pass, when all blocks are counted: the gradient hard * (softmax - onehot) + soft * (softmax - teacher's), and values. */
WF_API int32_t wf_differentiate_logits(WfRunner *runner, const WfLogitsBlock *block);

/* y [tokens][out_features] of x [tokens][in_features]; 0, or 1 for sizes that do not fit or too little memory. */
WF_API int32_t wf_linear(WfRunner *runner, const WfLinear *linear, int32_t code_max, int32_t tokens, const float *x,
                         int32_t in_features, float *y, int32_t out_features);
/* The integer products behind it, of ternary (kind 0), 8-bit (1, codes of at most 64) or 4-bit tiles (2): codes [tokens][stride], tiles of
 * one 64-row block, sums [tokens][64]. 0, or 1. */
WF_API int32_t wf_products(const char *isa, int32_t kind, const uint8_t *tiles, int32_t groups, const int8_t *codes,
                           int32_t stride, int32_t tokens, int32_t *sums);
/* Activation codes [tokens][planes][stride] and scales as the engine computes them, `steps` to the largest magnitude; more than
 * 127 steps take two planes. 0, or 1. */
WF_API int32_t wf_quantize(const char *isa, const float *x, int32_t tokens, int32_t width, int32_t stride,
                           int32_t steps, int8_t *codes, float *scales);

#endif
