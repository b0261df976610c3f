// Statistics of features by class on the CPU: computes what reference.py defines in one read of the features. Compiled
// without torch, so addresses are passed as integers.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "../_half.h"

namespace {

struct Batch {  // features [runs, rows, dim], last dimension contiguous; labels [rows]; shifts [runs, classes, dim]
  unsigned long long features, labels, shifts;
  long long runs, rows, dim, run_stride, row_stride, classes;
};

template <class X> INLINE const X *row_of(const Batch &b, int64_t run, int64_t row) {
  return reinterpret_cast<const X *>(b.features) + run * b.run_stride + row * b.row_stride;
}
INLINE int64_t label_of(const Batch &b, int64_t row) { return reinterpret_cast<const int64_t *>(b.labels)[row]; }
template <class R> INLINE R *shift_of(const Batch &b, int64_t run, int64_t k) {
  return reinterpret_cast<R *>(b.shifts) + (run * b.classes + k) * b.dim;
}
template <class R, class X> INLINE R get(const X *p, int64_t i) {
  if constexpr (sizeof(X) == 2)
    return load<float>(p, i);
  else
    return R(p[i]);
}

// Part of the rows of one run, and its sums.
struct Part {
  int64_t run, start, stop, not_finite;  // not_finite: number of such values
  std::unique_ptr<char[]> sums;  // R [classes, dim]; only the rows of classes seen are initialised
  std::vector<double> squares;
  std::vector<char> seen;
};

template <class X, class R> INLINE void add_rows(const Batch &b, Part &part) {
  const int64_t dim = b.dim;
  part.sums.reset(new char[b.classes * dim * sizeof(R)]);
  for (int64_t row = part.start; row < part.stop; ++row) {
    const int64_t k = label_of(b, row);
    const X *__restrict x = row_of<X>(b, part.run, row);
    const R *__restrict shift = shift_of<R>(b, part.run, k);
    R *__restrict sum = reinterpret_cast<R *>(part.sums.get()) + k * dim;
    if (!part.seen[k]) std::memset(sum, 0, dim * sizeof(R));
    part.seen[k] = 1;
    R square = 0;
    int32_t not_finite = 0;
#pragma omp simd reduction(+ : square, not_finite)
    for (int64_t i = 0; i < dim; ++i) {
      const R value = get<R>(x, i), centred = value - shift[i];
      sum[i] += centred;
      square += centred * centred;
      not_finite += !(value - value == 0);
    }
    part.squares[k] += square;
    part.not_finite += not_finite;
  }
}

template <class X, class R> INLINE void centre_row(const Batch &b, int64_t run, int64_t row, R *__restrict out) {
  const X *__restrict x = row_of<X>(b, run, row);
  const R *__restrict shift = shift_of<R>(b, run, label_of(b, row));
  const int64_t dim = b.dim;
  for (int64_t i = 0; i < dim; ++i) out[i] = get<R>(x, i) - shift[i];
}

template <class R> INLINE void project_row(const R *__restrict x, const R *__restrict axes, int64_t dim, int64_t n_axes, R *out) {
  int64_t j = 0;
  for (; j + 4 <= n_axes; j += 4) {  // four axes share the loads of x
    const R *__restrict a = axes + j * dim;
    R s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < dim; ++i) {
      s0 += x[i] * a[i];
      s1 += x[i] * a[dim + i];
      s2 += x[i] * a[2 * dim + i];
      s3 += x[i] * a[3 * dim + i];
    }
    out[j] = s0, out[j + 1] = s1, out[j + 2] = s2, out[j + 3] = s3;
  }
  for (; j < n_axes; ++j) {
    R s = 0;
#pragma omp simd reduction(+ : s)
    for (int64_t i = 0; i < dim; ++i) s += x[i] * axes[j * dim + i];
    out[j] = s;
  }
}

// Rows start … stop − 1 of one run, to centre and, if there are axes [runs, n_axes, dim], to project.
struct Rows {
  int64_t run, start, stop;
  unsigned long long axes, out;
  long long n_axes;
};

template <class X, class R> INLINE void map_rows(const Batch &b, const Rows &rows) {
  const R *axes = reinterpret_cast<const R *>(rows.axes) + rows.run * rows.n_axes * b.dim;
  const int64_t width = rows.axes ? rows.n_axes : b.dim;
  R *out = reinterpret_cast<R *>(rows.out) + rows.run * b.rows * width;
  std::vector<R> centred(rows.axes ? b.dim : 0);
  for (int64_t row = rows.start; row < rows.stop; ++row) {
    centre_row<X>(b, rows.run, row, rows.axes ? centred.data() : out + row * width);
    if (rows.axes) project_row<R>(centred.data(), axes, b.dim, rows.n_axes, out + row * width);
  }
}

template <class X, class R> void set_shift(const Batch &b, int64_t k, int64_t row) {
  for (int64_t run = 0; run < b.runs; ++run) {
    const X *x = row_of<X>(b, run, row);
    R *shift = shift_of<R>(b, run, k);
    for (int64_t i = 0; i < b.dim; ++i) shift[i] = get<R>(x, i);
  }
}

template <class R>
void commit(const Batch &b, const std::vector<Part> &parts, unsigned long long sums_at, unsigned long long squares_at) {
  R *sums = reinterpret_cast<R *>(sums_at), *squares = reinterpret_cast<R *>(squares_at);
  for (const Part &part : parts)  // in a fixed order, so that the result does not depend on the threads
    for (int64_t k = 0; k < b.classes; ++k)
      if (part.seen[k]) {
        const int64_t index = part.run * b.classes + k;
        const R *sum = reinterpret_cast<const R *>(part.sums.get()) + k * b.dim;
        for (int64_t i = 0; i < b.dim; ++i) sums[index * b.dim + i] += sum[i];
        squares[index] += R(part.squares[k]);
      }
}

struct Functions {
  void (*add)(const Batch &, Part &);
  void (*map)(const Batch &, const Rows &);
  void (*set_shift)(const Batch &, int64_t k, int64_t row);
  void (*commit)(const Batch &, const std::vector<Part> &, unsigned long long sums, unsigned long long squares);
};
#define KERNELS(name, X, R)                                                            \
  CLONES void add_##name(const Batch &b, Part &part) { add_rows<X, R>(b, part); }      \
  CLONES void map_##name(const Batch &b, const Rows &rows) { map_rows<X, R>(b, rows); }
KERNELS(f32, float, float)
KERNELS(bf16, BF16x, float)
KERNELS(f16, F16x, float)
KERNELS(f64, double, double)
KERNELS(f32_f64, float, double)

Functions choose(int features, int sums) {
  switch (features * 4 + sums) {
    case F32 * 4 + F32: return {add_f32, map_f32, set_shift<float, float>, commit<float>};
    case BF16 * 4 + F32: return {add_bf16, map_bf16, set_shift<BF16x, float>, commit<float>};
    case F16 * 4 + F32: return {add_f16, map_f16, set_shift<F16x, float>, commit<float>};
    case F64 * 4 + F64: return {add_f64, map_f64, set_shift<double, double>, commit<double>};
    case F32 * 4 + F64: return {add_f32_f64, map_f32_f64, set_shift<float, double>, commit<double>};
    default: PyErr_SetString(PyExc_TypeError, "no kernel for these dtypes"); return {};
  }
}

// The number of parts does not depend on the number of threads, so neither do the sums.
constexpr int64_t PART = 512, MOST_PARTS = 16;

#define BATCH_FORMAT "KKKLLLLLL"
#define BATCH_ADDRESSES(b)                                                                                              \
  &b.features, &b.labels, &b.shifts, &b.runs, &b.rows, &b.dim, &b.run_stride, &b.row_stride, &b.classes

PyObject *gather(PyObject *, PyObject *args) {
  Batch b;
  unsigned long long counts_at, sums_at, squares_at;
  int propagate, features, sums, threads;
  if (!PyArg_ParseTuple(args, BATCH_FORMAT "KKKpiii", BATCH_ADDRESSES(b), &counts_at, &sums_at, &squares_at,
                        &propagate, &features, &sums, &threads))
    return nullptr;
  const Functions functions = choose(features, sums);
  if (!functions.add) return nullptr;
  auto *counts = reinterpret_cast<int64_t *>(counts_at);
  long long bad_labels = 0, bad_values = 0;
  Py_BEGIN_ALLOW_THREADS;
  std::vector<int64_t> in_batch(b.classes), first(b.classes);
  for (int64_t row = b.rows - 1; row >= 0; --row) {
    const int64_t k = label_of(b, row);
    if (k < 0 || k >= b.classes)
      ++bad_labels;
    else
      ++in_batch[k], first[k] = row;
  }
  if (!bad_labels) {
    for (int64_t k = 0; k < b.classes; ++k)
      if (in_batch[k] && !counts[k]) functions.set_shift(b, k, first[k]);
    const int64_t cuts = std::clamp<int64_t>(b.rows / PART, 1, MOST_PARTS), n_parts = cuts * b.runs;
    std::vector<Part> parts(n_parts);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t i = 0; i < n_parts; ++i) {
      const int64_t cut = i % cuts;
      parts[i] = {i / cuts, b.rows * cut / cuts, b.rows * (cut + 1) / cuts, 0, nullptr,
                  std::vector<double>(b.classes), std::vector<char>(b.classes)};
      functions.add(b, parts[i]);
    }
    for (const Part &part : parts) bad_values += part.not_finite;
    if (propagate || !bad_values) {
      for (int64_t k = 0; k < b.classes; ++k) counts[k] += in_batch[k];
      functions.commit(b, parts, sums_at, squares_at);
    }
  }
  Py_END_ALLOW_THREADS;
  return Py_BuildValue("LL", bad_labels, bad_values);
}

PyObject *map(PyObject *, PyObject *args) {
  Batch b;
  Rows rows;
  int features, sums, threads;
  if (!PyArg_ParseTuple(args, BATCH_FORMAT "KLKiii", BATCH_ADDRESSES(b), &rows.axes, &rows.n_axes, &rows.out, &features,
                        &sums, &threads))
    return nullptr;
  const Functions functions = choose(features, sums);
  if (!functions.map) return nullptr;
  Py_BEGIN_ALLOW_THREADS;
  constexpr int64_t block = 64;
  const int64_t blocks = (b.rows + block - 1) / block, total = blocks * b.runs;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < total; ++i) {
    const int64_t start = i % blocks * block;
    functions.map(b, {i / blocks, start, std::min<int64_t>(start + block, b.rows), rows.axes, rows.out, rows.n_axes});
  }
  Py_END_ALLOW_THREADS;
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"gather", gather, METH_VARARGS, "Add a batch to counts, shifts, sums and squares."},
                         {"map", map, METH_VARARGS, "Subtract its class's shift from each row, and project the rows."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
