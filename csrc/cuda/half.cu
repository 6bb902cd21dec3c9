#include "launch.cuh"

namespace mnv2 {
namespace cuda {

extern constinit const KernelTable kHalfKernels = kernel_table<HalfMath>();

}  // namespace cuda
}  // namespace mnv2
