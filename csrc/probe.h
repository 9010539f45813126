// What this processor gives at best, for benchmarks to hold a kernel against: bytes read, and products of a kind.
#pragma once

#include "threads.h"
#include "vec.h"

namespace vecmat {
namespace VECMAT_ISA {

// The sum of a stretch of memory, by threads that each read a part of their own as four streams side by side: one
// stream a thread gets less out of the memory. Nothing but the loads takes time.
static int64_t read(const uint8_t* from, int64_t bytes, int threads) {
    constexpr int STREAMS = 4;
    const int64_t apart = bytes / (threads * STREAMS) / WIDTH * WIDTH;
    int64_t total = 0;
    in_threads(threads, [&](int thread, Team&) {
        const uint8_t* start = from + thread * STREAMS * apart;
        u32 sums[STREAMS] = {};
        for (int64_t at = 0; at < apart; at += WIDTH)
            for (int i = 0; i < STREAMS; ++i) sums[i] += load_as<u32>(start + i * apart + at);
        const u32 all = sums[0] + sums[1] + sums[2] + sums[3];
        int64_t part = 0;
        for (int lane = 0; lane < LANES; ++lane) part += all[lane];
        __atomic_fetch_add(&total, part, __ATOMIC_RELAXED);
    });
    return total;
}

enum { FLOATS = 0, BF16_PAIRS = 1, BYTES = 2 };
constexpr int SUMS = 12;  // hides an instruction's latency, and fits 16 registers with its operands

template <int KIND> inline f32 multiplied(f32 sum, f32 w, f32 x) {
    if (KIND == BYTES) return (f32)dot<false>((i32)sum, (i32)w, (i32)x);
#if defined(__AVX512BF16__)
    if (KIND == BF16_PAIRS) return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
#endif
    return fma(w, x, sum);
}

// A function of its own: within a parallel region's body the compiler keeps the sums in memory.
template <int KIND> __attribute__((noinline)) static void multiply_much(int64_t rounds) {
    float ones[LANES];
    for (int lane = 0; lane < LANES; ++lane) ones[lane] = 1.0f;
    f32 sums[SUMS];
#pragma GCC unroll 12
    for (int i = 0; i < SUMS; ++i) sums[i] = splat((float)i);  // unlike each other, or the compiler keeps one
    for (int64_t round = 0; round < rounds; ++round) {
        asm volatile("" : : "r"(ones) : "memory");  // the compiler cannot know that they stay as they are
        const f32 w = load(ones);
#pragma GCC unroll 12
        for (int i = 0; i < SUMS; ++i) sums[i] = multiplied<KIND>(sums[i], w, w);
    }
#pragma GCC unroll 12
    for (int i = 1; i < SUMS; ++i) sums[0] = (f32)((i32)sums[0] ^ (i32)sums[i]);
    store(ones, sums[0]);
    asm volatile("" : : "r"(ones) : "memory");  // somebody might read them
}

// Multiply and add in registers; the operations done (two a product), by all threads.
static int64_t operations(int kind, int64_t rounds, int threads) {
    void (*work)(int64_t) = multiply_much<FLOATS>;
    int64_t products = LANES;
    if (kind == BYTES) {
        work = multiply_much<BYTES>;
        products = LANES * 4;
#if defined(__AVX512BF16__)
    } else if (kind == BF16_PAIRS) {
        work = multiply_much<BF16_PAIRS>;
        products = LANES * 2;
#endif
    }
    in_threads(threads, [&](int, Team&) { work(rounds); });
    return 2 * products * SUMS * rounds * threads;
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
