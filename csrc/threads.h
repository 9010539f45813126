// Work shared among the threads of the OpenMP runtime that torch uses too, so that there is one pool of them.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <stdint.h>
#include <stdlib.h>

namespace vecmat {
namespace VECMAT_ISA {

// Memory of its own for one call; null if there is none.
struct Scratch {
    void* memory;
    explicit Scratch(int64_t bytes) : memory(aligned_alloc(64, (bytes + 63) / 64 * 64)) {}
    ~Scratch() { free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
};

// The threads of one parallel region.
struct Team {
    bool alone;
    void wait() const {
        if (alone) return;
#if defined(_OPENMP)
#pragma omp barrier
#endif
    }
};

// How many of ``threads`` are worth waking for so many units and multiplications: waking costs a few microseconds.
inline int worth(int threads, int64_t units, int64_t products) {
    constexpr int64_t EACH = 1 << 16;
    int64_t most = products / EACH + 1;
    if (most > units) most = units;
    if (most > threads) most = threads;
    return most < 1 ? 1 : (int)most;
}

// work(thread, team) in ``threads`` threads; in the caller alone for one, without touching the runtime.
template <class Work> inline void in_threads(int threads, const Work& work) {
#if defined(_OPENMP)
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            Team team{false};
            work(omp_get_thread_num(), team);
        }
        return;
    }
#endif
    Team team{true};
    work(0, team);
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
