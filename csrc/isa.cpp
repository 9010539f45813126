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

// Elements of y.
inline int64_t size_of(int type) { return type == VECMAT_FP32 ? 4 : 2; }

// Where the digits of some rows of x lie.
template <int D, class X> struct Written {
    int64_t digit_bytes, starts, bytes;
    Written(int64_t rows, const Shape& shape)
        : digit_bytes(divide_up(rows * D * shape.padded, 64) * 64), starts(rows * D * shape.groups),
          bytes(divide_up(digit_bytes + starts * 4 + rows * (int64_t)sizeof(Row), 64) * 64) {}

    Digits at(char* memory) const {
        int32_t* start = (int32_t*)(memory + digit_bytes);
        return {(int8_t*)memory, start, (Row*)(start + starts)};
    }
    // Every ``apart``-th row of the call's, from ``row`` on.
    static void write(const vecmat_call& call, const Shape& shape, const Digits& to, int64_t row, int64_t apart) {
        const int offset = call.weight->zero ? 1 : call.weight->bits == 8 ? 128 : 8;
        for (; row < call.m; row += apart)
            to.rows[row] = to_digits<D>((const X*)call.x + row * call.ldx, call.weight->k, shape, offset,
                                        to.digits + row * D * shape.padded, to.start + row * D * shape.groups);
    }
};

// A call's work as worth() counts it: half a byte read is a unit, and so are as many products as take that long.
template <int D> inline int64_t work_of(const vecmat_panels& w, int64_t m) {
#if defined(__AVX512VNNI__)
    constexpr int64_t EACH = 16;
#elif defined(__AVX2__)
    constexpr int64_t EACH = 2;
#else
    constexpr int64_t EACH = 1;
#endif
    return w.n * w.k * w.bits / 16 + m * D * w.n * w.k / EACH;
}

template <int BITS, int D, class X> inline bool multiply(const vecmat_call& call) {
    constexpr int64_t BESIDE = 1 << 22, FEW = 48;
    const vecmat_panels& w = *call.weight;
    const Shape shape(w);
    const int64_t m = call.m, units = divide_up(w.n, LANES);
    const int threads = worth(call.threads, units, work_of<D>(w, m));
    // Each thread writes all digits for itself: what a core of another cache wrote comes at 100 ns a line. They share the
    // work where a thread's columns are so few that it would count.
    const bool shared = m > threads && w.n < 512 * threads;
    int64_t rows = m;  // at a time, so that digits stay in the cache, but the weight is not read too often
    if (!shared && rows * D * shape.padded > BESIDE) {
        rows = BESIDE / (D * shape.padded);
        if (rows < FEW) rows = FEW;
        rows = divide_up(m, divide_up(m, rows));
    }
    const Written<D, X> written(rows, shape);
    const int64_t partial = divide_up(rows * COLUMNS * 4, 64) * 64;
    const int64_t common = shared ? written.bytes : 0, each = partial + (shared ? 0 : written.bytes);
    const Scratch scratch(common + threads * each);
    if (!scratch.memory) return false;
    in_threads(threads, [&](int thread, Team& team) {
        char* own = (char*)scratch.memory + common + thread * each;
        const Digits x = written.at(shared ? (char*)scratch.memory : own + partial);
        const int64_t from = units * thread / threads, to = units * (thread + 1) / threads;
        if (shared) {
            written.write(call, shape, x, thread, threads);
            team.wait();
            columns<BITS, D>(call, shape, x, from, to, (float*)own);
            return;
        }
        for (int64_t row = 0; row < m; row += rows) {
            vecmat_call part = call;
            part.x = (const X*)call.x + row * call.ldx;
            part.y = (char*)call.y + row * w.n * size_of(call.y_type);
            part.m = m - row < rows ? m - row : rows;
            written.write(part, shape, x, 0, 1);
            columns<BITS, D>(part, shape, x, from, to, (float*)own);
        }
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
