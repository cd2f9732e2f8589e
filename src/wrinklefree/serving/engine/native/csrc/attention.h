/* Loops over float32 or float16 memory, included by floats.h once for each: KV(name), KV_TYPE, KV_LOAD, KV_STORE.
 *
 * Cache of one head: keys in blocks [32 positions] laid out [head_dim][32], so that a lane is a position and a score needs
 * no sum across lanes; values [position][head_dim padded to 16], a lane is a dimension. Rows of queries that share a key
 * head share each load. Every score is a sum over dimensions in order, every mixture one over positions in order:
 * neither depends on how many rows are computed together.
 */

INLINE void KV(scores)(const KV_TYPE *keys, size_t head_dim, size_t blocks, const float *queries, const int rows,
                       float *scores, size_t stride) {
    for (size_t at = 0; at < blocks * WF_KEY_BLOCK; at += 2 * LANES) {
        const KV_TYPE *block = keys + at / WF_KEY_BLOCK * WF_KEY_BLOCK * head_dim + at % WF_KEY_BLOCK;
        VEC sums[WF_QUERY_ROWS][2];
        for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = SET(splat)(0.0f);
        for (size_t j = 0; j < head_dim; j++) {
            __builtin_prefetch(block + j * WF_KEY_BLOCK + WF_AHEAD / sizeof(KV_TYPE));
            VEC first = KV_LOAD(block + j * WF_KEY_BLOCK), second = KV_LOAD(block + j * WF_KEY_BLOCK + LANES);
#pragma GCC unroll 4
            for (int row = 0; row < rows; row++) {
                VEC query = SET(splat)(queries[row * head_dim + j]);
                sums[row][0] = vec_fma(query, first, sums[row][0]);
                sums[row][1] = vec_fma(query, second, sums[row][1]);
            }
        }
        for (int row = 0; row < rows; row++) {
            SET(save)(scores + row * stride + at, sums[row][0]);
            SET(save)(scores + row * stride + at + LANES, sums[row][1]);
        }
    }
}

INLINE void KV(mix_columns)(const KV_TYPE *values, size_t width, size_t positions, const float *shares, size_t stride,
                            const int rows, const int vectors, float *y) {
    VEC sums[WF_QUERY_ROWS][4];
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++) sums[row][v] = SET(splat)(0.0f);
    for (size_t at = 0; at < positions; at++) {
        __builtin_prefetch(values + at * width + WF_AHEAD / sizeof(KV_TYPE));
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

INLINE void KV(mix)(const KV_TYPE *values, size_t width, size_t positions, const float *shares, size_t stride,
                    const int rows, float *y) {
    size_t column = 0;
    for (; column + MIX_VECTORS * LANES <= width; column += MIX_VECTORS * LANES)
        KV(mix_columns)(values + column, width, positions, shares, stride, rows, MIX_VECTORS, y + column);
    for (; column < width; column += LANES)
        KV(mix_columns)(values + column, width, positions, shares, stride, rows, 1, y + column);
}

INLINE void KV(attend_rows)(const KV_TYPE *keys, const KV_TYPE *values, size_t head_dim, const float *queries,
                            const int rows, const size_t *lengths, float *scores, size_t stride, float *y) {
    size_t width = wf_padded(head_dim, WF_VALUE_PAD), positions = lengths[rows - 1];
    size_t blocks = (positions + WF_KEY_BLOCK - 1) / WF_KEY_BLOCK;
    float inverse[WF_QUERY_ROWS];
    KV(scores)(keys, head_dim, blocks, queries, rows, scores, stride);
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

TARGET static void KV(store)(void *keys, void *values, size_t head_dim, size_t position, const float *key, const float *value) {
    KV_TYPE *block = (KV_TYPE *)keys + position / WF_KEY_BLOCK * WF_KEY_BLOCK * head_dim + position % WF_KEY_BLOCK;
    KV_TYPE *row = (KV_TYPE *)values + position * wf_padded(head_dim, WF_VALUE_PAD);
    for (size_t i = 0; i < head_dim; i++) {
        block[i * WF_KEY_BLOCK] = KV_STORE(key[i]);
        row[i] = KV_STORE(value[i]);
    }
}

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
