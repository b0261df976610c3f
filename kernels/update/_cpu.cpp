// The update of a whole model on the CPU: what gpu.py does, over the same table (see table.py), with every operation
// rounded by itself as in reference.py. Compiled without torch; addresses come in as integers.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../_half.h"

namespace {

enum Rule { SGD, SIGNUM, ADAM, LION };
constexpr int64_t MAXIMIZE = 256, NESTEROV = 512, FRESH = 2;

struct Row {  // of the table `tensors`
  int64_t param, grad, first, second, step, copy, numel, hyper, flags, run, pitch, sums;
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
  R sign, nesterov;  // -1 to maximize; 1 or 0. As numbers they make vectors, as truth values copies of the loop.
};

double number(const Hyper &h, int i) {
  const void *address = reinterpret_cast<const void *>(h.number[i]);
  return h.wide >> i & 1 ? *static_cast<const double *>(address) : *static_cast<const float *>(address);
}

template <class R> Scalars<R> scalars(const Row &row, const Hyper &h, const float *scale) {
  const double lr = number(h, 0), decay = number(h, 1), coupling = number(h, 2);
  const double beta1 = number(h, 3), beta2 = number(h, 4);
  double rate = lr, root = 1;
  if ((h.code & 255) == ADAM) {
    const double t = double(*reinterpret_cast<const float *>(row.step) + 1);
    rate = lr / (1 - std::pow(beta1, t));
    root = std::pow(1 - std::pow(beta2, t), -0.5);
  }
  return {scale ? R(*scale) : R(1), R(coupling * decay), R(lr * (1 - coupling) * decay), R(rate), R(beta1),
          R(1 - beta1), R(beta2), R(1 - beta2), R(root), R(number(h, 5)),
          row.flags & FRESH || !row.first ? R(1) : R(1 - beta2), R(h.code & MAXIMIZE ? -1 : 1), R(h.code & NESTEROV ? 1 : 0)};
}

// The rules: from the gradient with the coupled decay in it to the direction; the states change in place.
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
    const R u = sign_of(m * s.b1 + g * s.b1c);
    m = m * s.b2 + g * s.b2c;
    return u;
  }
}

template <int RULE, bool FIRST, bool EXTRA, class P, class G, class R>
INLINE void span(const Row &row, const Scalars<R> &scalars, int64_t start, int64_t end, double *norms, double *sums) {
  P *__restrict param = reinterpret_cast<P *>(row.param);
  const G *__restrict grad = reinterpret_cast<const G *>(row.grad);
  R *__restrict first = reinterpret_cast<R *>(row.first);
  R *__restrict second = reinterpret_cast<R *>(row.second);
  BF16x *__restrict copy = reinterpret_cast<BF16x *>(row.copy);
  const Scalars<R> s = scalars;  // a copy, which the stores below cannot change
  double grads = 0, changes = 0;
  for (int64_t i = start; i < end; ++i) {
    const R w = load<R>(param, i);
    R g = load<R>(grad, i), m = 0, v = 0;
    if constexpr (EXTRA) g = g / s.scale;
    if constexpr (EXTRA) grads += double(g) * double(g);
    g = g * s.sign;
    const R decayed = g + w * s.coupled;  // both sides worked out: a choice makes vectors, a jump does not
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
      if (sums) sums[i - start] += double(load<R>(param, i));
    }
  }
  if constexpr (EXTRA) norms[0] += grads, norms[1] += changes;
}

template <int RULE, bool FIRST, bool EXTRA, class P, class G, class R>
INLINE void loop(const Row &row, const Scalars<R> &s, int64_t start, int64_t end, double *norms) {
  if (EXTRA && row.pitch) {  // of a classifier [K, d] a chunk is a range of columns, all K rows of them
    double *sums = reinterpret_cast<double *>(row.sums) + start;
    std::memset(sums, 0, (end - start) * sizeof(double));
    for (int64_t k = 0; k < row.numel; k += row.pitch)
      span<RULE, FIRST, EXTRA, P, G>(row, s, k + start, k + end, norms, sums);
  } else {
    span<RULE, FIRST, EXTRA, P, G>(row, s, start, end, norms, nullptr);
  }
}

template <bool EXTRA, class P, class G, class R>
INLINE void chunk(const Row &row, const Hyper &h, const float *scale, int64_t start, int64_t end, double *norms) {
  const Scalars<R> s = scalars<R>(row, h, scale);
  switch (h.code & 255) {
    case SGD:
      return row.first ? loop<SGD, true, EXTRA, P, G>(row, s, start, end, norms)
                       : loop<SGD, false, EXTRA, P, G>(row, s, start, end, norms);
    case SIGNUM:
      return row.first ? loop<SIGNUM, true, EXTRA, P, G>(row, s, start, end, norms)
                       : loop<SIGNUM, false, EXTRA, P, G>(row, s, start, end, norms);
    case ADAM:
      return loop<ADAM, true, EXTRA, P, G>(row, s, start, end, norms);
    default:
      return loop<LION, true, EXTRA, P, G>(row, s, start, end, norms);
  }
}

using Function = void (*)(const Row &, const Hyper &, const float *, int64_t, int64_t, double *);
#define CHUNK(name, P, G, R)                                                                                           \
  CLONES void name(const Row &r, const Hyper &h, const float *s, int64_t a, int64_t b, double *n) {                    \
    chunk<false, P, G, R>(r, h, s, a, b, n);                                                                           \
  }                                                                                                                    \
  CLONES void name##_extra(const Row &r, const Hyper &h, const float *s, int64_t a, int64_t b, double *n) {            \
    chunk<true, P, G, R>(r, h, s, a, b, n);                                                                            \
  }
CHUNK(f32, float, float, float)
CHUNK(f32_bf16, float, BF16x, float)
CHUNK(f64, double, double, double)
CHUNK(bf16, BF16x, BF16x, float)
CHUNK(bf16_f32, BF16x, float, float)
CHUNK(f16, F16x, F16x, float)
CHUNK(f16_f32, F16x, float, float)

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
  unsigned long long tensors_at, chunks_at, hypers_at, steps_at, scale_at, norms_at;
  long long n, size, n_steps;
  int extra, add, runs, param, grad, threads;
  if (!PyArg_ParseTuple(args, "KKLLKKLKpKpiiii", &tensors_at, &chunks_at, &n, &size, &hypers_at, &steps_at, &n_steps,
                        &scale_at, &extra, &norms_at, &add, &runs, &param, &grad, &threads))
    return nullptr;
  const auto *tensors = reinterpret_cast<const Row *>(tensors_at);
  const auto *chunks = reinterpret_cast<const Chunk *>(chunks_at);
  const auto *hypers = reinterpret_cast<const Hyper *>(hypers_at);
  const auto *steps = reinterpret_cast<const int64_t *>(steps_at);
  const auto *scale = reinterpret_cast<const float *>(scale_at);
  auto *norms = reinterpret_cast<double *>(norms_at);
  const Function function = choose(param, grad, extra);
  if (!function) {
    PyErr_SetString(PyExc_TypeError, "no kernel for these dtypes");
    return nullptr;
  }
  Py_BEGIN_ALLOW_THREADS;
  std::vector<double> partial(2 * n);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t of = omp_get_num_threads(), me = omp_get_thread_num(), until = n * (me + 1) / of;
    for (int64_t i = n * me / of; i < until;) {
      const Row &row = tensors[chunks[i].row];
      const int64_t at = i++, whole = row.pitch ? row.pitch : row.numel;
      if (!extra)  // a tensor's chunks in one go; but sums chunk by chunk, the same with any number of threads
        while (i < until && chunks[i].row == chunks[at].row) ++i;
      const int64_t end = std::min<int64_t>(chunks[i - 1].start + size, whole);
      function(row, hypers[row.hyper], scale, chunks[at].start, end, &partial[2 * at]);
    }
  }
  for (int64_t i = 0; i < n_steps; ++i) *reinterpret_cast<float *>(steps[i]) += 1;
  if (norms && !add) std::memset(norms, 0, 2 * runs * sizeof(double));
  if (norms)
    for (int64_t i = 0; i < n; ++i)
      for (int k = 0; k < 2; ++k) norms[2 * tensors[chunks[i].row].run + k] += partial[2 * i + k];
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"update", update, METH_VARARGS, "Take one step of every parameter in a table."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
