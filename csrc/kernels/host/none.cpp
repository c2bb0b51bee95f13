// The empty table of a build without nvcc.
#include "common/error.h"
#include "kernels/kernels.h"

#if !MNNVL_WITH_CUDA

namespace mnnvl::kernels {

const KernelTable* find() { return nullptr; }

const KernelTable& table() {
  fail(ErrorKind::kUnsupported,
       "mnnvl was built without CUDA kernels (no nvcc was found): to use CUDA tensors, install a CUDA toolkit or the "
       "nvidia-cuda-nvcc wheel and rebuild");
}

}  // namespace mnnvl::kernels

#endif
