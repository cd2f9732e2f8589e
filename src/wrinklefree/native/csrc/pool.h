/* Threads that help with the items of one job at a time. The thread that has the job works too and needs nobody. */
#ifndef WRINKLEFREE_POOL_H
#define WRINKLEFREE_POOL_H

#include <stddef.h>

#include "engine.h"

typedef struct WfPool WfPool;
typedef void (*WfWork)(void *job, size_t item, size_t worker);

/* A pool of `threads` including the caller's; NULL if not even memory is to be had, fewer threads if the system refuses. */
WfPool *wf_pool_create(size_t threads);
/* A pool that has no threads of its own but asks `parallel` for them, as OpenMP's GOMP_parallel gives them: a program that
 * already has a team would else have two, and each would keep the other's cores busy with waiting. */
WfPool *wf_pool_borrow(size_t threads, WfParallel parallel);
void wf_pool_free(WfPool *pool);
/* Call work(job, item, worker) for item 0 .. items - 1, each once, in any order; returns when all are done. */
void wf_pool_run(WfPool *pool, size_t items, WfWork work, void *job);

#endif
