// x as signed bytes, and what a quantised weight's sizes come to: the first half of panels.h.
#pragma once

#include "vec.h"
#include "vecmat.h"

namespace vecmat {
namespace VECMAT_ISA {

// Loops over what lies in registers: an array that a loop indexes would lie in memory.
#define VECMAT_UNROLL _Pragma("GCC unroll 16")

constexpr int VECTORS = 4;                // registers side by side in a panel
constexpr int COLUMNS = VECTORS * LANES;  // output channels of a panel
constexpr int SPAN = 2048;                // k whose products are summed in int32 where there are no groups

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

// A row of x: its digits (D rows of ``padded`` bytes), and what its sums are worth.
struct Row {
    float scale, after;  // y = sum * scale * after; two factors, so that neither is subnormal
};

// The bits of the largest magnitude as fp32: as integers they are ordered like numbers, and NaN is the largest.
inline int32_t largest(const float* x, int64_t k) {
    i32 top = {};
    for (int64_t i = 0; i < k; i += LANES) top = larger(top, (i32)load_some(x + i, k - i) & 0x7fffffff);
    return most(top);
}
template <class T> inline int32_t largest(const T* x, int64_t k) {  // 16 bits are ordered, too
    u16w top = {};
    int64_t i = 0;
    for (; i + 2 * LANES <= k; i += 2 * LANES) top = larger(top, load_as<u16w>(x + i) & 0x7fff);
    T rest[2 * LANES] = {};
    memcpy(rest, x + i, (k - i) * sizeof(T));
    const u32 pairs = (u32)larger(top, load_as<u16w>(rest) & 0x7fff);
    const T one[LANES] = {{(uint16_t)most(larger((i32)(pairs & 0xffff), (i32)(pairs >> 16)))}};
    return ((i32)load(one))[0];
}

// The digits of a row, ``rest`` being to_int(x * lift * factor), and minus ``offset`` times each group's sums of them.
template <int D, bool LIFT, class T>
inline void write_digits(const T* x, int64_t k, const Shape& shape, int offset, float before, float inverse,
                         int8_t* digits, int32_t* start) {
    const f32 lift = splat(before), factor = splat(inverse);
    const auto whole = [&](f32 v) { return to_int(LIFT ? v * lift * factor : v * factor); };
    for (int64_t g = 0; g < shape.groups; ++g) {
        int64_t i = g * shape.size;
        const int64_t to = g + 1 < shape.groups ? i + shape.size : k;
        i32 sums[D] = {};
        for (; i + 4 * LANES <= to; i += 4 * LANES) {
            i32 rest[4];
            VECMAT_UNROLL for (int q = 0; q < 4; ++q) rest[q] = whole(load(x + i + q * LANES));
            VECMAT_UNROLL for (int d = 0; d < D; ++d) {  // from the lowest, each within -128..127
                const i32 bytes = low_bytes(rest[0], rest[1], rest[2], rest[3]);
                VECMAT_UNROLL for (int q = 0; q < 4; ++q) rest[q] = (rest[q] + 128) >> 8;
                sums[d] = dot<true>(sums[d], splat(0x01010101), bytes);
                store_as(digits + d * shape.padded + i, bytes);
            }
        }
        for (; i < to; i += LANES) {
            i32 rest = whole(load_some(x + i, to - i));
            VECMAT_UNROLL for (int d = 0; d < D; ++d) {
                const i32 digit = (i32)((u32)rest << 24) >> 24;
                rest = (rest - digit) >> 8;
                sums[d] += digit;
                int8_t* out = digits + d * shape.padded + i;
                const i8x bytes = to_bytes(digit);
                if (i + LANES <= shape.padded) store_as(out, bytes);
                else memcpy(out, &bytes, shape.padded - i);
            }
        }
        VECMAT_UNROLL for (int d = 0; d < D; ++d) start[d * shape.groups + g] = -offset * sum(sums[d]);
    }
}

template <int D, class T>
__attribute__((noinline)) Row to_digits(const T* x, int64_t k, const Shape& shape, int offset, int8_t* digits,
                                        int32_t* start) {
    const int32_t most = largest(x, k);
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
    if (before == 1.0f) write_digits<D, false>(x, k, shape, offset, before, inverse, digits, start);
    else write_digits<D, true>(x, k, shape, offset, before, inverse, digits, start);
    return {scale, finite ? 1.0f / before : 1.0f};
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
