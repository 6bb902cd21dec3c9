// The training passes over a block's hidden channels, and those over its narrow maps. Included once per ISA.
#pragma once

#include "accumulate-inl.h"
#include "depthwise_backward-inl.h"
#include "hidden-inl.h"

namespace mnv2 {
namespace {

constexpr float kInfinity = __builtin_huge_valf();

inline Vec load_lanes(const float* p, int lanes) {
  return lanes == Vec::kLanes ? Vec::load(p) : Vec::load_first(p, lanes);
}
inline void store_lanes(Vec v, float* p, int lanes) {
  if (lanes == Vec::kLanes) return v.store(p);
  v.store_first(p, lanes);
}
inline int lanes_from(int64_t channel, int64_t channels) {
  return static_cast<int>(channels - channel < Vec::kLanes ? channels - channel : Vec::kLanes);
}

// Merges the moments of `pixels` rows of `z` into those of the `before` pixels before them. Around the mean so far no
// digits are lost, whatever the mean is.
void add_moments(const float* z, int64_t row, int64_t pixels, int64_t channels, int64_t before, double* mean,
                 double* squares) {
  constexpr int L = Vec::kLanes, kChains = 8;
  for (int64_t channel = 0; channel < channels; channel += L) {
    const int lanes = lanes_from(channel, channels);
    float around[L], sums[L], sums_of_squares[L];
    if (before == 0) {
      load_lanes(z + channel, lanes).store(around);
    } else {
      for (int i = 0; i < L; ++i) around[i] = i < lanes ? static_cast<float>(mean[channel + i]) : 0.f;
    }
    const Vec center = Vec::load(around);
    Vec sum[kChains], square[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = square[c] = Vec::zero();
    int64_t pixel = 0;
    for (; pixel + kChains <= pixels; pixel += kChains) {
#pragma GCC unroll 8
      for (int c = 0; c < kChains; ++c) {
        const Vec d = sub(load_lanes(z + (pixel + c) * row + channel, lanes), center);
        sum[c] = add(sum[c], d);
        square[c] = fma(d, d, square[c]);
      }
    }
    for (; pixel < pixels; ++pixel) {
      const Vec d = sub(load_lanes(z + pixel * row + channel, lanes), center);
      sum[0] = add(sum[0], d);
      square[0] = fma(d, d, square[0]);
    }
    for (int half = kChains / 2; half > 0; half /= 2) {
      for (int c = 0; c < half; ++c) {
        sum[c] = add(sum[c], sum[c + half]);
        square[c] = add(square[c], square[c + half]);
      }
    }
    sum[0].store(sums);
    square[0].store(sums_of_squares);
    const double count = static_cast<double>(pixels), all = static_cast<double>(before + pixels);
    for (int i = 0; i < lanes; ++i) {
      const double offset = sums[i] / count, old = before == 0 ? 0. : mean[channel + i];
      const double inner = sums_of_squares[i] - offset * sums[i];
      const double delta = around[i] + offset - old;
      mean[channel + i] = old + delta * count / all;
      squares[channel + i] = (before == 0 ? 0. : squares[channel + i] + delta * delta * (all - count) * count / all) +
                             (inner < 0. ? 0. : inner);
    }
  }
}

constexpr int64_t kSummedPixels = 128;

void moments(const MomentsTask& t) {
  const int64_t c = t.channels, row = moments_row(c, kLanes);
  float* tile = t.scratch;
  float* products = tile + kMomentsPixels * row;
  float* center = products + row * row;
  float* rest = center + row;
  double* delta = reinterpret_cast<double*>(rest + row);
  for (int64_t i = 0; i < c; ++i) t.mean[i] = 0.;
  for (int64_t i = 0; i < c * c; ++i) t.products[i] = 0.;
  int64_t before = 0;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMomentsPixels) {
    const int64_t pixels = t.pixels.last - first < kMomentsPixels ? t.pixels.last - first : kMomentsPixels;
    const float* x = t.x + first * c;
    const Vec scale = Vec::broadcast(1.f / static_cast<float>(pixels));
    // The tile around its own mean, so that rounding does not depend on how large the mean is.
    for (int64_t channel = 0; channel < row; channel += Vec::kLanes) {
      const int lanes = lanes_from(channel, c);
      const Vec start = load_lanes(x + channel, lanes);
      const auto sum_of = [&](auto term) __attribute__((always_inline)) {
        constexpr int kChains = 4;
        Vec sum[kChains];
        for (int i = 0; i < kChains; ++i) sum[i] = Vec::zero();
        int64_t p = 0;
        for (; p + kChains <= pixels; p += kChains) {
#pragma GCC unroll 4
          for (int i = 0; i < kChains; ++i) sum[i] = add(sum[i], term(p + i));
        }
        for (; p < pixels; ++p) sum[0] = add(sum[0], term(p));
        return add(add(sum[0], sum[1]), add(sum[2], sum[3]));
      };
      const Vec offset = sum_of([&](int64_t p) { return sub(load_lanes(x + p * c + channel, lanes), start); });
      const Vec mean = fma(offset, scale, start);
      const Vec sum = sum_of([&](int64_t p) {
        const Vec d = sub(load_lanes(x + p * c + channel, lanes), mean);
        d.store(tile + p * row + channel);
        return d;
      });
      mean.store(center + channel);
      sum.store(rest + channel);
    }
    clear(products, row * row);
    for (int64_t p = 0; p < pixels; p += kSummedPixels) {  // long sums in parts
      const int64_t count = pixels - p < kSummedPixels ? pixels - p : kSummedPixels;
      accumulate({tile + p * row, row, tile + p * row, row, count, products, row}, c, c, true);
    }
    const double count = static_cast<double>(pixels), all = static_cast<double>(before + pixels);
    for (int64_t i = 0; i < c; ++i) {
      delta[i] = center[i] + rest[i] / count - t.mean[i];
      t.mean[i] += delta[i] * count / all;
    }
    for (int64_t i = 0; i < c; ++i) {
      const double between = delta[i] * static_cast<double>(before) * count / all, inner = rest[i] / count;
      for (int64_t j = i; j < c; ++j) {
        t.products[i * c + j] += products[i * row + j] - inner * rest[j] + between * delta[j];
      }
    }
    before += pixels;
  }
}

// The quadratic form of a symmetric matrix: half of it is read, in blocks of columns that stay in registers.
void linear_moments(const LinearMomentsTask& t) {
  typedef double Doubles __attribute__((vector_size(Vec::kLanes * 4)));
  constexpr int L = Vec::kLanes / 2, kVectors = Vec::kLanes == 16 ? 4 : 2, kRows = 4, kColumns = L * kVectors;
  const int64_t c = t.channels;
  for (int64_t row = t.rows.first; row < t.rows.last; row += kRows) {
    const int64_t rows = t.rows.last - row < kRows ? t.rows.last - row : kRows;
    const float* w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = t.weight + (row + (r < rows ? r : 0)) * c;
    double mean[kRows] = {}, form[kRows] = {};
    for (int64_t i = 0; i < c; ++i) {
      for (int r = 0; r < kRows; ++r) mean[r] += w[r][i] * t.mean[i];
    }
    for (int64_t first = 0; first < c; first += kColumns) {
      const int64_t columns = c - first < kColumns ? c - first : kColumns;
      Doubles sum[kRows][kVectors] = {};
      const auto add_row = [&](int64_t i, double factor) __attribute__((always_inline)) {
        const double* from = t.products + i * c + first;
        double rest[kColumns] = {};
        if (columns < kColumns) {
          for (int64_t j = 0; j < columns; ++j) rest[j] = from[j];
          from = rest;
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          Doubles block;
          __builtin_memcpy(&block, from + v * L, sizeof(block));
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum[r][v] += block * (w[r][i] * factor);
        }
      };
      for (int64_t i = 0; i < first; ++i) add_row(i, 2.);
      for (int64_t i = first; i < first + columns; ++i) add_row(i, 1.);
      for (int r = 0; r < kRows; ++r) {
        for (int64_t j = 0; j < columns; ++j) form[r] += sum[r][j / L][j % L] * w[r][first + j];
      }
    }
    for (int r = 0; r < rows; ++r) {
      t.out_mean[row + r] = mean[r];
      t.out_squares[row + r] = form[r] < 0. ? 0. : form[r];
    }
  }
}

void product(const ProductTask& t) {
  const int64_t rows = t.range.last - t.range.first;
  clear(t.c + t.range.first * t.row, rows * t.row);
  for (int64_t k = 0; k < t.k; k += kSummedPixels) {  // long sums in parts
    const int64_t count = t.k - k < kSummedPixels ? t.k - k : kSummedPixels;
    const float* a = t.a + k * t.rows + t.range.first;
    accumulate({a, t.rows, t.b + k * t.row, t.row, count, t.c + t.range.first * t.row, t.row}, rows, t.columns);
  }
}

void map_moments(const MapTask& t) {
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMapPixels) {
    const int64_t pixels = t.pixels.last - first < kMapPixels ? t.pixels.last - first : kMapPixels;
    add_moments(t.a + first * t.channels, t.channels, pixels, t.channels, first - t.pixels.first, t.sums[0], t.sums[1]);
  }
}

// Adds the sums over `pixels` rows of g, and of g * (z - mean), to `sums`; rows are `row` floats apart.
void add_products(const float* g, const float* z, const float* mean, int64_t row, int64_t pixels, int64_t channels,
                  double* const sums[2]) {
  for (int64_t channel = 0; channel < channels; channel += Vec::kLanes) {
    const int lanes = lanes_from(channel, channels);
    const Vec m = load_lanes(mean + channel, lanes);
    constexpr int kChains = 4;
    Vec sum[kChains], product[kChains];
    for (int c = 0; c < kChains; ++c) sum[c] = product[c] = Vec::zero();
    const auto add_pixel = [&](int64_t pixel, int chain) __attribute__((always_inline)) {
      const int64_t at = pixel * row + channel;
      const Vec v = load_lanes(g + at, lanes);
      sum[chain] = add(sum[chain], v);
      product[chain] = fma(v, sub(load_lanes(z + at, lanes), m), product[chain]);
    };
    int64_t pixel = 0;
    for (; pixel + kChains <= pixels; pixel += kChains) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) add_pixel(pixel + c, c);
    }
    for (; pixel < pixels; ++pixel) add_pixel(pixel, 0);
    float of_g[Vec::kLanes], of_product[Vec::kLanes];
    add(add(sum[0], sum[1]), add(sum[2], sum[3])).store(of_g);
    add(add(product[0], product[1]), add(product[2], product[3])).store(of_product);
    for (int i = 0; i < lanes; ++i) {
      sums[0][channel + i] += of_g[i];
      sums[1][channel + i] += of_product[i];
    }
  }
}

void map_products(const MapTask& t) {
  for (int64_t i = 0; i < t.channels; ++i) t.sums[0][i] = t.sums[1][i] = 0.;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kMapPixels) {
    const int64_t pixels = t.pixels.last - first < kMapPixels ? t.pixels.last - first : kMapPixels;
    const int64_t at = first * t.channels;
    add_products(t.a + at, t.b + at, t.shift, t.channels, pixels, t.channels, t.sums);
  }
}

void map_combine(const MapTask& t) {
  for (int64_t pixel = t.pixels.first; pixel < t.pixels.last; ++pixel) {
    for (int64_t channel = 0; channel < t.channels; channel += Vec::kLanes) {
      const int lanes = lanes_from(channel, t.channels);
      const int64_t at = pixel * t.channels + channel;
      const auto load = [=](const float* p) { return load_lanes(p, lanes); };
      Vec v = fma(load(t.a + at), load(t.scale[0] + channel), load(t.shift + channel));
      if (t.b) v = fma(load(t.b + at), load(t.scale[1] + channel), v);
      if (t.c) v = add(v, load(t.c + at));
      store_lanes(v, t.out + at, lanes);
    }
  }
}

void input_backward(const InputGradientTask& t) {
  const int64_t c = t.channels, row = c + 1;
  for (int64_t first = t.pixels.first; first < t.pixels.last; first += kInputGradientPixels) {
    const int64_t rest = t.pixels.last - first, pixels = rest < kInputGradientPixels ? rest : kInputGradientPixels;
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t channel = 0; channel < c; channel += Vec::kLanes) {
        const int lanes = lanes_from(channel, c);
        store_lanes(load_lanes(t.x + (first + p) * c + channel, lanes), t.scratch + p * row + channel, lanes);
      }
      t.scratch[p * row + c] = 1.f;
    }
    const float* a = t.scratch;
    MultiplyArgs m{};
    m.a = &a;
    m.segments = 1;
    m.k = row;
    m.a_row = row;
    m.b = t.packed;
    m.c = t.out + first * c;
    m.c_row = c;
    m.residual = t.a + first * c;  // last: the correction, the smaller one, is summed up by itself
    multiply_panels(m, pixels, c);
    if (!t.residual) continue;
    for (int64_t i = first * c; i < (first + pixels) * c; i += Vec::kLanes) {
      const int lanes = lanes_from(i, (first + pixels) * c);
      store_lanes(add(load_lanes(t.out + i, lanes), load_lanes(t.residual + i, lanes)), t.out + i, lanes);
    }
  }
}

// ---------------------------------------------------------------------------------------- passes over hidden channels

// A strip of an image: its rows, and where they begin in the batch.
struct Strip {
  int64_t image;
  Range rows;
};

Strip strip_of(const TrainTask& t, int64_t i, int64_t height) {
  return {i / t.plan->strips, part(height, t.plan->strips, i % t.plan->strips)};
}

// Calls f(strip's number, chunk) for all of the task, in the order that the plan chose.
template <class F>
void for_each_strip(const TrainTask& t, const F& f) {
  if (t.plan->chunk_by_chunk) {
    for (int64_t chunk = t.chunks.first; chunk < t.chunks.last; ++chunk) {
      for (int64_t i = t.strips.first; i < t.strips.last; ++i) f(i, chunk);
    }
  } else {
    for (int64_t i = t.strips.first; i < t.strips.last; ++i) {
      for (int64_t chunk = t.chunks.first; chunk < t.chunks.last; ++chunk) f(i, chunk);
    }
  }
}

struct TrainScratch {
  Ring ring;
  float *tile[3], *strip[2], *taps;
  Rows gradient;
  const float* zeros;
  float* free;

  explicit TrainScratch(const TrainTask& t)
      : ring(*t.shape, t.plan->ring_rows, t.plan->ring_row, t.scratch), gradient{}, zeros(nullptr), free(t.scratch) {
    const TrainPlan& p = *t.plan;
    const auto take = [this](int64_t count) {
      float* taken = free;
      free += round_up(count, kAlign);
      return taken;
    };
    take((p.ring_rows + 1) * p.ring_row);
    float* rows = take((p.gradient_rows + 1) * p.gradient_row);  // the last one stays a row of zeros
    clear(rows, (p.gradient_rows + 1) * p.gradient_row);
    zeros = rows + p.gradient_rows * p.gradient_row + kGradientColumns * kChunk;
    gradient = {rows + kGradientColumns * kChunk, p.gradient_rows, p.gradient_row};
    for (float*& b : tile) b = take(p.tile);
    for (float*& b : strip) b = take(p.strip);
    taps = take(t.shape->kernel * t.shape->kernel * kChunk);
  }
};

// One chunk of one image in training.
struct TrainChunk {
  const TrainTask& t;
  const BlockShape back;
  HiddenChunk forward, backward;
  int64_t channel, vectors;
  int64_t first_pixel, wide;  // of the image in the batch; offset of the image's wide map

  TrainChunk(const TrainTask& task, int64_t image, int64_t chunk)
      : t(task),
        back(backward_shape(*task.shape)),
        forward(*task.shape, task.packed, chunk),
        backward(back, task.packed_backward, chunk),
        channel(chunk * kChunk),
        vectors(forward.panels.vectors) {
    const BlockShape& s = *t.shape;
    first_pixel = image * h_out(s) * w_out(s);
    wide = (chunk * s.n * h_out(s) * w_out(s) + first_pixel) * kChunk;
    forward.x = t.x + image * s.h * s.w * s.c_in;
    if (t.z_gradient) backward.x = t.z_gradient + first_pixel * s.c_out;
  }
  TrainChunk(const TrainChunk&) = delete;
  TrainChunk& operator=(const TrainChunk&) = delete;

  // Output rows of a wide map before `end`, to be fetched.
  Ahead wide_rows(const float* map, Range rows, int64_t end) const {
    const int64_t last = rows.last < end ? rows.last : end;
    return map && rows.first < last ? Ahead{map + at(rows.first), at(last) - at(rows.first)} : Ahead{t.x, 0};
  }

  // Rows of a wide map that will be written, to be fetched where stores do not go past the caches.
  Ahead rows_to_keep(const float* map, Range rows) const {
    return wide_rows(t.plan->streams ? nullptr : map, rows, rows.last);
  }

  int64_t at(int64_t row) const { return wide + row * w_out(*t.shape) * kChunk; }

  // The activated second batch norm.
  void activate(const float* z, int64_t pixels, float* out) const {
    const Vec lo = Vec::broadcast(t.shape->act.lo), hi = Vec::broadcast(t.shape->act.hi);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t lane = v * Vec::kLanes;
      const Vec scale = Vec::load(t.scale + channel + lane), shift = Vec::load(t.shift + channel + lane);
      for (int64_t i = lane; i < pixels * kChunk; i += kChunk) {
        clamp(fma(Vec::load(z + i), scale, shift), lo, hi).store(out + i);
      }
    }
  }

  // Adds z_gradient' (activated z) over output rows `rows`; `activated` holds as many pixels.
  void add_project_weight(Range rows, const float* z, float* activated) const {
    const int64_t width = w_out(*t.shape), pixels = (rows.last - rows.first) * width, c_out = t.shape->c_out;
    activate(z, pixels, activated);
    const float* g = backward.x + rows.first * width * c_out;
    accumulate({g, c_out, activated, kChunk, pixels, t.project_weight + channel * c_out, kChunk}, c_out,
               forward.channels);
  }

  // The gradient of the second batch norm's output over output rows `rows`, from that of the projection's and from the
  // depthwise outputs z; into h. Adds its sums to `sums` where they are wanted, and keeps z and h in `kept` where there
  // is room for them.
  void gradient(Range rows, const float* z, float* h, double* const* sums, float* const kept[2]) const {
    const BlockShape& s = *t.shape;
    const int64_t width = w_out(s), pixels = (rows.last - rows.first) * width;
    backward.expand(rows, {h, rows.last - rows.first, width * kChunk, rows.first});
    if (t.plan->streams) {
      clip(z, h, pixels, sums, kept, [](Vec v, float* to) { v.stream(to); });
    } else {
      clip(z, h, pixels, sums, kept, [](Vec v, float* to) { v.store(to); });
    }
  }

 private:
  template <class Store>
  void clip(const float* z, float* h, int64_t pixels, double* const* sums, float* const kept[2],
            const Store& store) const {
    constexpr int L = Vec::kLanes, kChains = 2;
    const Vec lo = Vec::broadcast(t.shape->act.lo), hi = Vec::broadcast(t.shape->act.hi);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = channel + v * L;
      const Vec scale = Vec::load(t.scale + at), shift = Vec::load(t.shift + at), mean = Vec::load(t.mean + at);
      Vec sum[kChains] = {Vec::zero(), Vec::zero()}, product[kChains] = {Vec::zero(), Vec::zero()};
      const auto clip_pixel = [&](int64_t pixel, int chain) __attribute__((always_inline)) {
        const int64_t i = pixel * kChunk + v * L;
        const Vec hidden = Vec::load(z + i);
        const Vec g = inside(fma(hidden, scale, shift), lo, hi, Vec::load(h + i));
        g.store(h + i);
        sum[chain] = add(sum[chain], g);
        product[chain] = fma(g, sub(hidden, mean), product[chain]);
        if (kept[0]) store(hidden, kept[0] + i);
        if (kept[1]) store(g, kept[1] + i);
      };
      int64_t pixel = 0;
      for (; pixel + kChains <= pixels; pixel += kChains) clip_pixel(pixel, 0), clip_pixel(pixel + 1, 1);
      if (pixel < pixels) clip_pixel(pixel, 0);
      if (!sums) continue;
      float of_g[L], of_product[L];
      add(sum[0], sum[1]).store(of_g);
      add(product[0], product[1]).store(of_product);
      for (int i = 0; i < L; ++i) sums[0][at + i] += of_g[i], sums[1][at + i] += of_product[i];
    }
  }
};

template <class F>
void for_each_tile(Range rows, int64_t step, const F& f) {
  for (int64_t first = rows.first; first < rows.last; first += step) {
    f(Range{first, first + step < rows.last ? first + step : rows.last});
  }
}

// Keeps a tile of a wide map, past the caches where it would not stay in them.
void keep(const TrainTask& t, const float* tile, int64_t pixels, float* to) {
  if (!t.plan->streams) {
    for (int64_t i = 0; i < pixels * kChunk; i += Vec::kLanes) Vec::load(tile + i).store(to + i);
    return;
  }
  for (int64_t i = 0; i < pixels * kChunk; i += Vec::kLanes) Vec::load(tile + i).stream(to + i);
}

void hidden(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  const int64_t height = h_out(s), width = w_out(s);
  const Strip start = strip_of(t, t.strips.first, height);
  const int64_t start_row = start.image * height + start.rows.first;
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, height);
    TrainChunk chunk(t, strip.image, number);
    scratch.ring.next = 0;
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      const int64_t pixels = (rows.last - rows.first) * width;
      float* z = scratch.tile[0];
      Ahead ahead = chunk.rows_to_keep(t.hidden, rows);
      chunk.forward.ahead = &ahead;
      scratch.ring.filter(chunk.forward, rows, -kInfinity, kInfinity, z);
      const int64_t before = (strip.image * height + rows.first - start_row) * width;
      add_moments(z, kChunk, pixels, chunk.vectors * Vec::kLanes, before, t.sums[0] + chunk.channel,
                  t.sums[1] + chunk.channel);
      if (t.hidden) keep(t, z, pixels, t.hidden + chunk.at(rows.first));
    });
  });
  end_of_streams();
}

void project(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, h_out(s));
    TrainChunk chunk(t, strip.image, number);
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      const int64_t pixels = (rows.last - rows.first) * w_out(s);
      Ahead ahead = chunk.wide_rows(t.hidden, {rows.last, rows.last + t.plan->rows}, strip.rows.last);
      chunk.forward.ahead = &ahead;
      chunk.activate(t.hidden + chunk.at(rows.first), pixels, scratch.tile[0]);
      float* out = t.out + (chunk.first_pixel + rows.first * w_out(s)) * s.c_out;
      chunk.forward.project(scratch.tile[0], pixels, {out, number > t.chunks.first ? out : nullptr, nullptr, nullptr});
    });
  });
}

// The sums that the projection's way back adds to.
void clear_projection(const TrainTask& t) {
  const int64_t weights = t.shape->c_out * kChunk;
  for (int64_t i = t.chunks.first; i < t.chunks.last; ++i) {
    if (t.project_weight) clear(t.project_weight + i * weights, weights);
    for (int64_t c = i * kChunk; c < (i + 1) * kChunk; ++c) t.sums[0][c] = t.sums[1][c] = 0.;
  }
}

void project_backward(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  clear_projection(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, h_out(s));
    TrainChunk chunk(t, strip.image, number);
    scratch.ring.next = 0;
    for_each_tile(strip.rows, t.plan->rows, [&](Range rows) {
      Ahead ahead[] = {chunk.rows_to_keep(t.hidden, rows), chunk.rows_to_keep(t.hidden_gradient, rows)};
      chunk.forward.ahead = &ahead[0];
      chunk.backward.ahead = &ahead[1];
      const float* z = t.hidden_kept ? t.hidden + chunk.at(rows.first) : scratch.tile[0];
      if (!t.hidden_kept) scratch.ring.filter(chunk.forward, rows, -kInfinity, kInfinity, scratch.tile[0]);
      if (t.project_weight) chunk.add_project_weight(rows, z, scratch.tile[1]);
      float* const kept[] = {t.hidden && !t.hidden_kept ? t.hidden + chunk.at(rows.first) : nullptr,
                             t.hidden_gradient ? t.hidden_gradient + chunk.at(rows.first) : nullptr};
      chunk.gradient(rows, z, scratch.tile[2], t.sums, kept);
    });
  });
  end_of_streams();
}

// `a` (pixels, kChunk), activated, becomes the gradient of what was activated; its sum is added to `sum`.
void clip_output_gradient(const TrainChunk& chunk, const float* gradient, int64_t pixels, float* a, float* sum) {
  const BlockShape& s = *chunk.t.shape;
  const Vec lo = Vec::broadcast(s.act.lo), hi = Vec::broadcast(s.act.hi);
  for (int64_t v = 0; v < chunk.vectors; ++v) {
    const int64_t lane = v * Vec::kLanes;
    const int lanes = lanes_from(lane, chunk.forward.channels);
    Vec total = Vec::load(sum + lane);
    for (int64_t pixel = 0; pixel < pixels; ++pixel) {
      float* at = a + pixel * kChunk + lane;
      const Vec g = load_lanes(gradient + pixel * s.c_hidden + chunk.channel + lane, lanes);
      const Vec h = inside(Vec::load(at), lo, hi, g);
      total = add(total, h);
      h.store(at);
    }
    total.store(sum + lane);
  }
}

// The smallest range that holds both.
Range join(Range a, Range b) {
  if (a.first == a.last) return b;
  return {a.first < b.first ? a.first : b.first, a.last > b.last ? a.last : b.last};
}

// Rows [rows.first, rows.last) of the gradient of the depthwise outputs.
void gradient_rows(const TrainChunk& chunk, Range rows, const float* z, const float* h, const Rows& to) {
  const TrainTask& t = chunk.t;
  const int64_t width = w_out(*t.shape);
  for (int64_t row = rows.first; row < rows.last; ++row) {
    const int64_t at = (row - rows.first) * width * kChunk;
    for (int64_t v = 0; v < chunk.vectors; ++v) {
      const int64_t lane = v * Vec::kLanes;
      const auto load = [&](const float* p) { return Vec::load(p + chunk.channel + lane); };
      const Vec a = load(t.backward[0]), c = load(t.backward[2]);
      if (!t.backward[1]) {  // 0 * Inf is not 0
        for (int64_t i = lane; i < width * kChunk; i += kChunk) fma(Vec::load(h + at + i), a, c).store(to[row] + i);
        continue;
      }
      const Vec b = load(t.backward[1]);
      for (int64_t i = lane; i < width * kChunk; i += kChunk) {
        fma(Vec::load(h + at + i), a, fma(Vec::load(z + at + i), b, c)).store(to[row] + i);
      }
    }
  }
}

// The way back through the depthwise convolution of one chunk over one strip of input rows, from its top downwards.
class DepthwiseBackward {
 public:
  DepthwiseBackward(const TrainChunk& chunk, TrainScratch& scratch, Range strip, Range own)
      : chunk_(chunk),
        ring_(scratch.ring),
        rows_(scratch.gradient),
        zeros_(scratch.zeros),
        z_(chunk.t.hidden),
        h_(chunk.t.hidden_gradient) {
    const TrainTask& t = chunk.t;
    const Range touched = output_rows(*t.shape, strip);
    start_ = next_ = touched.first;
    if (t.hidden) z_ += chunk.at(touched.first);
    if (h_) {
      h_ += chunk.at(touched.first);
      return;
    }
    // Rows of the strip's own count in the sums, if any are wanted; those that it touches besides are another's.
    const bool adds = t.sums[0] != nullptr;
    const Range all = adds ? join(touched, own) : touched;
    const int64_t size = w_out(*t.shape) * kChunk;
    const auto row_of = [&](float* strip, int64_t row) { return strip + (row - all.first) * size; };
    scratch.ring.next = 0;
    const auto make = [&](Range part, bool counts) {
      for_each_tile(part, t.plan->rows, [&](Range rows) {
        float* const nowhere[] = {nullptr, nullptr};
        float* const z = row_of(scratch.strip[0], rows.first);
        const float* from = t.hidden ? t.hidden + chunk.at(rows.first) : z;
        if (!t.hidden) scratch.ring.filter(chunk.forward, rows, -kInfinity, kInfinity, z);
        if (counts && t.project_weight) chunk.add_project_weight(rows, from, scratch.tile[1]);
        chunk.gradient(rows, from, row_of(scratch.strip[1], rows.first), counts ? t.sums : nullptr, nowhere);
      });
    };
    if (adds) {
      make({all.first, own.first}, false);
      make(own, true);
      make({own.last, all.last}, false);
    } else {
      make(all, false);
    }
    h_ = row_of(scratch.strip[1], touched.first);
    if (t.hidden) return;
    z_ = row_of(scratch.strip[0], touched.first);
    const BlockShape& s = *t.shape;
    const bool gaps = s.stride > kernel_extent(s.kernel, s.dilation);  // between the rows that are read
    if (s.has_expand && !gaps) expanded_ = {input_rows(s, all).first, ring_.next};
  }

  // The convolution's input, rows [rows.first, rows.last), to `a` (rows, w, kChunk).
  void expand(Range rows, float* a) const {
    const int64_t size = chunk_.t.shape->w * kChunk;
    if (rows.first < expanded_.first || rows.last > expanded_.last) {
      return chunk_.forward.expand(rows, {a, rows.last - rows.first, size, rows.first});
    }
    for (int64_t row = rows.first; row < rows.last; ++row, a += size) {
      const float* from = ring_.rows[row];
      for (int64_t i = 0; i < size; i += Vec::kLanes) Vec::load(from + i).store(a + i);
    }
  }

  // `a` (rows, w, kChunk), the convolution's input, becomes the gradient of what was activated into it; its sum is
  // added to `sum`, the filter's gradient to `dw`.
  void operator()(Range rows, float* a, float* dw, float* sum) {
    const BlockShape& s = *chunk_.t.shape;
    const int64_t width = w_out(s), last = output_rows(s, rows).last;
    if (next_ < last) {
      const int64_t at = (next_ - start_) * width * kChunk;
      gradient_rows(chunk_, {next_, last}, z_ + at, h_ + at, rows_);
      next_ = last;
    }
    for (int64_t row = rows.first; row < rows.last; ++row) {
      const float* readers[63];
      for (int64_t ky = 0; ky < s.kernel; ++ky) {
        const int64_t at = row + s.pad.top - ky * s.dilation;
        const bool read = at >= 0 && at % s.stride == 0 && at / s.stride < h_out(s);
        readers[ky] = read ? rows_[at / s.stride] : zeros_;
      }
      DepthwiseBackwardArgs d{};
      d.rows = readers;
      d.first_ky = (row + s.pad.top) % s.stride;
      d.a = a + (row - rows.first) * s.w * kChunk;
      d.weights = chunk_.forward.weights + chunk_.forward.offsets.depthwise;
      d.dw = dw;
      d.sum = sum;
      d.w = s.w;
      d.w_out = width;
      d.vectors = chunk_.vectors;
      d.kernel = s.kernel;
      d.stride = s.stride;
      d.dilation = s.dilation;
      d.pad_left = s.pad.left;
      d.mask = s.has_expand;
      d.lo = s.act.lo;
      d.hi = s.act.hi;
      depthwise_backward_row(d);
    }
  }

 private:
  const TrainChunk& chunk_;
  const Ring& ring_;
  const Rows rows_;
  const float* zeros_;
  const float *z_, *h_;   // from output row start_ on
  int64_t start_, next_;  // the first row whose gradient has not been made
  Range expanded_{0, 0};  // input rows that are still in the ring
};

void hidden_backward(const TrainTask& t) {
  const BlockShape& s = *t.shape;
  TrainScratch scratch(t);
  const int64_t taps = s.kernel * s.kernel * kChunk, weights = s.c_in * kChunk;
  for (int64_t i = t.chunks.first; i < t.chunks.last; ++i) {
    if (t.depthwise_weight) clear(t.depthwise_weight + i * taps, taps);
    if (t.expand_weight) clear(t.expand_weight + i * weights, weights);
    for (int64_t c = i * kChunk; c < (i + 1) * kChunk; ++c) t.sums[2][c] = 0.;
  }
  if (t.sums[0]) clear_projection(t);
  for_each_strip(t, [&](int64_t i, int64_t number) {
    const Strip strip = strip_of(t, i, s.h);
    TrainChunk chunk(t, strip.image, number);
    const bool dense = t.output_gradient != nullptr;
    const Range own = dense ? Range{0, 0} : strip_of(t, i, h_out(s)).rows;
    DepthwiseBackward depthwise(chunk, scratch, dense ? Range{0, 0} : strip.rows, own);
    for_each_tile(strip.rows, t.plan->input_rows, [&](Range rows) {
      float* a = scratch.tile[0];
      const int64_t pixels = (rows.last - rows.first) * s.w, pixel = (strip.image * s.h + rows.first) * s.w;
      const Range next = output_rows(s, {rows.last, rows.last + t.plan->input_rows});
      Ahead ahead[] = {chunk.wide_rows(t.hidden, next, next.last), chunk.wide_rows(t.hidden_gradient, next, next.last)};
      chunk.forward.ahead = &ahead[0];
      chunk.backward.ahead = &ahead[1];
      depthwise.expand(rows, a);
      float sum[kChunk] = {};
      if (dense) {
        clip_output_gradient(chunk, t.output_gradient + pixel * s.c_hidden, pixels, a, sum);
      } else {
        // Long sums in parts.
        float* const weight = t.depthwise_weight + number * taps;
        clear(scratch.taps, taps);
        depthwise(rows, a, scratch.taps, sum);
        for (int64_t k = 0; k < taps; k += Vec::kLanes) {
          add(Vec::load(weight + k), Vec::load(scratch.taps + k)).store(weight + k);
        }
      }
      for (int64_t c = 0; c < kChunk; ++c) t.sums[2][chunk.channel + c] += sum[c];

      if (t.expand_weight) {
        const float* x = t.x + pixel * s.c_in;
        accumulate({x, s.c_in, a, kChunk, pixels, t.expand_weight + number * weights, kChunk}, s.c_in,
                   chunk.forward.channels);
      }
      if (!t.out) return;
      float* out = t.out + pixel * s.c_in;
      if (s.has_expand) {
        chunk.backward.project(a, pixels, {out, number > t.chunks.first ? out : nullptr, nullptr, nullptr});
        return;
      }
      for (int64_t p = 0; p < pixels; ++p) {
        for (int64_t c = 0; c < chunk.forward.channels; ++c) out[p * s.c_in + chunk.channel + c] = a[p * kChunk + c];
      }
    });
  });
}

}  // namespace
}  // namespace mnv2
