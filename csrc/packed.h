// y = x @ weight + bias for a dense weight (n, k) packed once: columns of y lie in the registers' lanes.
//
// Packed, the weight is panels of COLUMNS rows of it: [panel][k / EACH][COLUMNS][EACH], zeros behind the last row and the
// last k; EACH is 2 for bf16, 1 for the others. A panel is read from its first byte to its last, and no lanes have to be
// added up: a register takes LANES columns, each k in turn is multiplied by that number of x in all lanes.
//
// A number of y is the sum of its products over a span of k in that order, and the spans' sums added up in theirs. A
// span is a block where y has 16 bits, SPAN where it is fp32 and a longer sum's error would be seen. Nothing changes
// that order: not how many rows of x there are, not the threads.
//
// K is cut into equal blocks. All tiles of x meet a block of a panel while the second cache holds it, and what comes
// next is fetched meanwhile. A tile of x, up to MOST rows of it, is held in the first cache.
#pragma once

#include "dense.h"

namespace vecmat {
namespace VECMAT_ISA {
namespace packed {

#define VECMAT_IN_REGISTERS _Pragma("GCC unroll 24")

constexpr int VECTORS = 2;                    // registers side by side in a panel
constexpr int COLUMNS = VECTORS * LANES;      // rows of the weight in a panel
constexpr int MOST = WIDTH == 64 ? 12 : 6;    // rows of x in registers, beside one panel; half of them beside two
constexpr int64_t BLOCK = 256;                // k of a block, at most
constexpr int64_t SPAN = 32;                  // k of a span, if y is fp32
constexpr int64_t PASS = 512;                 // rows of x that meet the weight before others do
constexpr int64_t SUMS = 1 << 18;             // bytes of sums under way at once, if x is large
constexpr int64_t SMALL = 1 << 19;            // bytes of x that stay in the second cache beside a panel

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
inline int64_t padded(int64_t k) { return round_up(k, 2 * LANES); }
inline int64_t panels(int64_t n) { return (n + COLUMNS - 1) / COLUMNS; }

// x in fp32 and the weight widened to it.
template <class W> struct Widened : rows::Widened<W> {
    static constexpr int EACH = 1, PARTS = 1;
    static f32 part(const W* from, int) { return load(from); }
};
// bf16 lies in pairs: the lower k of a pair in the lower half of a lane.
template <> struct Widened<bf16> : rows::Widened<bf16> {
    static constexpr int EACH = 2, PARTS = 2;
    static f32 part(const bf16* from, int part) {
        const u32 both = load_as<u32>(from);
        return part ? (f32)(both & 0xffff0000u) : (f32)(both << 16);
    }
};
#if defined(__AVX512BF16__)
struct Pairs : rows::Pairs {
    static constexpr int EACH = 2, PARTS = 1;
    static i32 part(const bf16* from, int) { return load_as<i32>(from); }
};
#endif

// What a tile works on. kept: fp32 sums, [row of x][COLUMNS], those of the next panel ``sums`` further on. Of what
// comes next ``lines`` of 64 bytes are fetched for each step of k, from ``next`` on.
template <class Kind> struct Block {
    const typename Kind::Stored* w;
    int64_t apart;  // elements from panel to panel
    const typename Kind::Taken* x;
    int64_t k, span;  // multiples of Kind::STEP
    float* kept;
    int64_t sums;
    bool first;     // of k: the sums begin here
    const char* next;
    int64_t lines;
};

// P panels by R rows of x, over a block's k.
template <class Kind, int P, int R> __attribute__((noinline)) void tile(const Block<Kind>& block) {
    typedef typename Kind::Vector Vector;
    constexpr int STEP = Kind::STEP, EACH = Kind::EACH, V = P * VECTORS;
    const auto* w = block.w;
    const auto* x = block.x;
    const char* next = block.next;
    const int64_t apart = block.apart, lines = block.lines;
    bool first = block.first;
    for (int64_t k = 0; k < block.k; first = false) {
        const int64_t end = block.k - k < block.span ? block.k : k + block.span;
        f32 acc[R][V];
        VECMAT_IN_REGISTERS for (int r = 0; r < R; ++r)
            VECMAT_IN_REGISTERS for (int j = 0; j < V; ++j) acc[r][j] = f32{};
        for (; k < end; k += STEP, x += (R - 1) * STEP) {
            for (int64_t i = 0; i < lines; ++i, next += 64) prefetch(next);
            for (int i = 0; i < STEP; i += EACH, w += COLUMNS * EACH, x += EACH)
                VECMAT_IN_REGISTERS for (int part = 0; part < Kind::PARTS; ++part) {
                    Vector stored[V];
                    VECMAT_IN_REGISTERS for (int j = 0; j < V; ++j)
                        stored[j] = Kind::part(w + j / VECTORS * apart + j % VECTORS * LANES * EACH, part);
                    VECMAT_IN_REGISTERS for (int r = 0; r < R; ++r) {
                        const Vector taken = (Vector)splat(load_as<int32_t>(x + r * STEP + part));
                        VECMAT_IN_REGISTERS for (int j = 0; j < V; ++j)
                            acc[r][j] = Kind::add(acc[r][j], stored[j], taken);
                    }
                }
        }
        float* kept = block.kept;
        VECMAT_IN_REGISTERS for (int r = 0; r < R; ++r, kept += COLUMNS)
            VECMAT_IN_REGISTERS for (int j = 0; j < V; ++j) {
                float* sum = kept + j / VECTORS * block.sums + j % VECTORS * LANES;
                store(sum, first ? acc[r][j] : load(sum) + acc[r][j]);
            }
    }
}

template <class Kind, int P> inline void tile_of(const Block<Kind>& block, int64_t rows) {
    constexpr int MAX = MOST / P;
    switch (rows) {
#define VECMAT_TILE(R) \
    case R: return tile<Kind, P, (R < MAX ? R : MAX)>(block);
        VECMAT_TILE(1) VECMAT_TILE(2) VECMAT_TILE(3) VECMAT_TILE(4) VECMAT_TILE(5) VECMAT_TILE(6)
        VECMAT_TILE(7) VECMAT_TILE(8) VECMAT_TILE(9) VECMAT_TILE(10) VECMAT_TILE(11) VECMAT_TILE(12)
#undef VECMAT_TILE
    }
}

// Rows [first, first + m) of x, taken: [tile][step][row of the tile][STEP].
template <class Kind> struct Pass {
    const vecmat_dense_call& call;
    const typename Kind::Taken* x;
    int64_t first, m, tiles, padded, block, span;  // k of a whole row, of a block, of a span

    int64_t row(int64_t tile) const { return tile * m / tiles; }  // tiles of rows as equal as they can be
};

// Columns of y from ``column`` on, ``count`` of them, from their sums.
template <class Y> inline void write_as(const vecmat_dense_call& call, const float* kept, int64_t first, int64_t m,
                                        int64_t column, int64_t count) {
    const vecmat_dense_spec& spec = *call.spec;
    for (int64_t at = 0; at < count; at += LANES) {
        const int some = count - at < LANES ? (int)(count - at) : LANES;
        const f32 bias = call.bias ? load_any(call.bias, spec.x_type, column + at, some) : f32{};
        Y* y = (Y*)call.y + first * spec.n + column + at;
        for (int64_t row = 0; row < m; ++row, y += spec.n) store(y, load(kept + row * COLUMNS + at) + bias, some);
    }
}

// P panels of the weight from ``panel`` on, k in [from, to), by all rows of a pass.
template <class Kind, int P>
inline void block_of(const Pass<Kind>& pass, int64_t panel, int64_t from, int64_t to, float* kept,
                     const typename Kind::Stored* next) {
    const int64_t whole = pass.padded * COLUMNS, bytes = (to - from) * COLUMNS * (int64_t)sizeof(typename Kind::Stored);
    const int64_t steps = (to - from) / Kind::STEP, tiles = pass.tiles;
    const int64_t lines = (bytes / 64 + tiles * steps - 1) / (tiles * steps);
    for (int64_t number = 0; number < tiles; ++number) {
        const int64_t row = pass.row(number), count = pass.row(number + 1) - row;
        const bool some = number * lines * steps * 64 < bytes;
        const Block<Kind> block = {
            (const typename Kind::Stored*)pass.call.w + panel * whole + from * COLUMNS, whole,
            pass.x + row * pass.padded + from * count, to - from, pass.span, kept + row * COLUMNS, pass.m * COLUMNS, from == 0,
            (const char*)next + number * lines * steps * 64, some ? lines : 0,
        };
        tile_of<Kind, P>(block, count);
    }
}

// Panels whose sums are under way at once, where m rows of x are large: each takes in all of x again.
inline int64_t group_of(int64_t m) {
    const int64_t group = SUMS / (m * COLUMNS * (int64_t)sizeof(float));
    return group < 4 ? 4 : group > 16 ? 16 : group;
}

// Panels [from, to) by all rows of a pass.
template <class Kind> inline void columns_of_y(const Pass<Kind>& pass, int64_t from, int64_t to, float* kept) {
    const vecmat_dense_call& call = pass.call;
    const typename Kind::Stored* w = (const typename Kind::Stored*)call.w;
    const int64_t whole = pass.padded * COLUMNS;
    const bool small = pass.m * pass.padded * (int64_t)sizeof(typename Kind::Taken) <= SMALL;
    const int64_t most = pass.tiles > 1 ? 1 : pass.m <= MOST / 4 ? 4 : pass.m <= MOST / 2 ? 2 : 1;
    const int64_t group = pass.tiles == 1 ? most : small ? 1 : group_of(pass.m);
    for (int64_t panel = from; panel < to; panel += group) {
        const int64_t count = to - panel < group ? to - panel : group;
        for (int64_t k = 0; k < pass.padded; k += pass.block) {
            const int64_t end = pass.padded - k < pass.block ? pass.padded : k + pass.block;
            for (int64_t i = 0; i < count;) {
                const int64_t left = count - i, at = panel + i;
                float* sums = kept + i * pass.m * COLUMNS;
                const auto* next = w + (left > 1 ? (at + 1) * whole + k * COLUMNS           // the order of these loops
                                        : end < pass.padded ? panel * whole + end * COLUMNS
                                                            : (at + 1) * whole);
                if (most == 4 && left >= 4) block_of<Kind, 4>(pass, at, k, end, sums, next), i += 4;
                else if (most >= 2 && left >= 2) block_of<Kind, 2>(pass, at, k, end, sums, next), i += 2;
                else block_of<Kind, 1>(pass, at, k, end, sums, next), ++i;
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t column = (panel + i) * COLUMNS, rest = call.spec->n - column;
            const int64_t columns = COLUMNS < rest ? COLUMNS : rest;
            const float* sums = kept + i * pass.m * COLUMNS;
            switch (call.spec->y_type) {
                case VECMAT_FP32: write_as<float>(call, sums, pass.first, pass.m, column, columns); break;
                case VECMAT_BF16: write_as<bf16>(call, sums, pass.first, pass.m, column, columns); break;
                default: write_as<fp16>(call, sums, pass.first, pass.m, column, columns);
            }
        }
    }
}

}  // namespace packed
}  // namespace VECMAT_ISA
}  // namespace vecmat
