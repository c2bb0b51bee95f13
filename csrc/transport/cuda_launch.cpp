#include "transport/cuda_launch.h"

#include <algorithm>
#include <bitset>
#include <vector>

#include "common/error.h"
#include "kernels/kernels.h"

namespace mnnvl {
namespace {

constexpr int64_t kLeastScatteredBroadcast = int64_t{1} << 20;  // bytes

// As each rank likes: slots go by packs, not by blocks.
GroupShape lamport_shape(const LaunchContext& context) {
  GroupShape shape = context.shape;
  if (context.lamport_blocks > 0 && (shape.max_blocks == 0 || context.lamport_blocks < shape.max_blocks)) {
    shape.max_blocks = context.lamport_blocks;
  }
  return shape;
}

void launch_lamport(const LaunchContext& context, const AllReduceRequest& request) {
  const GroupShape group = lamport_shape(context);
  Strategy strategy = request.strategy == Strategy::kAuto ? context.strategy : request.strategy;
  const kernels::KernelTable& table = kernels::table();
  kernels::Launch shape;
  shape.pdl = request.pdl || context.pdl;
  shape.stream = context.stream;
  kernels::AllReduceParams params;
  params.group = context.group;
  params.dtype = request.dtype;
  params.op = request.op;
  for (int64_t begin = 0; begin < request.numel; begin += params.numel) {
    const AllReduceChoice choice = choose_all_reduce(group, request.numel - begin, request.dtype, strategy);
    const bool oneshot = choice.algorithm == Algorithm::kOneShotLamport;
    if (begin == 0) {
      strategy = oneshot ? Strategy::kOneShot : Strategy::kTwoShot;  // of what is left, too
      if (TransportCounters* c = context.counters) count_one(oneshot ? c->oneshot_lamport : c->twoshot_lamport);
    }
    params.in = static_cast<const std::byte*>(request.in) + begin * element_size(request.dtype);
    params.out = static_cast<std::byte*>(request.out) + begin * element_size(request.dtype);
    params.numel = min64(choice.launch_elements, request.numel - begin);
    params.blocks = choice.blocks;
    params.windows = {choice.windows, choice.window_packs};
    shape.threads = choice.threads;
    (oneshot ? table.oneshot_allreduce : table.twoshot_allreduce).launch(params, shape);
  }
}

using kernels::ChannelMessage;

kernels::RoleShape shape_of(const LaunchContext& context, ChannelKind kind,
                            const std::vector<ChannelMessage>& messages) {
  int lanes = 1;
  std::bitset<kMaxWorldSize> peers;
  for (const ChannelMessage& m : messages) {
    lanes = std::max(lanes, int(Cut::make(context.group.layout.channel, m.bytes).lanes));
    peers.set(size_t(m.peer));
  }
  return {lanes, choose_exchange_blocks(context.shape, kind, int(peers.count()), lanes)};
}

// Everything else is messages on the pair channels.
struct Exchange {
  ChannelKind kind = ChannelKind::kCollective;
  Operation send_operation, receive_operation;
  std::vector<ChannelMessage> sends, receives;
  kernels::LocalCopy copy;

  explicit Exchange(Operation operation) : send_operation(operation), receive_operation(operation) {}
};

void launch_exchange(const LaunchContext& context, const Exchange& exchange) {
  if (exchange.sends.empty() && exchange.receives.empty() && exchange.copy.bytes == 0) return;
  kernels::ExchangeParams params;
  params.group = context.group;
  params.kind = exchange.kind;
  params.send_operation = exchange.send_operation;
  params.receive_operation = exchange.receive_operation;
  params.sends = exchange.sends.data();
  params.send_count = int(exchange.sends.size());
  params.receives = exchange.receives.data();
  params.receive_count = int(exchange.receives.size());
  params.send_shape = shape_of(context, exchange.kind, exchange.sends);
  params.receive_shape = shape_of(context, exchange.kind, exchange.receives);
  params.copy = exchange.copy;
  params.copy.blocks = choose_copy_blocks(context.shape, params.copy.bytes);
  kernels::Launch shape;
  shape.threads = kernels::kMaxExchangeThreads;
  shape.pdl = context.pdl;
  shape.stream = context.stream;
  kernels::table().exchange.launch(params, shape);
}

ChannelMessage message(const void* data, int64_t bytes, int peer, const CallDescriptor& call) {
  return {const_cast<void*>(data), bytes, pack(call), call.tag, peer};
}

// Messages to the peers, one each at most, and the reduction of theirs with this rank's own: `bytes` of it.
struct Reduction {
  Operation operation;
  Dtype dtype;
  ReduceOp op;
  std::vector<ChannelMessage> sends;
  const void* own = nullptr;
  void* out = nullptr;
  int64_t bytes = 0;
};

void launch_reduction(const LaunchContext& context, const Reduction& reduction, const CallDescriptor& call) {
  if (reduction.sends.empty() && reduction.bytes == 0) return;
  kernels::ReduceParams params;
  params.group = context.group;
  params.operation = reduction.operation;
  params.dtype = reduction.dtype;
  params.op = reduction.op;
  params.sends = reduction.sends.data();
  params.send_count = int(reduction.sends.size());
  params.send_shape = shape_of(context, ChannelKind::kCollective, reduction.sends);
  params.own = reduction.own;
  params.out = reduction.out;
  params.bytes = reduction.bytes;
  params.call = pack(call);
  kernels::Launch shape;
  shape.threads = kernels::kMaxExchangeThreads;
  shape.pdl = context.pdl;
  shape.stream = context.stream;
  kernels::table().reduce.launch(params, shape);
}

// What the Lamport kernels don't add. Every rank reduces a part and hands it to all: in place too, because what arrives
// in the second launch was sent in the first.
void launch_reduced(const LaunchContext& context, const AllReduceRequest& request) {
  const int world = context.group.world_size, rank = context.group.rank;
  const int64_t bytes = request.numel * element_size(request.dtype);
  const CallDescriptor call = descriptor_of(request);
  const int64_t part = align_up(ceil_div(bytes, world), kStageAlign);
  const auto begin_of = [&](int owner) { return min64(owner * part, bytes); };
  const auto bytes_of = [&](int owner) { return min64(part, bytes - begin_of(owner)); };
  const auto* in = static_cast<const std::byte*>(request.in);
  auto* out = static_cast<std::byte*>(request.out);
  Reduction scattered{Operation::kAllReduce, request.dtype, request.op};
  Exchange gathered(Operation::kAllReduce);
  for (int peer = 0; peer < world; ++peer) {
    if (peer == rank) continue;
    if (bytes_of(peer) > 0) {
      scattered.sends.push_back(message(in + begin_of(peer), bytes_of(peer), peer, call));
      gathered.receives.push_back(message(out + begin_of(peer), bytes_of(peer), peer, call));
    }
    if (bytes_of(rank) > 0) gathered.sends.push_back(message(out + begin_of(rank), bytes_of(rank), peer, call));
  }
  scattered.own = in + begin_of(rank);
  scattered.out = out + begin_of(rank);
  scattered.bytes = bytes_of(rank);
  launch_reduction(context, scattered, call);
  launch_exchange(context, gathered);
}

void launch_one(const LaunchContext& context, const AllReduceRequest& request) {
  if (is_float_sum(request.dtype, request.op)) return launch_lamport(context, request);
  if (context.counters != nullptr) count_one(context.counters->pair_channels);
  launch_reduced(context, request);
}

void launch_on_channels(const LaunchContext& context, const ReduceScatterRequest& request) {
  const int64_t element = element_size(request.dtype);
  const CallDescriptor call = descriptor_of(request, context.group.world_size);
  Reduction reduction{Operation::kReduceScatter, request.dtype, request.op};
  for (int peer = 0; peer < context.group.world_size; ++peer) {
    const int64_t bytes = request.numel_of(peer) * element;
    if (peer == context.group.rank) {
      reduction.own = request.ins[peer];
      reduction.out = request.out;
      reduction.bytes = bytes;
    } else if (bytes > 0) {
      reduction.sends.push_back(message(request.ins[peer], bytes, peer, call));
    }
  }
  launch_reduction(context, reduction, call);
}

void launch_lamport(const LaunchContext& context, const ReduceScatterRequest& request) {
  const GroupShape group = lamport_shape(context);
  kernels::Launch shape;
  shape.pdl = context.pdl;
  shape.stream = context.stream;
  kernels::ReduceScatterParams params;
  params.group = context.group;
  params.dtype = request.dtype;
  params.op = request.op;
  for (int64_t begin = 0; begin < request.numel; begin += params.numel) {
    const WindowShape choice = choose_reduce_scatter(group, request.numel - begin, request.dtype);
    const int64_t offset = begin * element_size(request.dtype);
    for (int r = 0; r < context.group.world_size; ++r) {
      params.ins[r] = static_cast<const std::byte*>(request.ins[r]) + offset;
    }
    params.out = static_cast<std::byte*>(request.out) + offset;
    params.numel = min64(choice.launch_elements, request.numel - begin);
    params.blocks = choice.blocks;
    params.windows = {choice.windows, choice.window_packs};
    shape.threads = choice.threads;
    kernels::table().reduce_scatter.launch(params, shape);
  }
}

// Parts of their own sizes may be empty, and a Lamport call needs a pack of everybody.
void launch_one(const LaunchContext& context, const ReduceScatterRequest& request) {
  if (request.numels == nullptr && is_float_sum(request.dtype, request.op)) return launch_lamport(context, request);
  launch_on_channels(context, request);
}

void launch_one(const LaunchContext& context, const ReduceRequest& request) {
  const CallDescriptor call = descriptor_of(request);
  Reduction reduction{Operation::kReduce, request.dtype, request.op};
  if (context.group.rank == request.root) {
    reduction.own = request.in;
    reduction.out = request.out;
    reduction.bytes = call.bytes;
  } else if (call.bytes > 0) {
    reduction.sends.push_back(message(request.in, call.bytes, request.root, call));
  }
  launch_reduction(context, reduction, call);
}

void launch_one(const LaunchContext& context, const AllGatherRequest& request) {
  const int world = context.group.world_size, rank = context.group.rank;
  const CallDescriptor call = descriptor_of(request, world);
  Exchange exchange(Operation::kAllGather);
  for (int peer = 0; peer < world; ++peer) {
    if (peer == rank) continue;
    exchange.sends.push_back(message(request.in, request.bytes_of(rank), peer, call));
    exchange.receives.push_back(message(request.outs[peer], request.bytes_of(peer), peer, call));
  }
  if (request.outs[rank] != request.in) exchange.copy = {request.in, request.outs[rank], request.bytes_of(rank)};
  launch_exchange(context, exchange);
}

// Every rank gets the same bytes: from the root alone, or, where that would keep its link busy for world_size - 1 times
// the bytes, each a part from the root and the other parts from those who got them.
void launch_one(const LaunchContext& context, const BroadcastRequest& request) {
  const int world = context.group.world_size, rank = context.group.rank, root = request.root;
  const CallDescriptor call = descriptor_of(request);
  auto* data = static_cast<std::byte*>(request.data);
  Exchange first(Operation::kBroadcast), second(Operation::kBroadcast);
  if (world == 2 || request.bytes < kLeastScatteredBroadcast) {
    for (int peer = 0; peer < world; ++peer) {
      if (rank == root && peer != root) first.sends.push_back(message(data, request.bytes, peer, call));
    }
    if (rank != root) first.receives.push_back(message(data, request.bytes, root, call));
    return launch_exchange(context, first);
  }
  const int64_t part = align_up(ceil_div(request.bytes, world), kStageAlign);
  const auto part_of = [&](int owner, int peer) {
    const int64_t begin = min64(owner * part, request.bytes);
    return message(data + begin, min64(part, request.bytes - begin), peer, call);
  };
  for (int peer = 0; peer < world; ++peer) {
    if (peer == rank) continue;
    if (rank == root) {
      first.sends.push_back(part_of(peer, peer));
      second.sends.push_back(part_of(rank, peer));
    } else {
      if (peer != root) second.sends.push_back(part_of(rank, peer));
      second.receives.push_back(part_of(peer, peer));
    }
  }
  if (rank != root) first.receives.push_back(part_of(rank, root));
  launch_exchange(context, first);
  launch_exchange(context, second);
}

void launch_one(const LaunchContext& context, const ScatterRequest& request) {
  const int rank = context.group.rank, root = request.root;
  const CallDescriptor call = descriptor_of(request);
  Exchange exchange(Operation::kScatter);
  for (int peer = 0; rank == root && peer < context.group.world_size; ++peer) {
    if (peer != rank) exchange.sends.push_back(message(request.ins[peer], request.bytes, peer, call));
  }
  if (rank != root) {
    exchange.receives.push_back(message(request.out, request.bytes, root, call));
  } else if (request.ins[rank] != request.out) {
    exchange.copy = {request.ins[rank], request.out, request.bytes};
  }
  launch_exchange(context, exchange);
}

void launch_one(const LaunchContext& context, const GatherRequest& request) {
  const int rank = context.group.rank, root = request.root;
  const CallDescriptor call = descriptor_of(request);
  Exchange exchange(Operation::kGather);
  for (int peer = 0; rank == root && peer < context.group.world_size; ++peer) {
    if (peer != rank) exchange.receives.push_back(message(request.outs[peer], request.bytes, peer, call));
  }
  if (rank != root) {
    exchange.sends.push_back(message(request.in, request.bytes, root, call));
  } else if (request.outs[rank] != request.in) {
    exchange.copy = {request.in, request.outs[rank], request.bytes};
  }
  launch_exchange(context, exchange);
}

// Messages without bytes too, so that both ends find out where their sizes differ.
void launch_one(const LaunchContext& context, const AllToAllRequest& request) {
  const int rank = context.group.rank;
  Exchange exchange(Operation::kAllToAll);
  for (int peer = 0; peer < context.group.world_size; ++peer) {
    if (peer == rank) continue;
    CallDescriptor call = descriptor_of(request);
    call.bytes = request.send_bytes[peer];
    exchange.sends.push_back(message(request.ins[peer], call.bytes, peer, call));
    call.bytes = request.receive_bytes[peer];
    exchange.receives.push_back(message(request.outs[peer], call.bytes, peer, call));
  }
  if (request.outs[rank] != request.ins[rank]) {
    exchange.copy = {request.ins[rank], request.outs[rank], request.receive_bytes[rank]};
  }
  launch_exchange(context, exchange);
}

void launch_one(const LaunchContext& context, const BarrierRequest& request) {
  Exchange exchange(Operation::kBarrier);
  for (int peer = 0; peer < context.group.world_size; ++peer) {
    if (peer == context.group.rank) continue;
    exchange.sends.push_back(message(nullptr, 0, peer, descriptor_of(request)));
    exchange.receives.push_back(exchange.sends.back());
  }
  launch_exchange(context, exchange);
}

void launch_one(const LaunchContext& context, const FusedRequest& request) { launch_fused(context, request); }

}  // namespace

void launch(const LaunchContext& context, const Request& request) {
  std::visit([&](const auto& one) { launch_one(context, one); }, request);
}

void launch(const LaunchContext& context, const ExchangeRequest& request) {
  if (request.send_count + request.receive_count > kernels::kMaxExchangeMessages) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: a batch of sends and receives: expected at most ",
         kernels::kMaxExchangeMessages, ", got ", request.send_count + request.receive_count);
  }
  Exchange exchange(Operation::kSend);
  exchange.receive_operation = Operation::kRecv;
  exchange.kind = ChannelKind::kPointToPoint;
  const auto add = [](std::vector<ChannelMessage>& to, const Message* messages, int count) {
    for (int i = 0; i < count; ++i) {
      to.push_back(message(messages[i].data, messages[i].bytes, messages[i].peer, descriptor_of(messages[i])));
    }
  };
  add(exchange.sends, request.sends, request.send_count);
  add(exchange.receives, request.receives, request.receive_count);
  launch_exchange(context, exchange);
}

}  // namespace mnnvl
