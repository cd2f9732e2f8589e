/* The pool has no barrier that every thread must reach: items are claimed one by one, so a thread that the system has put
 * aside for another process holds nothing back, except the one item that it may be working on. Idle threads spin for some
 * microseconds, as the next job is mostly that near, and then sleep.
 *
 * One 64-bit ticket holds the number of the job (32 bits), its items (16) and the next item to claim (16); a claim is one
 * atomic addition that tells all three, so a late thread cannot mistake one job's item for another's.
 */
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

enum { SPINS = 1500, MAX_ITEMS = 0xffff - 1024 /* room for claims that come too late, one a thread */, MAX_THREADS = 512 };

struct WfPool {
    _Atomic uint64_t ticket __attribute__((aligned(64)));
    _Atomic size_t finished __attribute__((aligned(64)));
    WfWork work __attribute__((aligned(64))); /* written before the ticket, stable while an item of its job is claimed */
    void *job;
    size_t offset;
    _Atomic int sleeping, stopping, caller_sleeps;
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    size_t threads;
    WfParallel parallel; /* or NULL */
    pthread_t handles[MAX_THREADS];
    struct Helper {
        WfPool *pool;
        size_t worker;
    } helpers[MAX_THREADS];
};

static void pause_briefly(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Claim and work until no item is left; returns the number of the job that had none. */
static uint32_t help(WfPool *pool, size_t worker) {
    for (;;) {
        uint64_t ticket = atomic_fetch_add(&pool->ticket, 1);
        size_t item = ticket & 0xffff, items = ticket >> 16 & 0xffff;
        if (item >= items) return (uint32_t)(ticket >> 32);
        pool->work(pool->job, pool->offset + item, worker);
        if (atomic_fetch_add(&pool->finished, 1) + 1 == items && atomic_load(&pool->caller_sleeps)) {
            pthread_mutex_lock(&pool->mutex);
            pthread_cond_signal(&pool->done);
            pthread_mutex_unlock(&pool->mutex);
        }
    }
}

static void *live(void *argument) {
    struct Helper *helper = argument;
    WfPool *pool = helper->pool;
    uint32_t seen = 0;
    while (!atomic_load(&pool->stopping)) {
        int spins = 0;
        while ((uint32_t)(atomic_load(&pool->ticket) >> 32) == seen && spins++ < SPINS) pause_briefly();
        if (spins > SPINS) {
            pthread_mutex_lock(&pool->mutex);
            atomic_fetch_add(&pool->sleeping, 1);
            while ((uint32_t)(atomic_load(&pool->ticket) >> 32) == seen && !atomic_load(&pool->stopping))
                pthread_cond_wait(&pool->wake, &pool->mutex);
            atomic_fetch_sub(&pool->sleeping, 1);
            pthread_mutex_unlock(&pool->mutex);
            continue;
        }
        seen = help(pool, helper->worker);
    }
    return NULL;
}

static void run_part(WfPool *pool, size_t offset, size_t items, WfWork work, void *job) {
    pool->work = work, pool->job = job, pool->offset = offset;
    atomic_store(&pool->finished, 0);
    uint64_t number = (atomic_load(&pool->ticket) >> 32) + 1;
    atomic_store(&pool->ticket, number << 32 | (uint64_t)items << 16);
    if (atomic_load(&pool->sleeping)) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->wake);
        pthread_mutex_unlock(&pool->mutex);
    }
    help(pool, 0);
    for (int spins = 0; atomic_load(&pool->finished) < items && spins < SPINS; spins++) pause_briefly();
    if (atomic_load(&pool->finished) < items) { /* whoever has the last item lost its core: leave ours too */
        pthread_mutex_lock(&pool->mutex);
        atomic_store(&pool->caller_sleeps, 1);
        while (atomic_load(&pool->finished) < items) pthread_cond_wait(&pool->done, &pool->mutex);
        atomic_store(&pool->caller_sleeps, 0);
        pthread_mutex_unlock(&pool->mutex);
    }
}

typedef struct {
    WfWork work;
    void *job;
    size_t items;
    _Atomic size_t next, members;
} Team;

static void take_part(void *argument) {
    Team *team = argument;
    size_t worker = atomic_fetch_add(&team->members, 1), item;
    while ((item = atomic_fetch_add(&team->next, 1)) < team->items) team->work(team->job, item, worker);
}

void wf_pool_run(WfPool *pool, size_t items, WfWork work, void *job) {
    if (pool->threads == 1 || items == 1) {
        for (size_t item = 0; item < items; item++) work(job, item, 0);
        return;
    }
    if (pool->parallel) {
        Team team = {.work = work, .job = job, .items = items};
        pool->parallel(take_part, &team, (unsigned)(items < pool->threads ? items : pool->threads), 0);
        return;
    }
    for (size_t offset = 0; offset < items; offset += MAX_ITEMS)
        run_part(pool, offset, items - offset < MAX_ITEMS ? items - offset : MAX_ITEMS, work, job);
}

static WfPool *lonely_pool(void) {
    WfPool *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (WfPool){.threads = 1};
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    return pool;
}

WfPool *wf_pool_borrow(size_t threads, WfParallel parallel) {
    WfPool *pool = lonely_pool();
    if (pool) pool->threads = threads, pool->parallel = parallel;
    return pool;
}

WfPool *wf_pool_create(size_t threads) {
    WfPool *pool = lonely_pool();
    if (!pool) return NULL;
    for (; pool->threads < threads && pool->threads < MAX_THREADS; pool->threads++) {
        struct Helper *helper = &pool->helpers[pool->threads];
        *helper = (struct Helper){pool, pool->threads};
        if (pthread_create(&pool->handles[pool->threads], NULL, live, helper)) break;
    }
    return pool;
}

void wf_pool_free(WfPool *pool) {
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->stopping, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (size_t i = 1; i < pool->threads && !pool->parallel; i++) pthread_join(pool->handles[i], NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    pthread_cond_destroy(&pool->done);
    free(pool);
}
