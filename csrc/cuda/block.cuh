// The inverted-residual block: one thread block computes a tile of output pixels, 32 hidden channels at a time. It
// expands the tile and its halo into shared memory, filters them from there into registers, and multiplies these by
// their part of the projection. The projection's sums stay in registers throughout.
#pragma once

#include "filter.cuh"
#include "store.cuh"
#include "window.cuh"

namespace mnv2 {
namespace cuda {

// Where the rows of the products come from and go to: the tile's input pixels, then rows that do not count. They go
// behind the expanded tile.
struct Places {
  // Pixels from the first one of the tile's first row, below 2^31; -1: from nowhere. Of a stem: bytes in x_tile to a
  // window, in the order of place_to().
  int32_t* from;
  int32_t* to;  // bytes in the expanded tile, in the order of place_to()
};

// Rows in the order of lanes: those that a lane has of a product are neighbours.
template <class B>
MNV2_DEVICE int place_to(int row) {
  constexpr int kRows = B::kExpandRows * 2;
  return row / (kRows * 8) * (kRows * 8) + row % 8 * kRows + row / 8 % kRows;
}

template <class M, class B>
MNV2_DEVICE void find_places(const BlockArgs& a, const Task& task, const TileInput& in, const Places& places) {
  const int of_image = in.height * in.width;
  const Divisor images = Divisor::of(of_image), rows = Divisor::of(in.width);
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.rows; i += a.threads) {
    int32_t from = a.windows ? 0 : -1, to = a.e_image * a.images;
    if (i < in.pixels) {
      const int image = a.images == 1 ? 0 : images.quotient(i), rest = i - image * of_image;
      const int row = rows.quotient(rest), column = rest - row * in.width + in.column;
      if (a.windows) {
        from = image * a.window.image + window_at<M>(a.window, row, column - in.column, a.window.c);
      } else if (task.first_image + image < a.n) {
        from = (image * a.h + row) * a.w + column;
      }
      to = image * a.e_image + (in.row + row - in.origin_row) * a.e_pitch +
           (column - in.origin_column) * Expanded<M>::kPixel;
    }
    const int place = place_to<B>(i);
    places.from[a.windows ? place : i] = from, places.to[place] = to;
  }
}

MNV2_DEVICE void zero_expanded(const BlockArgs& a, unsigned char* expanded) {
  const int vectors = a.e_image * a.images / 16;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < vectors; i += a.threads) reinterpret_cast<Four*>(expanded)[i] = {0, 0, 0, 0};
}

// A copy of part of a chunk's weights: by all threads, or in bulk.
MNV2_DEVICE void copy_bytes(const BlockArgs& a, unsigned char* to, const unsigned char* from, int bytes,
                            Arrival* arrival) {
  if (bulk_copies()) {
    copy_bulk(to, from, bytes, arrival);
  } else {
    MNV2_NO_UNROLL
    for (int i = thread_index() * 16; i < bytes; i += a.threads * 16) copy_async(to + i, from + i, true);
  }
}

// A step expands one of the task's chunks, and filters and projects one: the same or, if `a.ahead`, the one before.
struct Step {
  bool expands, filters;  // whether the task has these chunks
};

// number: from 0 in every round.
MNV2_DEVICE Step this_step(const BlockArgs& a, const Task& task, int number) {
  return {number < task.last_chunk - task.first_chunk, !a.ahead || number > 0};
}

// Turns are the steps of all rounds. Two places for weights and, if `a.ahead`, for expanded chunks: by the turn that
// uses these weights, and that expands this chunk.
MNV2_DEVICE int expand_turn(int turn) { return turn & 1; }
MNV2_DEVICE int filter_turn(const BlockArgs& a, int turn) { return (a.ahead ? turn + 1 : turn) & 1; }

// Turns count their weights in turn, too.
MNV2_DEVICE Arrival* arrival_of(int turn, unsigned char* shared) {
  return reinterpret_cast<Arrival*>(shared) + (turn & 1);
}

// In bulk a thread of the last warp copies, which has the fewest pixels to expand.
MNV2_DEVICE bool copies_in_bulk(const BlockArgs& a) { return bulk_copies() && thread_index() == a.threads - 32; }

MNV2_DEVICE unsigned char* weights_of(const BlockArgs& a, int turn, unsigned char* shared) {
  return shared + a.weights_at + (turn & 1) * a.weights_bytes;
}

// The weights of a turn and its step, for this part of the output. They lie side by side also if they are of two
// chunks. While they are copied the thread's warp is behind the others, so instructions count.
MNV2_DEVICE void copy_weights(const BlockArgs& a, const Task& task, int turn, int number, unsigned char* shared) {
  if (bulk_copies() && !copies_in_bulk(a)) return;
  const int place = task.first_chunk + number;
  const Step step = this_step(a, task, number);
  const int skipped = step.filters ? 0 : a.rest, bytes = (step.expands ? a.chunk : a.rest) - skipped;
  unsigned char* const to = weights_of(a, turn, shared);
  Arrival* const arrival = arrival_of(turn, shared);
  if (bulk_copies()) expect_bytes(arrival, bytes + a.stem_chunk);
  copy_bytes(a, to + skipped, a.weights + static_cast<int64_t>(task.part * a.chunks + place) * a.chunk + skipped, bytes,
             arrival);
  // A loop, and not a condition: with that the compiler issues the copy in any case, to do nothing.
  MNV2_NO_UNROLL
  for (int i = 0; i < a.stem_chunk; i += a.stem_chunk) {
    copy_bytes(a, to + a.rest, a.stem + static_cast<int64_t>(place) * a.stem_chunk, a.stem_chunk, arrival);
  }
  if (!bulk_copies()) copy_async_commit();
}

// The tiles of all images that a stem's windows lie in.
template <class M>
MNV2_DEVICE void load_images(const BlockArgs& a, int first_image, const TileInput& in, unsigned char* x_tile) {
  if (in.pixels == 0) return;
  for (int i = 0; i < a.images && first_image + i < a.n; ++i)
    load_windows<M, kLoadRows>(a.window, x_tile + i * a.window.image, first_image + i, in.row, in.column, in.height,
                               in.width, 0, a.window.c, Divisor{a.window.per_slice}, a.threads);
}

// The pixels that the expansion multiplies, a thread the same vectors of several pixels. x: of the tile's first row.
template <class M>
MNV2_DEVICE void load_pixels(const BlockArgs& a, const TileInput& in, const Places& places, const typename M::Value* x,
                             unsigned char* x_tile) {
  constexpr int kValues = 16 / M::kBytes;
  const int vectors = a.groups * M::kBytes;  // 16 bytes of a pixel
  const int side_by_side = vectors < a.threads ? vectors : a.threads;
  const Divisor by{a.per_vectors};
  const int first = by.quotient(thread_index()), step = by.quotient(a.threads);
  const int rows = first < step ? in.rows : 0;  // a thread that is left over copies none
  const int row_bytes = a.c_in * static_cast<int>(sizeof(*x));
  for (int vector = thread_index() - first * side_by_side; vector < vectors; vector += side_by_side) {
    const int count = a.c_in - vector * kValues;
    const unsigned char* const column = reinterpret_cast<const unsigned char*>(x) + (count > 0 ? vector * 16 : 0);
    unsigned char* to = x_tile + first * a.x_pitch + vector * 16;
    if (a.vectors_in) {
      MNV2_NO_UNROLL
      for (int pixel = first; pixel < rows; pixel += step, to += step * a.x_pitch) {
        const int from = places.from[pixel];
        copy_async(to, column + static_cast<int64_t>(from < 0 ? 0 : from) * row_bytes, count > 0 && from >= 0);
      }
    } else {
      MNV2_NO_UNROLL
      for (int pixel = first; pixel < rows; pixel += step, to += step * a.x_pitch) {
        const int from = places.from[pixel];
        copy_values(
            to,
            reinterpret_cast<const typename M::Value*>(column + static_cast<int64_t>(from < 0 ? 0 : from) * row_bytes),
            from >= 0 ? count : 0);
      }
    }
  }
  copy_async_commit();
}

// Without an expansion: a chunk's channels of the pixels, to the tile that the filter reads.
template <class M, class B>
MNV2_DEVICE void load_chunk(const BlockArgs& a, int chunk, const TileInput& in, const Places& places,
                            const typename M::Value* x, unsigned char* expanded) {
  using E = Expanded<M>;
  constexpr int kVectors = 2 * M::kBytes, kValues = 16 / M::kBytes;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < in.pixels * kVectors; i += a.threads) {
    const int from = places.from[i / kVectors], to = places.to[place_to<B>(i / kVectors)];
    const int vector = i % kVectors;
    const int at = E::kVectors == 1 ? vector * 16 : vector % 2 * E::kVector + vector / 2 * 16;
    copy_vector(expanded + to + at, x + static_cast<int64_t>(from < 0 ? 0 : from) * a.c_in,
                chunk * 32 + vector * kValues, a.c_in, from >= 0, a.vectors_in);
  }
  copy_async_commit();
}

// Sums of a product to the expanded tile, clamped. to: this lane's first channel of each of its rows. channels: those
// of this lane's eight that exist; what is not there must not be NaN either. common: all exist, the lower bound is 0.
template <bool kExact, int kM>
MNV2_DEVICE void store_expanded(const BlockArgs& a, const float (&d)[kM][4][4], unsigned char* const (&to)[2 * kM],
                                int channels, bool, FloatMath<kExact>) {
  MNV2_UNROLL
  for (int i = 0; i < 4 * kM; ++i) {
    float values[4];
    MNV2_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float value = clamp(d[i / 4][i % 2 * 2 + j / 2][i / 2 % 2 * 2 + j % 2], a.expand_lo, a.expand_hi);
      values[j] = i % 2 * 4 + j < channels ? value : 0.f;
    }
    store_values(reinterpret_cast<float*>(to[i / 2] + i % 2 * Expanded<FloatMath<kExact>>::kVector), values);
  }
}
template <class T, int kM>
MNV2_DEVICE void store_expanded(const BlockArgs& a, const float (&d)[kM][4][4], unsigned char* const (&to)[2 * kM],
                                int channels, bool common, Math16<T>) {
  const uint32_t most = pack<T>(a.expand_hi, a.expand_hi);
  uint32_t words[2 * kM][4];
  if (common) {
    MNV2_UNROLL
    for (int i = 0; i < 8 * kM; ++i) {
      const float* const pair = &d[i / 8][i % 4][i / 4 % 2 * 2];
      words[i / 4][i % 4] = clamped_pair<T, true>(pair[0], pair[1], 0, most);
    }
  } else {
    const uint32_t least = pack<T>(a.expand_lo, a.expand_lo);
    MNV2_UNROLL
    for (int i = 0; i < 8 * kM; ++i) {
      const float* const pair = &d[i / 8][i % 4][i / 4 % 2 * 2];
      const uint32_t word = clamped_pair<T, false>(pair[0], pair[1], least, most);
      words[i / 4][i % 4] = i % 4 * 2 + 1 < channels ? word : i % 4 * 2 < channels ? word & 0xffffu : 0u;
    }
  }
  MNV2_UNROLL
  for (int i = 0; i < 2 * kM; ++i)
    *reinterpret_cast<Four*>(to[i]) = {words[i][0], words[i][1], words[i][2], words[i][3]};
}

// A chunk of hidden channels of all the tile's pixels, clamped.
template <class M, class B>
MNV2_DEVICE void expand_chunk(const BlockArgs& a, const Lane& l, int chunk, const TileInput& in, const Places& places,
                              const unsigned char* x_tile, const unsigned char* weights, unsigned char* expanded) {
  const int channels = a.c_hidden - chunk * 32;
  const bool common = a.expand_lo == 0.f && channels >= 32;
  MNV2_NO_UNROLL
  for (int block = l.warp; block < in.row_blocks; block += l.warps) {
    float bias[4][4];
    MNV2_UNROLL
    for (int i = 0; i < 4; ++i)
      load_values(reinterpret_cast<const float*>(weights + a.expand_bias + l.t * 64) + i * 4, bias[i]);
    float d[B::kExpandRows][4][4];
    const int first = block * B::kExpandRows * 16;
    const int mine = first + l.g * 2 * B::kExpandRows;
    if (a.windows) {
      int32_t windows[2 * B::kExpandRows];
      load_words(places.from + mine, windows);
      const WindowRows<M, B::kExpandRows> rows(x_tile, windows, x_tile + a.window.table, l.lane);
      multiply_from<M>(d, bias, rows, weights, a.groups, l.lane);
    } else {
      multiply_from<M>(d, bias, TileRows<M>(x_tile + first * a.x_pitch, a.x_pitch, l.lane), weights, a.groups, l.lane);
    }
    int32_t places_to[2 * B::kExpandRows];
    load_words(places.to + mine, places_to);
    unsigned char* to[2 * B::kExpandRows];
    MNV2_UNROLL
    for (int i = 0; i < 2 * B::kExpandRows; ++i) to[i] = expanded + places_to[i] + l.t * 16;
    store_expanded(a, d, to, channels - l.t * 8, common, M{});
  }
}

// This lane's channels of the patch's first input pixel.
template <class M, class B>
MNV2_DEVICE const unsigned char* window_of(const BlockArgs& a, const Lane& l, const Patch& p,
                                           const unsigned char* expanded) {
  return expanded + l.t * 16 +
         (p.in_tile ? p.image * a.e_image + p.row * B::kPatchHeight * a.stride * a.e_pitch +
                          p.column * B::kPatchWidth * a.stride * Expanded<M>::kPixel
                    : 0);
}

// sums += filtered x a chunk of the projection. project: this lane's first operands of the chunk.
template <class M, int kTiles, int kRows>
MNV2_DEVICE void project_chunk(float (&sums)[kRows][kTiles][4], const Filtered<M> (&filtered)[2 * kRows],
                               const unsigned char* project) {
  float last[4] = {};
  if constexpr (M::kOperand == 2) {
    Rows<M> rows[2][kRows];
    MNV2_UNROLL
    for (int row = 0; row < kRows; ++row) {
      MNV2_UNROLL
      for (int half = 0; half < 2; ++half)
        rows[half][row].set(filtered[2 * row].half[half], filtered[2 * row + 1].half[half]);
    }
    MNV2_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile % (4 / kRows) == 0) warp_barrier();  // else the compiler reads too far ahead and spills
      Operand<M> b[2];
      load_operands(project + tile * 512, b);
      MNV2_UNROLL
      for (int half = 0; half < 2; ++half) {
        MNV2_UNROLL
        for (int row = 0; row < kRows; ++row)
          multiply(sums[row][tile], sums[row][tile], rows[half][row], b[half], last);
      }
    }
  } else {
    MNV2_UNROLL
    for (int half = 0; half < 2; ++half) {
      Rows<M> rows[kRows];
      MNV2_UNROLL
      for (int row = 0; row < kRows; ++row)
        rows[row].set(filtered[2 * row].half[half], filtered[2 * row + 1].half[half]);
      MNV2_UNROLL
      for (int tile = 0; tile < kTiles; ++tile) {
        warp_barrier();  // else the compiler reads too far ahead and spills
        Operand<M> b;
        load_operands(project + (half * kTiles + tile) * 512, &b);
        MNV2_UNROLL
        for (int row = 0; row < kRows; ++row) multiply(sums[row][tile], sums[row][tile], rows[row], b, last);
      }
    }
  }
}

// Zeros for the tickets of the blocks after this one, from the launch's first thread block.
MNV2_DEVICE void clear_tickets(const BlockArgs& a) {
  if (block_index_x() != 0 || block_index_y() != 0) return;
  MNV2_NO_UNROLL
  for (int i = thread_index(); i < a.clears; i += a.threads) a.tickets[i] = 0;
}

template <class M, int kTiles, int kFilter>
MNV2_KERNEL(Block<M, kTiles>::kThreads)
block_kernel(const MNV2_CONSTANT BlockArgs a) {
  using B = Block<M, kTiles>;
  using T = typename M::Value;
  unsigned char* const shared = shared_memory();
  unsigned char* const x_tile = shared + a.x_at;
  unsigned char* const expanded = shared + a.e_at;
  const Lane lane = this_lane(a, thread_index());
  const Task task = this_task(a, block_index_x());

  if (copies_in_bulk(a)) {
    for (int i = 0; i < 2; ++i) start_arrival(reinterpret_cast<Arrival*>(shared) + i);
  }
  copy_weights(a, task, 0, 0, shared);
  const TileInput in = tile_input<B>(a, task);
  int32_t* const table = reinterpret_cast<int32_t*>(shared + a.table_at);
  const Places places{table, reinterpret_cast<int32_t*>(shared + a.to_at)};
  find_places<M, B>(a, task, in, places);
  if (a.windows) find_pairs<M>(a.window, x_tile + a.window.table, a.window.c, a.threads);
  zero_expanded(a, expanded);  // beyond the image's edge the filter reads zeros
  if (a.ahead) zero_expanded(a, expanded + a.e_second);
  const Patch patch = this_patch(a, lane);
  // Whether registers are left for where sums go to: on GPUs with clusters, if there are few sums.
  constexpr bool kKeeps = kHasClusters && M::kFilterBytes == 2 && (kTiles == 3 || (kTiles == 2 && kFilter == kStride1));
  const Outputs outputs = outputs_of<B>(a, task, in, patch);
  const unsigned char* const first_window = window_of<M, B>(a, lane, patch, expanded);
  barrier();

  wait_for_previous_kernel();
  allow_next_kernel();

  if (a.clears > 0) clear_tickets(a);
  // Many sums leave few registers: what follows from the thread's number is computed anew in every step, with 96 output
  // channels all, with 32 its place in the warp.
  constexpr bool kRecomputes = !B::kRounds;
  // If a step's halves do not depend on each other, warps w and w + 4, which share a scheduler, begin with different
  // ones: one of them keeps the tensor cores busy, the other one the rest. Not where it would spill.
  constexpr bool kEitherFirst = M::kBytes == 2 && kFilter != kAnyFilter && !kRecomputes;
  const bool filter_first = kEitherFirst && a.ahead && lane.warp / 4 % 2 != 0;
  const int chunks = task.last_chunk - task.first_chunk, steps = a.ahead ? chunks + 1 : chunks;
  int turn = 0;
  MNV2_NO_UNROLL
  for (int first_image = task.first_image;; first_image += a.images) {
    const bool again = B::kRounds && first_image > task.first_image;
    const bool last = !B::kRounds || first_image + a.images >= task.end_image;
    if (again && a.residual) barrier();  // before the residual's pixels are overwritten
    if (a.windows)
      load_images<M>(a, first_image, in, x_tile);
    else if (a.has_expand)
      load_pixels<M>(a, in, places, first_row<T>(a, first_image, in), x_tile);

    float sums[B::kRows][kTiles][4];
    MNV2_UNROLL
    for (int i = 0; i < B::kValues; ++i) (&sums[0][0][0])[i] = 0.f;

    MNV2_NO_UNROLL
    for (int number = 0; number < steps; ++number, ++turn) {
      const Step step = this_step(a, task, number);
      const Lane l = kRecomputes || kTiles == 4 ? this_lane(a, forgotten(thread_index())) : lane;
      if (!a.has_expand)
        load_chunk<M, B>(a, task.first_chunk + number, in, places, first_row<T>(a, forgotten(first_image), in),
                         expanded);
      copy_async_wait<0>();
      if (bulk_copies() && !(again && chunks == 1)) wait_for_arrival(arrival_of(turn, shared), (turn & 2) != 0);
      barrier();  // weights and pixels are there, and the expanded tile is free
      // The weights of a task with one chunk stay.
      const int next = number + 1 < steps ? number + 1 : 0;
      const bool copies = next > 0 || (!last && chunks > 1);
      if (copies && a.weights_bytes > 0) copy_weights(a, task, turn + 1, next, shared);
      const unsigned char* const weights = weights_of(a, turn, shared);
      const auto expand = [&] {
        if (a.has_expand && step.expands)
          expand_chunk<M, B>(a, l, task.first_chunk + number, in, places, x_tile, weights + a.expand,
                             expanded + expand_turn(turn) * a.e_second);
        if (a.has_expand && !a.ahead) barrier();
      };
      const auto filter = [&] {
        if (!step.filters) return;
        Filtered<M> filtered[B::kPatch];
        const unsigned char* const window =
            kRecomputes ? window_of<M, B>(a, l, this_patch(a, l), expanded) : first_window;
        filter_patch<M, B::kPatchHeight, B::kPatchWidth, kFilter>(
            a, window + filter_turn(a, turn) * a.e_second, weights + a.filters + l.t * 8 * M::kFilterBytes,
            weights + a.filter_bias + l.t * 8 * M::kFilterBytes, filtered);
        project_chunk<M, kTiles>(sums, filtered, weights + a.project + l.lane * 16);
      };
      if constexpr (kEitherFirst) {
        MNV2_NO_UNROLL
        for (int half = 0; half < 2; ++half) {
          if ((half == 0) != filter_first)
            expand();
          else
            filter();
        }
      } else {
        expand();
        filter();
      }
      if (!a.has_expand) barrier();  // before the expanded tile is filled again
      if (copies && a.weights_bytes == 0) {
        if (a.has_expand) barrier();  // before the only place for weights is
        copy_weights(a, task, turn + 1, next, shared);
      }
    }

    if (kHasClusters && a.cluster) {
      barrier();  // before sums lie where weights and pixels are
      share_sums<B::kValues>(a, &sums[0][0][0]);
      cluster_barrier();
      store_cluster<M, kTiles>(a);
      cluster_barrier();  // before a block ends whose sums others read
      return;
    }
    if (a.splits > 1 && !add_up_splits<B::kValues>(a, task, &sums[0][0][0], table)) return;
    if constexpr (kKeeps) {
      store_patch<M, kTiles>(a, task, in, first_image + patch.image, lane.t, outputs, sums, x_tile);
    } else {
      // No register holds these through the steps.
      const Lane storing = this_lane(a, forgotten(thread_index()));
      const Patch place = this_patch(a, storing);
      const Task stored = kRecomputes ? this_task(a, forgotten(block_index_x())) : task;
      const TileInput input = kRecomputes ? tile_input<B>(a, stored) : in;
      store_patch<M, kTiles>(a, stored, input, forgotten(first_image) + place.image, storing.t,
                             outputs_of<B>(a, stored, input, place), sums, x_tile);
    }
    if (last) return;
  }
}

}  // namespace cuda
}  // namespace mnv2
