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

#include "digits.h"

namespace vecmat {
namespace VECMAT_ISA {

constexpr int ROWS = WIDTH == 64 ? 6 : 2;    // rows of digits that fit the registers beside a panel's width

// ---- one tile

// x as the tile wants it: ``rows`` rows from ``digits`` on, D digits each.
struct Digits {
    int8_t* digits;  // [row][digit][padded]
    int32_t* start;  // [row][digit][group]
    Row* rows;
};

// A panel from one of its registers on.
struct Strip {
    const uint8_t* data;
    const float* scale;
    const uint8_t* zero;
};

// What a tile asks of the memory while it computes: cache lines from ``at`` on, ``rate`` / 65536 of them with each step.
struct Ahead {
    int64_t distance;
    int from, to;
};

template <int BITS> constexpr int STEP = BITS == 8 ? 4 : 8;  // k of one register

// acc += products over ``steps`` of k: ALL rows of digits ``line`` bytes apart, NV registers of columns.
template <int BITS, int ALL, int NV>
VECMAT_INLINE inline void multiply(const uint8_t* data, const int8_t* digits, int64_t line, int64_t steps,
                                   const Ahead& ahead, i32 (&acc)[ALL][NV]) {
    for (; steps > 0; --steps, data += COLUMNS * 4, digits += STEP<BITS>) {
        for (int line = ahead.from; line < ahead.to; ++line) prefetch(data + ahead.distance + line * 64);
        i32 part[NV];
        each<NV>([&](auto j) VECMAT_INLINE {
            part[j] = load_as<i32>(data + j * WIDTH);
            if constexpr (BITS == 4) part[j] &= 0x0f0f0f0f;
        });
        const auto times = [&](const int8_t* row) VECMAT_INLINE {
            each<ALL>([&](auto r) VECMAT_INLINE {
                const i32 four = splat(load_as<int32_t>(row + r * line));
                each<NV>([&](auto j) VECMAT_INLINE { acc[r][j] = dot<BITS == 4>(acc[r][j], part[j], four); });
            });
        };
        times(digits);
        if constexpr (BITS == 4) {
            const uint8_t* again = data;  // loaded once more: there are registers for one half at a time
            if (ALL * NV > 16) asm("" : "+r"(again));
            each<NV>([&](auto j) VECMAT_INLINE {
                part[j] = (i32)(load_as<u32>(again + j * WIDTH) >> 4) & 0x0f0f0f0f;
            });
            times(digits + 4);
        }
    }
}

// ---- the whole product

struct Out {
    const vecmat_call& call;
    int64_t column;  // of the strip's first
};

template <class Y, int M, int NV>
VECMAT_INLINE inline void store_rows(const Out& out, int64_t row, const f32 (&f)[M][NV]) {
    const int64_t n = out.call.weight->n, columns = n - out.column;
    Y* y = (Y*)out.call.y + row * n + out.column;
    each<M>([&](auto m) VECMAT_INLINE {
        if constexpr (NV % 2 == 0)
            if (columns >= NV * LANES)
                return each<NV / 2>([&](auto j) VECMAT_INLINE {
                    store_pair(y + m * n + j * 2 * LANES, f[m][j * 2], f[m][j * 2 + 1]);
                });
        each<NV>([&](auto j) VECMAT_INLINE {
            if (columns > j * LANES) store(y + m * n + j * LANES, f[m][j], (int)(columns - j * LANES));
        });
    });
}

// Adds the bias and stores M rows of y. The types are looked at here, once for a tile.
template <int M, int NV> VECMAT_INLINE inline void finish(const Out& out, int64_t row, f32 (&f)[M][NV]) {
    const vecmat_call& call = out.call;
    if (call.bias)
        each<NV>([&](auto j) VECMAT_INLINE {
            const int64_t column = out.column + j * LANES;
            if (column >= call.weight->n) return;
            const f32 bias = load_any(call.bias, call.x_type, column, call.weight->n - column);
            each<M>([&](auto m) VECMAT_INLINE { f[m][j] += bias; });
        });
    switch (call.y_type) {
        case VECMAT_FP32: return store_rows<float>(out, row, f);
        case VECMAT_BF16: return store_rows<bf16>(out, row, f);
        default: return store_rows<fp16>(out, row, f);
    }
}

// Rows [row, row + M) of NV registers of columns, over groups [first, last). ``partial`` keeps the sums between groups:
// in registers they would drive out what the products need.
template <int BITS, int D, int M, int NV>
__attribute__((noinline)) void tile(const Out& out, const Shape& shape, const Strip& strip, const Digits& all,
                                    int64_t row, int64_t first, int64_t last, const Ahead& ahead, float* partial) {
    constexpr int ALL = M * D;  // rows of digits
    const vecmat_panels& w = *out.call.weight;
    const int64_t line = shape.padded, groups = shape.groups;
    const int8_t* digits = all.digits + row * D * line;
    const int32_t* start = all.start + row * D * groups;
    // Both digits' sums fit int32 together: the same number at a lower price.
    const bool narrow = D == 2 && w.group && w.group <= (BITS == 4 ? 4096 : 256);
    float* kept = partial + row * COLUMNS;
    for (int64_t g = first; g < last; ++g) {
        i32 acc[ALL][NV];
        each<ALL>([&](auto r) VECMAT_INLINE {
            const i32 begin = splat(start[r * groups + g]);
            each<NV>([&](auto j) VECMAT_INLINE { acc[r][j] = begin; });
        });
        if (strip.zero)
            each<NV>([&](auto j) VECMAT_INLINE {
                const i32 zero = from_bytes(load_as<u8x>(strip.zero + g * COLUMNS + j * LANES));
                each<ALL>([&](auto r) VECMAT_INLINE { acc[r][j] *= zero; });
            });
        const int64_t from = g * shape.size, to = g + 1 < groups ? from + shape.size : shape.padded;
        multiply<BITS>(strip.data + from / STEP<BITS> * COLUMNS * 4, digits + from, line, (to - from) / STEP<BITS>,
                       ahead, acc);
        f32 f[M][NV];
        each<M>([&](auto m) VECMAT_INLINE {
            each<NV>([&](auto j) VECMAT_INLINE {
                f32 whole = to_float(acc[m * D + D - 1][j]);
                if (narrow)
                    whole = to_float((acc[m * D + D - 1][j] << 8) + acc[m * D][j]);
                else
                    each<D - 1>([&](auto d) VECMAT_INLINE {
                        whole = fma(whole, splat(256.0f), to_float(acc[m * D + D - 2 - d][j]));
                    });
                const f32 before = g ? load(kept + m * COLUMNS + j * LANES) : f32{};
                f[m][j] = w.group ? fma(whole, load(strip.scale + g * COLUMNS + j * LANES), before) : before + whole;
            });
        });
        if (g + 1 < groups) {
            each<M>([&](auto m) VECMAT_INLINE {
                each<NV>([&](auto j) VECMAT_INLINE { store(kept + m * COLUMNS + j * LANES, f[m][j]); });
            });
            continue;
        }
        each<M>([&](auto m) VECMAT_INLINE {
            const Row& worth = all.rows[row + m];
            each<NV>([&](auto j) VECMAT_INLINE {
                if (!w.group) f[m][j] *= load(strip.scale + j * LANES);
                f[m][j] *= splat(worth.scale);
            });
            if (worth.after == 1.0f) return;  // nearly always
            each<NV>([&](auto j) VECMAT_INLINE { f[m][j] *= splat(worth.after); });
        });
        finish(out, row, f);
    }
}

// ``more``: the next panel is this thread's, too.
template <int BITS, int D, int NV>
inline void rows_of_strip(const Out& out, const Shape& shape, const Strip& strip, const Digits& x, bool more,
                          float* partial) {
    constexpr int MOST = ROWS / D ? ROWS / D : 1;
    const int64_t m = out.call.m;
    const int64_t chunk = m <= MOST ? shape.groups : (SPAN / shape.size ? SPAN / shape.size : 1);
    const int64_t blocks = divide_up(m, MOST);
    const auto at = [&](int64_t group) { return group < shape.groups ? group * shape.size : shape.padded; };
    // What comes next lies next, a whole block on: the panel's next block, or the next panel's first.
    const int64_t distance = at(chunk) / STEP<BITS> * COLUMNS * 4;
    for (int64_t first = 0; first < shape.groups; first += chunk) {
        const int64_t last = first + chunk < shape.groups ? first + chunk : shape.groups;
        const int64_t lines = blocks > 1 && NV == VECTORS && (last < shape.groups || more) ? COLUMNS * 4 / 64 : 0;
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
__attribute__((noinline)) void columns(const vecmat_call& call, const Shape& shape, const Digits& x, int64_t from, int64_t to,
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
        from += count;
        if (count == 4) rows_of_strip<BITS, D, 4>(out, shape, strip, x, from < to, partial);
        else if (count == 2) rows_of_strip<BITS, D, 2>(out, shape, strip, x, false, partial);
        else rows_of_strip<BITS, D, 1>(out, shape, strip, x, false, partial);
    }
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
