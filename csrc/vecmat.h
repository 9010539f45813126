// The C interface of vecmat's CPU kernels: plain structs and functions, called through ctypes (src/vecmat/native.py).
//
// Nothing here checks its arguments: the Python side has. Pointers need no alignment beyond their element's.
#pragma once

#include <stdint.h>

// Element types of x and y.
enum { VECMAT_FP32 = 0, VECMAT_BF16 = 1, VECMAT_FP16 = 2 };

// A quantised weight (n, k) in panels of ``vecmat_columns()`` output channels; all of it made by vecmat_pack.
//
//   data   [panel][k / 4][column][4] bytes, value + 128              (bits = 8; k in steps of 4)
//          [panel][k / 8][column][4] bytes, k..k+3 in the low nibbles, k+4..k+7 in the high ones  (bits = 4)
//   scale  [panel][group][column] fp32; one group if group = 0
//   zero   [panel][group][column] bytes, or null for the middle of the range
struct vecmat_panels {
    uint8_t* data;
    float* scale;
    uint8_t* zero;
    int64_t n, k;
    int64_t group;  // elements of k that share a scale, 0 for all of them
    int64_t bits;   // 8 or 4
};

// What is multiplied: x (m, k) with rows ldx elements apart, y (m, n) without gaps, bias (n,) of x's type or null.
// digits: signed bytes that each element of x becomes, 1 (int8 by rows), 2 (16 bits) or 4 (32 bits).
struct vecmat_call {
    const struct vecmat_panels* weight;
    const void* x;
    int64_t ldx;
    void* y;
    const void* bias;
    int64_t m;
    int32_t x_type, y_type, digits, threads;
};

// A kind of dense product: y (m, n) = x (m, k) @ weight (n, k), by ``threads`` threads.
struct vecmat_dense_spec {
    int64_t n, k;
    int32_t x_type, w_type, y_type, threads;
};

// One of them: rows of x ldx and rows of the weight ldw elements apart, y without gaps, bias (n,) of x's type or null.
struct vecmat_dense_call {
    const struct vecmat_dense_spec* spec;
    const void* x;
    int64_t ldx;
    const void* w;
    int64_t ldw;
    void* y;
    const void* bias;
    int64_t m;
};
