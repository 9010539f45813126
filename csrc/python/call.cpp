// What Python does around a call of the library, done in C: look at the tensors, make the result, let go of the GIL.
//
// A small module for CPython (limited API, 3.10 on), and nothing of torch's headers: it reads tensors through DLPack's
// C exchange API, which torch.Tensor offers since 2.10, and is given by ``setup`` the few functions of torch that it
// calls. It is optional (src/vecmat/ready.py): every function here answers None where it will not do something, and the
// caller then goes the long way, through Python and ctypes, to the same result.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>
#include <stdint.h>
#include <string.h>

#include <initializer_list>

namespace {

// DLPack 1.x, as much of it as is read here.
struct DLTensor {
    void* data;
    int32_t device, device_id;
    int32_t ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t byte_offset;
};

struct DLExchange {
    uint32_t major, minor;
    void *previous, *allocator, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DLTensor* out);
    void* current_stream;
};

constexpr int32_t DL_CPU = 1;
constexpr int DIMS = 8;  // of an x; more go the long way

typedef int64_t (*Multiply)(const void* weight, const void* x, int64_t ldx, void* y, const void* bias, int64_t m,
                            int64_t x_type, int64_t y_type, int64_t digits, int64_t threads);
typedef int64_t (*Dense)(const void* spec, const void* x, int64_t ldx, const void* w, int64_t ldw, void* y,
                         const void* bias, int64_t m);
typedef int64_t (*Packed)(const void* spec, const void* x, int64_t ldx, const void* w, void* y, const void* bias,
                          int64_t m);

// Given once by ``setup``, for the life of the process.
struct Torch {
    int (*tensor_from_object)(void*, DLTensor*);
    PyObject *tensor, *parameter;  // the types that are read; no subclass, which may mean something else
    PyObject *empty;               // (size, stride, dtype) -> a CPU tensor
    PyObject *grad_enabled, *threads, *scope;
    PyObject *requires_grad, *epoch, *version, *ready;  // names of attributes
};
Torch torch;
PyTypeObject* call_type;

// Which function of csrc/dispatch.cpp is called: vecmat_multiply, vecmat_dense or vecmat_packed.
enum Kind { MULTIPLY = 0, DENSE = 1, PACKED = 2 };

// A product that is ready to be called: the plan of one Problem, and for packed weights the one weight.
struct Call {
    PyObject_HEAD
    int64_t kind;
    uintptr_t function, spec, packed;  // what describes a dense product, and the packed weight
    uintptr_t address;                 // PACKED: of the data that it was made from
    int64_t version;                   // and torch's count of writes to it, -1 if it does not count
    int64_t m, n, k;
    int64_t x_type, w_type, y_type, digits, threads, biased;
    PyObject *out, *compute, *epoch, *keep;  // y's dtype, what was asked for, what tells that it is stale, what it reads
    PyObject *size, *stride;                 // of y, if x has two dimensions
};

// The element type as csrc/vecmat.h numbers it, -1 for another.
int type_of(const DLTensor& tensor) {
    if (tensor.lanes != 1) return -1;
    if (tensor.code == 2) return tensor.bits == 32 ? 0 : tensor.bits == 16 ? 2 : -1;
    return tensor.code == 4 && tensor.bits == 16 ? 1 : -1;
}

// Read a tensor of a known type in the CPU's memory; false for any other object.
bool look(PyObject* object, DLTensor* out) {
    PyObject* type = (PyObject*)Py_TYPE(object);
    if (type != torch.tensor && type != torch.parameter) return false;
    if (torch.tensor_from_object(object, out) != 0) {
        PyErr_Clear();
        return false;
    }
    return out->device == DL_CPU && out->strides && out->byte_offset == 0;
}

// Whether torch says true: a function without arguments, or an attribute.
bool is_true(PyObject* value) {
    const bool yes = value == Py_True;
    if (!value) PyErr_Clear();
    Py_XDECREF(value);
    return yes;
}

bool wants_grad(PyObject* tensor) { return tensor != Py_None && is_true(PyObject_GetAttr(tensor, torch.requires_grad)); }

// torch's count of writes to a tensor, -1 if it says none.
int64_t version_of(PyObject* tensor) {
    PyObject* version = PyObject_GetAttr(tensor, torch.version);
    const int64_t count = version ? PyLong_AsLongLong(version) : -1;
    Py_XDECREF(version);
    if (PyErr_Occurred()) PyErr_Clear();
    return count;
}

// Whether the settings and the threads are those that the plan was made for.
bool is_current(const Call* call) {
    PyObject* threads = PyObject_CallNoArgs(torch.threads);
    const int64_t count = threads ? PyLong_AsLongLong(threads) : -1;
    Py_XDECREF(threads);
    PyObject* scope = PyObject_CallNoArgs(torch.scope);
    PyObject* epoch = scope ? PyObject_GetAttr(scope, torch.epoch) : nullptr;
    const bool same = epoch == call->epoch && count == call->threads;
    Py_XDECREF(epoch);
    Py_XDECREF(scope);
    if (PyErr_Occurred()) PyErr_Clear();
    return same;
}

// x's rows: how many and how far apart; false if they are no matrix with elements side by side.
bool rows_of(const DLTensor& x, int64_t k, int64_t* m, int64_t* ldx) {
    const int last = x.ndim - 1;
    if (last < 0 || last >= DIMS || x.shape[last] != k || x.strides[last] != 1) return false;
    *m = 1, *ldx = k;
    bool first = true;
    for (int i = last - 1; i >= 0; --i) {
        if (x.shape[i] != 1) {
            if (first) *ldx = x.strides[i];
            else if (x.strides[i] != *m * *ldx) return false;
            first = false;
        }
        *m *= x.shape[i];
    }
    return true;
}

PyObject* fresh(const Call* call, const DLTensor& x) {
    if (x.ndim == 2) return PyObject_CallFunctionObjArgs(torch.empty, call->size, call->stride, call->out, nullptr);
    PyObject *size = PyTuple_New(x.ndim), *stride = PyTuple_New(x.ndim), *y = nullptr;
    if (size && stride) {
        int64_t step = 1;
        for (int i = x.ndim - 1; i >= 0; --i) {
            const int64_t extent = i == x.ndim - 1 ? call->n : x.shape[i];
            PyTuple_SetItem(size, i, PyLong_FromLongLong(extent));
            PyTuple_SetItem(stride, i, PyLong_FromLongLong(step));
            step *= extent;
        }
        y = PyObject_CallFunctionObjArgs(torch.empty, size, stride, call->out, nullptr);
    }
    Py_XDECREF(size);
    Py_XDECREF(stride);
    return y;
}

// What a call is asked for, beside the weight: x's rows and type, a bias, ``compute``.
struct Asked {
    DLTensor x;
    int64_t k, m, ldx, type;
    bool biased;
    PyObject* compute;
};

// What is asked with x, whose last dimension must be k (any if k < 0); false for an x that is not read here.
bool ask(PyObject* x, int64_t k, PyObject* bias, PyObject* compute, Asked* out) {
    if (!look(x, &out->x) || out->x.ndim < 1) return false;
    out->k = k < 0 ? out->x.shape[out->x.ndim - 1] : k;
    out->type = type_of(out->x), out->biased = bias != Py_None, out->compute = compute;
    return out->type >= 0 && rows_of(out->x, out->k, &out->m, &out->ldx);
}

bool answers(const Call* call, const Asked& asked) {
    return call->m == asked.m && call->k == asked.k && call->x_type == asked.type &&
           (call->biased != 0) == asked.biased && call->compute == asked.compute;
}

// y of a call that answers what is asked, None if weight, bias or settings are not what it was made for, null with an
// exception set if something failed.
PyObject* run(Call* call, const Asked& asked, PyObject* x, PyObject* weight, PyObject* bias) {
    const DLTensor& in = asked.x;
    const int64_t m = asked.m, ldx = asked.ldx;
    DLTensor w{}, b{}, out;
    if (call->biased && !(look(bias, &b) && type_of(b) == call->x_type && b.ndim == 1 && b.shape[0] == call->n &&
                          b.strides[0] == 1))
        Py_RETURN_NONE;
    if (call->kind != MULTIPLY && !(look(weight, &w) && type_of(w) == call->w_type && w.ndim == 2)) Py_RETURN_NONE;
    if (call->kind == DENSE && (w.shape[0] != call->n || w.shape[1] != call->k || w.strides[1] != 1)) Py_RETURN_NONE;
    if (call->kind == PACKED && ((uintptr_t)w.data != call->address ||
                                 (call->version >= 0 && version_of(weight) != call->version)))
        Py_RETURN_NONE;
    if (!is_current(call)) Py_RETURN_NONE;
    if (is_true(PyObject_CallNoArgs(torch.grad_enabled)) && (wants_grad(x) || wants_grad(weight) || wants_grad(bias)))
        Py_RETURN_NONE;
    PyObject* y = fresh(call, in);
    if (!y) return nullptr;
    if (!look(y, &out)) {
        Py_DECREF(y);
        Py_RETURN_NONE;
    }
    int64_t done;
    Py_BEGIN_ALLOW_THREADS
    const void *spec = (const void*)call->spec, *packed = (const void*)call->packed;
    switch (call->kind) {
        case DENSE:
            done = ((Dense)call->function)(spec, in.data, ldx, w.data, w.strides[0], out.data, b.data, m);
            break;
        case PACKED: done = ((Packed)call->function)(spec, in.data, ldx, packed, out.data, b.data, m); break;
        default:
            done = ((Multiply)call->function)(packed, in.data, ldx, out.data, b.data, m, call->x_type, call->y_type,
                                              call->digits, call->threads);
    }
    Py_END_ALLOW_THREADS
    if (!done) {
        Py_DECREF(y);
        PyErr_SetString(PyExc_MemoryError, "matmul: no memory to work in");
        return nullptr;
    }
    return y;
}

// The same for the one of several calls, a tuple of them, that answers; the caller holds the tuple.
PyObject* run_any(PyObject* calls, PyObject* x, PyObject* weight, PyObject* bias, PyObject* compute) {
    Asked asked;
    const Py_ssize_t count = PyTuple_Size(calls);
    if (count < 0) return nullptr;
    if (!ask(x, -1, bias, compute, &asked)) Py_RETURN_NONE;
    for (Py_ssize_t i = 0; i < count; ++i) {
        Call* call = (Call*)PyTuple_GetItem(calls, i);
        if (Py_TYPE(call) == call_type && answers(call, asked)) return run(call, asked, x, weight, bias);
    }
    Py_RETURN_NONE;
}

// Products with plain dense tensors, by their sizes and types; a Call checks what it is given, so any slot will do.
constexpr int64_t PLAIN = 256;
Call* plain[PLAIN];

int64_t slot(int64_t m, int64_t n, int64_t k, int64_t type, bool biased) {
    uint64_t mixed = (uint64_t)m * 0x9E3779B97F4A7C15u ^ (uint64_t)n * 0xC2B2AE3D27D4EB4Fu;
    mixed = (mixed ^ (uint64_t)k) * 0x165667B19E3779F9u + (uint64_t)(type * 2 + biased);
    return (int64_t)((mixed * 0x9E3779B97F4A7C15u) >> 56) % PLAIN;
}

PyObject* run_plain(PyObject* x, PyObject* weight, PyObject* bias) {
    DLTensor w;
    Asked asked;
    if (!look(weight, &w) || w.ndim != 2 || !ask(x, w.shape[1], bias, Py_None, &asked)) Py_RETURN_NONE;
    Call* call = plain[slot(asked.m, w.shape[0], w.shape[1], asked.type, asked.biased)];
    if (!call || !answers(call, asked)) Py_RETURN_NONE;
    Py_INCREF(call);  // another thread may put one of its own into the slot
    PyObject* y = run(call, asked, x, weight, bias);
    Py_DECREF(call);
    return y;
}

// A weight in a compiled graph, which is there as bare tensors: its Twin (src/vecmat/packs.py), held weakly, and how the
// graph calls it. All of it is looked at in each call, and whatever is not as it was goes the long way.
struct Known {
    const void* address;   // of the data; null: nothing here
    PyObject* twin;        // a weak reference
    PyObject* tensors[3];  // the Twin's own data, scale and zero, which live as long as it
    long long versions[3];
    PyObject *format, *k, *layout;
};

// By address, open addressing; room is a power of two.
struct Weights {
    int64_t room, count;
    Known* known;
};
Weights weights;
PyObject* slow;  // the long way, with the same arguments as ``matmul``
constexpr int64_t MOST = 1 << 16;

Known* place(Known* known, int64_t room, const void* address) {
    uint64_t at = ((uint64_t)address >> 6) * 0x9E3779B97F4A7C15u >> 20;
    while (known[at & (room - 1)].address && known[at & (room - 1)].address != address) ++at;
    return known + (at & (room - 1));
}

void forget(const Known& known) {
    Py_XDECREF(known.twin), Py_XDECREF(known.format), Py_XDECREF(known.k), Py_XDECREF(known.layout);
}

bool equal(PyObject* a, PyObject* b) {
    const int same = a == b ? 1 : PyObject_RichCompareBool(a, b, Py_EQ);
    if (same < 0) PyErr_Clear();
    return same == 1;
}

bool same(const DLTensor& a, const DLTensor& b) {
    return a.data == b.data && a.ndim == b.ndim && a.code == b.code && a.bits == b.bits &&
           memcmp(a.shape, b.shape, a.ndim * sizeof(int64_t)) == 0 &&
           memcmp(a.strides, b.strides, a.ndim * sizeof(int64_t)) == 0;
}

// Whether a tensor is the Twin's, in the same memory and not written to since.
bool unchanged(PyObject* given, PyObject* own, long long version) {
    if (given == Py_None || own == Py_None) return given == own;
    DLTensor a, b;
    if (!look(given, &a) || !look(own, &b) || !same(a, b)) return false;
    if (version < 0) return true;  // an inference tensor: torch does not count
    return version_of(own) == version;
}

// The Calls of the weight that ``matmul``'s arguments name (a new reference), null if it is not known or has changed.
PyObject* calls_of(PyObject* const* args) {
    DLTensor data;
    if (!weights.room || !look(args[1], &data) || !data.data) return nullptr;
    const Known found = *place(weights.known, weights.room, data.data);
    PyObject* twin = found.address ? PyWeakref_GetObject(found.twin) : nullptr;
    if (!twin || twin == Py_None) return nullptr;
    Py_INCREF(twin);
    bool good = equal(args[5], found.format) && equal(args[6], found.k) && equal(args[7], found.layout);
    for (int i = 0; good && i < 3; ++i) good = unchanged(args[1 + i], found.tensors[i], found.versions[i]);
    PyObject* calls = good ? PyObject_GetAttr(twin, torch.ready) : nullptr;
    Py_DECREF(twin);
    if (calls && PyTuple_Check(calls)) return calls;
    Py_XDECREF(calls);
    PyErr_Clear();
    return nullptr;
}

// matmul(x, data, scale, zero, bias, format, k, layout, out_dtype, kernel, compute) -> y: the operator's own arguments.
PyObject* matmul(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count == 11 && args[8] == Py_None && args[9] == Py_None) {
        PyObject* y = nullptr;
        if (PyObject* calls = calls_of(args)) {
            y = run_any(calls, args[0], args[1], args[4], args[10]);
            Py_DECREF(calls);
        } else if (args[10] == Py_None && PyUnicode_Check(args[5]) && PyUnicode_Check(args[7]) &&
                   PyUnicode_GetLength(args[5]) == 0 && PyUnicode_CompareWithASCIIString(args[7], "nk") == 0) {
            y = run_plain(args[0], args[1], args[4]);
        }
        if (y != Py_None && (y || PyErr_Occurred())) return y;
        Py_XDECREF(y);
    }
    if (!slow) {
        PyErr_SetString(PyExc_RuntimeError, "matmul: the long way is not set");
        return nullptr;
    }
    PyObject* all = PyTuple_New(count);
    if (!all) return nullptr;
    for (Py_ssize_t i = 0; i < count; ++i) {
        Py_INCREF(args[i]);
        PyTuple_SetItem(all, i, args[i]);
    }
    PyObject* y = PyObject_Call(slow, all, nullptr);
    Py_DECREF(all);
    return y;
}

bool grow() {
    if (weights.count * 4 < weights.room * 3) return true;
    if (weights.room >= MOST) {  // weights come and go; those that are still there are met again
        for (int64_t i = 0; i < weights.room; ++i) forget(weights.known[i]);
        PyMem_Free(weights.known);
        weights = {0, 0, nullptr};
    }
    const int64_t room = weights.room ? 2 * weights.room : 256;
    Known* known = (Known*)PyMem_Calloc(room, sizeof(Known));
    if (!known) return false;
    for (int64_t i = 0; i < weights.room; ++i)
        if (weights.known[i].address) *place(known, room, weights.known[i].address) = weights.known[i];
    PyMem_Free(weights.known);
    weights.known = known, weights.room = room;
    return true;
}

// keep(twin, format, k, layout): let ``matmul`` find this Twin.
PyObject* keep(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 4) {
        PyErr_SetString(PyExc_TypeError, "keep: expected a Twin, format, k and layout");
        return nullptr;
    }
    static const char* const NAMES[] = {"data", "scale", "zero"};
    Known made{};
    PyObject* versions = PyObject_GetAttrString(args[0], "versions");
    bool good = versions != nullptr;
    for (int i = 0; good && i < 3; ++i) {
        PyObject* tensor = PyObject_GetAttrString(args[0], NAMES[i]);
        PyObject* version = tensor ? PySequence_GetItem(versions, i) : nullptr;
        made.tensors[i] = tensor;
        made.versions[i] = version ? PyLong_AsLongLong(version) : -1;
        good = version && !PyErr_Occurred();
        Py_XDECREF(version);
        Py_XDECREF(tensor);  // the Twin has it
    }
    Py_XDECREF(versions);
    if (!good) return nullptr;
    DLTensor data;
    if (!look(made.tensors[0], &data) || !data.data) Py_RETURN_NONE;
    made.address = data.data;
    made.twin = PyWeakref_NewRef(args[0], nullptr);
    if (!made.twin) return nullptr;
    if (!grow()) {
        Py_DECREF(made.twin);
        return PyErr_NoMemory();
    }
    made.format = args[1], made.k = args[2], made.layout = args[3];
    Py_INCREF(args[1]), Py_INCREF(args[2]), Py_INCREF(args[3]);
    Known* at = place(weights.known, weights.room, made.address);
    const Known before = *at;
    if (!before.address) ++weights.count;
    *at = made;
    forget(before);
    Py_RETURN_NONE;
}

// set_slow(function): the long way.
PyObject* set_slow(PyObject*, PyObject* given) {
    Py_INCREF(given);
    Py_XDECREF(slow);
    slow = given;
    Py_RETURN_NONE;
}

// run_plain(x, weight, bias), for a dense tensor (N, K) that is no Weight.
PyObject* plain_run(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 3) {
        PyErr_SetString(PyExc_TypeError, "run_plain: expected x, weight and bias");
        return nullptr;
    }
    return run_plain(args[0], args[1], args[2]);
}

// keep_plain(call): for run_plain to find.
PyObject* plain_keep(PyObject*, PyObject* call) {
    if (Py_TYPE(call) != call_type) {
        PyErr_SetString(PyExc_TypeError, "keep_plain: expected a Call");
        return nullptr;
    }
    Call* made = (Call*)call;
    Call** at = plain + slot(made->m, made->n, made->k, made->x_type, made->biased != 0);
    Call* before = *at;
    Py_INCREF(call);
    *at = made;
    Py_XDECREF((PyObject*)before);
    Py_RETURN_NONE;
}

PyObject* call_run(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (count != 5 || !PyTuple_Check(args[0])) {
        PyErr_SetString(PyExc_TypeError, "run: expected a tuple of Calls, x, weight, bias and compute");
        return nullptr;
    }
    return run_any(args[0], args[1], args[2], args[3], args[4]);
}

// Whether two Calls answer the same question, so that a weight needs only the later one.
PyObject* call_replaces(PyObject* self, PyObject* other) {
    if (Py_TYPE(other) != call_type) {
        PyErr_SetString(PyExc_TypeError, "replaces: expected a Call");
        return nullptr;
    }
    const Call* call = (const Call*)self;
    const Asked asked = {{}, call->k, call->m, 0, call->x_type, call->biased != 0, call->compute};
    return PyBool_FromLong(answers((const Call*)other, asked));
}

PyObject* call_new(PyTypeObject* type, PyObject* args, PyObject*) {
    unsigned long long function, spec, packed, address;
    long long kind, version, m, n, k, x_type, w_type, y_type, digits, threads, biased;
    PyObject *out, *compute, *epoch, *keep;
    if (!PyArg_ParseTuple(args, "LKKKKLLLLLLLLLLOOOO", &kind, &function, &spec, &packed, &address, &version, &m, &n,
                          &k, &x_type, &w_type, &y_type, &digits, &threads, &biased, &out, &compute, &epoch, &keep))
        return nullptr;
    allocfunc make = (allocfunc)PyType_GetSlot(type, Py_tp_alloc);
    Call* call = (Call*)make(type, 0);
    if (!call) return nullptr;
    call->kind = kind, call->function = (uintptr_t)function, call->spec = (uintptr_t)spec;
    call->packed = (uintptr_t)packed, call->address = (uintptr_t)address, call->version = version;
    call->m = m, call->n = n, call->k = k;
    call->x_type = x_type, call->w_type = w_type, call->y_type = y_type;
    call->digits = digits, call->threads = threads, call->biased = biased;
    Py_INCREF(out), Py_INCREF(compute), Py_INCREF(epoch), Py_INCREF(keep);
    call->out = out, call->compute = compute, call->epoch = epoch, call->keep = keep;
    call->size = Py_BuildValue("(LL)", m, n), call->stride = Py_BuildValue("(Li)", n, 1);
    if (!call->size || !call->stride) {
        Py_DECREF(call);
        return nullptr;
    }
    return (PyObject*)call;
}

void call_free(PyObject* self) {
    Call* call = (Call*)self;
    Py_XDECREF(call->out), Py_XDECREF(call->compute), Py_XDECREF(call->epoch), Py_XDECREF(call->keep);
    Py_XDECREF(call->size), Py_XDECREF(call->stride);
    PyTypeObject* type = Py_TYPE(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

PyObject* setup(PyObject*, PyObject* args) {
    PyObject *capsule, *tensor, *parameter, *empty, *grad_enabled, *threads, *scope;
    if (!PyArg_ParseTuple(args, "OOOOOOO", &capsule, &tensor, &parameter, &empty, &grad_enabled, &threads, &scope))
        return nullptr;
    const DLExchange* api = (const DLExchange*)PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (!api) return nullptr;
    if (api->major != 1 || !api->tensor_from_object) {
        PyErr_SetString(PyExc_ImportError, "another major version of DLPack's exchange API");
        return nullptr;
    }
    for (PyObject* given : {capsule, tensor, parameter, empty, grad_enabled, threads, scope}) Py_INCREF(given);
    torch = {api->tensor_from_object, tensor, parameter, empty, grad_enabled, threads, scope,
             PyUnicode_InternFromString("requires_grad"), PyUnicode_InternFromString("epoch"),
             PyUnicode_InternFromString("_version"), PyUnicode_InternFromString("ready")};
    Py_RETURN_NONE;
}

PyMethodDef METHODS[] = {
    {"setup", setup, METH_VARARGS, "setup(exchange, Tensor, Parameter, empty, is_grad_enabled, get_num_threads, scope)"},
    {"run", (PyCFunction)(void (*)(void))call_run, METH_FASTCALL,
     "run(calls, x, weight, bias, compute): y, or None where they are not what one of the calls was made for"},
    {"run_plain", (PyCFunction)(void (*)(void))plain_run, METH_FASTCALL,
     "run_plain(x, weight, bias): the same for a dense tensor, with what keep_plain was given"},
    {"keep_plain", plain_keep, METH_O, "keep_plain(call): let run_plain find it"},
    {"matmul", (PyCFunction)(void (*)(void))matmul, METH_FASTCALL,
     "matmul(x, data, scale, zero, bias, format, k, layout, out_dtype, kernel, compute): y, the long way if need be"},
    {"keep", (PyCFunction)(void (*)(void))keep, METH_FASTCALL, "keep(twin, format, k, layout): let matmul find it"},
    {"set_slow", set_slow, METH_O, "set_slow(function): the long way, with matmul's arguments"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef MODULE = {PyModuleDef_HEAD_INIT, "_call", nullptr, -1, METHODS, nullptr, nullptr, nullptr, nullptr};

PyMethodDef CALL_METHODS[] = {
    {"replaces", call_replaces, METH_O, "replaces(other): whether it is asked for with the same arguments as other"},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot CALL_SLOTS[] = {{Py_tp_new, (void*)call_new},
                            {Py_tp_dealloc, (void*)call_free},
                            {Py_tp_methods, CALL_METHODS},
                            {0, nullptr}};
PyType_Spec CALL = {"vecmat._call.Call", sizeof(Call), 0, Py_TPFLAGS_DEFAULT, CALL_SLOTS};

}  // namespace

PyMODINIT_FUNC PyInit__call() {
    PyObject* module = PyModule_Create(&MODULE);
    if (!module) return nullptr;
    call_type = (PyTypeObject*)PyType_FromSpec(&CALL);
    if (!call_type || PyModule_AddObjectRef(module, "Call", (PyObject*)call_type) < 0) return nullptr;
    return module;
}
