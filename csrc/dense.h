// y = x @ weight + bias for a dense weight (n, k) read where it is, row by row.
//
// Each number of y is a dot product along two rows. Lane l of a register sums the products of k = l, l + LANES, ...
// in that order, and the lanes are added up at the end (sum4). Nothing changes that order: not how many rows of x there
// are, not the blocks below, not the threads; so a row of x gets the same bits in any company.
//
// x is copied first (widened, or as it is where bf16 pairs are multiplied), TILE rows side by side, zeros behind the
// last k. A tile is R rows of the weight by up to TILE rows of x, held in registers while all of k goes by. A block of
// the weight that the second cache holds meets all tiles of x in turn; what comes next is fetched during the first.
#pragma once

#include "vec.h"
#include "vecmat.h"

namespace vecmat {
namespace VECMAT_ISA {
namespace rows {  // names of its own: panels.h has a tile, too

constexpr int TILE = 6;                    // rows of x in registers
constexpr int ROWS = WIDTH == 64 ? 4 : 2;  // rows of the weight beside them
constexpr int FEW = WIDTH == 64 ? 4 : 2;   // up to so many rows of x it is better to read more of the weight at once
constexpr int FEW_ROWS = WIDTH == 64 ? 8 : 4;
constexpr int BLOCK = 16;                  // rows of the weight whose results are written together
constexpr int64_t NEAR = 1 << 18;          // bytes of the weight that stay in the second cache
// One row of x: the weight comes from memory, one row at a time if the rows are short and eight if they are long.
constexpr int64_t SHORT = 8192;            // bytes
constexpr int STREAMS = 8;

// x in fp32 and the weight widened to it.
template <class W> struct Widened {
    typedef W Stored;
    typedef float Taken;
    typedef f32 Vector;
    static constexpr int STEP = LANES;
    static f32 stored(const W* from) { return load(from); }
    static f32 stored(const W* from, int64_t count) { return load_some(from, count); }
    static f32 taken(const float* from) { return load(from); }
    static void take(float* to, const void* x, int type, int64_t at, int64_t count) {
        store(to, load_any(x, type, at, (int)count));
    }
    static f32 add(f32 acc, f32 w, f32 x) { return fma(w, x, acc); }
};

#if defined(__AVX512BF16__)
// x and the weight in bf16, multiplied by pairs.
struct Pairs {
    typedef bf16 Stored;
    typedef bf16 Taken;
    typedef i32 Vector;
    static constexpr int STEP = 2 * LANES;
    static i32 stored(const bf16* from) { return load_as<i32>(from); }
    static i32 stored(const bf16* from, int64_t count) {
        if (count >= STEP) return stored(from);
        return (i32)_mm512_maskz_loadu_epi16((1u << count) - 1, from);
    }
    static i32 taken(const bf16* from) { return load_as<i32>(from); }
    static void take(bf16* to, const void* x, int, int64_t at, int64_t count) {
        store_as(to, stored((const bf16*)x + at, count));
    }
    static f32 add(f32 acc, i32 w, i32 x) { return dot_pairs(acc, w, x); }
};
#endif

// Elements [at, at + k) of x as a tile wants a row of it: its steps ``apart`` elements apart.
template <class Kind> inline void take_row(const void* x, int type, int64_t at, int64_t k, typename Kind::Taken* to,
                                           int64_t apart) {
    for (int64_t i = 0; i < k; i += Kind::STEP, to += apart) Kind::take(to, x, type, at + i, k - i);
}

// The sums of R rows of the weight, ``line`` elements apart, and M of x: out[m * BLOCK + r]. Meanwhile AHEAD rows of
// the weight from ``next`` on are brought into the second cache.
template <class Kind, int R, int M, int AHEAD>
__attribute__((noinline)) void tile(const typename Kind::Stored* w, int64_t line, const typename Kind::Taken* x,
                                    int64_t k, float* out, const typename Kind::Stored* next) {
    typedef typename Kind::Vector Vector;
    constexpr int STEP = Kind::STEP;
    f32 acc[R][M] = {};
    const auto add = [&](const Vector(&stored)[R]) {
        for (int m = 0; m < M; ++m) {
            const Vector taken = Kind::taken(x + m * STEP);
            for (int r = 0; r < R; ++r) acc[r][m] = Kind::add(acc[r][m], stored[r], taken);
        }
        x += M * STEP;
    };
    Vector stored[R];
    for (; k >= STEP; k -= STEP, w += STEP) {
        for (int r = 0; r < R; ++r) stored[r] = Kind::stored(w + r * line);
        for (int r = 0; r < AHEAD; ++r) prefetch(next + r * line);
        next += STEP;
        add(stored);
    }
    if (k > 0) {
        for (int r = 0; r < R; ++r) stored[r] = Kind::stored(w + r * line, k);
        add(stored);
    }
    const f32 none = {};
    for (int m = 0; m < M; ++m)
        for (int r = 0; r < R; r += 4) {
            float sums[4];
            sum4(acc[r][m], r + 1 < R ? acc[(r + 1) % R][m] : none, r + 2 < R ? acc[(r + 2) % R][m] : none,
                 r + 3 < R ? acc[(r + 3) % R][m] : none, sums);
            memcpy(out + m * BLOCK + r, sums, (R - r < 4 ? R - r : 4) * sizeof(float));
        }
}

// ``columns`` columns of y from ``column`` on, from their fp32 sums.
inline void write(const vecmat_dense_call& call, const float* out, int64_t column, int64_t columns) {
    const vecmat_dense_spec& spec = *call.spec;
    for (int64_t at = 0; at < columns; at += LANES) {
        const int count = columns - at < LANES ? (int)(columns - at) : LANES;
        const f32 bias = call.bias ? load_any(call.bias, spec.x_type, column + at, count) : f32{};
        for (int64_t m = 0; m < call.m; ++m)
            store_any(call.y, spec.y_type, m * spec.n + column + at, load(out + m * BLOCK + at) + bias, count);
    }
}

// What a call comes to: x taken, [tile][step][row of the tile][STEP], and results on their way, [row][BLOCK].
template <class Kind> struct Job {
    const vecmat_dense_call& call;
    const typename Kind::Taken* x;
    float* out;
    int64_t tiles, padded;

    int64_t row(int64_t tile) const { return tile * call.m / tiles; }  // tiles of rows as equal as they can be
};

// One tile: R rows of the weight from ``column`` of y on, whose results begin at ``out``; at most MOST rows of x.
template <class Kind, int R, int MOST, int AHEAD>
inline void tile_of(const Job<Kind>& job, int64_t number, int64_t column, float* out, int64_t next) {
    const vecmat_dense_call& call = job.call;
    const int64_t row = job.row(number), line = call.ldw;
    const typename Kind::Stored* w = (const typename Kind::Stored*)call.w;
    const typename Kind::Taken* x = job.x + row * job.padded;
    out += row * BLOCK;
    switch (job.row(number + 1) - row) {
#define VECMAT_TILE(M) \
    case M:            \
        return tile<Kind, R, (M < MOST ? M : MOST), AHEAD>(w + column * line, line, x, call.spec->k, out, w + next * line);
        VECMAT_TILE(1) VECMAT_TILE(2) VECMAT_TILE(3) VECMAT_TILE(4) VECMAT_TILE(5) VECMAT_TILE(6)
#undef VECMAT_TILE
    }
}

// Rows [from, to) of the weight, R at a time, by all rows of x, AHEAD rows of the weight fetched beside each tile.
template <class Kind, int R, int MOST, int AHEAD>
inline void columns_of_y(const Job<Kind>& job, int64_t from, int64_t to) {
    const vecmat_dense_call& call = job.call;
    const int64_t bytes = R * call.spec->k * (int64_t)sizeof(typename Kind::Stored);
    // Rows that meet all of x before the next do: few while x itself stays in the second cache.
    const bool small = call.m * job.padded * (int64_t)sizeof(typename Kind::Taken) <= 2 * NEAR;
    const int64_t near = small || NEAR / bytes <= 1 ? R : NEAR / bytes >= BLOCK / R ? BLOCK : NEAR / bytes * R;
    for (int64_t block = from; block < to; block += BLOCK) {
        const int64_t end = to - block < BLOCK ? to : block + BLOCK;
        for (int64_t first = block; first < end; first += near) {
            const int64_t last = end - first < near ? end : first + near;
            int64_t next = last;  // the rows after these, a few with each tile
            const int64_t stop = to - last < near ? to : last + near;
            for (int64_t number = 0; number < job.tiles; ++number) {
                int64_t column = first;
                for (; column + R <= last; column += R) {
                    float* out = job.out + (column - block);
                    if (AHEAD && next + AHEAD <= stop) tile_of<Kind, R, MOST, AHEAD>(job, number, column, out, next);
                    else tile_of<Kind, R, MOST, 0>(job, number, column, out, next);
                    next += AHEAD;
                }
                for (; column < last; ++column)
                    tile_of<Kind, 1, TILE, 0>(job, number, column, job.out + (column - block), column);
            }
        }
        write(call, job.out, block, end - block);
    }
}

}  // namespace rows
}  // namespace VECMAT_ISA
}  // namespace vecmat
