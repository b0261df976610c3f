// Statistics of features by class on the CPU: computes what reference.py defines in one read of the features. Compiled
// without torch, so addresses are passed as integers.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <omp.h>

#include <algorithm>
#include <memory>
#include <new>
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

// The first samples of the classes whose shifts are looked at before a batch is added, as `move_shifts` of reference.py.
constexpr int64_t SAMPLES = 32;
constexpr double FAR = 2.5;

int bit_length(int64_t n) { return n ? 64 - __builtin_clzll(static_cast<unsigned long long>(n)) : 0; }

struct Class {
  int64_t k, before, in_batch;
  std::vector<int64_t> rows;
};

// The statistics that a batch changes: counts [classes], sums [runs, classes, dim], squares [runs, classes].
struct Totals {
  int64_t *counts;
  double *sums, *squares;
};

// Set or move the shift of a class in one run. `moved` gets what the second moment then needs: a and δ of a·δᵀ + δ·aᵀ.
template <class X, class R>
void move_shift(const Batch &b, const Totals &totals, const Class &c, int64_t run, std::vector<double> &moved) {
  R *shift = shift_of<R>(b, run, c.k);
  double *sums = totals.sums + (run * b.classes + c.k) * b.dim, &squares = totals.squares[run * b.classes + c.k];
  std::vector<double> found(c.before ? 2 * b.dim : 0);  // a and δ; at first the sum of h − s, in the place of a
  double *a = found.data(), *delta = a + b.dim;
  const double before = double(c.before);
  if (c.before) {
    const size_t used = c.before < SAMPLES ? c.rows.size() : 0;
    const double n = before + double(used);
    double total = squares, distance = 0;
    std::copy(sums, sums + b.dim, a);
    for (size_t r = 0; r < used; ++r) {
      const X *x = row_of<X>(b, run, c.rows[r]);
      for (int64_t i = 0; i < b.dim; ++i) {
        const double z = double(get<R>(x, i)) - double(shift[i]);
        a[i] += z;
        total += z * z;
      }
    }
    for (int64_t i = 0; i < b.dim; ++i) distance += a[i] / n * (a[i] / n);
    if (!((before + double(c.in_batch)) * distance > FAR * (total - n * distance))) return;  // nor is NaN far
  }
  const bool three = c.rows.size() >= 3;
  const X *x = row_of<X>(b, run, c.rows[0]), *y = row_of<X>(b, run, c.rows[three]), *z = row_of<X>(b, run, c.rows[2 * three]);
  for (int64_t i = 0; i < b.dim; ++i) {
    const R low = std::min(get<R>(x, i), get<R>(y, i)), high = std::max(get<R>(x, i), get<R>(y, i));
    const R median = std::max(low, std::min(high, get<R>(z, i)));
    if (c.before) {
      delta[i] = double(median) - double(shift[i]);
      a[i] = before * delta[i] / 2 - sums[i];
      squares += before * delta[i] * delta[i] - 2 * delta[i] * sums[i];
      sums[i] -= before * delta[i];
    }
    shift[i] = median;
  }
  moved.swap(found);
}

template <class R> void commit(const Batch &b, const std::vector<Part> &parts, const Totals &totals, int threads) {
  const int64_t cuts = int64_t(parts.size()) / b.runs;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < b.runs * b.classes; ++i)
    for (int64_t p = i / b.classes * cuts; p < (i / b.classes + 1) * cuts; ++p) {  // in a fixed order
      const int64_t k = i % b.classes;
      if (!parts[p].seen[k]) continue;
      const R *__restrict sum = reinterpret_cast<const R *>(parts[p].sums.get()) + k * b.dim;
      double *__restrict sums = totals.sums + i * b.dim;
      for (int64_t j = 0; j < b.dim; ++j) sums[j] += double(sum[j]);
      totals.squares[i] += parts[p].squares[k];
    }
}

struct Functions {
  void (*add)(const Batch &, Part &);
  void (*map)(const Batch &, const Rows &);
  void (*move_shift)(const Batch &, const Totals &, const Class &, int64_t run, std::vector<double> &moved);
  void (*commit)(const Batch &, const std::vector<Part> &, const Totals &, int threads);
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
    case F32 * 4 + F32: return {add_f32, map_f32, move_shift<float, float>, commit<float>};
    case BF16 * 4 + F32: return {add_bf16, map_bf16, move_shift<BF16x, float>, commit<float>};
    case F16 * 4 + F32: return {add_f16, map_f16, move_shift<F16x, float>, commit<float>};
    case F64 * 4 + F64: return {add_f64, map_f64, move_shift<double, double>, commit<double>};
    case F32 * 4 + F64: return {add_f32_f64, map_f32_f64, move_shift<float, double>, commit<double>};
    default: PyErr_SetString(PyExc_TypeError, "no kernel for these dtypes"); return {};
  }
}

// The number of parts does not depend on the number of threads, so neither do the sums.
constexpr int64_t PART = 512, MOST_PARTS = 16;

#define BATCH_FORMAT "KKKLLLLLL"
#define BATCH_ADDRESSES(b)                                                                                              \
  &b.features, &b.labels, &b.shifts, &b.runs, &b.rows, &b.dim, &b.run_stride, &b.row_stride, &b.classes

// Run `f` and return whether there was memory for it: in a parallel region an exception would end the process.
template <class F> bool with_memory(F f) {
  try {
    f();
    return true;
  } catch (const std::bad_alloc &) {
    return false;
  }
}

struct Gathered {
  long long bad_labels = 0, bad_values = 0;
  std::vector<int64_t> in_batch;
  std::vector<std::vector<double>> moved;  // of each class looked at and each run, as `move_shift` fills it
  std::vector<Class> classes;
  std::vector<Part> parts;
};

void count_labels(const Batch &b, Gathered &g) {
  g.in_batch.resize(b.classes);
  for (int64_t row = 0; row < b.rows; ++row) {
    const int64_t k = label_of(b, row);
    if (k < 0 || k >= b.classes)
      ++g.bad_labels;
    else
      ++g.in_batch[k];
  }
}

// The classes whose count reaches another power of two: each is looked at as often as its samples double.
void choose_classes(const Batch &b, const Totals &totals, Gathered &g) {
  std::vector<int32_t> place(b.classes, -1);
  for (int64_t k = 0; k < b.classes; ++k) {
    const int64_t before = totals.counts[k], in_batch = g.in_batch[k];
    if (!in_batch || bit_length(before + in_batch) == bit_length(before)) continue;
    place[k] = int32_t(g.classes.size());
    g.classes.push_back({k, before, in_batch, {}});
  }
  for (int64_t row = 0; !g.classes.empty() && row < b.rows; ++row) {
    const int32_t i = place[label_of(b, row)];
    if (i >= 0 && int64_t(g.classes[i].rows.size()) < SAMPLES) g.classes[i].rows.push_back(row);
  }
  g.moved.resize(g.classes.size() * b.runs);
}

template <class R> void prepare_parts(const Batch &b, Gathered &g) {
  const int64_t cuts = std::clamp<int64_t>(b.rows / PART, 1, MOST_PARTS);
  for (int64_t i = 0; i < cuts * b.runs; ++i) {
    const int64_t cut = i % cuts;
    g.parts.push_back({i / cuts, b.rows * cut / cuts, b.rows * (cut + 1) / cuts, 0,
                       std::unique_ptr<char[]>(new char[b.classes * b.dim * sizeof(R)]),
                       std::vector<double>(b.classes), std::vector<char>(b.classes)});
  }
}

PyObject *gather(PyObject *, PyObject *args) {
  Batch b;
  unsigned long long counts_at, sums_at, squares_at;
  int propagate, features, sums, threads;
  if (!PyArg_ParseTuple(args, BATCH_FORMAT "KKKpiii", BATCH_ADDRESSES(b), &counts_at, &sums_at, &squares_at,
                        &propagate, &features, &sums, &threads))
    return nullptr;
  const Functions functions = choose(features, sums);
  if (!functions.add) return nullptr;
  const Totals totals{reinterpret_cast<int64_t *>(counts_at), reinterpret_cast<double *>(sums_at),
                      reinterpret_cast<double *>(squares_at)};
  Gathered g;
  bool memory;
  Py_BEGIN_ALLOW_THREADS;
  memory = with_memory([&] {  // all that a batch needs, before any statistic changes
    count_labels(b, g);
    if (g.bad_labels) return;
    choose_classes(b, totals, g);
    sums == F64 ? prepare_parts<double>(b, g) : prepare_parts<float>(b, g);
  });
  if (memory && !g.bad_labels) {
    const int64_t n_moves = int64_t(g.moved.size()), n_parts = int64_t(g.parts.size());
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(&& : memory)
    for (int64_t i = 0; i < n_moves; ++i)
      memory = with_memory([&] { functions.move_shift(b, totals, g.classes[i / b.runs], i % b.runs, g.moved[i]); }) && memory;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
    for (int64_t i = 0; i < n_parts; ++i) functions.add(b, g.parts[i]);
    for (const Part &part : g.parts) g.bad_values += part.not_finite;
    if (memory && (propagate || !g.bad_values)) {
      for (int64_t k = 0; k < b.classes; ++k) totals.counts[k] += g.in_batch[k];
      functions.commit(b, g.parts, totals, threads);
    }
  }
  Py_END_ALLOW_THREADS;
  PyObject *moves = PyList_New(0);
  for (size_t i = 0; moves && i < g.moved.size(); ++i) {
    if (g.moved[i].empty()) continue;
    PyObject *move = Py_BuildValue("Ly#", (long long)(i % b.runs), reinterpret_cast<const char *>(g.moved[i].data()),
                                   Py_ssize_t(g.moved[i].size() * sizeof(double)));
    if (!move || PyList_Append(moves, move)) Py_CLEAR(moves);
    Py_XDECREF(move);
  }
  return moves ? Py_BuildValue("iLLN", int(memory), g.bad_labels, g.bad_values, moves) : nullptr;
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
  bool memory = true;
  Py_BEGIN_ALLOW_THREADS;
  constexpr int64_t block = 64;
  const int64_t blocks = (b.rows + block - 1) / block, total = blocks * b.runs;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : memory)
  for (int64_t i = 0; i < total; ++i) {
    const int64_t run = i / blocks, start = i % blocks * block, stop = std::min<int64_t>(start + block, b.rows);
    memory = with_memory([&] { functions.map(b, {run, start, stop, rows.axes, rows.out, rows.n_axes}); }) && memory;
  }
  Py_END_ALLOW_THREADS;
  if (!memory) return PyErr_NoMemory();
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {{"gather", gather, METH_VARARGS, "Add a batch to counts, shifts, sums and squares."},
                         {"map", map, METH_VARARGS, "Subtract its class's shift from each row, and project the rows."},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_cpu", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cpu() { return PyModule_Create(&module); }
