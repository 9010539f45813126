// The kernels for one instruction set: compiled once for each, with VECMAT_ISA naming it.
#include "isa.h"
#include "panels.h"
#include "probe.h"
#include "threads.h"

namespace vecmat {
namespace VECMAT_ISA {

bool dense(const vecmat_dense_call* call);  // dense.cpp
int64_t packed_bytes(const vecmat_dense_spec* spec);  // packed.cpp
void pack_dense(const vecmat_dense_spec* spec, const void* w, int64_t ldw, void* out);
bool packed_dense(const vecmat_dense_call* call);

template <int BITS, int D, class X> inline bool multiply(const vecmat_call& call) {
    const vecmat_panels& w = *call.weight;
    const Shape shape(w);
    const int64_t m = call.m, units = divide_up(w.n, LANES);
    const int64_t digit_bytes = divide_up(m * D * shape.padded, 64) * 64, starts = m * D * shape.groups;
    const int64_t bytes = digit_bytes + starts * 4 + m * (int64_t)sizeof(Row);
    const int64_t partial = divide_up(m * COLUMNS * 4, 64) * 64;
    const int threads = worth(call.threads, units, m * w.n * w.k);
    const bool shared = m > threads;  // few rows: each thread takes them apart by itself, which costs no barrier
    const int64_t each = (shared ? 0 : divide_up(bytes, 64) * 64) + partial;
    const Scratch scratch((shared ? divide_up(bytes, 64) * 64 : 0) + threads * each);
    if (!scratch.memory) return false;
    const int offset = w.zero ? 1 : BITS == 8 ? 128 : 8;
    char* common = (char*)scratch.memory;
    char* own = common + (shared ? divide_up(bytes, 64) * 64 : 0);
    in_threads(threads, [&](int thread, Team& team) {
        char* mine = own + thread * each;
        char* base = shared ? common : mine + partial;
        int8_t* digits = (int8_t*)base;
        int32_t* start = (int32_t*)(base + digit_bytes);
        Row* rows = (Row*)(start + starts);
        for (int64_t row = shared ? thread : 0; row < m; row += shared ? threads : 1)
            rows[row] = to_digits<D>((const X*)call.x + row * call.ldx, w.k, shape, offset,
                                     digits + row * D * shape.padded, start + row * D * shape.groups);
        if (shared) team.wait();
        columns<BITS, D>(call, shape, {digits, start, rows}, units * thread / threads, units * (thread + 1) / threads,
                            (float*)mine);
    });
    return true;
}

template <int BITS, int D> inline bool multiply_x(const vecmat_call& call) {
    switch (call.x_type) {
        case VECMAT_FP32: return multiply<BITS, D, float>(call);
        case VECMAT_BF16: return multiply<BITS, D, bf16>(call);
        default: return multiply<BITS, D, fp16>(call);
    }
}

template <int BITS> inline bool multiply_digits(const vecmat_call& call) {
    switch (call.digits) {
        case 1: return multiply_x<BITS, 1>(call);
        case 2: return multiply_x<BITS, 2>(call);
        default: return multiply_x<BITS, 4>(call);
    }
}

static bool panels(const vecmat_call* call) {
    return call->weight->bits == 4 ? multiply_digits<4>(*call) : multiply_digits<8>(*call);
}

// The plain storage (weights.py), rows ``row_bytes`` apart, as panels. Columns and k beyond the weight become zeros.
static void pack(const vecmat_panels* weight, const uint8_t* data, int64_t row_bytes, const float* scale,
                 const uint8_t* zero) {
    const vecmat_panels& w = *weight;
    const Shape shape(w);
    const int64_t step = w.bits == 8 ? 4 : 8, stored = w.bits == 8 ? w.k : (w.k + 1) / 2;
    for (int64_t panel = 0; panel < divide_up(w.n, COLUMNS); ++panel)
        for (int64_t column = 0; column < COLUMNS; ++column) {
            const int64_t n = panel * COLUMNS + column, table = panel * shape.scales * COLUMNS + column;
            const bool real = n < w.n;
            for (int64_t g = 0; g < shape.scales; ++g) {
                w.scale[table + g * COLUMNS] = real ? scale[n * shape.scales + g] : 0.0f;
                if (w.zero) w.zero[table + g * COLUMNS] = real ? zero[n * shape.scales + g] : 0;
            }
            uint8_t* out = w.data + panel * shape.panel + column * 4;
            const uint8_t* row = data + n * row_bytes;
            for (int64_t k = 0; k < shape.padded; k += step, out += COLUMNS * 4)
                for (int64_t i = 0; i < 4; ++i) {
                    if (w.bits == 8) {
                        out[i] = real && k + i < stored ? row[k + i] ^ 128 : 0;
                        continue;
                    }
                    const int64_t near = (k + i) / 2, far = (k + 4 + i) / 2, shift = i % 2 * 4;
                    const int low = real && near < stored ? row[near] >> shift & 15 : 0;
                    const int high = real && far < stored ? row[far] >> shift & 15 : 0;
                    out[i] = (uint8_t)(low | high << 4);
                }
        }
}

}  // namespace VECMAT_ISA

#define VECMAT_TEXT(name) #name
#define VECMAT_NAME(name) VECMAT_TEXT(name)
#define VECMAT_JOIN(a, b) a##b
#define VECMAT_TABLE(name) VECMAT_JOIN(isa_, name)
extern const Isa VECMAT_TABLE(VECMAT_ISA);
const Isa VECMAT_TABLE(VECMAT_ISA) = {VECMAT_NAME(VECMAT_ISA), VECMAT_ISA::COLUMNS, VECMAT_ISA::pack,
                                      VECMAT_ISA::panels, VECMAT_ISA::read, VECMAT_ISA::operations,
                                      VECMAT_ISA::dense, VECMAT_ISA::packed_bytes, VECMAT_ISA::pack_dense,
                                      VECMAT_ISA::packed_dense};

}  // namespace vecmat
