#include "launch.cuh"

namespace mnv2 {
namespace cuda {

extern constinit const KernelTable kTf32Kernels = kernel_table<FloatMath<false>>();

}  // namespace cuda
}  // namespace mnv2
