#include "transport/cuda_launch.h"

#include <algorithm>

#include "kernels/kernels.h"

namespace mnnvl {
namespace {

void launch_one(const LaunchContext& context, const AllReduceRequest& request) {
  const Strategy strategy = request.strategy == Strategy::kAuto ? context.strategy : request.strategy;
  const AllReduceChoice choice = choose_all_reduce(context.shape, request.numel, request.dtype, strategy);
  const kernels::KernelTable& table = kernels::table();
  const auto& kernel =
      choice.algorithm == Algorithm::kOneShotLamport ? table.oneshot_allreduce : table.twoshot_allreduce;
  kernels::Launch shape;
  shape.threads = choice.threads;
  shape.pdl = request.pdl;
  shape.stream = context.stream;
  kernels::AllReduceParams params;
  params.group = context.group;
  params.dtype = request.dtype;
  params.blocks = choice.blocks;
  params.op = request.op;
  for (int64_t begin = 0; begin < request.numel; begin += choice.launch_elements) {
    params.in = static_cast<const std::byte*>(request.in) + begin * element_size(request.dtype);
    params.out = static_cast<std::byte*>(request.out) + begin * element_size(request.dtype);
    params.numel = min64(choice.launch_elements, request.numel - begin);
    kernel.launch(params, shape);
  }
}

// Everything else goes through the epoch pipe, `bytes` a contribution.
void gather(const LaunchContext& context, kernels::GatherParams& params, int64_t bytes) {
  const GatherChoice choice = choose_gather(context.shape, bytes);
  params.group = context.group;
  params.bytes = bytes;
  params.blocks = choice.blocks;
  kernels::Launch shape;
  shape.threads = choice.threads;
  shape.stream = context.stream;
  kernels::table().epoch_gather.launch(params, shape);
}

void launch_one(const LaunchContext& context, const AllGatherRequest& request) {
  kernels::GatherParams params;
  params.in = request.in;
  std::copy(request.outs, request.outs + context.group.world_size, params.outs);
  gather(context, params, request.bytes);
}

void launch_one(const LaunchContext& context, const BroadcastRequest& request) {
  kernels::GatherParams params;
  params.in = request.data;
  params.outs[request.root] = request.data;
  params.source = request.root;
  params.operation = Operation::kBroadcast;
  gather(context, params, request.bytes);
}

void launch_one(const LaunchContext& context, const BarrierRequest&) {
  kernels::GatherParams params;
  params.operation = Operation::kBarrier;
  gather(context, params, 0);
}

}  // namespace

void launch(const LaunchContext& context, const Request& request) {
  std::visit([&](const auto& one) { launch_one(context, one); }, request);
}

}  // namespace mnnvl
