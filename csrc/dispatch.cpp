// The C interface: which instruction set this processor has, and its kernels.
#include <string.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "isa.h"

namespace vecmat {

#if defined(__x86_64__)
extern const Isa isa_avx512_bf16, isa_avx512_vnni, isa_avx512, isa_avx2, isa_portable;

static bool runs(const Isa& isa) {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool vnni = avx512 && __builtin_cpu_supports("avx512vnni");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (&isa == &isa_avx512_bf16) return vnni && __builtin_cpu_supports("avx512bf16");
    if (&isa == &isa_avx512_vnni) return vnni;
    if (&isa == &isa_avx512) return avx512;
    if (&isa == &isa_avx2) return avx2;
    return true;
}

static const Isa* const ISAS[] = {&isa_avx512_bf16, &isa_avx512_vnni, &isa_avx512, &isa_avx2, &isa_portable};
#else
extern const Isa isa_portable;

static bool runs(const Isa&) { return true; }

static const Isa* const ISAS[] = {&isa_portable};
#endif

static const Isa* in_use = nullptr;

}  // namespace vecmat

#define VECMAT_API extern "C" __attribute__((visibility("default")))

// The name of the i-th instruction set that this processor has, best first; null past the last.
VECMAT_API const char* vecmat_isa(int64_t i) {
    for (const vecmat::Isa* isa : vecmat::ISAS)
        if (vecmat::runs(*isa) && i-- == 0) return isa->name;
    return nullptr;
}

// Use an instruction set from here on, by its name; 0 if this processor does not have it. Call it before all others.
VECMAT_API int64_t vecmat_use(const char* name) {
    for (const vecmat::Isa* isa : vecmat::ISAS)
        if (strcmp(isa->name, name) == 0 && vecmat::runs(*isa)) {
            vecmat::in_use = isa;
            return 1;
        }
    return 0;
}

// Output channels of a panel.
VECMAT_API int64_t vecmat_columns() { return vecmat::in_use->columns; }

// Fill a weight's panels from the plain storage: data with rows ``row_bytes`` apart, scale and zero (n, groups).
VECMAT_API void vecmat_pack(const vecmat_panels* weight, const uint8_t* data, int64_t row_bytes, const float* scale,
                            const uint8_t* zero) {
    vecmat::in_use->pack(weight, data, row_bytes, scale, zero);
}

// Ask for huge pages where memory will lie; ``from`` at the start of a page. Nothing happens where there are none.
VECMAT_API void vecmat_advise(void* from, int64_t bytes) {
#if defined(__linux__)
    if (bytes > 0) madvise(from, (size_t)bytes, MADV_HUGEPAGE);
#else
    (void)from, (void)bytes;
#endif
}

// y = x @ weight + bias; 0 if there is no memory to work in.
VECMAT_API int64_t vecmat_multiply(const vecmat_panels* weight, const void* x, int64_t ldx, void* y, const void* bias,
                                   int64_t m, int64_t x_type, int64_t y_type, int64_t digits, int64_t threads) {
    const vecmat_call call = {weight, x, ldx, y, bias, m, (int32_t)x_type, (int32_t)y_type, (int32_t)digits,
                              (int32_t)threads};
    return vecmat::in_use->panels(&call);
}

// Read memory and do nothing else: the sum of what is there, so that the reading cannot be left out.
VECMAT_API int64_t vecmat_read(const uint8_t* from, int64_t bytes, int64_t threads) {
    return vecmat::in_use->read(from, bytes, (int)threads);
}

// Multiply and add in registers for a while, in each thread; the operations that all of them did, two for a product.
// kind: 0 fp32, 1 pairs of bf16 (fp32 where there is no instruction for them), 2 bytes.
VECMAT_API int64_t vecmat_operations(int64_t kind, int64_t rounds, int64_t threads) {
    return vecmat::in_use->operations((int)kind, rounds, (int)threads);
}

// The same for a dense weight.
VECMAT_API int64_t vecmat_dense(const vecmat_dense_spec* spec, const void* x, int64_t ldx, const void* w, int64_t ldw,
                                void* y, const void* bias, int64_t m) {
    const vecmat_dense_call call = {spec, x, ldx, w, ldw, y, bias, m};
    return vecmat::in_use->dense(&call);
}

// Bytes of a dense weight packed in this instruction set's order, zeros beside it included.
VECMAT_API int64_t vecmat_packed_bytes(const vecmat_dense_spec* spec) { return vecmat::in_use->packed_bytes(spec); }

// Pack a dense weight (n, k), rows ldw elements apart, into memory of so many bytes.
VECMAT_API void vecmat_pack_dense(const vecmat_dense_spec* spec, const void* w, int64_t ldw, void* out) {
    vecmat::in_use->pack_dense(spec, w, ldw, out);
}

// vecmat_dense for a weight that was packed.
VECMAT_API int64_t vecmat_packed(const vecmat_dense_spec* spec, const void* x, int64_t ldx, const void* w, void* y,
                                 const void* bias, int64_t m) {
    const vecmat_dense_call call = {spec, x, ldx, w, 0, y, bias, m};
    return vecmat::in_use->packed(&call);
}
