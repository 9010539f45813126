// What one instruction set's translation unit offers.
#pragma once

#include "vecmat.h"

namespace vecmat {

struct Isa {
    const char* name;
    int columns;  // output channels of a panel
    void (*pack)(const vecmat_panels*, const uint8_t* data, int64_t row_bytes, const float* scale, const uint8_t* zero);
    bool (*panels)(const vecmat_call*);  // false if there is no memory to work in
    int64_t (*read)(const uint8_t* from, int64_t bytes, int threads);
    int64_t (*operations)(int kind, int64_t rounds, int threads);
    bool (*dense)(const vecmat_dense_call*);
    int64_t (*packed_bytes)(const vecmat_dense_spec*);
    void (*pack_dense)(const vecmat_dense_spec*, const void* w, int64_t ldw, void* out);
    bool (*packed)(const vecmat_dense_call*);  // ``w`` packed, ``ldw`` of no meaning
};

}  // namespace vecmat
