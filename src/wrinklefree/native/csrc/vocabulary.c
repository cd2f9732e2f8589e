/* Cross-entropy and KL of a block of logits: what a row's normalizers are made of, then the gradient. */

#include "engine.h"
#include "kernels.h"
#include "pool.h"
#include "runner.h"

enum { ROWS_AT_ONCE = 4 /* a claim costs more than a short row */ };

typedef struct {
    WfRunner *runner;
    const WfLogitsBlock *block;
} Job;

/* Row `row` of a block as floats; those of bfloat16 in one of the worker's three places. */
static const float *floats_of(const Job *job, const void *logits, size_t row, size_t worker, size_t place) {
    const size_t width = (size_t)job->block->width;
    if (job->block->type == WF_F32) return (const float *)logits + row * width;
    float *floats = job->runner->rows + worker * job->runner->width + place * width;
    job->runner->kernels->load_row[WF_BF16]((const uint16_t *)logits + row * width, width, floats);
    return floats;
}

/* Column of a row's label, or -1: it is in another block, or there is none. */
static int64_t label_of(const WfLogitsBlock *block, size_t row) {
    const int64_t column = block->labels ? block->labels[row] - block->first : -1;
    return column < block->width ? column : -1;
}

static void sum_row(const Job *job, size_t row, size_t worker) {
    const WfLogitsBlock *block = job->block;
    const WfKernels *kernels = job->runner->kernels;
    const size_t width = (size_t)block->width, powers = (size_t)block->powers;
    const float *student = floats_of(job, block->student, row, worker, 0);
    const int64_t label = label_of(block, row);
    if (label >= 0) block->sums[row].target = student[label];
    kernels->add_powers(student, width, powers, block->factors, block->sums + row);
    if (!block->teacher) return;
    kernels->add_powers(floats_of(job, block->teacher, row, worker, 1), width, 1, block->factors + powers - 1, block->teacher_sums + row);
}

static void differentiate_row(const Job *job, size_t row, size_t worker) {
    const WfLogitsBlock *block = job->block;
    const WfRunner *runner = job->runner;
    const size_t width = (size_t)block->width, last = (size_t)block->powers - 1;
    const WfRowSums *sums = block->sums + row;
    const float hard = block->hard ? block->hard[row] : 0.0f, soft = block->soft ? block->soft[row] : 0.0f;
    WfRowGradient of_row = {
        .student = floats_of(job, block->student, row, worker, 0), .width = width, .powers = block->powers,
        .factors = {block->factors[0], block->factors[1]}, .student_largest = sums->largest,
        .weights = {(last ? hard : hard + soft) / sums->sums[0], last ? soft / sums->sums[1] : 0.0f},
        .gradient = block->type == WF_F32 ? (float *)block->gradient + row * width : runner->rows + worker * runner->width + 2 * width,
    };
    if (block->teacher) {
        const WfRowSums *taught = block->teacher_sums + row;
        of_row.teacher = floats_of(job, block->teacher, row, worker, 1);
        of_row.teacher_largest = taught->largest;
        of_row.teacher_factor = block->factors[last];
        of_row.teacher_weight = soft / taught->sums[0];
        block->values[row] += runner->kernels->logits_gradient(&of_row) / taught->sums[0];
    } else {
        runner->kernels->logits_gradient(&of_row);
    }
    const int64_t label = label_of(block, row);
    if (label >= 0) of_row.gradient[label] -= hard;
    if (block->type == WF_F32) return;
    uint16_t *gradient = (uint16_t *)block->gradient + row * width;
    for (size_t i = 0; i < width; i++) gradient[i] = wf_bfloat16(of_row.gradient[i]);
}

static void sum_rows(void *job, size_t item, size_t worker) {
    const size_t first = item * ROWS_AT_ONCE, rows = (size_t)((const Job *)job)->block->rows;
    for (size_t row = first; row < first + ROWS_AT_ONCE && row < rows; row++) sum_row(job, row, worker);
}

static void differentiate_rows(void *job, size_t item, size_t worker) {
    const size_t first = item * ROWS_AT_ONCE, rows = (size_t)((const Job *)job)->block->rows;
    for (size_t row = first; row < first + ROWS_AT_ONCE && row < rows; row++) differentiate_row(job, row, worker);
}

static int32_t for_rows(WfRunner *runner, const WfLogitsBlock *block, WfWork work) {
    if (block->rows < 1 || block->width < 1 || block->powers < 1 || block->powers > (block->teacher ? 2 : 1)) return 1;
    if (block->type != WF_F32 && block->type != WF_BF16) return 1;
    if (block->type == WF_BF16 && !wf_runner_reserve_rows(runner, 3 * (size_t)block->width)) return 1;
    Job job = {runner, block};
    wf_pool_run(runner->pool, ((size_t)block->rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, work, &job);
    return 0;
}

int32_t wf_sum_logits(WfRunner *runner, const WfLogitsBlock *block) { return for_rows(runner, block, sum_rows); }

int32_t wf_differentiate_logits(WfRunner *runner, const WfLogitsBlock *block) { return for_rows(runner, block, differentiate_rows); }
