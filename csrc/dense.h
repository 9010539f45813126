// y = x @ weight + bias for a dense weight (n, k) read where it is, row by row.
//
// Each number of y is a dot product along two rows. Lane l of a register sums the products of k = l, l + LANES, ...
// in that order, and the lanes are added up at the end (sum4). Nothing changes that order: not how many rows of x there
// are, not the blocks below, not the threads; so a row of x gets the same bits in any company.
//
// x is copied first (widened, or as it is where bf16 pairs are multiplied), TILE rows side by side, zeros behind the
// last k. A tile is ROWS rows of the weight by up to TILE rows of x, held in registers while k goes by. With more rows
// of x than that, k goes by in chunks that the caches hold, and each chunk of the weight is used for all tiles of x
// before the next; the registers wait in memory meanwhile.
#pragma once

#include "vec.h"
#include "vecmat.h"

namespace vecmat {
namespace VECMAT_ISA {
namespace rows {  // names of its own: panels.h has a tile, too

constexpr int TILE = 6;                     // rows of x in registers
constexpr int ROWS = WIDTH == 64 ? 4 : 2;   // rows of the weight beside them
constexpr int STREAMS = 8;                  // rows of the weight at a time where there is one row of x, if they are long
constexpr int64_t LONG = 8192;              // bytes
constexpr int BLOCK = 16;                   // rows of the weight whose results are written together
constexpr int64_t CHUNK = 2048;             // bytes of a row of x in a chunk of k
constexpr int64_t BAND = 32 * TILE;         // rows of x whose chunk stays in the cache

// x in fp32 and the weight widened to it.
template <class W> struct Widened {
    typedef W Stored;
    typedef float Taken;
    typedef f32 Vector;
    typedef Widened<float> Copied;  // how a copy of the weight in ``Taken`` is multiplied
    static constexpr int STEP = LANES;
    static f32 stored(const W* from) { return load(from); }
    static f32 stored(const W* from, int count) { return load(from, count); }
    static f32 taken(const float* from) { return load(from); }
    template <class X> static void take(float* to, const X* from) { store(to, load(from)); }
    template <class X> static void take(float* to, const X* from, int count) { store(to, load(from, count)); }
    static void keep(float* to, f32 value) { store(to, value); }
    static f32 add(f32 acc, f32 w, f32 x) { return fma(w, x, acc); }
};

#if defined(__AVX512BF16__)
// x and the weight in bf16, multiplied by pairs.
struct Pairs {
    typedef bf16 Stored;
    typedef bf16 Taken;
    typedef i32 Vector;
    typedef Pairs Copied;
    static constexpr int STEP = 2 * LANES;
    static i32 stored(const bf16* from) { return load_as<i32>(from); }
    static i32 stored(const bf16* from, int count) {
        i32 value = {};
        memcpy(&value, from, count * sizeof(bf16));
        return value;
    }
    static i32 taken(const bf16* from) { return load_as<i32>(from); }
    static void take(bf16* to, const bf16* from) { store_as(to, load_as<i32>(from)); }
    static void take(bf16* to, const bf16* from, int count) { store_as(to, stored(from, count)); }
    static void keep(bf16* to, i32 value) { store_as(to, value); }
    static f32 add(f32 acc, i32 w, i32 x) { return dot_pairs(acc, w, x); }
};
#endif

// A row of x as a tile wants it: its steps ``apart`` elements apart.
template <class Kind, class X> inline void take_row(const X* x, int64_t k, typename Kind::Taken* to, int64_t apart) {
    int64_t i = 0;
    for (; i + Kind::STEP <= k; i += Kind::STEP, to += apart) Kind::take(to, x + i);
    if (i < k) Kind::take(to, x + i, (int)(k - i));
}

// Part of the weight: rows ``line`` elements apart, steps of k ``step`` apart, ``whole`` of them full and then one of
// ``rest`` elements.
template <class Kind> struct Part {
    const typename Kind::Stored* data;
    int64_t line, step, whole;
    int rest;
};

// What is brought into the cache while a tile is computed: rows ``line`` bytes apart, ``step`` bytes of each a step.
struct Ahead {
    const char* data;
    int64_t line, step;
};

// The sums of R rows of the weight and M of x, added to those in ``kept`` if ``go_on``; they stay in ``kept`` unless
// these are the last steps, whose results go to ``out``, rows BLOCK apart.
template <class Kind, int R, int M, bool AHEAD>
__attribute__((noinline)) void tile(const Part<Kind>& w, const typename Kind::Taken* x, bool go_on, bool last, float* kept,
                                    float* out, Ahead next) {
    typedef typename Kind::Vector Vector;
    constexpr int STEP = Kind::STEP;
    f32 acc[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) acc[r][m] = go_on ? load(kept + (r * M + m) * LANES) : f32{};
    const typename Kind::Stored* data = w.data;
    const auto add = [&](const Vector(&stored)[R]) {
        for (int m = 0; m < M; ++m) {
            const Vector taken = Kind::taken(x + m * STEP);
            for (int r = 0; r < R; ++r) acc[r][m] = Kind::add(acc[r][m], stored[r], taken);
        }
        x += M * STEP;
    };
    for (int64_t i = 0; i < w.whole; ++i, data += w.step) {
        Vector stored[R];
        for (int r = 0; r < R; ++r) stored[r] = Kind::stored(data + r * w.line);
        if (AHEAD) {
            for (int r = 0; r < R; ++r) __builtin_prefetch(next.data + r * next.line);
            next.data += next.step;
        }
        add(stored);
    }
    if (w.rest) {
        Vector stored[R];
        for (int r = 0; r < R; ++r) stored[r] = Kind::stored(data + r * w.line, w.rest);
        add(stored);
    }
    if (!last) {
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) store(kept + (r * M + m) * LANES, acc[r][m]);
        return;
    }
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; r += 4) {
            const f32 none = {};
            float sums[4];
            sum4(acc[r][m], r + 1 < R ? acc[(r + 1) % R][m] : none, r + 2 < R ? acc[(r + 2) % R][m] : none,
                 r + 3 < R ? acc[(r + 3) % R][m] : none, sums);
            memcpy(out + m * BLOCK + r, sums, (R - r < 4 ? R - r : 4) * sizeof(float));
        }
}

template <class Kind, int R, bool AHEAD>
inline void tile_of(int64_t m, const Part<Kind>& w, const typename Kind::Taken* x, bool go_on, bool last, float* kept,
                    float* out, const Ahead& next) {
    switch (m) {
#define VECMAT_TILE(M) \
    case M: return tile<Kind, R, M, AHEAD>(w, x, go_on, last, kept, out, next);
        VECMAT_TILE(1) VECMAT_TILE(2) VECMAT_TILE(3) VECMAT_TILE(4) VECMAT_TILE(5) VECMAT_TILE(6)
#undef VECMAT_TILE
    }
}

template <class X, class Y> inline void write_as(const vecmat_dense_call& call, const float* out, int64_t row, int64_t rows,
                                                 int64_t column, int columns) {
    for (int at = 0; at < columns; at += LANES) {
        const int count = columns - at < LANES ? columns - at : LANES;
        f32 bias = {};
        if (call.bias) {
            const X* from = (const X*)call.bias + column + at;
            bias = count == LANES ? load(from) : load(from, count);
        }
        for (int64_t m = 0; m < rows; ++m)
            store((Y*)call.y + (row + m) * call.spec->n + column + at, load(out + m * BLOCK + at) + bias, count);
    }
}

template <class X> inline void write(const vecmat_dense_call& call, const float* out, int64_t row, int64_t rows,
                                     int64_t column, int columns) {
    switch (call.spec->y_type) {
        case VECMAT_FP32: return write_as<X, float>(call, out, row, rows, column, columns);
        case VECMAT_BF16: return write_as<X, bf16>(call, out, row, rows, column, columns);
        default: return write_as<X, fp16>(call, out, row, rows, column, columns);
    }
}

// What a call comes to: x taken, and the memory one thread works in.
template <class Kind> struct Job {
    typedef typename Kind::Taken Taken;
    const vecmat_dense_call& call;
    const Taken* x;       // [tile][step][row of the tile][STEP]
    float* kept;          // BLOCK * BAND registers
    float* out;           // [BAND][BLOCK]
    Taken* copy;          // ROWS rows of a chunk of the weight
    int64_t tiles, steps;

    int64_t row(int64_t tile) const { return tile * call.m / tiles; }  // tiles of rows as equal as they can be
};

// R rows of the weight, from ``row`` of the block that begins at ``column``, times tiles [first, last) of x, over steps
// [from, to) of k.
template <class Kind, int R>
inline void rows_of_weight(const Job<Kind>& job, int64_t column, int64_t row, int64_t first, int64_t last, int64_t from,
                           int64_t to) {
    constexpr int STEP = Kind::STEP;
    typedef typename Kind::Stored Stored;
    typedef typename Kind::Copied Copied;
    const vecmat_dense_call& call = job.call;
    const int64_t k = call.spec->k, ldw = call.ldw, begin = job.row(first);
    const Stored* data = (const Stored*)call.w + (column + row) * ldw + from * STEP;
    const int64_t whole = (to * STEP <= k ? to : k / STEP) - from;
    const int rest = (int)(to * STEP <= k ? 0 : k % STEP);
    const Stored* next = data + R * ldw;  // what is read next: these steps of the rows below, or else the next steps
    if (row + 2 * R > BLOCK) next = (const Stored*)call.w + (to < job.steps ? column * ldw + to * STEP : (column + BLOCK) * ldw);
    const Ahead ahead = {(const char*)next, ldw * (int64_t)sizeof(Stored), STEP * (int64_t)sizeof(Stored)};
    const Part<Kind> there = {data, ldw, STEP, whole, rest};
    Part<Copied> here = {job.copy, STEP, R * STEP, to - from, 0};
    const bool copied = last - first > 2;
    if (copied) {
        typename Kind::Taken* copy = job.copy;
        for (int64_t i = 0; i < whole; ++i, data += STEP)
            for (int r = 0; r < R; ++r, copy += STEP) Kind::keep(copy, Kind::stored(data + r * ldw));
        if (rest)
            for (int r = 0; r < R; ++r, copy += STEP) Kind::keep(copy, Kind::stored(data + r * ldw, rest));
    }
    for (int64_t t = first; t < last; ++t) {
        const int64_t at = job.row(t), count = job.row(t + 1) - at;
        const typename Kind::Taken* x = job.x + (at * job.steps + from * count) * STEP;
        float* kept = job.kept + (row * BAND + (at - begin) * R) * LANES;
        float* out = job.out + (at - begin) * BLOCK + row;
        const bool go_on = from > 0, end = to == job.steps;
        if (copied && t == first) tile_of<Copied, R, true>(count, here, x, go_on, end, kept, out, ahead);
        else if (copied) tile_of<Copied, R, false>(count, here, x, go_on, end, kept, out, ahead);
        else tile_of<Kind, R, false>(count, there, x, go_on, end, kept, out, ahead);
    }
}

// Rows [from, to) of the weight, R at a time.
template <class Kind, int R> inline void columns_of_y(const Job<Kind>& job, int64_t from, int64_t to) {
    const vecmat_dense_call& call = job.call;
    const int64_t chunk = job.tiles == 1 ? job.steps : CHUNK / (int64_t)(Kind::STEP * sizeof(typename Kind::Taken));
    const int64_t bands = (call.m + BAND - 1) / BAND;
    for (int64_t column = from; column < to; column += BLOCK) {
        const int64_t rows = to - column < BLOCK ? to - column : BLOCK;
        for (int64_t band = 0; band < bands; ++band) {
            const int64_t first = band * job.tiles / bands, last = (band + 1) * job.tiles / bands;
            for (int64_t step = 0; step < job.steps; step += chunk) {
                const int64_t end = step + chunk < job.steps ? step + chunk : job.steps;
                int64_t row = 0;
                for (; row + R <= rows; row += R) rows_of_weight<Kind, R>(job, column, row, first, last, step, end);
                for (; row < rows; ++row) rows_of_weight<Kind, 1>(job, column, row, first, last, step, end);
            }
            const int64_t at = job.row(first), count = job.row(last) - at;
            switch (call.spec->x_type) {
                case VECMAT_FP32: write<float>(call, job.out, at, count, column, (int)rows); break;
                case VECMAT_BF16: write<bf16>(call, job.out, at, count, column, (int)rows); break;
                default: write<fp16>(call, job.out, at, count, column, (int)rows);
            }
        }
    }
}

}  // namespace rows
}  // namespace VECMAT_ISA
}  // namespace vecmat
