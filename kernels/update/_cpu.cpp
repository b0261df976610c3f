// The update of a whole model on the CPU. Does what gpu.py does, over the same table (table.py), and rounds every
// operation separately, as reference.py does. Compiled without torch, so addresses are passed as integers.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "../_half.h"

namespace {

enum Rule { SGD, SIGNUM, ADAM, LION };
constexpr int64_t RULE_MASK = 255, MAXIMIZE = 256, NESTEROV = 512, FRESH = 2;

// `layout` below reports these structs, numbers and flags; cpu.py compares them with table.py.
struct Row {  // of the table `tensors`
  int64_t param, grad, first, second, step, copy, numel, hyper, flags, run;
};
struct Hyper {  // of the table `hypers`
  int64_t number[6], wide, code;
};
struct Chunk {
  int64_t row, start;
};

INLINE float root_of(float x) { return std::sqrt(x); }
INLINE double root_of(double x) { return std::sqrt(x); }
template <class R> INLINE R sign_of(R x) { return x > 0 ? R(1) : x < 0 ? R(-1) : x; }  // NaN stays NaN

template <class R> struct Scalars {
  R scale, coupled, decoupled, rate, b1, b1c, b2, b2c, root, eps, damp;
  R sign, nesterov;  // -1 to maximize; 1 or 0. As numbers they vectorize; as booleans they would duplicate the loop.
};

double number(const Hyper &h, int i) {
  const void *address = reinterpret_cast<const void *>(h.number[i]);
  return h.wide >> i & 1 ? *static_cast<const double *>(address) : *static_cast<const float *>(address);
}

template <class R> Scalars<R> scalars(const Row &row, const Hyper &h, const float *scale) {
  const double lr = number(h, 0), decay = number(h, 1), coupling = number(h, 2);
  const double beta1 = number(h, 3), beta2 = number(h, 4);
  double rate = lr, root = 1;
  if ((h.code & RULE_MASK) == ADAM) {
    const double t = double(*reinterpret_cast<const float *>(row.step) + 1);
    // Powers take longer than the update of a small tensor, and most parameters have the same betas and count.
    static thread_local double key[3], correction[2];
    if (beta1 != key[0] || beta2 != key[1] || t != key[2]) {
      key[0] = beta1, key[1] = beta2, key[2] = t;
      correction[0] = 1 - std::pow(beta1, t);
      correction[1] = std::pow(1 - std::pow(beta2, t), -0.5);
    }
    rate = lr / correction[0];
    root = correction[1];
  }
  return {scale ? R(*scale) : R(1), R(coupling * decay), R(lr * (1 - coupling) * decay), R(rate), R(beta1),
          R(1 - beta1), R(beta2), R(1 - beta2), R(root), R(number(h, 5)),
          row.flags & FRESH || !row.first ? R(1) : R(1 - beta2), R(h.code & MAXIMIZE ? -1 : 1), R(h.code & NESTEROV ? 1 : 0)};
}

// The rules: the direction, from the gradient plus the coupled decay; the states change in place.
template <int RULE, class R> INLINE R direction(R g, R &m, R &v, const Scalars<R> &s) {
  if constexpr (RULE == SGD) {
    m = m * s.b1 + g * s.damp;
    const R ahead = g + m * s.b1;
    return s.nesterov != 0 ? ahead : m;
  } else if constexpr (RULE == SIGNUM) {
    m = m * s.b1 + g;
    return sign_of(m);
  } else if constexpr (RULE == ADAM) {
    m = m + (g - m) * s.b1c;
    v = v * s.b2 + g * g * s.b2c;
    return m / (root_of(v) * s.root + s.eps);
  } else {
    static_assert(RULE == LION);
    const R u = sign_of(m * s.b1 + g * s.b1c);
    m = m * s.b2 + g * s.b2c;
    return u;
  }
}

template <int RULE, bool FIRST, bool EXTRA, class P, class G, class R>
INLINE void span(const Row &row, const Scalars<R> &scalars, int64_t start, int64_t end, double *norms) {
  P *__restrict param = reinterpret_cast<P *>(row.param);
  const G *__restrict grad = reinterpret_cast<const G *>(row.grad);
  R *__restrict first = reinterpret_cast<R *>(row.first);
  R *__restrict second = reinterpret_cast<R *>(row.second);
  BF16x *__restrict copy = reinterpret_cast<BF16x *>(row.copy);
  const Scalars<R> s = scalars;  // a copy, since the stores below might alias the original
  double grads = 0, changes = 0;
  for (int64_t i = start; i < end; ++i) {
    const R w = load<R>(param, i);
    R g = load<R>(grad, i), m = 0, v = 0;
    if constexpr (EXTRA) g = g / s.scale;
    if constexpr (EXTRA) grads += double(g) * double(g);
    g = g * s.sign;
    const R decayed = g + w * s.coupled;  // compute both: a select vectorizes, a branch does not
    g = s.coupled != 0 ? decayed : g;
    if constexpr (FIRST) m = first[i];
    if constexpr (RULE == ADAM) v = second[i];
    const R step = direction<RULE>(g, m, v, s) * s.rate, both = step + w * s.decoupled;
    const R change = s.decoupled != 0 ? both : step;
    if constexpr (FIRST) first[i] = m;
    if constexpr (RULE == ADAM) second[i] = v;
    store(param, i, R(w - change));
    if constexpr (EXTRA) {
      changes += double(change) * double(change);
      if (copy) store(copy, i, float(load<R>(param, i)));
    }
  }
  if constexpr (EXTRA) norms[0] += grads, norms[1] += changes;
}

INLINE void fetch(const Row &row) {
  for (const int64_t address : {row.param, row.grad, row.first, row.second, row.step})
    prefetch(reinterpret_cast<const void *>(address));
}

// Returns false, and changes nothing, if the row's rule is unknown. A row without a gradient is left as it is.
template <bool EXTRA, class P, class G, class R>
INLINE bool chunk(const Row &row, const Hyper &h, const float *scale, int64_t start, int64_t end, double *norms) {
  if (!row.grad) return true;
  const Scalars<R> s = scalars<R>(row, h, scale);
  switch (h.code & RULE_MASK) {
    case SGD:
      row.first ? span<SGD, true, EXTRA, P, G>(row, s, start, end, norms)
                : span<SGD, false, EXTRA, P, G>(row, s, start, end, norms);
      break;
    case SIGNUM:
      row.first ? span<SIGNUM, true, EXTRA, P, G>(row, s, start, end, norms)
                : span<SIGNUM, false, EXTRA, P, G>(row, s, start, end, norms);
      break;
    case ADAM:
      span<ADAM, true, EXTRA, P, G>(row, s, start, end, norms);
      break;
    case LION:
      span<LION, true, EXTRA, P, G>(row, s, start, end, norms);
      break;
    default:
      return false;
  }
  return true;
}

using Function = bool (*)(const Row &, const Hyper &, const float *, int64_t, int64_t, double *);
#define CHUNK(name, EXTRA, P, G, R)                                                                                    \
  CLONES bool name(const Row &r, const Hyper &h, const float *s, int64_t a, int64_t b, double *n) {                    \
    return chunk<EXTRA, P, G, R>(r, h, s, a, b, n);                                                                    \
  }
#define CHUNKS(name, P, G, R) CHUNK(name, false, P, G, R) CHUNK(name##_extra, true, P, G, R)
CHUNKS(f32, float, float, float)
CHUNKS(f32_bf16, float, BF16x, float)
CHUNKS(f64, double, double, double)
CHUNKS(bf16, BF16x, BF16x, float)
CHUNKS(bf16_f32, BF16x, float, float)
CHUNKS(f16, F16x, F16x, float)
CHUNKS(f16_f32, F16x, float, float)

Function choose(int param, int grad, bool extra) {
  switch (param * 4 + grad) {
    case F32 * 4 + F32: return extra ? f32_extra : f32;
    case F32 * 4 + BF16: return extra ? f32_bf16_extra : f32_bf16;
    case F64 * 4 + F64: return extra ? f64_extra : f64;
    case BF16 * 4 + BF16: return extra ? bf16_extra : bf16;
    case BF16 * 4 + F32: return extra ? bf16_f32_extra : bf16_f32;
    case F16 * 4 + F16: return extra ? f16_extra : f16;
    case F16 * 4 + F32: return extra ? f16_f32_extra : f16_f32;
    default: return nullptr;
  }
}

PyObject *update(PyObject *, PyObject *args) {
  unsigned long long tensors_at, chunks_at, hypers_at, scale_at, norms_at;
  long long n_rows, n, size;
  int extra, add, runs, param, grad, threads;
  if (!PyArg_ParseTuple(args, "KLKLLKKpKpiiii", &tensors_at, &n_rows, &chunks_at, &n, &size, &hypers_at, &scale_at,
                        &extra, &norms_at, &add, &runs, &param, &grad, &threads))
    return nullptr;
  const auto *tensors = reinterpret_cast<const Row *>(tensors_at);
  const auto *chunks = reinterpret_cast<const Chunk *>(chunks_at);
  const auto *hypers = reinterpret_cast<const Hyper *>(hypers_at);
  const auto *scale = reinterpret_cast<const float *>(scale_at);
  auto *norms = reinterpret_cast<double *>(norms_at);
  const Function function = choose(param, grad, extra);
  if (!function) return PyErr_Format(PyExc_TypeError, "no kernel for these dtypes");
  int64_t unknown = 0;
  Py_BEGIN_ALLOW_THREADS;
  std::vector<double> partial(2 * n);
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : unknown)
  {
    const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num(), stop = n * (thread + 1) / team;
    for (int64_t i = n * thread / team; i < stop;) {
      const Row &row = tensors[chunks[i].row];
      const int64_t first = i++;
      // Small tensors lie scattered: ask early for those that come next.
      if (i + 8 < stop) fetch(tensors[chunks[i + 8].row]);
      if (!extra)  // merge a tensor's chunks; but sum chunk by chunk, so that the sums do not depend on the threads
        while (i < stop && chunks[i].row == chunks[first].row) ++i;
      const int64_t end = std::min<int64_t>(chunks[i - 1].start + size, row.numel);
      unknown += !function(row, hypers[row.hyper], scale, chunks[first].start, end, &partial[2 * first]);
    }
  }
  for (const Row *row = tensors; row != tensors + n_rows && !unknown; ++row)
    if (row->step && row->grad && !row->run) *reinterpret_cast<float *>(row->step) += 1;  // runs share a count
  if (norms && !add) std::memset(norms, 0, 2 * runs * sizeof(double));
  if (norms)
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < 2; ++k) norms[2 * tensors[chunks[i].row].run + k] += partial[2 * i + k];
  Py_END_ALLOW_THREADS;
  if (unknown) return PyErr_Format(PyExc_ValueError, "the update kernel does not know a rule number of the table");
  Py_RETURN_NONE;
}

PyObject *layout(PyObject *, PyObject *) {
  const auto column = [](size_t offset) { return int(offset / sizeof(int64_t)); };
#define COLUMN(name, field) name, column(offsetof(Row, field))
  return Py_BuildValue(
      "{si si si si si si si si si si si si si si si si si si si si si si si si si si}", COLUMN("PARAM", param),
      COLUMN("GRAD", grad), COLUMN("FIRST", first), COLUMN("SECOND", second), COLUMN("STEP", step),
      COLUMN("COPY", copy), COLUMN("NUMEL", numel), COLUMN("HYPER", hyper), COLUMN("FLAGS", flags), COLUMN("RUN", run), "columns", column(sizeof(Row)), "wide", column(offsetof(Hyper, wide)),
      "code", column(offsetof(Hyper, code)), "hyper columns", column(sizeof(Hyper)), "rule mask", int(RULE_MASK),
      "maximize", int(MAXIMIZE), "nesterov", int(NESTEROV), "fresh", int(FRESH), "sgd", SGD, "signum", SIGNUM, "adam",
      ADAM, "lion", LION, "float32", F32, "float64", F64, "bfloat16", BF16, "float16", F16);
}

PyMethodDef methods[] = {{"update", update, METH_VARARGS, "Take one step of every parameter in a table."},
                         {"layout", layout, METH_NOARGS, "Return the columns, flags and numbers compiled in."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() {
  PyObject *made = PyModule_Create(&module);
  if (made && PyModule_AddIntConstant(made, "has_openmp", HAS_OPENMP)) Py_CLEAR(made);
  return made;
}
