#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {

void refuse(const char* name) {
  TORCH_CHECK(false, "mnnvl: ", name,
              " is not supported yet. Call it on a group of another backend over the same ranks, for example "
              "torch.distributed.new_group(backend=\"nccl\") for CUDA tensors or backend=\"gloo\" for CPU tensors");
}

}  // namespace mnnvl::collectives
