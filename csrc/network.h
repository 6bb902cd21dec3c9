// The shape of a network: units, each of which takes the images or the output of a unit before it. Torch-free.
#pragma once

#include <string>
#include <vector>

#include "api.h"
#include "shapes.h"

namespace mnv2 {

enum class UnitKind : int64_t { kDense, kBlock, kHead };

static constexpr int64_t kImages = -1;  // the source of a unit that takes the network's images

struct NetworkUnit {
  UnitKind kind;
  int64_t source;    // index of the unit whose output it takes, or kImages
  bool tap;          // its output is an output of the network
  DenseShape dense;  // the shape of its kind; the other two are zeros
  BlockShape block;
  HeadShape head;
};

struct NetworkShape {
  ImageSize images;
  std::vector<NetworkUnit> units;
};

// The arguments of the operator `network` besides x and the packed weights. units: for each unit the values of
// kUnitFields, then the fields of its kind. bounds: lo and hi of each activation, for a block also of its output. Both
// are numbers in text with a space between them: a call passes one string through the dispatcher in the time of a few
// of its hundreds of numbers.
struct NetworkArguments {
  std::string units, bounds;

  bool operator==(const NetworkArguments&) const = default;
};

static constexpr const char* kUnitFields[] = {"kind", "source", "tap"};

// The network on images of size x. If the arguments break a rule, `rule` names it and the unit; else it stays empty.
MNV2_FUSED_API NetworkShape network_from(const ImageSize& x, const NetworkArguments& arguments, std::string* rule);

// Bounds for these units, for those who ask about sizes alone: no activation clamps.
MNV2_FUSED_API std::string any_bounds(const std::string& units);

// The size of the unit's output; a head's has one pixel, and its classes as channels.
MNV2_FUSED_API ImageSize output_of(const NetworkUnit& unit);

// "stem" (takes the images), "dense 1", "block 1", "head 1".
MNV2_FUSED_API std::string name_of(const NetworkShape& shape, int64_t unit);

// Index of the last unit that takes the output of unit i, or i itself.
MNV2_FUSED_API int64_t last_reader(const NetworkShape& shape, int64_t unit);

// Whether block 1 takes the stem's output, nothing else does, and it has no expansion: the stem can be its expansion.
MNV2_FUSED_API bool joins_stem(const NetworkShape& shape);

// The images that a dense convolution reads, in any layout; strides in elements.
struct Images {
  const void* data;
  int64_t strides[4];  // n, c, h, w
};

// A dense NHWC map as the images of a dense convolution.
static inline Images dense_images(const DenseShape& s, const void* x) {
  return {.data = x, .strides = {s.h * s.w * s.c_in, 1, s.w * s.c_in, s.c_in}};
}

// Where a map lies: `offset` bytes from the start of the network's output of this index, or of the arena.
struct MapPlace {
  int64_t output;  // -1: in the arena
  int64_t offset;
};

// Places in memory for maps that are needed at different times.
class MNV2_FUSED_API Arena {
 public:
  // The offset of a new map that is written in step `first` and read until step `last`. No map that is needed in one of
  // these steps shares its memory.
  int64_t place(int64_t first, int64_t last, int64_t bytes);
  int64_t size() const { return size_; }

 private:
  struct Map {
    int64_t first, last, begin, end;
  };
  std::vector<Map> maps_;  // by begin
  int64_t size_ = 0;
};

}  // namespace mnv2
