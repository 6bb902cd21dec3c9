// The passes of training for Python's tests, over the addresses of tensors.
#pragma once

#include <pybind11/pybind11.h>

void bind_passes(pybind11::module_& m);
