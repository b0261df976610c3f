// Statistics of features by class on the CPU: computes what reference.py defines in one read of the features. Compiled
// without torch, so addresses are passed as integers.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

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

int bit_length(int64_t n) {
  int bits = 0;
  for (; n; n >>= 1) ++bits;
  return bits;
}

// A class's samples before the batch, and its rows in the batch, in their order.
struct Class {
  int64_t k, before, in_batch;
  const int64_t *rows;
};

// The statistics that a batch changes: counts [classes], sums [runs, classes, dim], squares [runs, classes].
struct Totals {
  int64_t *counts;
  double *sums, *squares;
};

template <class X, class R> INLINE bool is_far(const Batch &b, const Totals &totals, const Class &c, int64_t run) {
  constexpr int64_t width = 128;
  const R *__restrict shift = shift_of<R>(b, run, c.k);
  const int64_t at = run * b.classes + c.k, used = c.before < SAMPLES ? std::min(SAMPLES, c.in_batch) : 0;
  const double *__restrict sums = totals.sums + at * b.dim;
  const double n = double(c.before + used);
  double total = totals.squares[at], distance = 0, sum[width];
  for (int64_t start = 0; start < b.dim; start += width) {
    const int64_t stop = std::min<int64_t>(b.dim - start, width);
    std::copy(sums + start, sums + start + stop, sum);
    for (int64_t r = 0; r < used; ++r) {
      const X *__restrict x = row_of<X>(b, run, c.rows[r]);
#pragma omp simd reduction(+ : total)
      for (int64_t i = 0; i < stop; ++i) {
        const double z = double(get<R>(x, start + i)) - double(shift[start + i]);
        sum[i] += z;
        total += z * z;
      }
    }
#pragma omp simd reduction(+ : distance)
    for (int64_t i = 0; i < stop; ++i) distance += sum[i] / n * (sum[i] / n);
  }
  return double(c.before + c.in_batch) * distance > FAR * (total - n * distance);  // NaN is not far
}

// Set or move the shift of a class in one run. `moved` gets what the second moment then needs: a and δ of a·δᵀ + δ·aᵀ.
template <class X, class R>
INLINE void move_shift(const Batch &b, const Totals &totals, const Class &c, int64_t run, std::vector<double> &moved) {
  if (c.before && !is_far<X, R>(b, totals, c, run)) return;
  R *__restrict shift = shift_of<R>(b, run, c.k);
  double *__restrict sums = totals.sums + (run * b.classes + c.k) * b.dim;
  const bool three = c.in_batch >= 3;
  const X *x = row_of<X>(b, run, c.rows[0]), *y = row_of<X>(b, run, c.rows[three]);
  const X *z = row_of<X>(b, run, c.rows[2 * three]);
  const auto median_of = [&](int64_t i) {
    const R low = std::min(get<R>(x, i), get<R>(y, i)), high = std::max(get<R>(x, i), get<R>(y, i));
    return std::max(low, std::min(high, get<R>(z, i)));
  };
  // An old class keeps its shift for one that is not finite: the batch may be refused, its sums must not be.
  for (int64_t i = 0; c.before && i < b.dim; ++i)
    if (const R median = median_of(i); !(median - median == 0)) return;
  moved.resize(c.before ? 2 * b.dim : 0);
  double *a = moved.data(), *delta = a + b.dim;
  const double before = double(c.before);
  double change = 0;
  for (int64_t i = 0; i < b.dim; ++i) {
    const R median = median_of(i);
    if (c.before) {
      delta[i] = double(median) - double(shift[i]);
      a[i] = before * delta[i] / 2 - sums[i];
      change += before * delta[i] * delta[i] - 2 * delta[i] * sums[i];
      sums[i] -= before * delta[i];
    }
    shift[i] = median;
  }
  totals.squares[run * b.classes + c.k] += change;
}

// Add the rows of a class to the statistics; `sum` [dim] is for this call alone.
template <class X, class R>
INLINE void add_class(const Batch &b, const Totals &totals, const Class &c, int64_t run, R *__restrict sum) {
  constexpr int64_t block = 512;
  const R *__restrict shift = shift_of<R>(b, run, c.k);
  double *__restrict sums = totals.sums + (run * b.classes + c.k) * b.dim;
  double squares = 0;
  for (int64_t start = 0; start < c.in_batch; start += block) {
    std::memset(sum, 0, b.dim * sizeof(R));
    for (int64_t r = start; r < std::min(start + block, c.in_batch); ++r) {
      const X *__restrict x = row_of<X>(b, run, c.rows[r]);
      R square = 0;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < b.dim; ++i) {
        const R centred = get<R>(x, i) - shift[i];
        sum[i] += centred;
        square += centred * centred;
      }
      squares += square;
    }
    for (int64_t i = 0; i < b.dim; ++i) sums[i] += double(sum[i]);
  }
  totals.squares[run * b.classes + c.k] += squares;
}

template <class X, class R> INLINE int64_t not_finite(const Batch &b, int64_t run, int64_t row) {
  const X *__restrict x = row_of<X>(b, run, row);
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < b.dim; ++i) {
    const R value = get<R>(x, i);
    count += !(value - value == 0);
  }
  return count;
}

template <class R> INLINE void add_part(const Part &part, int64_t k, int64_t dim, double *__restrict sums) {
  const R *__restrict sum = reinterpret_cast<const R *>(part.sums.get()) + k * dim;
  for (int64_t j = 0; j < dim; ++j) sums[j] += double(sum[j]);
}

struct Functions {
  void (*add_rows)(const Batch &, Part &);
  void (*add_part)(const Part &, int64_t k, int64_t dim, double *sums);
  void (*add_class)(const Batch &, const Totals &, const Class &, int64_t run, char *sum);
  int64_t (*not_finite)(const Batch &, int64_t run, int64_t row);
  void (*map)(const Batch &, const Rows &);
  void (*move_shift)(const Batch &, const Totals &, const Class &, int64_t run, std::vector<double> &moved);
};
#define KERNELS(name, X, R)                                                                                            \
  CLONES void add_rows_##name(const Batch &b, Part &part) { add_rows<X, R>(b, part); }                                 \
  CLONES void add_part_##name(const Part &p, int64_t k, int64_t dim, double *sums) { add_part<R>(p, k, dim, sums); }   \
  CLONES void add_class_##name(const Batch &b, const Totals &t, const Class &c, int64_t run, char *sum) {              \
    add_class<X, R>(b, t, c, run, reinterpret_cast<R *>(sum));                                                         \
  }                                                                                                                    \
  CLONES int64_t not_finite_##name(const Batch &b, int64_t run, int64_t row) { return not_finite<X, R>(b, run, row); } \
  CLONES void map_##name(const Batch &b, const Rows &rows) { map_rows<X, R>(b, rows); }                                \
  CLONES void move_##name(const Batch &b, const Totals &t, const Class &c, int64_t run, std::vector<double> &moved) {  \
    move_shift<X, R>(b, t, c, run, moved);                                                                             \
  }                                                                                                                    \
  constexpr Functions of_##name{add_rows_##name,   add_part_##name, add_class_##name,                                  \
                                not_finite_##name, map_##name,      move_##name};
KERNELS(f32, float, float)
KERNELS(bf16, BF16x, float)
KERNELS(f16, F16x, float)
KERNELS(f64, double, double)
KERNELS(f32_f64, float, double)

const Functions *choose(int features, int sums) {
  switch (features * 4 + sums) {
    case F32 * 4 + F32: return &of_f32;
    case BF16 * 4 + F32: return &of_bf16;
    case F16 * 4 + F32: return &of_f16;
    case F64 * 4 + F64: return &of_f64;
    case F32 * 4 + F64: return &of_f32_f64;
    default: PyErr_SetString(PyExc_TypeError, "no kernel for these dtypes"); return nullptr;
  }
}

// The number of parts does not depend on the number of threads, so neither do the sums.
constexpr int64_t PART = 512, MOST_PARTS = 16;
// Below so many numbers a loop is not divided among threads: where others use the machine too, to wait for them is long.
constexpr int64_t SERIAL = 1 << 16;
int64_t cuts_of(const Batch &b) { return std::clamp<int64_t>(b.rows / PART, 1, MOST_PARTS); }

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
  bool by_class;
  std::vector<int64_t> in_batch, rows;     // of each class; sorted by class
  std::vector<Class> classes;              // those in the batch
  std::vector<size_t> looked_at;           // of `classes`, those whose shifts may change
  std::vector<std::vector<double>> moved;  // of each class looked at and each run, as `move_shift` fills it
  std::vector<Part> parts;
  std::vector<char> sums;  // of a class, for each thread
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

// The classes whose count reaches another power of two are looked at: each as often as its samples double.
void sort_rows(const Batch &b, const Totals &totals, Gathered &g) {
  std::vector<int64_t> next(b.classes);
  int64_t start = 0;
  g.rows.resize(b.rows);
  for (int64_t k = 0; k < b.classes; ++k) {
    const int64_t before = totals.counts[k], in_batch = g.in_batch[k];
    next[k] = start;
    if (!in_batch) continue;
    if (bit_length(before + in_batch) != bit_length(before)) g.looked_at.push_back(g.classes.size());
    g.classes.push_back({k, before, in_batch, g.rows.data() + start});
    start += in_batch;
  }
  if (g.looked_at.empty() && !g.by_class) return;
  for (int64_t row = 0; row < b.rows; ++row) g.rows[next[label_of(b, row)]++] = row;
  g.moved.resize(g.looked_at.size() * b.runs);
}

void prepare_parts(const Batch &b, size_t item, Gathered &g) {
  const int64_t cuts = cuts_of(b);
  for (int64_t i = 0; i < cuts * b.runs; ++i) {
    const int64_t cut = i % cuts;
    g.parts.push_back({i / cuts, b.rows * cut / cuts, b.rows * (cut + 1) / cuts, 0,
                       std::unique_ptr<char[]>(new char[b.classes * b.dim * item]), std::vector<double>(b.classes),
                       std::vector<char>(b.classes)});
  }
}

void add_parts(const Batch &b, const Totals &totals, const Functions &functions, bool propagate, int threads,
               Gathered &g) {
  const int64_t n_parts = int64_t(g.parts.size()), cuts = n_parts / b.runs;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic)
  for (int64_t i = 0; i < n_parts; ++i) functions.add_rows(b, g.parts[i]);
  for (const Part &part : g.parts) g.bad_values += part.not_finite;
  if (g.bad_values && !propagate) return;
  const int64_t workers = n_parts * b.classes * b.dim > SERIAL ? threads : 1;
#pragma omp parallel for num_threads(workers) if (workers > 1)
  for (int64_t i = 0; i < b.runs * b.classes; ++i)
    for (int64_t p = i / b.classes * cuts; p < (i / b.classes + 1) * cuts; ++p) {  // in a fixed order
      const int64_t k = i % b.classes;
      if (!g.parts[p].seen[k]) continue;
      functions.add_part(g.parts[p], k, b.dim, totals.sums + i * b.dim);
      totals.squares[i] += g.parts[p].squares[k];
    }
}

void add_classes(const Batch &b, const Totals &totals, const Functions &functions, bool propagate, int threads,
                 Gathered &g) {
  const int64_t n_rows = b.runs * b.rows, n_classes = b.runs * int64_t(g.classes.size());
  long long bad = 0;
  if (!propagate) {
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(+ : bad)
    for (int64_t i = 0; i < n_rows; ++i) bad += functions.not_finite(b, i / b.rows, i % b.rows);
  }
  g.bad_values = bad;
  if (bad) return;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 16)
  for (int64_t i = 0; i < n_classes; ++i)
    functions.add_class(b, totals, g.classes[i / b.runs], i % b.runs,
                        g.sums.data() + omp_get_thread_num() * (g.sums.size() / threads));
}

PyObject *gather(PyObject *, PyObject *args) {
  Batch b;
  unsigned long long counts_at, sums_at, squares_at;
  int propagate, features, sums, threads;
  if (!PyArg_ParseTuple(args, BATCH_FORMAT "KKKpiii", BATCH_ADDRESSES(b), &counts_at, &sums_at, &squares_at,
                        &propagate, &features, &sums, &threads))
    return nullptr;
  const Functions *functions = choose(features, sums);
  if (!functions) return nullptr;
  const Totals totals{reinterpret_cast<int64_t *>(counts_at), reinterpret_cast<double *>(sums_at),
                      reinterpret_cast<double *>(squares_at)};
  const size_t item = sums == F64 ? 8 : 4;
  Gathered g;
  // With many classes the parts' sums of each take more memory than the rows, and class after class is added instead.
  g.by_class = 2 * cuts_of(b) * b.classes > b.rows;
  bool memory;
  Py_BEGIN_ALLOW_THREADS;
  memory = with_memory([&] {  // all that a batch needs, before any statistic changes
    count_labels(b, g);
    if (g.bad_labels) return;
    sort_rows(b, totals, g);
    if (g.by_class)
      g.sums.resize(threads * b.dim * item);
    else
      prepare_parts(b, item, g);
  });
  if (memory && !g.bad_labels) {
    const int64_t n_moves = int64_t(g.moved.size()), workers = n_moves * b.dim > SERIAL ? threads : 1;
#pragma omp parallel for num_threads(workers) if (workers > 1) schedule(dynamic, 16) reduction(&& : memory)
    for (int64_t i = 0; i < n_moves; ++i) {
      const Class &c = g.classes[g.looked_at[i / b.runs]];
      memory = with_memory([&] { functions->move_shift(b, totals, c, i % b.runs, g.moved[i]); }) && memory;
    }
    if (memory) {
      (g.by_class ? add_classes : add_parts)(b, totals, *functions, propagate, threads, g);
      if (propagate || !g.bad_values)
        for (const Class &c : g.classes) totals.counts[c.k] += c.in_batch;
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
  const Functions *functions = choose(features, sums);
  if (!functions) return nullptr;
  bool memory = true;
  Py_BEGIN_ALLOW_THREADS;
  constexpr int64_t block = 64;
  const int64_t blocks = (b.rows + block - 1) / block, total = blocks * b.runs;
#pragma omp parallel for num_threads(threads) if (threads > 1) reduction(&& : memory)
  for (int64_t i = 0; i < total; ++i) {
    const int64_t run = i / blocks, start = i % blocks * block, stop = std::min<int64_t>(start + block, b.rows);
    memory = with_memory([&] { functions->map(b, {run, start, stop, rows.axes, rows.out, rows.n_axes}); }) && memory;
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

PyMODINIT_FUNC PyInit__cpu() {
  PyObject *made = PyModule_Create(&module);
  if (made && PyModule_AddIntConstant(made, "has_openmp", HAS_OPENMP)) Py_CLEAR(made);
  return made;
}
