// The vector registers of one instruction set, as types and a few functions; everything else is written over them.
//
// This header is compiled several times, with the compiler's flags for one instruction set and VECMAT_ISA naming it.
// All of it lies in a namespace of that name, and none of it uses the standard library's templates: the linker must
// never take code made for one set into another's path.
#pragma once

#include <stdint.h>
#include <string.h>

#include "vecmat.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace vecmat {
namespace VECMAT_ISA {

#if defined(__AVX512BW__)
constexpr int WIDTH = 64;  // bytes of a register
#elif defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int LANES = WIDTH / 4;

typedef float f32 __attribute__((vector_size(WIDTH)));
typedef int32_t i32 __attribute__((vector_size(WIDTH)));
typedef uint32_t u32 __attribute__((vector_size(WIDTH)));
typedef uint16_t u16w __attribute__((vector_size(WIDTH)));
typedef uint16_t u16x __attribute__((vector_size(WIDTH / 2)));  // as many as there are lanes
typedef uint8_t u8x __attribute__((vector_size(WIDTH / 4)));
typedef int8_t i8x __attribute__((vector_size(WIDTH / 4)));

// Elements of x, y and dense weights. The 16-bit floats are bare bits.
struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

// f(0), ..., f(N - 1), each with a constant: what such an index reaches lies in a register. (What the index of an unrolled
// loop reaches may stay in memory: the compiler unrolls too late to take it out.)
#if defined(__SANITIZE_ADDRESS__)  // a plain loop: the checks of unrolled ones take minutes to compile
template <int N, class F> inline void each(const F& f) {
    for (int i = 0; i < N; ++i) f(i);
}
#define VECMAT_INLINE
#else
template <int I> struct Constant {
    constexpr operator int() const { return I; }
};
template <int N, int I = 0, class F> __attribute__((always_inline)) inline void each(const F& f) {
    if constexpr (I < N) {
        f(Constant<I>());
        each<N, I + 1>(f);
    }
}
#define VECMAT_INLINE __attribute__((always_inline))  // of a lambda that is given to each()
#endif

template <class V> inline V load_as(const void* from) {
    V value;
    memcpy(&value, from, sizeof value);
    return value;
}
template <class V> inline void store_as(void* to, V value) { memcpy(to, &value, sizeof value); }

// Asks for an address' cache line, which need not exist, into the second cache. gcc takes a function of nothing but
// prefetches for one without effect, and a loop of them for empty, and leaves both out: not so with the asm.
inline void prefetch(const void* at) {
    asm volatile("" : "+r"(at));
    __builtin_prefetch(at, 0, 2);
}

inline f32 splat(float value) {
#if defined(__AVX512BW__)
    return (f32)_mm512_set1_ps(value);
#elif defined(__AVX2__)
    return (f32)_mm256_set1_ps(value);
#else
    return f32{} + value;
#endif
}
inline i32 splat(int32_t value) {
#if defined(__AVX512BW__)
    return (i32)_mm512_set1_epi32(value);
#elif defined(__AVX2__)
    return (i32)_mm256_set1_epi32(value);
#else
    return i32{} + value;
#endif
}

// a * b + c, rounded once where the instruction set can.
inline f32 fma(f32 a, f32 b, f32 c) {
#if defined(__AVX512BW__)
    return (f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline f32 to_float(i32 value) { return __builtin_convertvector(value, f32); }

// To the nearest integer, ties to even; |value| < 2^31.
inline i32 to_int(f32 value) {
#if defined(__AVX512BW__)
    return (i32)_mm512_cvtps_epi32((__m512)value);
#elif defined(__AVX2__)
    return (i32)_mm256_cvtps_epi32((__m256)value);
#else
    i32 out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = (int32_t)__builtin_rintf(value[lane]);
    return out;
#endif
}

// The low byte of each lane. (gcc 12 makes a conversion of 64 bytes of two halves.)
inline i8x to_bytes(i32 value) {
#if defined(__AVX512BW__)
    return (i8x)_mm512_cvtepi32_epi8((__m512i)value);
#else
    return __builtin_convertvector(value, i8x);
#endif
}
inline i32 from_bytes(u8x value) {
#if defined(__AVX512BW__)
    return (i32)_mm512_cvtepu8_epi32((__m128i)value);
#else
    return __builtin_convertvector(value, i32);
#endif
}
inline u32 from_words(u16x value) {
#if defined(__AVX512BW__)
    return (u32)_mm512_cvtepu16_epi32((__m256i)value);
#else
    return __builtin_convertvector(value, u32);
#endif
}

// The low bytes of four registers' lanes, one register's after the other's.
inline i32 low_bytes(i32 a, i32 b, i32 c, i32 d) {
#if defined(__AVX512BW__)
    const __m512i ab = _mm512_packus_epi32((__m512i)(a & 255), (__m512i)(b & 255));
    const __m512i cd = _mm512_packus_epi32((__m512i)(c & 255), (__m512i)(d & 255));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return (i32)_mm512_permutexvar_epi32(order, _mm512_packus_epi16(ab, cd));
#elif defined(__AVX2__)
    const __m256i ab = _mm256_packus_epi32((__m256i)(a & 255), (__m256i)(b & 255));
    const __m256i cd = _mm256_packus_epi32((__m256i)(c & 255), (__m256i)(d & 255));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    return (i32)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(ab, cd), order);
#else
    const i8x all[4] = {to_bytes(a), to_bytes(b), to_bytes(c), to_bytes(d)};
    return load_as<i32>(all);
#endif
}

// The larger one of each pair of lanes.
inline i32 larger(i32 a, i32 b) { return a > b ? a : b; }
inline u16w larger(u16w a, u16w b) {
#if defined(__AVX512BW__)
    return (u16w)_mm512_max_epu16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (u16w)_mm256_max_epu16((__m256i)a, (__m256i)b);
#else
    return a > b ? a : b;
#endif
}

// All lanes' sum, and the largest of them.
inline int32_t sum(i32 value) {
#if defined(__AVX512BW__)
    return _mm512_reduce_add_epi32((__m512i)value);
#else
    int32_t total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += value[lane];
    return total;
#endif
}
inline int32_t most(i32 value) {
#if defined(__AVX512BW__)
    return _mm512_reduce_max_epi32((__m512i)value);
#else
    int32_t top = value[0];
    for (int lane = 1; lane < LANES; ++lane) top = value[lane] > top ? value[lane] : top;
    return top;
#endif
}

// acc + the sum of four products in each lane: unsigned bytes of w times signed bytes of x. Exact. NARROW promises that
// no byte of w exceeds 127, which makes it cheaper where there is no instruction for it.
template <bool NARROW> inline i32 dot(i32 acc, i32 w, i32 x) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    return (i32)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX512BW__)
    const __m512i ones = _mm512_set1_epi16(1);
    if (NARROW) return acc + (i32)_mm512_madd_epi16(_mm512_maddubs_epi16((__m512i)w, (__m512i)x), ones);
    const __m512i low = _mm512_set1_epi16(255);  // one product at a time: the sum of two would saturate 16 bits
    const __m512i even = _mm512_maddubs_epi16(_mm512_and_si512((__m512i)w, low), (__m512i)x);
    const __m512i odd = _mm512_maddubs_epi16(_mm512_andnot_si512(low, (__m512i)w), (__m512i)x);
    return acc + (i32)_mm512_madd_epi16(even, ones) + (i32)_mm512_madd_epi16(odd, ones);
#elif defined(__AVX2__)
    const __m256i ones = _mm256_set1_epi16(1);
    if (NARROW) return acc + (i32)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)w, (__m256i)x), ones);
    const __m256i low = _mm256_set1_epi16(255);
    const __m256i even = _mm256_maddubs_epi16(_mm256_and_si256((__m256i)w, low), (__m256i)x);
    const __m256i odd = _mm256_maddubs_epi16(_mm256_andnot_si256(low, (__m256i)w), (__m256i)x);
    return acc + (i32)_mm256_madd_epi16(even, ones) + (i32)_mm256_madd_epi16(odd, ones);
#else
    const u32 bytes = (u32)w;
    acc += (i32)(bytes & 255) * ((i32)((u32)x << 24) >> 24);
    acc += (i32)(bytes >> 8 & 255) * ((i32)((u32)x << 16) >> 24);
    acc += (i32)(bytes >> 16 & 255) * ((i32)((u32)x << 8) >> 24);
    acc += (i32)(bytes >> 24) * (x >> 24);
    return acc;
#endif
}

// 16-bit floats to fp32 and back, to nearest, ties to even; NaN stays NaN.
inline f32 widen(u16x bits, bf16) { return (f32)(from_words(bits) << 16); }

inline f32 widen(u16x bits, fp16) {
#if defined(__AVX512BW__)
    return (f32)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__) && defined(__AVX2__)
    return (f32)_mm256_cvtph_ps((__m128i)bits);
#else
    const u32 wide = __builtin_convertvector(bits, u32);
    const u32 magnitude = wide & 0x7fff;
    // The exponent moves from bias 15 to 127: a power of two does it, for subnormals too. Inf and NaN are set apart.
    const f32 finite = (f32)(magnitude << 13) * splat(0x1p112f);
    const u32 special = (u32)(magnitude >= 0x7c00);
    const u32 value = ((u32)finite & ~special) | (((magnitude << 13) | 0x7f800000u) & special);
    return (f32)(value | (wide & 0x8000) << 16);
#endif
}

#if defined(__AVX512BW__)
// bf16 in the high half of each lane; what the low half holds is of no account.
inline __m512i rounded(f32 value) {
    const __m512i bits = (__m512i)value;
    const __m512i last = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), last);
    const __mmask16 nan = _mm512_cmp_ps_mask((__m512)value, (__m512)value, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
}
#endif

inline u16x narrow(f32 value, bf16) {
#if defined(__AVX512BW__)
    return (u16x)_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(value), 16));
#else
    const u32 bits = (u32)value;
    const u32 rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    const u32 nan = (u32)(value != value);
    return __builtin_convertvector((rounded & ~nan) | ((bits >> 16 | 0x40) & nan), u16x);
#endif
}

inline u16x narrow(f32 value, fp16) {
#if defined(__AVX512BW__)
    return (u16x)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__) && defined(__AVX2__)
    return (u16x)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const u32 bits = (u32)value;
    const u32 magnitude = bits & 0x7fffffff;
    // Adding a number whose last bit is fp16's last bit at this exponent rounds there: subnormals alike.
    const u32 exponent = (magnitude & 0x7f800000) > 0x38800000 ? (magnitude & 0x7f800000) : u32{} + 0x38800000;
    const f32 anchor = (f32)(exponent + (13u << 23));
    const u32 steps = (u32)((f32)magnitude + anchor) - (u32)anchor;
    const u32 normal = steps + (((exponent >> 23) - 113) << 10);
    const u32 large = (u32)(magnitude >= 0x477ff000), nan = (u32)(magnitude > 0x7f800000);
    const u32 half = (normal & ~large) | (((0x7c00u & ~nan) | (0x7e00u & nan)) & large);
    return __builtin_convertvector(half | (bits >> 16 & 0x8000), u16x);
#endif
}

inline f32 load(const float* from) { return load_as<f32>(from); }
template <class T> inline f32 load(const T* from) { return widen(load_as<u16x>(from), T()); }
inline void store(float* to, f32 value) { store_as(to, value); }
template <class T> inline void store(T* to, f32 value) { store_as(to, narrow(value, T())); }
// Two registers, one after the other.
template <class T> inline void store_pair(T* to, f32 first, f32 second) {
    store(to, first);
    store(to + LANES, second);
}
#if defined(__AVX512BW__)
inline void store_pair(bf16* to, f32 first, f32 second) {
    const __m512i high_halves = _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29,
                                                 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    store_as(to, _mm512_permutex2var_epi16(rounded(first), high_halves, rounded(second)));
}
#endif

// The sums of four registers' lanes: l with l + 8, then l + 4, l + 2, l + 1. Always in this order.
inline void sum4(f32 a, f32 b, f32 c, f32 d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512BW__)
    const auto half = [](f32 v) {
        return _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
    };
#else
    const auto half = [](f32 v) { return (__m256)v; };
#endif
    const auto quarter = [&](f32 v) {
        const __m256 h = half(v);
        return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    };
    const __m128 p = quarter(a), q = quarter(b), r = quarter(c), s = quarter(d);
    const __m128 first = _mm_add_ps(_mm_unpacklo_ps(p, q), _mm_unpackhi_ps(p, q));
    const __m128 second = _mm_add_ps(_mm_unpacklo_ps(r, s), _mm_unpackhi_ps(r, s));
    _mm_storeu_ps(out, _mm_add_ps(_mm_movelh_ps(first, second), _mm_movehl_ps(second, first)));
#else
    const f32 all[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) out[i] = (all[i][0] + all[i][2]) + (all[i][1] + all[i][3]);
#endif
}

#if defined(__AVX512BF16__)
// acc + the sum of two products in each lane, of bf16 pairs; subnormal numbers count as zeros.
inline f32 dot_pairs(f32 acc, i32 w, i32 x) {
    return (f32)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)w, (__m512bh)(__m512i)x);
}
#endif

// The first ``count`` elements, zeros behind them.
template <class T> inline f32 load_some(const T* from, int64_t count) {
    if (count >= LANES) return load(from);
#if defined(__AVX512BW__)  // no call to memcpy, before which all registers would be saved
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    if constexpr (sizeof(T) == 4) return (f32)_mm512_maskz_loadu_ps(some, from);
    else return widen((u16x)_mm256_maskz_loadu_epi16(some, from), T());
#else
    T part[LANES];
    memset(part, 0, sizeof part);
    memcpy(part, from, count * sizeof(T));
    return load(part);
#endif
}
template <class T> inline void store(T* to, f32 value, int count) {
    if (count >= LANES) return store(to, value);
#if defined(__AVX512BW__)
    const __mmask16 some = (__mmask16)((1u << count) - 1);
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, some, (__m512)value);
    else _mm256_mask_storeu_epi16(to, some, (__m256i)narrow(value, T()));
#else
    T part[LANES];
    store(part, value);
    memcpy(to, part, count * sizeof(T));
#endif
}

// The same for an element type that is known at run time (VECMAT_FP32, ...): elements [at, at + count) of an array.
inline f32 load_any(const void* from, int type, int64_t at, int64_t count) {
    switch (type) {
        case VECMAT_FP32: return load_some((const float*)from + at, count);
        case VECMAT_BF16: return load_some((const bf16*)from + at, count);
        default: return load_some((const fp16*)from + at, count);
    }
}
inline void store_any(void* to, int type, int64_t at, f32 value, int count) {
    switch (type) {
        case VECMAT_FP32: return store((float*)to + at, value, count);
        case VECMAT_BF16: return store((bf16*)to + at, value, count);
        default: return store((fp16*)to + at, value, count);
    }
}

}  // namespace VECMAT_ISA
}  // namespace vecmat
