#include "freshness.h"

#include <ATen/dlpack.h>

#include <algorithm>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>

#include "../introspect.h"

namespace py = pybind11;

namespace mnv2 {
namespace {

// torch.Tensor's exchange functions: https://dmlc.github.io/dlpack/latest/python_spec.html, "DLPack C Exchange API"
const DLPackExchangeAPI& exchange() {
  static const DLPackExchangeAPI* api = [] {
    const py::object capsule = py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    const auto* found =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (!found) throw py::error_already_set();
    if (found->header.version.major != DLPACK_MAJOR_VERSION || !found->dltensor_from_py_object_no_sync) {
      throw py::import_error("mnv2_fused: this torch offers no tensors through DLPack 1's C exchange interface");
    }
    return found;
  }();
  return *api;
}

// Fills `view` with pointers into the tensor's own fields. Returns false and sets a Python error if that fails.
bool get_view(PyObject* tensor, DLTensor* view) {
  return exchange().dltensor_from_py_object_no_sync(tensor, view) == 0;
}

uint32_t dtype_of(const DLTensor& view) { return view.dtype.code | view.dtype.bits << 8 | view.dtype.lanes << 16; }

// The last forward read these objects, and by now they are in no cache. Prefetching hides the latency.
constexpr size_t kFetchAhead = 16;
void fetch(const void* p) { __builtin_prefetch(p); }

// For a query that fails now and did not before: the tensor has changed. Clears the Python error and returns false.
bool changed_kind() {
  PyErr_Clear();
  return false;
}

// A dict's version, which changes with its entries. Python 3.12 made it private, and 0 stands for all versions there.
uint64_t version_tag([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030c0000
  return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
  return 0;
#endif
}
constexpr bool kVersionTags = PY_VERSION_HEX < 0x030c0000;

uint64_t digest(PyObject* dict) {
  uint64_t hash = 0;
  Py_ssize_t position = 0;
  PyObject *key, *value;
  while (PyDict_Next(dict, &position, &key, &value)) {
    for (PyObject* entry : {key, value}) {
      hash = (hash ^ reinterpret_cast<uintptr_t>(entry)) * 0x9e3779b97f4a7c15u;
      hash ^= hash >> 32;
    }
  }
  return hash;
}

// The tensor's version counter; -1 and a Python error if it has none.
int64_t version_of(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("_version");
  const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  return version ? PyLong_AsLongLong(version.ptr()) : -1;
}

// The size of a torch.UntypedStorage; -1 and a Python error if the query fails.
int64_t bytes_of(PyObject* storage) {
  static PyObject* nbytes =
      py::object(py::module_::import("torch").attr("UntypedStorage").attr("nbytes")).release().ptr();
  const py::object bytes = py::reinterpret_steal<py::object>(PyObject_CallOneArg(nbytes, storage));
  return bytes ? PyLong_AsLongLong(bytes.ptr()) : -1;
}

int64_t item_bytes(const DLTensor& view) { return view.dtype.bits * view.dtype.lanes / 8; }

int64_t elements(const DLTensor& view) {
  return std::accumulate(view.shape, view.shape + view.ndim, int64_t{1}, std::multiplies<>());
}

// Bytes from the first element to the end of the last.
int64_t span(const DLTensor& view) {
  if (elements(view) == 0) return 0;
  int64_t last = 0;
  for (int32_t d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return (last + 1) * item_bytes(view);
}

std::string describe(const py::object& tensor) {
  return py::str("a {} tensor of shape {}").format(tensor.attr("dtype"), py::list(tensor.attr("shape")));
}

}  // namespace

SameObjects::SameObjects(const py::list& objects, const py::list& dicts) {
  for (const py::handle object : objects) {
    objects_.emplace_back(object.ptr(), Py_TYPE(object.ptr()));
    alive_.push_back(py::reinterpret_borrow<py::object>(object));
  }
  for (const py::handle dict : dicts) {
    dicts_.push_back({dict.ptr(), PyDict_GET_SIZE(dict.ptr()), digest(dict.ptr()), version_tag(dict.ptr())});
    alive_.push_back(py::reinterpret_borrow<py::object>(dict));
    for (const auto& [key, value] : py::reinterpret_borrow<py::dict>(dict)) {
      alive_.push_back(py::reinterpret_borrow<py::object>(key));
      alive_.push_back(py::reinterpret_borrow<py::object>(value));
    }
  }
}

bool SameObjects::holds() const {
  for (size_t i = 0; i < objects_.size(); ++i) {
    if (i + kFetchAhead < objects_.size()) fetch(objects_[i + kFetchAhead].first);
    if (Py_TYPE(objects_[i].first) != objects_[i].second) return false;
  }
  for (size_t i = 0; i < dicts_.size(); ++i) {
    if (i + kFetchAhead < dicts_.size()) fetch(dicts_[i + kFetchAhead].dict);
    const Dict& same = dicts_[i];
    if (kVersionTags && version_tag(same.dict) == same.version) continue;
    if (PyDict_GET_SIZE(same.dict) != same.size) return false;
    if (same.size > 0 && digest(same.dict) != same.entries) return false;
    same.version = version_tag(same.dict);  // an entry was changed and changed back
  }
  return true;
}

SameTensors::SameTensors(const std::vector<std::pair<py::object, Watch>>& tensors) {
  for (const auto& [object, watch] : tensors) add(object, watch);
  fingerprint_ = fingerprint(regions_.data(), static_cast<int64_t>(regions_.size()));
}

void SameTensors::add(const py::object& object, Watch watch) {
  DLTensor view{};
  if (!get_view(object.ptr(), &view)) throw py::error_already_set();
  const py::object storage = object.attr("untyped_storage")();
  const int64_t bytes = bytes_of(storage.ptr());
  if (bytes < 0) throw py::error_already_set();
  const int64_t size = span(view);
  const int64_t needed = size == 0 ? 0 : size + object.attr("storage_offset")().cast<int64_t>() * item_bytes(view);
  if (bytes < needed) {
    throw std::runtime_error("mnv2_fused: " + describe(object) + " needs a storage of " + std::to_string(needed) +
                             " bytes; got " + std::to_string(bytes) +
                             (bytes == 0 ? ": its storage is not allocated" : ": a part of its storage was freed"));
  }
  Tensor t{};
  t.object = object.ptr();
  t.type = Py_TYPE(t.object);
  t.storage = storage.ptr();
  t.bytes = bytes;
  t.data = view.data;
  t.shape = view.shape;
  t.dims = dims_.size();
  t.ndim = view.ndim;
  t.dtype = dtype_of(view);
  dims_.insert(dims_.end(), view.shape, view.shape + view.ndim);
  dims_.insert(dims_.end(), view.strides, view.strides + view.ndim);
  t.versioned = watch == Watch::kVersion;
  if (watch == Watch::kContents && size > 0) {
    if (view.device.device_type != kDLCPU || !is_dense(view.ndim, view.shape, view.strides)) {
      throw std::invalid_argument(
          "SameTensors: tensors: contents are watched on the CPU, without gaps and with the "
          "first dimension outermost; got " +
          describe(object));
    }
    const int64_t rows = view.ndim > 1 ? view.shape[0] : 1;
    const Region region{static_cast<const unsigned char*>(view.data) + view.byte_offset, rows, size / rows};
    regions_.push_back(region);
    t.versioned = !counts_whole(region) && !object.attr("is_inference")().cast<bool>();
  }
  if (t.versioned && (t.version = version_of(t.object)) < 0) throw py::error_already_set();
  tensors_.push_back(t);
  alive_.push_back(object);
  alive_.push_back(storage);
}

bool SameTensors::same_places() const {
  for (size_t i = 0; i < tensors_.size(); ++i) {
    if (i + kFetchAhead < tensors_.size()) {
      const Tensor& soon = tensors_[i + kFetchAhead];
      fetch(soon.object);
      fetch(soon.storage);
      for (int64_t line : {-64, 0, 64}) fetch(reinterpret_cast<const char*>(soon.shape) + line);
    }
    const Tensor& t = tensors_[i];
    if (Py_TYPE(t.object) != t.type) return false;
    DLTensor view{};
    if (!get_view(t.object, &view)) return changed_kind();
    const int64_t* dims = dims_.data() + t.dims;
    if (view.data != t.data || view.ndim != t.ndim || dtype_of(view) != t.dtype ||
        !std::equal(view.shape, view.shape + t.ndim, dims) ||
        !std::equal(view.strides, view.strides + t.ndim, dims + t.ndim)) {
      return false;
    }
    // A storage that was freed and allocated again may have the same address and be smaller.
    const int64_t bytes = bytes_of(t.storage);
    if (bytes < 0) return changed_kind();
    if (bytes != t.bytes) return false;
    if (!t.versioned) continue;
    const int64_t version = version_of(t.object);
    if (version < 0) return changed_kind();
    if (version != t.version) return false;
  }
  return true;
}

bool SameTensors::same_contents() const {
  return fingerprint(regions_.data(), static_cast<int64_t>(regions_.size())) == fingerprint_;
}

namespace {

struct Check {
  py::object objects, tensors;
  const SameTensors* known = nullptr;  // null: objects and places have not been looked at
  bool done = false, held = false;

  // With the GIL.
  void look() {
    known = &tensors.cast<const SameTensors&>();
    held = objects.cast<const SameObjects&>().holds() && known->same_places();
  }
  // Without the GIL, as operators run. Other threads may take it while the contents are read.
  void run() {
    if (!known) {
      const py::gil_scoped_acquire gil;
      look();
    }
    held = held && known->same_contents();
    done = true;
  }
};

thread_local Check check;  // holds objects from check_alongside() to check_held()

}  // namespace

void check_alongside(py::object objects, py::object tensors) {
  check = {std::move(objects), std::move(tensors)};
  // There is no other thread that would compute meanwhile, and callers in other threads may be waiting for the GIL.
  if (cpu_threads() == 1) check.look();
  run_alongside([](void* data) { static_cast<Check*>(data)->run(); }, &check);
}

bool check_held() {
  if (!check.done) {  // the operator had nothing to compute and did not run the check
    const py::gil_scoped_release no_gil;
    check.run();
  }
  run_alongside(nullptr, nullptr);
  check.objects = check.tensors = py::object();
  return check.held;
}

}  // namespace mnv2
