// y = x @ weight for int8 and int4 weights in panels, by products of bytes.
//
// Each row of x is written as D signed bytes an element ("digits": x = scale * sum of 256^d * digit_d), one for int8
// activations, two for 16-bit x (off by at most 2^-16 of the row's largest element, where bf16's own last place is at
// 2^-9), four for fp32 x (exact for elements within 2^-7 of the largest). The products of bytes are summed exactly in
// int32 over a group of k, or over SPAN of k where there are no groups; the digits' sums are joined, scaled and added
// up in fp32, group by group in the order of k. That order does not depend on m or on the threads, so a row's bits do
// not either.
//
// A register holds four k of LANES columns. The weight's bytes are unsigned; what they are off by (128, 8, or a zero
// point) is taken off in advance: the sums start at -offset * (sum of the digits).
#pragma once

#include "vec.h"
#include "vecmat.h"

namespace vecmat {
namespace VECMAT_ISA {

// Loops over what lies in registers: an array that a loop indexes would lie in memory.
#define VECMAT_UNROLL _Pragma("GCC unroll 16")

constexpr int VECTORS = 4;                   // registers side by side in a panel
constexpr int COLUMNS = VECTORS * LANES;     // output channels of a panel
constexpr int SPAN = 2048;                   // k whose products are summed in int32 where there are no groups
constexpr int ROWS = WIDTH == 64 ? 6 : 2;    // rows of digits that fit the registers beside a panel's width

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a weight's sizes come to.
struct Shape {
    int64_t groups;      // of int32 sums along k
    int64_t size;        // k of a group
    int64_t padded;      // k, up to a whole step
    int64_t panel;       // bytes of a panel
    int64_t scales;      // scales of a column

    explicit Shape(const vecmat_panels& w) {
        size = w.group ? w.group : SPAN;
        groups = divide_up(w.k, size);
        padded = divide_up(w.k, 8) * 8;
        panel = padded * COLUMNS * w.bits / 8;
        scales = w.group ? groups : 1;
    }
};

// ---- x as digits

// A row of x: its digits (D rows of ``padded`` bytes), and what its sums are worth.
struct Row {
    float scale, after;  // y = sum * scale * after; two factors, so that neither is subnormal
};

template <int D, class T> inline Row to_digits(const T* x, int64_t k, const Shape& shape, int offset, int8_t* digits,
                                               int32_t* start) {
    i32 top = {};
    for (int64_t i = 0; i < k; i += LANES) {
        const f32 v = load_some(x + i, k - i);
        const i32 magnitude = (i32)v & 0x7fffffff;  // as integers they are ordered like numbers, and NaN is the largest
        top = magnitude > top ? magnitude : top;
    }
    int32_t most = 0;
    for (int lane = 0; lane < LANES; ++lane) most = top[lane] > most ? top[lane] : most;
    float largest;
    memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000;
    const float before = largest < 0x1p-90f ? 0x1p64f : 1.0f;  // lifts what is near the subnormal numbers
    float scale = 1.0f, inverse = 1.0f;
    if (!finite) {
        scale = __builtin_nanf(""), inverse = 0.0f;
    } else if (D == 1) {
        scale = largest / 127.0f * before;
        scale = scale == 0.0f ? 1.0f : scale;
        inverse = 1.0f / scale;
    } else if (D == 2) {
        scale = largest > 0.0f ? largest * before / 32512.0f : 1.0f;  // 127 * 256: the high digit is at most 127
        inverse = 1.0f / scale;
    } else if (largest > 0.0f) {  // a power of two, so that nothing is rounded: the largest lies in [2^29, 2^30)
        int exponent;
        __builtin_frexpf(largest * before, &exponent);
        scale = __builtin_ldexpf(1.0f, exponent - 30);
        inverse = __builtin_ldexpf(1.0f, 30 - exponent);
    }
    for (int d = 0; d < D; ++d) memset(digits + (d + 1) * shape.padded - 8, 0, 8);  // what k is padded with
    const f32 lift = splat(before), factor = splat(inverse);
    for (int64_t g = 0; g < shape.groups; ++g) {
        const int64_t from = g * shape.size, to = g + 1 < shape.groups ? from + shape.size : k;
        i32 sums[D] = {};
        for (int64_t i = from; i < to; i += LANES) {
            const f32 v = load_some(x + i, to - i);
            i32 rest = to_int(v * lift * factor);
            for (int d = 0; d < D; ++d) {  // from the lowest, each within -128..127
                const i32 digit = d + 1 < D ? (i32)((u32)rest << 24) >> 24 : rest;
                rest = (rest - digit) >> 8;
                sums[d] += digit;
                int8_t* out = digits + d * shape.padded + i;
                const i8x bytes = to_bytes(digit);
                if (i + LANES <= shape.padded) store_as(out, bytes);
                else memcpy(out, &bytes, shape.padded - i);
            }
        }
        for (int d = 0; d < D; ++d) start[d * shape.groups + g] = -offset * sum(sums[d]);
    }
    return {scale, finite ? 1.0f / before : 1.0f};
}

// ---- one tile

// x as the tile wants it: ``rows`` rows from ``digits`` on, D digits each.
struct Digits {
    const int8_t* digits;  // [row][digit][padded]
    const int32_t* start;  // [row][digit][group]
    const Row* rows;
};

// A panel from one of its registers on.
struct Strip {
    const uint8_t* data;
    const float* scale;
    const uint8_t* zero;
};

// What a tile asks of the memory while it computes: of each step's lines those from ``from`` to ``to``, ``distance``
// bytes further on.
struct Ahead {
    int64_t distance;
    int from, to;
};

// f += the sums of groups [first, last): M rows of x, NV registers of columns. Without groups f is not scaled yet.
template <int BITS, int D, int M, int NV>
inline void accumulate(const vecmat_panels& w, const Shape& shape, const Strip& strip, const Digits& x, int64_t first,
                       int64_t last, const Ahead& ahead, f32 (&f)[M][NV]) {
    constexpr int STEP = BITS == 8 ? 4 : 8;  // k of one register
    const int64_t line = shape.padded, groups = shape.groups;
    for (int64_t g = first; g < last; ++g) {
        i32 acc[M][D][NV];
        VECMAT_UNROLL for (int m = 0; m < M; ++m)
            VECMAT_UNROLL for (int d = 0; d < D; ++d) {
                const i32 start = splat(x.start[(m * D + d) * groups + g]);
                VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
                    acc[m][d][j] = start;
                    if (strip.zero) acc[m][d][j] *= from_bytes(load_as<u8x>(strip.zero + g * COLUMNS + j * LANES));
                }
            }
        const int64_t from = g * shape.size, to = g + 1 < groups ? from + shape.size : shape.padded;
        const uint8_t* data = strip.data + from / STEP * COLUMNS * 4;
        const int8_t* digits = x.digits + from;
        for (int64_t k = from; k < to; k += STEP, data += COLUMNS * 4, digits += STEP) {
            for (int line = ahead.from; line < ahead.to; ++line) prefetch(data + ahead.distance + line * 64);
            i32 low[NV], high[NV];
            VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
                low[j] = load_as<i32>(data + j * WIDTH);
                if (BITS == 4) {
                    high[j] = (i32)((u32)low[j] >> 4) & 0x0f0f0f0f;
                    low[j] &= 0x0f0f0f0f;
                }
            }
            VECMAT_UNROLL for (int m = 0; m < M; ++m)
                VECMAT_UNROLL for (int d = 0; d < D; ++d) {
                    const int8_t* row = digits + (m * D + d) * line;
                    const i32 first_four = splat(load_as<int32_t>(row));
                    VECMAT_UNROLL for (int j = 0; j < NV; ++j)
                        acc[m][d][j] = dot<BITS == 4>(acc[m][d][j], low[j], first_four);
                    if (BITS == 4) {
                        const i32 next_four = splat(load_as<int32_t>(row + 4));
                        VECMAT_UNROLL for (int j = 0; j < NV; ++j)
                            acc[m][d][j] = dot<true>(acc[m][d][j], high[j], next_four);
                    }
                }
        }
        VECMAT_UNROLL for (int m = 0; m < M; ++m)
            VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
                f32 whole = to_float(acc[m][D - 1][j]);
                VECMAT_UNROLL for (int d = D - 2; d >= 0; --d)
                    whole = fma(whole, splat(256.0f), to_float(acc[m][d][j]));
                f[m][j] = w.group ? fma(whole, load(strip.scale + g * COLUMNS + j * LANES), f[m][j]) : f[m][j] + whole;
            }
    }
}

// ---- the whole product

struct Out {
    const vecmat_call& call;
    int64_t column;  // of the strip's first
};

template <class Y, int M, int NV> inline void store_rows(const Out& out, int64_t row, const f32 (&f)[M][NV]) {
    const int64_t n = out.call.weight->n, columns = n - out.column;
    Y* y = (Y*)out.call.y + row * n + out.column;
    VECMAT_UNROLL for (int m = 0; m < M; ++m, y += n)
        VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
            if (columns >= NV * LANES) store(y + j * LANES, f[m][j]);
            else if (columns > j * LANES) store(y + j * LANES, f[m][j], (int)(columns - j * LANES));
        }
}

// Adds the bias and stores M rows of y. The types are looked at here, once for a tile.
template <int M, int NV> inline void finish(const Out& out, int64_t row, f32 (&f)[M][NV]) {
    const vecmat_call& call = out.call;
    if (call.bias)
        VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
            const int64_t column = out.column + j * LANES;
            if (column >= call.weight->n) break;
            const f32 bias = load_any(call.bias, call.x_type, column, call.weight->n - column);
            VECMAT_UNROLL for (int m = 0; m < M; ++m) f[m][j] += bias;
        }
    switch (call.y_type) {
        case VECMAT_FP32: return store_rows<float>(out, row, f);
        case VECMAT_BF16: return store_rows<bf16>(out, row, f);
        default: return store_rows<fp16>(out, row, f);
    }
}

// Rows [row, row + M) of NV registers of columns, over groups [first, last); ``partial`` keeps what is not finished.
template <int BITS, int D, int M, int NV>
__attribute__((noinline)) void tile(const Out& out, const Shape& shape, const Strip& strip, const Digits& all,
                                    int64_t row, int64_t first, int64_t last, const Ahead& ahead, float* partial) {
    const vecmat_panels& w = *out.call.weight;
    const Digits x = {all.digits + row * D * shape.padded, all.start + row * D * shape.groups, all.rows + row};
    float* kept = partial + row * COLUMNS;
    f32 f[M][NV];
    VECMAT_UNROLL for (int m = 0; m < M; ++m)
        VECMAT_UNROLL for (int j = 0; j < NV; ++j) f[m][j] = first ? load(kept + m * COLUMNS + j * LANES) : f32{};
    accumulate<BITS, D, M, NV>(w, shape, strip, x, first, last, ahead, f);
    if (last < shape.groups) {
        VECMAT_UNROLL for (int m = 0; m < M; ++m)
            VECMAT_UNROLL for (int j = 0; j < NV; ++j) store(kept + m * COLUMNS + j * LANES, f[m][j]);
        return;
    }
    VECMAT_UNROLL for (int m = 0; m < M; ++m)
        VECMAT_UNROLL for (int j = 0; j < NV; ++j) {
            if (!w.group) f[m][j] *= load(strip.scale + j * LANES);
            f[m][j] = f[m][j] * splat(x.rows[m].scale) * splat(x.rows[m].after);
        }
    finish(out, row, f);
}

template <int BITS, int D, int NV>
inline void rows_of_strip(const Out& out, const Shape& shape, const Strip& strip, const Digits& x, float* partial) {
    constexpr int MOST = ROWS / D ? ROWS / D : 1;
    const int64_t m = out.call.m;
    const int64_t chunk = m <= MOST ? shape.groups : (SPAN / shape.size ? SPAN / shape.size : 1);
    const int64_t blocks = divide_up(m, MOST);
    for (int64_t first = 0; first < shape.groups; first += chunk) {
        const int64_t last = first + chunk < shape.groups ? first + chunk : shape.groups;
        const int64_t distance = (last - first) * shape.size * COLUMNS * BITS / 8;
        const int64_t lines = blocks > 1 && NV == VECTORS ? COLUMNS * 4 / 64 : 0;  // one block is a stream
        for (int64_t block = 0; block < blocks; ++block) {  // blocks of rows as equal as they can be
            const int64_t row = block * m / blocks, count = (block + 1) * m / blocks - row;
            const Ahead ahead = {distance, (int)(block * lines / blocks), (int)((block + 1) * lines / blocks)};
            switch (count) {
#define VECMAT_ROWS(M) \
    case M: tile<BITS, D, (M < MOST ? M : MOST), NV>(out, shape, strip, x, row, first, last, ahead, partial); break;
                VECMAT_ROWS(1) VECMAT_ROWS(2) VECMAT_ROWS(3) VECMAT_ROWS(4) VECMAT_ROWS(5) VECMAT_ROWS(6)
#undef VECMAT_ROWS
            }
        }
    }
}

// The columns of registers [from, to), counted over all panels.
template <int BITS, int D>
inline void columns(const vecmat_call& call, const Shape& shape, const Digits& x, int64_t from, int64_t to,
                    float* partial) {
    const vecmat_panels& w = *call.weight;
    while (from < to) {
        const int64_t panel = from / VECTORS, vector = from % VECTORS;
        const int64_t left = VECTORS - vector < to - from ? VECTORS - vector : to - from;
        const int count = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        const int64_t scales = panel * shape.scales * COLUMNS + vector * LANES;
        const Strip strip = {w.data + panel * shape.panel + vector * WIDTH, w.scale + scales,
                             w.zero ? w.zero + scales : nullptr};
        const Out out = {call, from * LANES};
        if (count == 4) rows_of_strip<BITS, D, 4>(out, shape, strip, x, partial);
        else if (count == 2) rows_of_strip<BITS, D, 2>(out, shape, strip, x, partial);
        else rows_of_strip<BITS, D, 1>(out, shape, strip, x, partial);
        from += count;
    }
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
