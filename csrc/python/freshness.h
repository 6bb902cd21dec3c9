// Tells in microseconds whether Python objects and tensors are what they were when weights were packed. It is asked
// before every forward, when nothing of it is in the caches. No torch header: tensors are read through DLPack's C
// interface.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../fingerprint.h"

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

// What of a tensor is watched. Each watches all that the one before does.
enum class Watch {
  kPlace,     // type, address, dtype, shape, strides, the size of its storage
  kVersion,   // its version counter, which writes through `.data` leave as it is
  kContents,  // a fingerprint of its memory, which is on the CPU and dense, the first dimension outermost. Its version
              // counts if the fingerprint is partial, unless it was made in inference mode and has none.
};

class SameTensors {
 public:
  // Throws std::runtime_error if a storage holds fewer bytes than its tensor needs, be it that it was freed, and
  // std::invalid_argument for the contents of a tensor that is not dense.
  explicit SameTensors(const std::vector<std::pair<pybind11::object, Watch>>& tensors);
  // Reads no memory that a storage has given back since.
  bool holds() const;

 private:
  struct Tensor {
    PyObject* object;
    PyTypeObject* type;
    PyObject* storage;  // torch.UntypedStorage
    int64_t bytes;      // its size
    const void* data;
    const int64_t* shape;  // where it lay, beside the tensor's other fields
    size_t dims;           // where its sizes and strides begin in dims_
    int32_t ndim;
    uint32_t dtype;
    bool versioned;
    int64_t version;
  };
  void add(const pybind11::object& object, Watch watch);

  std::vector<Tensor> tensors_;
  std::vector<int64_t> dims_;
  std::vector<Region> regions_;
  uint64_t fingerprint_;
  std::vector<pybind11::object> alive_;  // storages too: no other tensor can come to lie at a remembered address
};

// Asks both beside this thread's next CPU operator; the answer, once that has returned, is check_held().
void check_alongside(pybind11::object objects, pybind11::object tensors);
bool check_held();

}  // namespace mnv2
