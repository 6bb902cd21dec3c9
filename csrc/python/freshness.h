// Tells in microseconds whether Python objects and tensors are what they were when weights were packed. Every forward
// asks, with cold caches. No torch header: tensors are read through DLPack's C interface.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "../fingerprint.h"

namespace mnv2 {

// Whether objects still have the same types, and dicts still have identical keys and values.
class SameObjects {
 public:
  SameObjects(const pybind11::list& objects, const pybind11::list& dicts);
  bool holds() const;

 private:
  struct Dict {
    PyObject* dict;
    Py_ssize_t size;
    uint64_t entries;  // digest of the addresses of keys and values
    mutable uint64_t version;
  };
  std::vector<std::pair<PyObject*, PyTypeObject*>> objects_;
  std::vector<Dict> dicts_;
  std::vector<pybind11::object> alive_;  // references, so that no other object can get a remembered address
};

// How a tensor is watched.
enum class Watch {
  kPlace,     // type, address, dtype, shape, strides, size of the storage
  kVersion,   // kPlace and the version counter; a write through `.data` does not change the counter
  kContents,  // kPlace and a fingerprint of the contents. The tensor must be on the CPU and dense, with the first
              // dimension outermost. If the fingerprint is partial, the version counter is watched as well, unless the
              // tensor was made in inference mode and has none.
};

class SameTensors {
 public:
  // Throws std::runtime_error if a storage holds fewer bytes than its tensor needs (it may have been freed), and
  // std::invalid_argument for kContents of a tensor that is not dense or not on the CPU.
  explicit SameTensors(const std::vector<std::pair<pybind11::object, Watch>>& tensors);
  // Safe if storages were freed since: reads none of their memory.
  bool holds() const { return same_places() && same_contents(); }
  // All but the fingerprint.
  bool same_places() const;
  // Only after same_places(): else the memory may have been freed. Needs no GIL.
  bool same_contents() const;

 private:
  struct Tensor {
    PyObject* object;
    PyTypeObject* type;
    PyObject* storage;  // torch.UntypedStorage
    int64_t bytes;      // size of the storage
    const void* data;
    const int64_t* shape;  // address of the tensor's own sizes, for prefetching
    size_t dims;           // index in dims_ of its sizes and strides
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
  std::vector<pybind11::object> alive_;  // tensors and storages, so that no other can get a remembered address
};

// Asks both whether they hold during this thread's next CPU operator. check_held() returns the answer afterwards.
void check_alongside(pybind11::object objects, pybind11::object tensors);
bool check_held();

}  // namespace mnv2
