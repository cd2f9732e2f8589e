/* What this CPU can run. Asked of the CPU itself: some compilers' __builtin_cpu_supports always says no. */
#include <string.h>

#include "engine.h"
#include "kernels.h"

typedef struct {
    const WfKernels *kernels;
    int (*runs)(void);
} Choice;

static int always(void) { return 1; }

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

typedef struct {
    unsigned a, b, c, d;
} Registers;

static Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r = {0, 0, 0, 0};
    if (!__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d)) r = (Registers){0, 0, 0, 0};
    return r;
}

/* Register state that the operating system saves: 6 = AVX, 0xe6 = AVX-512, 0x60000 = AMX. */
static int saves(unsigned states) {
    unsigned low, high;
    if (!(cpuid(1, 0).c >> 27 & 1)) return 0; /* OSXSAVE */
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & states) == states;
}

static int has_avx2(void) {
    const unsigned fma = 1u << 12, f16c = 1u << 29, wanted = fma | f16c;
    return saves(6) && (cpuid(1, 0).c & wanted) == wanted && (cpuid(7, 0).b >> 5 & 1);
}

static int has_avxvnni(void) { return has_avx2() && (cpuid(7, 1).a >> 4 & 1); }

static int has_avx512(void) {
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* F, DQ, BW, VL */
    Registers seven = cpuid(7, 0);
    return has_avx2() && saves(0xe6) && (seven.b & wanted) == wanted && (seven.c >> 11 & 1); /* VNNI */
}

/* Linux gives a process the tile registers when it asks. */
static int has_amx(void) {
#if defined(__linux__)
    const unsigned wanted = 1u << 24 | 1u << 25; /* TILE, INT8 */
    const int request_permission = 0x1023, tile_data = 18;
    return has_avx512() && saves(0x60000) && (cpuid(7, 0).d & wanted) == wanted &&
           syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
    return 0;
#endif
}
#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
static int has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }
#else
static int has_dotprod(void) { return 1; } /* every Apple CPU that runs this */
#endif
#endif

static const Choice choices[] = {
#if defined(__x86_64__)
    {&wf_amx, has_amx}, {&wf_avx512, has_avx512}, {&wf_avxvnni, has_avxvnni}, {&wf_avx2, has_avx2},
#elif defined(__aarch64__)
    {&wf_neon, has_dotprod},
#endif
    {&wf_plain, always},
};

enum { CHOICES = sizeof choices / sizeof *choices };

/* Asked once: in a virtual machine a cpuid takes tens of microseconds. */
static int runs(size_t choice) {
    static _Atomic signed char known[CHOICES];
    if (!known[choice]) known[choice] = choices[choice].runs() ? 1 : -1;
    return known[choice] > 0;
}

const WfKernels *wf_kernels(const char *name) {
    for (size_t i = 0; i < CHOICES; i++)
        if ((!name || !strcmp(name, choices[i].kernels->name)) && runs(i)) return choices[i].kernels;
    return NULL;
}

const char *wf_isa_name(int32_t index) {
    for (size_t i = 0; i < CHOICES; i++)
        if (runs(i) && index-- == 0) return choices[i].kernels->name;
    return NULL;
}

int32_t wf_sources(void) { return WF_SOURCES; }
