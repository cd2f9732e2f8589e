/* Loops over float32, float16 or 8-bit memory, included by floats.h once for each: KV(name), KV_TYPE, KV_LOAD, KV_SCALED.
 *
 * Cache of one head, in blocks of 32 positions: keys laid out [head_dim][32], so that a lane is a position and a score needs
 * no sum across lanes; values [32][head_dim padded to 16], a lane is a dimension. 8-bit blocks end with the scales of their
 * positions, [32] floats: a score is multiplied once, a share of the mixture once. Rows of queries that share a key head
 * share each load. Every score is a sum over dimensions in order, every mixture one over positions in order: neither depends
 * on how many rows are computed together.
 */

INLINE const KV_TYPE *KV(block)(const void *cache, size_t block, size_t width) {
    return (const KV_TYPE *)((const char *)cache + block * wf_cache_block(KV_KIND, width));
}

/* The block's own scales, or NULL. */
INLINE const float *KV(scales)(const KV_TYPE *block, size_t width) {
    return KV_KIND == WF_INT8 ? (const float *)(const void *)(block + WF_KEY_BLOCK * width) : NULL;
}

/* Fetches what comes WF_AHEAD bytes later, and at the last block the first values. */
INLINE void KV(scores)(const void *keys, const void *values, size_t head_dim, size_t blocks, const float *queries, const int rows,
                       float *scores, size_t stride) {
    const size_t ahead = WF_AHEAD / (WF_KEY_BLOCK * sizeof(KV_TYPE));
    for (size_t at = 0; at < blocks * WF_KEY_BLOCK; at += 2 * LANES) {
        const KV_TYPE *all = KV(block)(keys, at / WF_KEY_BLOCK, head_dim), *block = all + at % WF_KEY_BLOCK;
        const KV_TYPE *next = at / WF_KEY_BLOCK + 1 < blocks ? KV(block)(keys, at / WF_KEY_BLOCK + 1, head_dim) : values;
        const float *scales = KV(scales)(all, head_dim);
        VEC sums[WF_QUERY_ROWS][2];
        for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = SET(splat)(0.0f);
        for (size_t j = 0; j < head_dim; j++) {
            __builtin_prefetch(j + ahead < head_dim ? all + (j + ahead) * WF_KEY_BLOCK
                                                    : next + (head_dim < ahead ? j : j + ahead - head_dim) * WF_KEY_BLOCK);
            VEC first = KV_LOAD(block + j * WF_KEY_BLOCK), second = KV_LOAD(block + j * WF_KEY_BLOCK + LANES);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                VEC query = SET(splat)(queries[row * head_dim + j]);
                sums[row][0] = vec_fma(query, first, sums[row][0]);
                sums[row][1] = vec_fma(query, second, sums[row][1]);
            }
        }
        for (int row = 0; row < rows; row++)
            for (int part = 0; part < 2; part++) {
                VEC sum = sums[row][part];
                if (scales) sum *= SET(load)(scales + at % WF_KEY_BLOCK + part * LANES);
                SET(save)(scores + row * stride + at + part * LANES, sum);
            }
    }
}

/* Some columns of one block's values, added to y; the first of them fetch `ahead` values of each later row. */
INLINE void KV(mix_columns)(const KV_TYPE *values, size_t width, size_t positions, const float *shares, size_t stride,
                            const int rows, const int vectors, const size_t ahead, float *y) {
    VEC sums[WF_QUERY_ROWS][4];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sums[row][v] = SET(load)(y + row * width + v * LANES);
    for (size_t at = 0; at < positions; at++) {
        for (size_t line = 0; line < ahead; line += 64 / sizeof(KV_TYPE))
            __builtin_prefetch(values + at * width + line + WF_AHEAD / sizeof(KV_TYPE));
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            VEC value = KV_LOAD(values + at * width + v * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++)
                sums[row][v] = vec_fma(SET(splat)(shares[row * stride + at]), value, sums[row][v]);
        }
    }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) SET(save)(y + row * width + v * LANES, sums[row][v]);
}

/* Block by block, so that memory is read once and in order however wide the heads are. */
INLINE void KV(mix)(const void *values, size_t width, size_t positions, float *shares, size_t stride, const int rows, float *y) {
    memset(y, 0, (size_t)rows * width * sizeof(float));
    for (size_t at = 0; at < positions; at += WF_KEY_BLOCK, shares += WF_KEY_BLOCK) {
        const KV_TYPE *block = KV(block)(values, at / WF_KEY_BLOCK, width);
        const float *scales = KV(scales)(block, width);
        size_t count = positions - at < WF_KEY_BLOCK ? positions - at : WF_KEY_BLOCK, column = 0;
        for (int row = 0; scales && row < rows; row++)
            for (size_t i = 0; i < count; i++) shares[row * stride + i] *= scales[i];
        for (; column + MIX_VECTORS * LANES <= width; column += MIX_VECTORS * LANES)
            KV(mix_columns)(block + column, width, count, shares, stride, rows, MIX_VECTORS, column ? 0 : width, y + column);
        for (; column < width; column += LANES) KV(mix_columns)(block + column, width, count, shares, stride, rows, 1, 0, y + column);
    }
}

INLINE void KV(attend_rows)(const void *keys, const void *values, size_t head_dim, const float *queries, const int rows,
                            const size_t *lengths, float *scores, size_t stride, float *y) {
    size_t width = wf_padded(head_dim, WF_VALUE_PAD), positions = lengths[rows - 1];
    size_t blocks = (positions + WF_KEY_BLOCK - 1) / WF_KEY_BLOCK;
    float inverse[WF_QUERY_ROWS];
    KV(scores)(keys, values, head_dim, blocks, queries, rows, scores, stride);
    for (int row = 0; row < rows; row++)
        inverse[row] = SET(softmax)(scores + row * stride, lengths[row], blocks * WF_KEY_BLOCK, 1.0f / sqrtf((float)head_dim));
    KV(mix)(values, width, positions, scores, stride, rows, y);
    for (int row = 0; row < rows; row++)
        for (size_t i = 0; i < width; i++) y[row * width + i] *= inverse[row];
}

TARGET static void KV(attend)(const void *keys, const void *values, size_t head_dim, const float *queries, size_t rows,
                              const size_t *lengths, float *scores, size_t stride, float *y) {
    switch (rows) { /* constants, so that the sums of all rows stay in registers */
    case 1: KV(attend_rows)(keys, values, head_dim, queries, 1, lengths, scores, stride, y); break;
    case 2: KV(attend_rows)(keys, values, head_dim, queries, 2, lengths, scores, stride, y); break;
    case 3: KV(attend_rows)(keys, values, head_dim, queries, 3, lengths, scores, stride, y); break;
    case 4: KV(attend_rows)(keys, values, head_dim, queries, 4, lengths, scores, stride, y); break;
    }
}

#if KV_KIND == WF_INT8
/* One position's codes, `step` apart, and their scale: the largest magnitude becomes 127. */
INLINE void KV(store_codes)(const float *x, size_t count, KV_TYPE *codes, size_t step, float *scale) {
    float range = 0;
    for (size_t i = 0; i < count; i++) range = fabsf(x[i]) <= range ? range : fabsf(x[i]); /* NaN stays */
    const int usable = isfinite(range) && range > 0;
    *scale = range / 127.0f; /* carries infinity and NaN on: 0 * inf is NaN */
    for (size_t i = 0; i < count; i++) codes[i * step] = (KV_TYPE)(usable ? lrintf(x[i] * 127.0f / range) : 0);
}
#endif

TARGET static void KV(store)(void *keys, void *values, size_t head_dim, size_t position, const float *key, const float *value) {
    const size_t block = position / WF_KEY_BLOCK, place = position % WF_KEY_BLOCK, width = wf_padded(head_dim, WF_VALUE_PAD);
    KV_TYPE *column = (KV_TYPE *)KV(block)(keys, block, head_dim) + place, *all = (KV_TYPE *)KV(block)(values, block, width);
#if KV_KIND == WF_INT8
    KV(store_codes)(key, head_dim, column, WF_KEY_BLOCK, (float *)KV(scales)(column - place, head_dim) + place);
    KV(store_codes)(value, head_dim, all + place * width, 1, (float *)KV(scales)(all, width) + place);
#else
    for (size_t i = 0; i < head_dim; i++) {
        column[i * WF_KEY_BLOCK] = KV_STORE(key[i]);
        all[place * width + i] = KV_STORE(value[i]);
    }
#endif
}

#if KV_KIND != WF_INT8
TARGET static void KV(load_row)(const void *row, size_t width, float *y) {
    size_t i = 0;
    for (; i + LANES <= width; i += LANES) SET(save)(y + i, KV_LOAD((const KV_TYPE *)row + i));
    if (i < width) {
        KV_TYPE padded[LANES] = {0};
        float tail[LANES];
        memcpy(padded, (const KV_TYPE *)row + i, (width - i) * sizeof(KV_TYPE));
        SET(save)(tail, KV_LOAD(padded));
        memcpy(y + i, tail, (width - i) * sizeof(float));
    }
}

/* y[t] = row . x[t] for an unquantized head; x is padded, the row is not. */
TARGET static void KV(dot_row)(const void *row, size_t width, const float *x, size_t stride, size_t tokens, float *y, size_t y_stride) {
    const KV_TYPE *weights = row;
    size_t whole = width / 16 * 16;
    for (size_t t = 0; t < tokens; t++) {
        VEC sums[PARTS] = {{0}};
        for (size_t i = 0; i < whole; i += 16)
            for (int part = 0; part < PARTS; part++)
                sums[part] = vec_fma(KV_LOAD(weights + i + part * LANES), SET(load)(x + t * stride + i + part * LANES), sums[part]);
        float sum = SET(total)(sums), tail[16];
        if (whole < width) {
            KV(load_row)(weights + whole, width - whole, tail);
            for (size_t i = whole; i < width; i++) sum += tail[i - whole] * x[t * stride + i];
        }
        y[t * y_stride] = sum;
    }
}
#endif
