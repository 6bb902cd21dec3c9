#include "passes.h"

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "../introspect.h"

namespace py = pybind11;
namespace train = mnv2::train;

namespace {

using Address = uintptr_t;  // 0 is null

void* at(Address a) { return reinterpret_cast<void*>(a); }
double* numbers(Address a) { return static_cast<double*>(at(a)); }

train::Map map_at(Address a, int64_t pixels, int64_t channels) { return {at(a), pixels, channels}; }
train::Matrix matrix_at(Address a, int64_t rows, int64_t columns) { return {at(a), rows, columns}; }

mnv2::Activation act_of(const std::array<double, 2>& bounds) {
  return {static_cast<float>(bounds[0]), static_cast<float>(bounds[1])};
}
mnv2::ImageSize size_of(const std::array<int64_t, 4>& x) { return {x[0], x[2], x[3], x[1]}; }

mnv2::DenseShape dense_of(const std::array<int64_t, 4>& x, const std::vector<int64_t>& fields,
                          const std::array<double, 2>& bounds) {
  return mnv2::dense_from(size_of(x), fields.data(), act_of(bounds));
}

train::LinearGradients linear_at(const std::array<Address, 4>& a) {
  return {at(a[0]), at(a[1]), numbers(a[2]), numbers(a[3])};
}
train::ProjectGradients project_at(const std::array<Address, 3>& a) {
  return {at(a[0]), {numbers(a[1]), numbers(a[2])}};
}

// A norm's vectors, one after the other.
train::BatchNorm norm_at(Address a, int64_t channels) { return train::BatchNorm::in(numbers(a), channels); }
train::BatchNormBackward backward_at(Address a, int64_t channels) {
  return train::BatchNormBackward::in(numbers(a), channels);
}

}  // namespace

void bind_passes(py::module_& m) {
  using P = train::Passes;
  py::class_<P>(m, "TrainPasses",
                "The passes of training, see csrc/train/passes.h. Tensors are given by their addresses, 0 for none; "
                "nothing is checked. For tests.")
      .def(py::init(
               [](bool reference) { return reference ? mnv2::reference_train_passes() : mnv2::cpu_train_passes(); }),
           py::arg("reference"))
      .def("moments",
           [](P& p, Address x, int64_t pixels, int64_t c, bool exact, Address mean, Address products) {
             p.moments(map_at(x, pixels, c), exact, numbers(mean), numbers(products));
           })
      .def("linear_moments",
           [](P& p, Address weight, int64_t rows, int64_t c, Address mean, Address products, double least,
              Address out_mean, Address out_squares) {
             return p.linear_moments(matrix_at(weight, rows, c), numbers(mean), numbers(products), least,
                                     numbers(out_mean), numbers(out_squares));
           })
      .def("linear_gradients",
           [](P& p, Address weight, int64_t rows, int64_t c, Address norm, const std::array<Address, 4>& found,
              bool batch, Address d_weight, Address d_gamma) {
             p.linear_gradients(matrix_at(weight, rows, c), norm_at(norm, rows), linear_at(found), batch, at(d_weight),
                                numbers(d_gamma));
           })
      .def("linear_correction",
           [](P& p, Address weight, int64_t rows, int64_t c, Address norm, Address d_gamma, Address d_beta,
              Address products, double count, double share, Address d_weight, Address x, int64_t pixels,
              Address residual, Address d_x) {
             p.linear_correction(matrix_at(weight, rows, c), norm_at(norm, rows), numbers(d_gamma), numbers(d_beta),
                                 numbers(products), count, share, at(d_weight), map_at(x, pixels, c), at(residual),
                                 at(d_x));
           })
      .def("map_moments", [](P& p, Address x, int64_t pixels, int64_t c, Address mean,
                             Address squares) { p.map_moments(map_at(x, pixels, c), numbers(mean), numbers(squares)); })
      .def("map_products",
           [](P& p, Address dy, int64_t pixels, int64_t c, Address x, Address mean, Address sum_dy, Address centred) {
             p.map_products(map_at(dy, pixels, c), at(x), numbers(mean), {numbers(sum_dy), numbers(centred)});
           })
      .def("map_combine",
           [](P& p, Address a, int64_t pixels, int64_t channels, Address scale, Address shift, Address b,
              Address b_scale, Address c, Address out) {
             p.map_combine({.a = map_at(a, pixels, channels),
                            .scale = numbers(scale),
                            .shift = numbers(shift),
                            .b = at(b),
                            .b_scale = numbers(b_scale),
                            .c = at(c),
                            .out = at(out)});
           })
      .def("norm",
           [](P& p, int64_t channels, Address gamma, Address beta, Address mean, Address squares, double count,
              double eps, Address out) {
             const train::Conv conv{.weight = nullptr,
                                    .gamma = numbers(gamma),
                                    .beta = numbers(beta),
                                    .eps = eps,
                                    .batch = true,
                                    .mean = nullptr,
                                    .var = nullptr};
             p.norm(conv, channels, numbers(mean), numbers(squares), count, norm_at(out, channels));
           })
      .def("norm_backward",
           [](P& p, int64_t channels, Address norm, Address sum_dy, Address centred, double count, Address out) {
             p.norm_backward(norm_at(norm, channels), channels, numbers(sum_dy), numbers(centred), count,
                             backward_at(out, channels));
           })
      .def("windows", [](P& p, const std::array<int64_t, 4>& size, const std::vector<int64_t>& fields, Address x,
                         const std::array<int64_t, 4>& strides,
                         Address out) { p.windows(dense_of(size, fields, {0., 0.}), at(x), strides.data(), at(out)); })
      .def("add_windows",
           [](P& p, const std::array<int64_t, 4>& size, const std::vector<int64_t>& fields, Address windows,
              Address out) { p.add_windows(dense_of(size, fields, {0., 0.}), at(windows), at(out)); })
      .def("dense",
           [](P& p, const std::array<int64_t, 4>& size, const std::vector<int64_t>& fields,
              const std::array<double, 2>& bounds, Address x, const std::array<int64_t, 4>& strides, Address weight,
              Address scale, Address shift, Address y) {
             p.dense(dense_of(size, fields, bounds), at(x), strides.data(), at(weight), numbers(scale), numbers(shift),
                     at(y));
           })
      .def("linear_backward",
           [](P& p, const std::array<int64_t, 4>& size, Address x, Address dy, Address weight, int64_t rows,
              const std::array<double, 2>& bounds, Address scale, Address shift, const std::array<Address, 4>& found) {
             p.linear_backward(mnv2::linear_block(size_of(size), rows, act_of(bounds)), at(x), at(dy), at(weight),
                               numbers(scale), numbers(shift), linear_at(found));
           })
      .def("set_block",
           [](P& p, const std::array<int64_t, 4>& size, const std::vector<int64_t>& fields,
              const std::array<double, 2>& bounds, Address expand, Address expand_scale, Address expand_shift,
              Address depthwise, Address project) {
             p.set_block(mnv2::block_from(size_of(size), fields.data(), act_of(bounds)),
                         {at(expand), at(depthwise), at(project), numbers(expand_scale), numbers(expand_shift)});
             return p.hidden_size(mnv2::block_from(size_of(size), fields.data(), act_of(bounds)));
           })
      .def("hidden", [](P& p, Address x, Address hidden, Address mean,
                        Address squares) { p.hidden(at(x), at(hidden), numbers(mean), numbers(squares)); })
      .def("project", [](P& p, Address x, Address hidden, Address depthwise, int64_t channels,
                         Address out) { p.project(at(x), at(hidden), norm_at(depthwise, channels), at(out)); })
      .def("set_backward", [](P& p, Address project_scale) { p.set_backward(numbers(project_scale)); })
      .def("project_backward",
           [](P& p, Address x, Address hidden, bool saved, Address d_hidden, Address d_project, Address depthwise,
              int64_t channels, const std::array<Address, 3>& found) {
             p.project_backward(at(x), at(hidden), saved, at(d_hidden), at(d_project), norm_at(depthwise, channels),
                                project_at(found));
           })
      .def("hidden_backward",
           [](P& p, Address x, Address hidden, Address d_hidden, Address d_project, Address depthwise, Address backward,
              int64_t channels, Address d_depthwise, const std::array<Address, 4>& expand, bool with_project,
              const std::array<Address, 3>& project) {
             p.hidden_backward(at(x), at(hidden), at(d_hidden), at(d_project), norm_at(depthwise, channels),
                               backward_at(backward, channels),
                               {at(d_depthwise), linear_at(expand), with_project, project_at(project)});
           });
}
