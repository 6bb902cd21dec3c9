#include "launch.cuh"

namespace mnv2 {
namespace cuda {

extern constinit const KernelTable kFloatKernels = kernel_table<FloatMath<true>>();

}  // namespace cuda
}  // namespace mnv2
