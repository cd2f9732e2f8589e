/* Loops over one row of a block of logits, compiled like floats.h, which includes this file.
 *
 * Rows have any width: the last 16 floats of one are worked on in a copy, which is filled up with values that add nothing.
 */

/* 2^x to about a unit in the last place for x <= 0; 0 below -100, which a sum that holds 2^0 would not notice. NaN stays. */
INLINE VEC SET(power_of_two)(VEC x) {
    const VEC magic = SET(splat)(12582912.0f); /* as in exponential; its lowest nine bits are zero */
    VEC shifted = x + magic, r = x - (shifted - magic);
    VEC y = SET(splat)(0.00015353361959569156f); /* minimax on -0.5..0.5, relative error 2e-9 */
    y = vec_fma(y, r, SET(splat)(0.0013398873852565885f));
    y = vec_fma(y, r, SET(splat)(0.00961843691766262f));
    y = vec_fma(y, r, SET(splat)(0.055503323674201965f));
    y = vec_fma(y, r, SET(splat)(0.24022647738456726f));
    y = vec_fma(y, r, SET(splat)(0.6931471824645996f));
    y = vec_fma(y, r, SET(splat)(1.0f));
    y *= (VEC)(((IVEC)shifted + 127) << 23); /* a product, so that any NaN's bits stay those of one */
    return (VEC)((IVEC)y & ~(IVEC)(x < -100.0f));
}

/* Count a row's next words. */
TARGET static void SET(add_powers)(const float *x, size_t width, size_t count, const float *factors, WfRowSums *row) {
    const size_t whole = width / 16 * 16;
    float tail[16], lanes[16];
    for (size_t i = 0; i < 16; i++) tail[i] = whole + i < width ? x[whole + i] : -INFINITY;
    VEC largest[PARTS];
    for (int part = 0; part < PARTS; part++) largest[part] = SET(load)(tail + part * LANES);
    for (size_t i = 0; i < whole; i += 16)
        for (int part = 0; part < PARTS; part++) {
            VEC value = SET(load)(x + i + part * LANES);
            largest[part] = SET(choose)(value > largest[part], value, largest[part]);
        }
    float most = row->largest;
    for (int part = 0; part < PARTS; part++) SET(save)(lanes + part * LANES, largest[part]);
    for (int lane = 0; lane < 16; lane++) most = lanes[lane] > most ? lanes[lane] : most;
    for (size_t k = 0; k < count; k++) {
        VEC sums[PARTS] = {{0}};
        for (size_t i = 0; i < width; i += 16) {
            const float *at = i < whole ? x + i : tail;
            for (int part = 0; part < PARTS; part++)
                sums[part] += SET(power_of_two)((SET(load)(at + part * LANES) - most) * factors[k]);
        }
        row->sums[k] = row->sums[k] * exp2f((row->largest - most) * factors[k]) + SET(total)(sums);
    }
    row->largest = most;
}

/* A row's gradient, sum of weight * 2^(factor * (student - largest)) less the teacher's; returns sum of teacher's powers *
 * (teacher - student). `powers` and `taught` say at compile time how
 * many terms there are. */
INLINE float SET(gradient_of)(const WfRowGradient row, const int powers, const int taught) {
    const size_t whole = row.width / 16 * 16, rest = row.width - whole;
    float students[16], teachers[16], gradients[16];
    for (size_t i = 0; i < 16; i++) students[i] = teachers[i] = row.teacher_largest; /* their difference is zero */
    memcpy(students, row.student + whole, rest * sizeof(float));
    if (taught) memcpy(teachers, row.teacher + whole, rest * sizeof(float));
    VEC sums[PARTS] = {{0}};
    for (size_t i = 0; i < row.width; i += 16)
        for (int part = 0; part < PARTS; part++) {
            const size_t place = i + (size_t)part * LANES, in_tail = (size_t)part * LANES;
            VEC student = SET(load)(i < whole ? row.student + place : students + in_tail), above = student - row.student_largest;
            VEC gradient = row.weights[0] * SET(power_of_two)(above * row.factors[0]);
            if (powers == 2) gradient = vec_fma(SET(splat)(row.weights[1]), SET(power_of_two)(above * row.factors[1]), gradient);
            if (taught) {
                VEC teacher = SET(load)(i < whole ? row.teacher + place : teachers + in_tail);
                VEC power = SET(power_of_two)((teacher - row.teacher_largest) * row.teacher_factor);
                gradient = vec_fma(SET(splat)(-row.teacher_weight), power, gradient);
                sums[part] = vec_fma(power, teacher - student, sums[part]);
            }
            SET(save)(i < whole ? row.gradient + place : gradients + in_tail, gradient);
        }
    memcpy(row.gradient + whole, gradients, rest * sizeof(float));
    return taught ? SET(total)(sums) : 0.0f;
}

TARGET static float SET(logits_gradient)(const WfRowGradient *row) {
    if (!row->teacher) return SET(gradient_of)(*row, 1, 0);
    return row->powers == 2 ? SET(gradient_of)(*row, 2, 1) : SET(gradient_of)(*row, 1, 1);
}
