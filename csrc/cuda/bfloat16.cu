#include "launch.cuh"

namespace mnv2 {
namespace cuda {

extern constinit const KernelTable kBFloat16Kernels = kernel_table<BFloat16Math>();

}  // namespace cuda
}  // namespace mnv2
