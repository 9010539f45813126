// Dense products with packed weights for one instruction set: compiled once for each, with VECMAT_ISA naming it.
#include "packed.h"
#include "threads.h"

namespace vecmat {
namespace VECMAT_ISA {
namespace packed {

// Elements [at, at + k) of x as a tile wants a row of it: its steps ``apart`` elements apart, zeros up to ``wide``.
template <class Kind> inline void take_row(const void* x, int type, int64_t at, int64_t k, typename Kind::Taken* to,
                                           int64_t apart, int64_t wide) {
    for (int64_t i = 0; i < wide; i += Kind::STEP, to += apart) {
        const int64_t from = i < k ? i : k;
        Kind::take(to, x, type, at + from, k - from);
    }
}

template <class Kind> inline bool multiply(const vecmat_dense_call& call) {
    typedef typename Kind::Taken Taken;
    const vecmat_dense_spec& spec = *call.spec;
    const int64_t passes = (call.m + PASS - 1) / PASS, most = (call.m + passes - 1) / passes;
    const int64_t units = panels(spec.n), wide = padded(spec.k);
    const int64_t blocks = (wide + BLOCK - 1) / BLOCK, block = round_up((wide + blocks - 1) / blocks, 2 * LANES);
    const int64_t span = spec.y_type == VECMAT_FP32 ? SPAN : block;
    const int64_t taken = round_up(most * wide * (int64_t)sizeof(Taken), 64);
    const int64_t own = round_up(most * group_of(most) * COLUMNS * (int64_t)sizeof(float), 64);
    const int threads = worth(spec.threads, units, call.m * spec.n * spec.k);
    const bool shared = call.m > threads;  // few rows: each thread takes them by itself, which costs no barrier
    const int64_t each = own + (shared ? 0 : taken);
    const Scratch scratch((shared ? taken : 0) + threads * each);
    if (!scratch.memory) return false;
    in_threads(threads, [&](int thread, Team& team) {
        char* mine = (char*)scratch.memory + (shared ? taken : 0) + thread * each;
        Taken* x = (Taken*)(shared ? (char*)scratch.memory : mine + own);
        for (int64_t number = 0; number < passes; ++number) {
            const int64_t first = number * call.m / passes, m = (number + 1) * call.m / passes - first;
            const Pass<Kind> pass = {call, x, first, m, (m + MOST - 1) / MOST, wide, block, span};
            if (number) team.wait();  // until nobody reads the rows before these
            for (int64_t tile = 0; tile < pass.tiles; ++tile) {
                const int64_t from = pass.row(tile), count = pass.row(tile + 1) - from;
                for (int64_t row = 0; row < count; ++row)
                    if (!shared || (from + row) % threads == thread)
                        take_row<Kind>(call.x, spec.x_type, (first + from + row) * call.ldx, spec.k,
                             x + from * wide + row * Kind::STEP, count * Kind::STEP, wide);
            }
            if (shared) team.wait();
            columns_of_y(pass, units * thread / threads, units * (thread + 1) / threads, (float*)mine);
        }
    });
    return true;
}

// Rows of the weight as panels.
template <class T, int EACH> inline void pack(const vecmat_dense_spec& spec, const T* w, int64_t ldw, T* out) {
    const int64_t wide = padded(spec.k), units = panels(spec.n);
    in_threads(worth(spec.threads, units, spec.n * spec.k), [&](int thread, Team&) {
        const int64_t count = worth(spec.threads, units, spec.n * spec.k);
        for (int64_t panel = units * thread / count; panel < units * (thread + 1) / count; ++panel)
            for (int64_t k = 0; k < wide; k += LANES)  // a square at a time, so that no line is fetched twice
                for (int64_t column = 0; column < COLUMNS; ++column) {
                    const int64_t n = panel * COLUMNS + column;
                    const T* row = w + n * ldw;
                    T* to = out + (panel * wide + k) * COLUMNS + column * EACH;
                    for (int64_t i = 0; i < LANES; ++i)
                        to[i / EACH * COLUMNS * EACH + i % EACH] = n < spec.n && k + i < spec.k ? row[k + i] : T();
                }
    });
}

}  // namespace packed

int64_t packed_bytes(const vecmat_dense_spec* spec) {
    return packed::panels(spec->n) * packed::COLUMNS * packed::padded(spec->k) * (spec->w_type == VECMAT_FP32 ? 4 : 2);
}

void pack_dense(const vecmat_dense_spec* spec, const void* w, int64_t ldw, void* out) {
    switch (spec->w_type) {
        case VECMAT_FP32: return packed::pack<float, 1>(*spec, (const float*)w, ldw, (float*)out);
        case VECMAT_BF16: return packed::pack<bf16, 2>(*spec, (const bf16*)w, ldw, (bf16*)out);
        default: return packed::pack<fp16, 1>(*spec, (const fp16*)w, ldw, (fp16*)out);
    }
}

bool packed_dense(const vecmat_dense_call* call) {
#if defined(__AVX512BF16__)
    if (call->spec->x_type == VECMAT_BF16 && call->spec->w_type == VECMAT_BF16)
        return packed::multiply<packed::Pairs>(*call);
#endif
    switch (call->spec->w_type) {
        case VECMAT_FP32: return packed::multiply<packed::Widened<float>>(*call);
        case VECMAT_BF16: return packed::multiply<packed::Widened<bf16>>(*call);
        default: return packed::multiply<packed::Widened<fp16>>(*call);
    }
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
