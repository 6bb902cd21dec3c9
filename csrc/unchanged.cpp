#include "unchanged.h"

#include <ATen/dlpack.h>

#include <algorithm>

namespace py = pybind11;

namespace mnv2 {
namespace {

// Of torch.Tensor. https://dmlc.github.io/dlpack/latest/python_spec.html, "DLPack C Exchange API"
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

// A view of the tensor's fields; they belong to the tensor.
DLTensor view_of(PyObject* tensor) {
  DLTensor view{};
  if (exchange().dltensor_from_py_object_no_sync(tensor, &view)) throw py::error_already_set();
  return view;
}

int64_t version_of(PyObject* tensor) {
  static PyObject* name = PyUnicode_InternFromString("_version");
  const py::object version = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor, name));
  if (!version) throw py::error_already_set();
  return PyLong_AsLongLong(version.ptr());
}

}  // namespace

SameObjects::SameObjects(const py::list& objects, const py::list& dicts) {
  alive_.push_back(objects.attr("copy")());
  for (const py::handle object : objects) objects_.emplace_back(object.ptr(), Py_TYPE(object.ptr()));
  for (const py::handle dict : dicts) {
    Dict same{dict.ptr(), {}};
    alive_.push_back(py::reinterpret_borrow<py::object>(dict));
    Py_ssize_t position = 0;
    PyObject *key, *value;
    while (PyDict_Next(same.dict, &position, &key, &value)) {
      for (PyObject* entry : {key, value}) {
        same.entries.push_back(entry);
        alive_.push_back(py::reinterpret_borrow<py::object>(entry));
      }
    }
    dicts_.push_back(std::move(same));
  }
}

bool SameObjects::holds() const {
  for (const auto& [object, type] : objects_) {
    if (Py_TYPE(object) != type) return false;
  }
  for (const Dict& same : dicts_) {
    if (2 * PyDict_GET_SIZE(same.dict) != static_cast<Py_ssize_t>(same.entries.size())) return false;
    Py_ssize_t position = 0;
    PyObject *key, *value;
    for (PyObject* const* entry = same.entries.data(); PyDict_Next(same.dict, &position, &key, &value); entry += 2) {
      if (entry[0] != key || entry[1] != value) return false;
    }
  }
  return true;
}

SameTensors::SameTensors(const std::vector<std::pair<py::object, int64_t>>& tensors) {
  for (const auto& [object, rows] : tensors) {
    const DLTensor view = view_of(object.ptr());
    Tensor t{};
    t.object = object.ptr();
    t.type = Py_TYPE(t.object);
    t.data = view.data;
    t.dims = dims_.size();
    t.ndim = view.ndim;
    dims_.insert(dims_.end(), view.shape, view.shape + view.ndim);
    dims_.insert(dims_.end(), view.strides, view.strides + view.ndim);
    if (rows > 0) {
      int64_t bytes = view.dtype.bits / 8;
      for (int32_t d = 0; d < view.ndim; ++d) bytes *= view.shape[d];
      const auto* data = static_cast<const unsigned char*>(view.data) + view.byte_offset;
      const Region region{data, rows, bytes / rows};
      regions_.push_back(region);
      t.in_part = !counts_whole(region);
      if (t.in_part) t.version = version_of(t.object);
    }
    tensors_.push_back(t);
    alive_.push_back(object);
  }
  fingerprint_ = fingerprint(regions_.data(), static_cast<int64_t>(regions_.size()));
}

bool SameTensors::holds() const {
  for (const Tensor& t : tensors_) {
    if (Py_TYPE(t.object) != t.type) return false;
    const DLTensor view = view_of(t.object);
    const int64_t* dims = dims_.data() + t.dims;
    if (view.data != t.data || view.ndim != t.ndim || !std::equal(view.shape, view.shape + t.ndim, dims) ||
        !std::equal(view.strides, view.strides + t.ndim, dims + t.ndim)) {
      return false;
    }
    if (t.in_part && version_of(t.object) != t.version) return false;
  }
  return fingerprint(regions_.data(), static_cast<int64_t>(regions_.size())) == fingerprint_;
}

}  // namespace mnv2
