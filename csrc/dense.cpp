// Dense products for one instruction set: compiled once for each, with VECMAT_ISA naming it.
#include "dense.h"
#include "threads.h"

namespace vecmat {
namespace VECMAT_ISA {
namespace rows {

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <class Kind> inline bool multiply(const vecmat_dense_call& call) {
    typedef typename Kind::Taken Taken;
    const vecmat_dense_spec& spec = *call.spec;
    const int64_t tiles = round_up(call.m, TILE) / TILE;
    const int64_t units = round_up(spec.n, ROWS) / ROWS, padded = round_up(spec.k, Kind::STEP);
    const int64_t taken = round_up(call.m * padded * (int64_t)sizeof(Taken), 64);
    const int64_t own = round_up(call.m * BLOCK * (int64_t)sizeof(float), 64);
    const int threads = worth(spec.threads, units, call.m * spec.n * spec.k);
    const bool shared = call.m > threads;  // few rows: each thread takes them by itself, which costs no barrier
    const int64_t each = own + (shared ? 0 : taken);
    const Scratch scratch((shared ? taken : 0) + threads * each);
    if (!scratch.memory) return false;
    in_threads(threads, [&](int thread, Team& team) {
        char* mine = (char*)scratch.memory + (shared ? taken : 0) + thread * each;
        Taken* x = (Taken*)(shared ? (char*)scratch.memory : mine + own);
        const Job<Kind> job = {call, x, (float*)mine, tiles, padded};
        for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t first = job.row(tile), count = job.row(tile + 1) - first;
            for (int64_t row = 0; row < count; ++row)
                if (!shared || (first + row) % threads == thread)
                    take_row<Kind>(call.x, spec.x_type, (first + row) * call.ldx, spec.k,
                                   x + first * padded + row * Kind::STEP, count * Kind::STEP);
        }
        if (shared) team.wait();
        const int64_t from = units * thread / threads * ROWS, to = units * (thread + 1) / threads * ROWS;
        const int64_t end = to < spec.n ? to : spec.n;
        const bool is_short = spec.k * (int64_t)sizeof(typename Kind::Stored) <= SHORT;
        if (call.m == 1 && is_short) columns_of_y<Kind, 1, 1, 0>(job, from, end);
        else if (call.m == 1) columns_of_y<Kind, STREAMS, 1, STREAMS>(job, from, end);
        else if (call.m <= FEW) columns_of_y<Kind, FEW_ROWS, FEW, FEW_ROWS>(job, from, end);
        else if (tiles == 1) columns_of_y<Kind, ROWS, TILE, ROWS>(job, from, end);
        else if (tiles < ROWS) columns_of_y<Kind, ROWS, TILE, ROWS / 2>(job, from, end);
        else columns_of_y<Kind, ROWS, TILE, 1>(job, from, end);
    });
    return true;
}

}  // namespace rows

bool dense(const vecmat_dense_call* call) {
#if defined(__AVX512BF16__)
    if (call->spec->x_type == VECMAT_BF16 && call->spec->w_type == VECMAT_BF16)
        return rows::multiply<rows::Pairs>(*call);
#endif
    switch (call->spec->w_type) {
        case VECMAT_FP32: return rows::multiply<rows::Widened<float>>(*call);
        case VECMAT_BF16: return rows::multiply<rows::Widened<bf16>>(*call);
        default: return rows::multiply<rows::Widened<fp16>>(*call);
    }
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
