// What compilers say in different words: inlining, asking for memory early, and threads, which some do not have.

#pragma once

#ifdef _OPENMP
#include <omp.h>
constexpr int HAS_OPENMP = 1;
#else
constexpr int HAS_OPENMP = 0;
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif

#ifdef _MSC_VER
#include <intrin.h>
#define INLINE static __forceinline
static inline void prefetch(const void *address) { _mm_prefetch(static_cast<const char *>(address), _MM_HINT_T0); }
#else
#define INLINE static inline __attribute__((always_inline))
static inline void prefetch(const void *address) { __builtin_prefetch(address); }
#endif
