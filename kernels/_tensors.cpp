// Addresses, shapes and strides of many torch tensors in one call. Compiled without torch: libtorch's C functions
// (aoti_torch/c/shim.h, a stable interface) are found at run time, and their addresses passed in by tensors.py.

#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <vector>

#include "_compiler.h"

namespace {

// A tensor's kind, in words: a header (dtype, device, number of dimensions), the bytes that it spans, then sizes and
// strides. Two headers have nothing after them: of None, and of what has no memory that a kernel may touch.
constexpr int64_t NONE = -1, FOREIGN = -2;
constexpr int CHANGED = -1;
constexpr int64_t EMPTY = 16;  // stands for the address of an empty tensor

// at::Tensor holds one pointer, so that a pointer to it serves as the functions' AtenTensorHandle.
using Handle = void *;
int32_t (*get_data_ptr)(Handle, void **);
int32_t (*get_dim)(Handle, int64_t *);
int32_t (*get_sizes)(Handle, int64_t **);
int32_t (*get_strides)(Handle, int64_t **);
int32_t (*get_dtype)(Handle, int32_t *);
int32_t (*get_device_type)(Handle, int32_t *);
int32_t (*get_device_index)(Handle, int32_t *);
int32_t (*get_layout)(Handle, int32_t *);
int32_t (*get_storage_size)(Handle, int64_t *);
int32_t (*get_storage_offset)(Handle, int64_t *);
void (*bump_version)(Handle);  // C++: void torch::autograd::impl::bump_version(const at::Tensor &); may be missing
const void *(*get_grad)(Handle);  // C++: const at::Tensor &c10::TensorImpl::grad() const; may be missing
PyObject *(*wrap)(const void *);  // C++: PyObject *THPVariable_Wrap(const at::TensorBase &); may be missing
int32_t strided, cpu, cuda;
size_t (*element_size)(int32_t);
int64_t item_sizes[256];  // by dtype, as far as asked
Py_ssize_t tensor_offset;  // of the at::Tensor in a Python tensor
PyObject *usual[2];  // torch.Tensor and torch.nn.Parameter
std::vector<PyObject *> types;  // others of Python tensors that have memory of their own

struct Found {
  int64_t header = FOREIGN, bytes = 0, address = 0, dim = 0;
  const int64_t *sizes = nullptr, *strides = nullptr;
};

inline int64_t header_of(int32_t dtype, int32_t device, int32_t index, int64_t dim) {
  return int64_t(dtype) | int64_t(device) << 8 | int64_t(index & 255) << 16 | dim << 24;
}

inline Handle handle_of(PyObject *object) { return reinterpret_cast<char *>(object) + tensor_offset; }

[[gnu::always_inline]] inline bool known(PyObject *object) {
  auto *type = reinterpret_cast<PyObject *>(Py_TYPE(object));
  if (type == usual[0] || type == usual[1]) return true;
  for (auto *each : types)
    if (each == type) return true;
  return false;
}

// Whether a view of one element has torch's lazy minus sign: its memory then holds the negative.
bool negated(PyObject *object) {
  PyObject *result = PyObject_CallMethod(object, "is_neg", nullptr);
  const bool yes = result == Py_True;
  Py_XDECREF(result);
  PyErr_Clear();
  return yes;
}

Found find(PyObject *object) {
  Found found;
  if (object == Py_None) {
    found.header = NONE;
    return found;
  }
  int32_t layout, dtype, device, index = 0;
  const Handle tensor = handle_of(object);
  if (!known(object) || get_layout(tensor, &layout) || layout != strided || get_device_type(tensor, &device) ||
      (device != cpu && device != cuda) || get_dtype(tensor, &dtype) || (device != cpu && get_device_index(tensor, &index)))
    return found;
  int64_t dim, bytes, offset, *sizes, *strides;
  if (get_dim(tensor, &dim) || get_sizes(tensor, &sizes) || get_strides(tensor, &strides) ||
      get_storage_size(tensor, &bytes) || get_storage_offset(tensor, &offset))
    return found;
  int64_t numel = 1, last = 0;
  bool unit = true;
  for (int64_t d = 0; d < dim; ++d) {
    numel *= sizes[d];
    last += (sizes[d] - 1) * strides[d];
    unit &= strides[d] == 1;
  }
  int64_t &item = item_sizes[dtype & 255];
  if (!item) item = int64_t(element_size(dtype));
  // The storage may have been made smaller behind the tensor's back.
  if (numel && (offset + last + 1) * item > bytes) return found;
  // Dense views with a lazy minus sign have one element.
  if (numel == 1 && !unit && negated(object)) return found;
  void *address = reinterpret_cast<void *>(EMPTY);
  if (numel && get_data_ptr(tensor, &address)) return found;
  found.header = header_of(dtype, device, index, dim);
  found.bytes = numel ? (last + 1) * item : 0;
  found.address = reinterpret_cast<int64_t>(address);
  found.dim = dim, found.sizes = sizes, found.strides = strides;
  return found;
}

// Tensors lie scattered, so that waiting for memory would take most of the time: ask early for what comes later. Words 2,
// 3 and 5 of a TensorImpl are its storage, its gradient's owner and its version; were they others, only time would be lost.
inline void fetch(const std::vector<PyObject *> &objects, size_t i, std::initializer_list<int> words) {
  const auto impl = [&](size_t k) -> const char *const * {
    return k < objects.size() && known(objects[k]) ? *static_cast<const char *const **>(handle_of(objects[k])) : nullptr;
  };
  if (i + 20 < objects.size()) prefetch(handle_of(objects[i + 20]));
  if (const auto *at = impl(i + 10))
    for (int word = 0; word < 32; word += 8) prefetch(at + word);
  if (const auto *at = impl(i + 4))
    for (const int word : words) prefetch(at[word]), prefetch(at[word] + 64);
}

void take(PyObject *list, std::vector<PyObject *> &objects) {
  objects.resize(PyList_Size(list));
  for (size_t i = 0; i < objects.size(); ++i) objects[i] = PyList_GetItem(list, Py_ssize_t(i));
}

inline void bump(PyObject *object) {
  try {
    bump_version(handle_of(object));
  } catch (...) {  // tensors made in inference mode have no version
  }
}

inline bool same(const int64_t *a, const int64_t *b, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (a[i] != b[i]) return false;
  return true;
}

// Whether a tensor is of a kind, of which the words after the header are given; then its address. Like `find`, in fewer
// calls. Only gradients turn sparse; of others torch would log an error, and the answer be the same.
[[gnu::always_inline]] inline bool matches(PyObject *object, int64_t header, const int64_t *kind, bool may_be_sparse,
                                           int64_t *address) {
  const Handle tensor = handle_of(object);
  const int64_t dim = header >> 24;
  int32_t layout, dtype, device, index = 0;
  int64_t found, *sizes, *strides, bytes, offset;
  void *at = reinterpret_cast<void *>(EMPTY);
  if (!known(object) || (may_be_sparse && (get_layout(tensor, &layout) || layout != strided)) ||
      get_dim(tensor, &found) || found != dim ||
      get_device_type(tensor, &device) || get_dtype(tensor, &dtype) ||
      (device != cpu && get_device_index(tensor, &index)) || header_of(dtype, device, index, dim) != header)
    return false;
  if (dim && (get_sizes(tensor, &sizes) || get_strides(tensor, &strides) || !same(kind + 1, sizes, dim) ||
              !same(kind + 1 + dim, strides, dim)))
    return false;
  if (kind[0]) {
    if (get_storage_size(tensor, &bytes) || get_storage_offset(tensor, &offset) ||
        offset * item_sizes[dtype & 255] + kind[0] > bytes || get_data_ptr(tensor, &at))
      return false;
    // Dense views with a lazy minus sign have one element, and strides that are not 1.
    if (kind[0] == item_sizes[dtype & 255])
      for (int64_t d = 0; d < dim; ++d)
        if (strides[d] != 1) return !negated(object) && (*address = reinterpret_cast<int64_t>(at), true);
  }
  *address = reinterpret_cast<int64_t>(at);
  return true;
}

// look(columns, kinds, addresses, optional, written) -> -1, or a mask of the columns of which an address has changed.
PyObject *look(PyObject *, PyObject *args) {
  PyObject *columns, *kinds;
  unsigned long long addresses_at;
  int optional;
  unsigned written;
  if (!PyArg_ParseTuple(args, "O!SKiI", &PyTuple_Type, &columns, &kinds, &addresses_at, &optional, &written))
    return nullptr;
  auto *at = reinterpret_cast<const int64_t *>(PyBytes_AsString(kinds));
  const int64_t *end = at + PyBytes_Size(kinds) / Py_ssize_t(sizeof(int64_t));
  auto *address = reinterpret_cast<int64_t *>(addresses_at);
  long moved = 0;
  std::vector<PyObject *> objects;
  for (Py_ssize_t c = 0; c < PyTuple_Size(columns); ++c) {
    PyObject *column = PyTuple_GetItem(columns, c);
    const Py_ssize_t n = PyList_Size(column);
    if (n < 0) return nullptr;
    const bool counts = written >> c & 1 && bump_version;
    take(column, objects);
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (at == end) return PyLong_FromLong(CHANGED);
      fetch(objects, i, {2, 5});
      PyObject *object = objects[i];
      const int64_t header = *at++;
      int64_t now = 0;
      if (object == Py_None) {
        if (header != NONE && c != optional) return PyLong_FromLong(CHANGED);
      } else if (header < 0) {
        if (header == NONE || find(object).header != FOREIGN) return PyLong_FromLong(CHANGED);
      } else if (!matches(object, header, at, c == optional, &now)) {
        return PyLong_FromLong(CHANGED);
      } else if (counts) {
        bump(object);
      }
      if (header >= 0) at += 1 + 2 * (header >> 24);
      if (*address != now) {
        *address = now;
        moved |= 1L << c;
      }
      ++address;
    }
  }
  return PyLong_FromLong(at == end ? moved : CHANGED);
}

// describe(list) -> list of bytes: each tensor's kind.
PyObject *describe(PyObject *, PyObject *list) {
  const Py_ssize_t n = PyList_Size(list);
  PyObject *result = n < 0 ? nullptr : PyList_New(n);
  std::vector<int64_t> words;
  for (Py_ssize_t i = 0; result && i < n; ++i) {
    const Found found = find(PyList_GetItem(list, i));
    words.assign(1, found.header);
    if (found.header >= 0) words.push_back(found.bytes);
    words.insert(words.end(), found.sizes, found.sizes + found.dim);
    words.insert(words.end(), found.strides, found.strides + found.dim);
    const auto *bytes = reinterpret_cast<const char *>(words.data());
    PyObject *kind = PyBytes_FromStringAndSize(bytes, Py_ssize_t(words.size() * sizeof(int64_t)));
    if (!kind || PyList_SetItem(result, i, kind)) Py_CLEAR(result);
  }
  return result;
}

// same(list, list) -> whether both hold the same objects.
PyObject *same_objects(PyObject *, PyObject *args) {
  PyObject *a, *b;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &a, &PyList_Type, &b)) return nullptr;
  const Py_ssize_t n = PyList_Size(a);
  bool same = n == PyList_Size(b);
  for (Py_ssize_t i = 0; same && i < n; ++i) same = PyList_GetItem(a, i) == PyList_GetItem(b, i);
  return PyBool_FromLong(same);
}

// values(dicts, keys) -> for each key, a list of dict[key] of each dict; KeyError where one is missing.
PyObject *values(PyObject *, PyObject *args) {
  PyObject *dicts, *keys;
  if (!PyArg_ParseTuple(args, "O!O!", &PyList_Type, &dicts, &PyTuple_Type, &keys)) return nullptr;
  const Py_ssize_t n = PyList_Size(dicts), m = PyTuple_Size(keys);
  PyObject *result = PyList_New(m);
  std::vector<PyObject *> names(m), columns(m);
  for (Py_ssize_t k = 0; result && k < m; ++k) {
    names[k] = PyTuple_GetItem(keys, k), columns[k] = PyList_New(n);
    if (!columns[k] || PyList_SetItem(result, k, columns[k])) Py_CLEAR(result);
  }
  for (Py_ssize_t i = 0; result && i < n; ++i) {
    PyObject *dict = PyList_GetItem(dicts, i);
    Py_ssize_t place = 0;
    for (Py_ssize_t k = 0; result && k < m; ++k) {
      PyObject *key = names[k], *next, *value;
      // Most dicts hold their entries in the order of the keys.
      if (!PyDict_Next(dict, &place, &next, &value) || next != key) value = PyDict_GetItemWithError(dict, key);
      if (value) {
        Py_INCREF(value);
        PyList_SetItem(columns[k], i, value);
      } else {
        if (!PyErr_Occurred()) PyErr_SetObject(PyExc_KeyError, key);
        Py_CLEAR(result);
      }
    }
  }
  return result;
}

// The gradient of a tensor of a usual type: a new reference, or null without an exception if it must be asked otherwise.
// What `Tensor.grad` does, without the way through Python's descriptors.
inline PyObject *gradient(PyObject *object) {
  if (!get_grad || !wrap) return nullptr;
  try {
    PyObject *found = wrap(get_grad(*static_cast<Handle *>(handle_of(object))));
    if (!found) PyErr_Clear();  // the caller asks in another way
    return found;
  } catch (...) {
    PyErr_Clear();
    return nullptr;
  }
}

// gradients(list, descriptor) -> list of the `grad` of each, by the descriptor of torch.Tensor.grad.
PyObject *gradients(PyObject *, PyObject *args) {
  PyObject *tensors, *descriptor;
  if (!PyArg_ParseTuple(args, "O!O", &PyList_Type, &tensors, &descriptor)) return nullptr;
  const auto get = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(descriptor), Py_tp_descr_get));
  const Py_ssize_t n = PyList_Size(tensors);
  PyObject *result = PyList_New(n);
  std::vector<PyObject *> objects;
  take(tensors, objects);
  for (Py_ssize_t i = 0; result && i < n; ++i) {
    fetch(objects, i, {3});
    PyObject *tensor = objects[i];
    auto *type = reinterpret_cast<PyObject *>(Py_TYPE(tensor));
    const bool is_usual = type == usual[0] || type == usual[1];
    PyObject *grad = is_usual ? gradient(tensor) : nullptr;
    // A class of the user's may have a `grad` of its own.
    if (!grad) grad = is_usual ? get(descriptor, tensor, type) : PyObject_GetAttrString(tensor, "grad");
    if (!grad || PyList_SetItem(result, i, grad)) Py_CLEAR(result);
  }
  return result;
}

// bind(offset, strided, cpu, cuda, *functions)
PyObject *bind(PyObject *, PyObject *args) {
  unsigned long long f[14];
  if (!PyArg_ParseTuple(args, "niiiKKKKKKKKKKKKKK", &tensor_offset, &strided, &cpu, &cuda, f, f + 1, f + 2, f + 3, f + 4,
                        f + 5, f + 6, f + 7, f + 8, f + 9, f + 10, f + 11, f + 12, f + 13))
    return nullptr;
  const auto set = [](auto &function, unsigned long long address) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(address);
  };
  set(get_data_ptr, f[0]), set(get_dim, f[1]), set(get_sizes, f[2]), set(get_strides, f[3]), set(get_dtype, f[4]);
  set(get_device_type, f[5]), set(get_device_index, f[6]), set(get_layout, f[7]), set(get_storage_size, f[8]);
  set(get_storage_offset, f[9]), set(element_size, f[10]), set(bump_version, f[11]);
  set(get_grad, f[12]), set(wrap, f[13]);
  Py_RETURN_NONE;
}

// accept(type): tensors of this type have memory of their own. The first two are torch.Tensor and torch.nn.Parameter.
PyObject *accept(PyObject *, PyObject *type) {
  Py_INCREF(type);
  if (!usual[0] || !usual[1])
    usual[usual[0] != nullptr] = type;
  else
    types.push_back(type);
  Py_RETURN_NONE;
}

PyMethodDef methods[] = {
    {"look", look, METH_VARARGS, "Compare tensors with their kinds, and take their addresses."},
    {"describe", describe, METH_O, "Return the kinds of tensors."},
    {"same", same_objects, METH_VARARGS, "Return whether two lists hold the same objects."},
    {"values", values, METH_VARARGS, "Return the values of keys in a list of dicts."},
    {"gradients", gradients, METH_VARARGS, "Return the gradients of tensors."},
    {"bind", bind, METH_VARARGS, "Take the addresses of libtorch's functions."},
    {"accept", accept, METH_O, "Take tensors of a type for such with memory of their own."},
    {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_tensors", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__tensors() { return PyModule_Create(&module); }
