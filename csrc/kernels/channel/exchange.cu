// Messages between pairs of ranks: any list of sends and receives in one launch, and copies of this rank beside them.
//
// Blocks have one of three roles: send, receive, copy. The first two are those of roles.cuh.
#include "kernels/channel/roles.cuh"
#include "kernels/host/launch.cuh"

namespace mnnvl::kernels {
namespace {

template <typename Params>
__global__ void __launch_bounds__(kMaxExchangeThreads, kMinBlocks) exchange(const __grid_constant__ Params p) {
  __shared__ Shared shared;
  grid_dependency_wait();
  const int block = int(blockIdx.x), sends = p.sends.shape.blocks, moves = sends + p.receives.shape.blocks;
  if (block >= moves) {
    constexpr int64_t kStep = 32 << 10;
    for (int64_t at = int64_t(block - moves) * kStep; at < p.copy.bytes; at += int64_t(gridDim.x - moves) * kStep) {
      copy_bytes(static_cast<std::byte*>(p.copy.to) + at, static_cast<const std::byte*>(p.copy.from) + at,
                 int(min64(kStep, p.copy.bytes - at)), int(threadIdx.x), int(blockDim.x));
    }
    return;
  }
  if (block < sends) {
    serve<true>(p, p.sends, block, shared);
  } else {
    serve<false>(p, p.receives, block - sends, shared);
  }
}

constexpr int kFewMessages = 16;
using FewMessages = DeviceParams<kFewMessages, kFewMessages>;
using ManyMessages = DeviceParams<kMaxExchangeMessages, 2 * (kMaxWorldSize - 1)>;

template <typename Params>
void launch_as(const ExchangeParams& params, const Launch& shape) {
  Params p;
  p.group = params.group;
  p.kind = params.kind;
  p.copy = params.copy;
  p.sends.shape = params.send_shape;
  p.sends.operation = params.send_operation;
  p.receives.shape = params.receive_shape;
  p.receives.operation = params.receive_operation;
  int channels = 0, filled = 0;
  add_role(p, p.sends, params.sends, params.send_count, channels, filled);
  add_role(p, p.receives, params.receives, params.receive_count, channels, filled);
  const int blocks = params.send_shape.blocks + params.receive_shape.blocks + params.copy.blocks;
  launch(exchange<Params>, p, blocks, shape);
}

void launch_instance(const ExchangeParams& params, const Launch& shape) {
  if (params.send_count + params.receive_count <= kFewMessages) {
    return launch_as<FewMessages>(params, shape);
  }
  launch_as<ManyMessages>(params, shape);
}

void load_instances() {
  load(exchange<FewMessages>);
  load(exchange<ManyMessages>);
}

}  // namespace

namespace rows {
extern constexpr KernelTable::Row<ExchangeParams> exchange{"exchange", launch_instance, load_instances};
}

}  // namespace mnnvl::kernels
