// Tells in microseconds whether Python objects are what they were: what packed weights were made of is looked at before
// every forward, when nothing of it is in the caches. No torch header; tensors are read through DLPack's C interface.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "introspect.h"

namespace mnv2 {

// Objects by their type, dicts by their entries' identity.
class SameObjects {
 public:
  SameObjects(const pybind11::list& objects, const pybind11::list& dicts);
  bool holds() const;

 private:
  struct Dict {
    PyObject* dict;
    Py_ssize_t size;
    uint64_t entries;  // digest of the keys' and values' addresses
  };
  std::vector<std::pair<PyObject*, PyTypeObject*>> objects_;
  std::vector<Dict> dicts_;
  std::vector<pybind11::object> alive_;  // no other object can come to lie at a remembered address
};

// Tensors by type, place, dtype, shape and strides, and by what their memory holds.
class SameTensors {
 public:
  // Each tensor with the number of dense rows that its memory is read as (see Region); 0: the memory is not looked at,
  // -1: nor is it, and the tensor's version counts instead.
  explicit SameTensors(const std::vector<std::pair<pybind11::object, int64_t>>& tensors);
  bool holds() const;

 private:
  struct Tensor {
    PyObject* object;
    PyTypeObject* type;
    const void* data;
    const int64_t* shape;  // where it lay, beside the tensor's other fields
    size_t dims;           // where its sizes and strides begin in dims_
    int32_t ndim;
    uint32_t dtype;
    bool in_part;  // a write may miss the fingerprint: its version counts as well
    int64_t version;
  };
  std::vector<Tensor> tensors_;
  std::vector<int64_t> dims_;
  std::vector<Region> regions_;
  uint64_t fingerprint_;
  std::vector<pybind11::object> alive_;
};

// Asks both beside this thread's next CPU operator; the answer, once that has returned, is check_held().
void check_alongside(pybind11::object objects, pybind11::object tensors);
bool check_held();

}  // namespace mnv2
