#include "reference.h"

#include <algorithm>
#include <vector>

#include "windows.h"

namespace mnv2::train {
namespace {

using Vector = std::vector<double>;

const double* numbers(ConstData data) { return static_cast<const double*>(data); }
double* numbers(Data data) { return static_cast<double*>(data); }
size_t index(int64_t i) { return static_cast<size_t>(i); }

// c (m, n) += a b. a (m, k), or transposed (k, m); b (k, n), or transposed (n, k).
void add_product(int64_t m, int64_t n, int64_t k, const double* a, bool a_transposed, const double* b,
                 bool b_transposed, double* c) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0.;
      for (int64_t l = 0; l < k; ++l) {
        sum += a[a_transposed ? l * m + i : i * k + l] * b[b_transposed ? j * k + l : l * n + j];
      }
      c[i * n + j] += sum;
    }
  }
}

bool inside(double u, Activation act) { return u > act.lo && u < act.hi; }
double clamp(double u, Activation act) { return u < act.lo ? act.lo : u > act.hi ? act.hi : u; }

// Hidden maps are dense in the order n, h_out, w_out, c_hidden.
class ReferencePasses final : public Passes {
 public:
  Data workspace(Slot slot, int64_t elements) override {
    Vector& memory = slots_[static_cast<int>(slot)];
    if (memory.size() < index(elements)) memory.resize(index(elements));
    return memory.data();
  }
  double* vector(int64_t size) override {
    vectors_.emplace_back(index(size));
    return vectors_.back().data();
  }
  int64_t hidden_size(const BlockShape& s) const override { return pixels_out(s) * s.c_hidden; }

  void moments(const Map& x, bool, double* mean, double* products) override {
    const Vector centred = centred_of(x, mean);
    std::fill_n(products, x.channels * x.channels, 0.);
    add_product(x.channels, x.channels, x.pixels, centred.data(), true, centred.data(), false, products);
  }

  bool linear_moments(const Matrix& weight, const double* mean, const double* products, double, double* out_mean,
                      double* out_squares) override {
    const int64_t rows = weight.rows, c = weight.columns;
    const double* w = numbers(weight.data);
    Vector half(index(rows * c));
    add_product(rows, c, c, w, false, products, false, half.data());
    for (int64_t i = 0; i < rows; ++i) {
      out_mean[i] = out_squares[i] = 0.;
      for (int64_t j = 0; j < c; ++j) {
        out_mean[i] += w[i * c + j] * mean[j];
        out_squares[i] += half[index(i * c + j)] * w[i * c + j];
      }
      out_squares[i] = std::max(out_squares[i], 0.);
    }
    return false;
  }

  void linear_gradients(const Matrix& weight, const BatchNorm& norm, const LinearGradients& found, bool batch,
                        Data d_weight, double* d_gamma) override {
    const double *w = numbers(weight.data), *folded = numbers(found.d_folded);
    for (int64_t i = 0; i < weight.rows; ++i) {
      double product = 0.;
      for (int64_t j = i * weight.columns; j < (i + 1) * weight.columns; ++j) {
        product += folded[j] * w[j];
        numbers(d_weight)[j] = folded[j] * norm.scale[i];
      }
      d_gamma[i] = linear_d_gamma(norm, i, product, found.sum_dy[i], found.sum_dy_linear[i], batch);
    }
  }

  void linear_correction(const Matrix& weight, const BatchNorm& norm, const double* d_gamma, const double* d_beta,
                         const double* products, double count, double share, Data d_weight, const Map& x,
                         ConstData residual, Data d_x) override {
    const int64_t rows = weight.rows, c = weight.columns;
    const double* w = numbers(weight.data);
    Vector scaled(index(rows * c)), correction(index(rows * c)), square(index(c * c)), shift(index(c));
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < c; ++j) {
        scaled[index(i * c + j)] = w[i * c + j] * norm.scale[i] * norm.rstd[i] * d_gamma[i] / count;
        shift[index(j)] += w[i * c + j] * norm.scale[i] * d_beta[i] / count;
      }
    }
    if (d_weight) {
      add_product(rows, c, c, scaled.data(), false, products, false, correction.data());
      for (int64_t i = 0; i < rows * c; ++i) numbers(d_weight)[i] -= share * correction[index(i)];
    }
    if (!d_x) return;
    add_product(c, c, rows, w, true, scaled.data(), false, square.data());
    Vector terms(index(x.pixels * c));
    add_product(x.pixels, c, c, numbers(x.data), false, square.data(), false, terms.data());
    for (int64_t i = 0; i < x.pixels * c; ++i) {
      numbers(d_x)[i] += (residual ? numbers(residual)[i] : 0.) - terms[index(i)] - shift[index(i % c)];
    }
  }

  void scale_rows(int64_t rows, int64_t columns, const double* scale, Data matrix) override {
    for (int64_t i = 0; i < rows * columns; ++i) numbers(matrix)[i] *= scale[i / columns];
  }

  void map_moments(const Map& x, double* mean, double* squares) override {
    const Vector centred = centred_of(x, mean);
    std::fill_n(squares, x.channels, 0.);
    for (int64_t i = 0; i < x.pixels * x.channels; ++i)
      squares[i % x.channels] += centred[index(i)] * centred[index(i)];
  }

  void map_products(const Map& dy, ConstData x, const double* mean, const NormSums& sums) override {
    const int64_t c = dy.channels;
    std::fill_n(sums.dy, c, 0.);
    std::fill_n(sums.dy_centred, c, 0.);
    for (int64_t i = 0; i < dy.pixels * c; ++i) {
      sums.dy[i % c] += numbers(dy.data)[i];
      sums.dy_centred[i % c] += numbers(dy.data)[i] * (numbers(x)[i] - mean[i % c]);
    }
  }

  void map_combine(const Combination& from) override {
    const int64_t c = from.a.channels;
    for (int64_t i = 0; i < from.a.pixels * c; ++i) {
      numbers(from.out)[i] = from.scale[i % c] * numbers(from.a.data)[i] + from.shift[i % c] +
                             (from.b ? from.b_scale[i % c] * numbers(from.b)[i] : 0.) +
                             (from.c ? numbers(from.c)[i] : 0.);
    }
  }

  void map_add(const Map& from, Data to) override {
    for (int64_t i = 0; i < from.pixels * from.channels; ++i) numbers(to)[i] += numbers(from.data)[i];
  }

  void set_block(const BlockShape& s, const BlockWeights& weights) override { s_ = s, w_ = weights; }

  void hidden(ConstData x, Data hidden, double* mean, double* squares) override {
    const Vector found = hidden_of(x);
    map_moments({found.data(), pixels_out(s_), s_.c_hidden}, mean, squares);
    if (hidden) std::copy(found.begin(), found.end(), numbers(hidden));
  }

  void project(ConstData x, ConstData hidden, const BatchNorm& depthwise, Data out) override {
    Vector activated = hidden ? copy_of(hidden, hidden_size(s_)) : hidden_of(x);
    for (size_t i = 0; i < activated.size(); ++i) activated[i] = clamp(normalised(activated, i, depthwise), s_.act);
    std::fill_n(numbers(out), pixels_out(s_) * s_.c_out, 0.);
    add_product(pixels_out(s_), s_.c_out, s_.c_hidden, activated.data(), false, numbers(w_.project), true,
                numbers(out));
  }

  void set_backward(const double* project_scale) override { project_scale_ = project_scale; }

  void project_backward(ConstData x, Data hidden, bool saved, Data d_hidden, ConstData d_project,
                        const BatchNorm& depthwise, const ProjectGradients& found) override {
    const Vector z = saved ? copy_of(hidden, hidden_size(s_)) : hidden_of(x);
    const Vector dz = d_hidden_of(z, d_project, depthwise);
    if (hidden && !saved) std::copy(z.begin(), z.end(), numbers(hidden));
    if (d_hidden) std::copy(dz.begin(), dz.end(), numbers(d_hidden));
    map_products({dz.data(), pixels_out(s_), s_.c_hidden}, z.data(), depthwise.mean, found.sums);
    if (!found.d_weight) return;
    Vector activated(z.size());
    for (size_t i = 0; i < z.size(); ++i) activated[i] = clamp(normalised(z, i, depthwise), s_.act);
    std::fill_n(numbers(found.d_weight), s_.c_out * s_.c_hidden, 0.);
    add_product(s_.c_out, s_.c_hidden, pixels_out(s_), numbers(d_project), true, activated.data(), false,
                numbers(found.d_weight));
  }

  void hidden_backward(ConstData x, ConstData hidden, ConstData d_hidden, ConstData d_project,
                       const BatchNorm& depthwise, const BatchNormBackward& backward,
                       const HiddenGradients& found) override {
    Vector z = hidden ? copy_of(hidden, hidden_size(s_)) : hidden_of(x);
    if (found.with_project) project_backward(x, z.data(), true, nullptr, d_project, depthwise, found.project);
    const Vector dz = d_hidden ? copy_of(d_hidden, hidden_size(s_)) : d_hidden_of(z, d_project, depthwise);
    map_combine({.a = {dz.data(), pixels_out(s_), s_.c_hidden},
                 .scale = backward.d_output,
                 .shift = backward.constant,
                 .b = z.data(),
                 .b_scale = backward.input,
                 .c = nullptr,
                 .out = z.data()});
    const Vector a = activated_of(x);
    Vector da(a.size());
    std::fill_n(numbers(found.d_depthwise), s_.c_hidden * s_.kernel * s_.kernel, 0.);
    for_each_tap([&](int64_t in, int64_t out, int64_t weight) {
      da[index(in)] += z[index(out)] * numbers(w_.depthwise)[weight];
      numbers(found.d_depthwise)[weight] += z[index(out)] * a[index(in)];
    });
    const LinearGradients& to = found.expand;
    std::fill_n(to.sum_dy, s_.c_hidden, 0.);
    std::fill_n(to.sum_dy_linear, s_.c_hidden, 0.);
    for (size_t i = 0; i < a.size(); ++i) {
      const size_t c = i % index(s_.c_hidden);
      if (s_.has_expand && !inside(a[i], s_.act)) da[i] = 0.;
      to.sum_dy[c] += da[i];
      if (s_.has_expand) to.sum_dy_linear[c] += da[i] * (a[i] - w_.expand_shift[c]);
    }
    if (s_.has_expand) {
      const Matrix weight{w_.expand, s_.c_hidden, s_.c_in};
      to_linear(numbers(x), da, s_.n * s_.h * s_.w, weight, w_.expand_scale, to);
    } else if (to.d_x) {
      std::copy(da.begin(), da.end(), numbers(to.d_x));
    }
  }

  void windows(const DenseShape& s, ConstData x, const int64_t strides[4], Data out) override {
    double* to = numbers(out);
    for_each_window(s, [&](int64_t n, int64_t y, int64_t column) {
      const bool within = y >= 0 && y < s.h && column >= 0 && column < s.w;
      for (int64_t c = 0; c < s.c_in; ++c) {
        *to++ = within ? numbers(x)[n * strides[0] + c * strides[1] + y * strides[2] + column * strides[3]] : 0.;
      }
    });
  }

  void add_windows(const DenseShape& s, ConstData windows, Data out) override {
    for (int64_t i = 0; i < s.n; ++i) add_windows_of(s, i, numbers(windows), numbers(out));
  }

  void window_matrix(const DenseShape& s, ConstData from, bool back, Data to) override {
    permute_windows(s, numbers(from), back, numbers(to));
  }

  void dense(const DenseShape& s, ConstData x, const int64_t strides[4], ConstData weight, const double* scale,
             const double* shift, Data y) override {
    const int64_t window = s.kernel * s.kernel * s.c_in, pixels = s.n * h_out(s) * w_out(s);
    Vector columns(index(pixels * window)), matrix(index(s.c_out * window));
    windows(s, x, strides, columns.data());
    window_matrix(s, weight, false, matrix.data());
    std::fill_n(numbers(y), pixels * s.c_out, 0.);
    add_product(pixels, s.c_out, window, columns.data(), false, matrix.data(), true, numbers(y));
    for (int64_t i = 0; i < pixels * s.c_out; ++i) {
      const int64_t c = i % s.c_out;
      numbers(y)[i] = clamp(scale[c] * numbers(y)[i] + shift[c], s.act);
    }
  }

  void linear_backward(const BlockShape& s, ConstData x, ConstData dy, ConstData expand, const double* scale,
                       const double* shift, const LinearGradients& found) override {
    const int64_t pixels = s.n * s.h * s.w, rows = s.c_hidden;
    const Matrix weight{expand, rows, s.c_in};
    Vector linear(index(pixels * rows)), d = copy_of(dy, pixels * rows);
    add_product(pixels, rows, weight.columns, numbers(x), false, numbers(weight.data), true, linear.data());
    std::fill_n(found.sum_dy, rows, 0.);
    std::fill_n(found.sum_dy_linear, rows, 0.);
    for (size_t i = 0; i < d.size(); ++i) {
      const size_t c = i % index(rows);
      const double z = scale[c] * linear[i];
      if (!inside(z + shift[c], s.act)) d[i] = 0.;
      found.sum_dy[c] += d[i];
      found.sum_dy_linear[c] += d[i] * z;
    }
    to_linear(numbers(x), d, pixels, weight, scale, found);
  }

 private:
  static int64_t pixels_out(const BlockShape& s) { return s.n * h_out(s) * w_out(s); }
  static Vector copy_of(ConstData from, int64_t size) { return Vector(numbers(from), numbers(from) + size); }

  // x minus the mean of its channels, which it writes.
  static Vector centred_of(const Map& x, double* mean) {
    Vector centred = copy_of(x.data, x.pixels * x.channels);
    const size_t c = index(x.channels);
    std::fill_n(mean, c, 0.);
    for (size_t i = 0; i < centred.size(); ++i) mean[i % c] += centred[i];
    for (size_t i = 0; i < c; ++i) mean[i] /= static_cast<double>(x.pixels);
    for (size_t i = 0; i < centred.size(); ++i) centred[i] -= mean[i % c];
    return centred;
  }

  // d_folded and d_x of a linear map from dy (pixels, rows).
  static void to_linear(const double* x, const Vector& dy, int64_t pixels, const Matrix& weight, const double* scale,
                        const LinearGradients& found) {
    const int64_t rows = weight.rows, c = weight.columns;
    if (found.d_folded) {
      std::fill_n(numbers(found.d_folded), rows * c, 0.);
      add_product(rows, c, pixels, dy.data(), true, x, false, numbers(found.d_folded));
    }
    if (!found.d_x) return;
    Vector folded = copy_of(weight.data, rows * c);
    for (int64_t i = 0; i < rows * c; ++i) folded[index(i)] *= scale[i / c];
    std::fill_n(numbers(found.d_x), pixels * c, 0.);
    add_product(pixels, c, rows, dy.data(), false, folded.data(), false, numbers(found.d_x));
  }

  // The depthwise convolution's input.
  Vector activated_of(ConstData x) const {
    const int64_t pixels = s_.n * s_.h * s_.w;
    if (!s_.has_expand) return copy_of(x, pixels * s_.c_in);
    Vector u(index(pixels * s_.c_hidden));
    add_product(pixels, s_.c_hidden, s_.c_in, numbers(x), false, numbers(w_.expand), true, u.data());
    for (size_t i = 0; i < u.size(); ++i) {
      const size_t c = i % index(s_.c_hidden);
      u[i] = clamp(w_.expand_scale[c] * u[i] + w_.expand_shift[c], s_.act);
    }
    return u;
  }

  Vector hidden_of(ConstData x) const {
    const Vector a = activated_of(x);
    Vector hidden(index(hidden_size(s_)));
    for_each_tap([&](int64_t in, int64_t out, int64_t weight) {
      hidden[index(out)] += a[index(in)] * numbers(w_.depthwise)[weight];
    });
    return hidden;
  }

  double normalised(const Vector& hidden, size_t i, const BatchNorm& norm) const {
    const size_t c = i % index(s_.c_hidden);
    return norm.scale[c] * hidden[i] + norm.shift[c];
  }

  Vector d_hidden_of(const Vector& hidden, ConstData d_project, const BatchNorm& depthwise) const {
    Vector scaled = copy_of(d_project, pixels_out(s_) * s_.c_out), d_hidden(hidden.size());
    for (size_t i = 0; project_scale_ && i < scaled.size(); ++i) scaled[i] *= project_scale_[i % index(s_.c_out)];
    add_product(pixels_out(s_), s_.c_hidden, s_.c_out, scaled.data(), false, numbers(w_.project), false,
                d_hidden.data());
    for (size_t i = 0; i < hidden.size(); ++i) {
      if (!inside(normalised(hidden, i, depthwise), s_.act)) d_hidden[i] = 0.;
    }
    return d_hidden;
  }

  // Calls f(element of the input, element of the output, weight) for every tap of the depthwise convolution.
  template <class F>
  void for_each_tap(const F& f) const {
    const int64_t height = h_out(s_), width = w_out(s_), c_hidden = s_.c_hidden;
    for (int64_t n = 0; n < s_.n; ++n) {
      for (int64_t row = 0; row < height; ++row) {
        for (int64_t column = 0; column < width; ++column) {
          for (int64_t tap = 0; tap < s_.kernel * s_.kernel; ++tap) {
            const int64_t y = row * s_.stride - s_.pad.top + tap / s_.kernel * s_.dilation;
            const int64_t x = column * s_.stride - s_.pad.left + tap % s_.kernel * s_.dilation;
            if (y < 0 || y >= s_.h || x < 0 || x >= s_.w) continue;
            for (int64_t c = 0; c < c_hidden; ++c) {
              f(((n * s_.h + y) * s_.w + x) * c_hidden + c, ((n * height + row) * width + column) * c_hidden + c,
                c * s_.kernel * s_.kernel + tap);
            }
          }
        }
      }
    }
  }

  // Calls f(image, row, column) for every pixel of every window, which may lie outside of the image.
  template <class F>
  static void for_each_window(const DenseShape& s, const F& f) {
    const int64_t pixels = h_out(s) * w_out(s), taps = s.kernel * s.kernel;
    for (int64_t i = 0; i < s.n * pixels * taps; ++i) {
      const int64_t pixel = i / taps % pixels, tap = i % taps;
      f(i / taps / pixels, pixel / w_out(s) * s.stride - s.pad.top + tap / s.kernel,
        pixel % w_out(s) * s.stride - s.pad.left + tap % s.kernel);
    }
  }

  std::vector<Vector> slots_ = std::vector<Vector>(index(static_cast<int64_t>(Slot::kCount)));
  std::vector<Vector> vectors_;
  BlockShape s_{};
  BlockWeights w_{};
  const double* project_scale_ = nullptr;
};

}  // namespace

std::unique_ptr<Passes> reference_passes() { return std::make_unique<ReferencePasses>(); }

}  // namespace mnv2::train
