// Calls libvecmat through its C interface on small and awkward sizes, every block of memory as large as it must be and
// no larger, and compares with plain loops in double. Made for AddressSanitizer and UBSan (-DVECMAT_SANITIZE=ON).
#include <dlfcn.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../csrc/vecmat.h"

static uint32_t state = 1;
static uint32_t draw() { return state = state * 1664525u + 1013904223u; }
static float number() { return (float)(int32_t)draw() / 2147483648.0f; }

static uint16_t to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static float from_bf16(uint16_t bits) {
    const uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, 4);
    return value;
}

// Memory of exactly so many bytes: what lies next to it is poison.
template <class T> struct Exact {
    T* data;
    explicit Exact(int64_t count) : data((T*)malloc(count * sizeof(T))) {
        memset((void*)data, 0x7f, count * sizeof(T));
    }
    ~Exact() { free(data); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;
};

// Rows of numbers ``line`` apart, in fp32 and in bf16; the last row ends the block.
struct Matrix {
    const int64_t rows, columns, line;
    Exact<float> wide;
    Exact<uint16_t> narrow;
    Matrix(int64_t rows, int64_t columns, int64_t line)
        : rows(rows), columns(columns), line(line), wide((rows - 1) * line + columns),
          narrow((rows - 1) * line + columns) {
        for (int64_t i = 0; i < (rows - 1) * line + columns; ++i) {
            narrow.data[i] = to_bf16(number());
            wide.data[i] = from_bf16(narrow.data[i]);
        }
    }
    const void* as(int type) const { return type == VECMAT_FP32 ? (const void*)wide.data : narrow.data; }
    double at(int64_t row, int64_t column) const { return wide.data[row * line + column]; }
};

static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Library {
    const char* (*isa)(int64_t);
    int64_t (*use)(const char*);
    int64_t (*columns)();
    void (*pack)(const vecmat_panels*, const uint8_t*, int64_t, const float*, const uint8_t*);
    int64_t (*multiply)(const vecmat_panels*, const void*, int64_t, void*, const void*, int64_t, int64_t, int64_t,
                        int64_t, int64_t);
    int64_t (*dense)(const vecmat_dense_spec*, const void*, int64_t, const void*, int64_t, void*, const void*, int64_t);
    int64_t (*packed_bytes)(const vecmat_dense_spec*);
    void (*pack_dense)(const vecmat_dense_spec*, const void*, int64_t, void*);
    int64_t (*packed)(const vecmat_dense_spec*, const void*, int64_t, const void*, void*, const void*, int64_t);
    void* handle;
    template <class F> void find(F& function, const char* name) {
        function = (F)dlsym(handle, name);
        if (!function) fprintf(stderr, "no %s\n", name), exit(2);
    }
    explicit Library(const char* file) : handle(dlopen(file, RTLD_NOW)) {
        if (!handle) fprintf(stderr, "%s\n", dlerror()), exit(2);
        find(isa, "vecmat_isa"), find(use, "vecmat_use"), find(columns, "vecmat_columns"), find(pack, "vecmat_pack");
        find(multiply, "vecmat_multiply"), find(dense, "vecmat_dense");
        find(packed_bytes, "vecmat_packed_bytes"), find(pack_dense, "vecmat_pack_dense"), find(packed, "vecmat_packed");
    }
};

static long checked = 0, wrong = 0;

// Compares y (m, n) with x @ w + bias in double. The error may be ``most`` times the root of the sum of |x|^2 |w|^2
// over the results, so that a sum that nearly cancels is not asked for more than the rest.
static void compare(const char* what, const float* y, const Matrix& x, const std::vector<double>& w, int64_t n,
                    const Matrix* bias, double most) {
    double error = 0, size = 0;
    for (int64_t i = 0; i < x.rows; ++i)
        for (int64_t j = 0; j < n; ++j) {
            double sum = bias ? bias->at(0, j) : 0.0, xx = sum * sum, ww = 1;
            for (int64_t l = 0; l < x.columns; ++l) {
                const double a = x.at(i, l), b = w[j * x.columns + l];
                sum += a * b, xx += a * a, ww += b * b;
            }
            error += (y[i * n + j] - sum) * (y[i * n + j] - sum), size += xx * ww;
        }
    ++checked;
    if (sqrt(error) <= most * sqrt(size)) return;
    if (++wrong <= 10) printf("%s: relative error %g, at most %g\n", what, sqrt(error / size), most);
}

static void quantised(const Library& library, const char* isa, int64_t n, int64_t k, int bits, int64_t group,
                      bool zeros) {
    const int64_t groups = group ? up(k, group) : 1, row = bits == 8 ? k : up(k, 2), columns = library.columns();
    Exact<uint8_t> data(n * row), zero(n * groups);
    Exact<float> scale(n * groups);
    for (int64_t i = 0; i < n * row; ++i) data.data[i] = (uint8_t)(draw() >> 24);
    for (int64_t i = 0; i < n * groups; ++i) {
        scale.data[i] = 0.01f + fabsf(number());
        zero.data[i] = draw() >> 24 & 15;
    }
    const int64_t panels = up(n, columns), padded = up(k, 8) * 8;
    Exact<uint8_t> packed(panels * padded * columns * bits / 8), packed_zero(panels * groups * columns);
    Exact<float> packed_scale(panels * groups * columns);
    const vecmat_panels weight = {packed.data, packed_scale.data, zeros ? packed_zero.data : nullptr, n, k, group,
                                  bits};
    library.pack(&weight, data.data, row, scale.data, zeros ? zero.data : nullptr);
    std::vector<double> w(n * k);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const int64_t at = i * groups + (group ? j / group : 0);
            const int q = bits == 8 ? (int8_t)data.data[i * row + j] : data.data[i * row + j / 2] >> j % 2 * 4 & 15;
            w[i * k + j] = (double)scale.data[at] * (bits == 8 ? q : q - (zeros ? zero.data[at] : 8));
        }
    const double most[5] = {0, 1e-2, 5e-5, 0, 1e-6};  // by digits
    for (int64_t m : {1, 2, 3, 5, 7, 13})
        for (int digits : {1, 2, 4})
            for (int type : {VECMAT_FP32, VECMAT_BF16})
                for (int threads : {1, 2}) {
                    const bool biased = (m + digits + threads) % 2;
                    const Matrix x(m, k, k + m % 2), bias(1, n, n);
                    Exact<float> y(m * n);
                    if (!library.multiply(&weight, x.as(type), x.line, y.data, biased ? bias.as(type) : nullptr, m,
                                          type, VECMAT_FP32, digits, threads))
                        fprintf(stderr, "no memory\n"), exit(2);
                    char what[160];
                    snprintf(what, sizeof what, "%s int%d:g%ld%s m%ld n%ld k%ld digits %d type %d threads %d", isa,
                             bits, (long)group, zeros ? ":zp" : "", (long)m, (long)n, (long)k, digits, type, threads);
                    compare(what, y.data, x, w, n, biased ? &bias : nullptr, most[digits]);
                }
}

// Read where it is, and packed.
static void dense(const Library& library, const char* isa, int64_t n, int64_t k, bool packed) {
    for (int64_t m : {1, 2, 3, 5, 7, 13, 50, 600})
        for (int x_type : {VECMAT_FP32, VECMAT_BF16})
            for (int w_type : {VECMAT_FP32, VECMAT_BF16})
                for (int threads : {1, 2}) {
                    const bool biased = (m + x_type + threads) % 2;
                    const Matrix x(m, k, k + m % 2), weight(n, k, k + w_type), bias(1, n, n);
                    Exact<float> y(m * n);
                    const vecmat_dense_spec spec = {n, k, x_type, w_type, VECMAT_FP32, threads};
                    const void* added = biased ? bias.as(x_type) : nullptr;
                    Exact<uint8_t> panels(packed ? library.packed_bytes(&spec) : 1);
                    if (packed) library.pack_dense(&spec, weight.as(w_type), weight.line, panels.data);
                    if (!(packed ? library.packed(&spec, x.as(x_type), x.line, panels.data, y.data, added, m)
                                 : library.dense(&spec, x.as(x_type), x.line, weight.as(w_type), weight.line, y.data,
                                                 added, m)))
                        fprintf(stderr, "no memory\n"), exit(2);
                    std::vector<double> w(n * k);
                    for (int64_t i = 0; i < n; ++i)
                        for (int64_t j = 0; j < k; ++j) w[i * k + j] = weight.at(i, j);
                    char what[160];
                    snprintf(what, sizeof what, "%s %s m%ld n%ld k%ld x %d w %d threads %d", isa, packed ? "packed" : "dense",
                             (long)m, (long)n, (long)k, x_type, w_type, threads);
                    compare(what, y.data, x, w, n, biased ? &bias : nullptr, 1e-6);
                }
}

int main(int argc, char** argv) {
    if (argc != 2) return fprintf(stderr, "usage: check_native LIBRARY\n"), 2;
    const Library library(argv[1]);
    for (int64_t i = 0; const char* isa = library.isa(i); ++i) {
        library.use(isa);
        for (int64_t n : {1, 15, 17, 63, 65})
            for (int64_t k : {1, 15, 17, 63, 130}) {
                quantised(library, isa, n, k, 8, 0, false);
                quantised(library, isa, n, k, 8, 32, false);
                quantised(library, isa, n, k, 4, 32, false);
                quantised(library, isa, n, k, 4, 64, true);
                for (bool packed : {false, true}) dense(library, isa, n, k, packed);
            }
        quantised(library, isa, 520, 17, 8, 0, false);  // columns enough that each thread writes x's digits for itself
        quantised(library, isa, 1040, 33, 4, 32, true);
        printf("%s\n", isa);
    }
    printf("%ld checked, %ld wrong\n", checked, wrong);
    return wrong ? 1 : 0;
}
