// Random calls of the collectives whose ranks have parts of their own, and of those that reduce: every byte against the
// definition. A Rank has rank(), and run(request), which returns when the result is in place.
#pragma once

#include <algorithm>
#include <cstring>

#include "native/harness.h"
#include "native/rank_order.h"
#include "protocol/requests.h"

namespace mnnvl::test {

// What the ranks agree in: call number `call` of a program, of `world_size` ranks. Everything else follows from it.
struct Call {
  int world_size;
  uint64_t call;
  int64_t most_bytes;  // of a part

  Random random(uint64_t what) const { return Random(mix(call * 64 + what)); }
  // Of the part that goes from `from` to `to`: often nothing, sometimes as much as there can be.
  int64_t size(int from, int to) const {
    Random r = random(static_cast<uint64_t>(1000 + from * 100 + to));
    return r.below(4) == 0 ? 0 : r.below((most_bytes >> r.below(12)) + 1);
  }
  int root() const { return static_cast<int>(random(1).below(world_size)); }
  bool uneven() const { return random(2).below(2) == 0; }
  bool in_place() const { return random(3).below(2) == 0; }
  Dtype dtype() const { return kNumberDtypes[random(4).below(std::size(kNumberDtypes))]; }
  ReduceOp op() const {
    const ReduceOp op = kReduceOps[random(5).below(std::size(kReduceOps))];
    return has_reduction(dtype(), op) ? op : ReduceOp::kSum;
  }
  // Of this rank's memory: none, so that it may be moved by packs, or any.
  int64_t shift(int any) const { return random(9).below(2) == 0 ? 0 : any; }
  // The bytes that `from` has for `to`: any at all, or numbers of like size.
  Bytes data(int from, int to, int64_t bytes) const {
    const uint64_t seed = mix(call) + static_cast<uint64_t>(from * 100 + to);
    Bytes made = any_bytes(seed, bytes);
    if (!is_floating(dtype()) || random(6).below(2) == 0) return made;
    const int64_t size = element_size(dtype());
    for (int64_t i = 0; i < bytes / size; ++i) {
      const double value = static_cast<double>(mix(seed + static_cast<uint64_t>(i)) % 2001) / 97.0 - 10.0;
      const uint64_t bits = rounded_bits(value, dtype());
      std::memcpy(made.data() + i * size, &bits, static_cast<size_t>(size));
    }
    return made;
  }
};

// Memory at an odd address, with a margin behind that has to stay as it is.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t shift = 0) : bytes_(bytes), shift_(shift % 8) {
    memory_.assign(static_cast<size_t>(bytes + shift_ + 64), std::byte{0x5a});
  }
  Buffer(const Bytes& data, int64_t shift) : Buffer(static_cast<int64_t>(data.size()), shift) {
    std::copy(data.begin(), data.end(), memory_.begin() + shift_);
  }
  std::byte* data() { return memory_.data() + shift_; }
  int64_t bytes() const { return bytes_; }
  template <typename... What>
  void check(const Bytes& expected, const What&... what) const {
    for (int64_t i = 0; i < bytes_; ++i) {
      const auto seen = memory_[static_cast<size_t>(shift_ + i)], wanted = expected[static_cast<size_t>(i)];
      CHECK(seen == wanted, "byte ", i, " of ", bytes_, ": ", int(seen), " for ", int(wanted), ", ", what...);
    }
    for (int64_t i = 0; i < shift_; ++i) CHECK(memory_[static_cast<size_t>(i)] == std::byte{0x5a}, "before ", what...);
    for (size_t i = static_cast<size_t>(shift_ + bytes_); i < memory_.size(); ++i)
      CHECK(memory_[i] == std::byte{0x5a}, "behind ", what...);
  }

 private:
  int64_t bytes_, shift_;
  Bytes memory_;
};

// One for each rank, and their addresses.
struct Buffers {
  std::vector<Buffer> each;
  std::vector<void*> addresses;
  void push(Buffer&& buffer) { each.push_back(std::move(buffer)); }
  void* const* outs() {
    addresses.clear();
    for (Buffer& b : each) addresses.push_back(b.bytes() == 0 ? nullptr : b.data());
    return addresses.data();
  }
  const void* const* ins() { return const_cast<const void* const*>(outs()); }
};

template <typename Rank>
void check_scatter(Rank& rank, const Call& call) {
  const int me = rank.rank(), root = call.root();
  const int64_t bytes = call.size(0, 0);
  Buffers ins;
  if (me == root) {
    for (int r = 0; r < call.world_size; ++r) ins.push(Buffer(call.data(root, r, bytes), r));
  }
  Buffer out(bytes, me);
  const bool in_place = call.in_place() && me == root;
  Buffer& result = in_place ? ins.each[static_cast<size_t>(me)] : out;
  rank.run(ScatterRequest{me == root ? ins.ins() : nullptr, result.data(), bytes, root});
  result.check(call.data(root, me, bytes), "scatter ", call.call, " at ", me);
}

template <typename Rank>
void check_gather(Rank& rank, const Call& call) {
  const int me = rank.rank(), root = call.root();
  const int64_t bytes = call.size(0, 0);
  Buffer in(call.data(me, 0, bytes), me);
  Buffers outs;
  for (int r = 0; r < call.world_size; ++r) outs.push(Buffer(bytes, r));
  const bool in_place = call.in_place() && me == root;
  if (in_place) outs.each[static_cast<size_t>(me)] = in;
  const void* from = in_place ? outs.each[static_cast<size_t>(me)].data() : in.data();
  rank.run(GatherRequest{from, me == root ? outs.outs() : nullptr, bytes, root});
  for (int r = 0; r < call.world_size && me == root; ++r)
    outs.each[static_cast<size_t>(r)].check(call.data(r, 0, bytes), "gather ", call.call, " of ", r);
}

template <typename Rank>
void check_all_gather(Rank& rank, const Call& call) {
  const int me = rank.rank();
  std::vector<int64_t> sizes;
  Buffers outs;
  for (int r = 0; r < call.world_size; ++r) {
    sizes.push_back(call.uneven() ? call.size(r, 0) : call.size(0, 0));
    outs.push(Buffer(sizes.back(), r));
  }
  Buffer in(call.data(me, 0, sizes[static_cast<size_t>(me)]), me);
  AllGatherRequest request{in.data(), outs.outs(), sizes[0]};
  if (call.uneven()) request.sizes = sizes.data();
  rank.run(request);
  for (int r = 0; r < call.world_size; ++r) {
    const auto index = static_cast<size_t>(r);
    outs.each[index].check(call.data(r, 0, sizes[index]), "all_gather ", call.call, " of ", r, " at ", me);
  }
}

template <typename Rank>
void check_broadcast(Rank& rank, const Call& call) {
  const int64_t bytes = call.size(0, 0);
  Buffer data(call.data(rank.rank(), 0, bytes), call.shift(rank.rank()));
  rank.run(BroadcastRequest{data.data(), bytes, call.root()});
  data.check(call.data(call.root(), 0, bytes), "broadcast ", call.call, " at ", rank.rank());
}

template <typename Rank>
void check_all_to_all(Rank& rank, const Call& call) {
  const int me = rank.rank();
  const bool nothing = call.random(7).below(8) == 0;
  const auto size = [&](int from, int to) {
    return nothing ? 0 : call.uneven() ? call.size(from, to) : call.size(0, 0);
  };
  Buffers ins, outs;
  std::vector<int64_t> send, receive;
  for (int r = 0; r < call.world_size; ++r) {
    send.push_back(size(me, r));
    receive.push_back(size(r, me));
    ins.push(Buffer(call.data(me, r, send.back()), r));
    outs.push(Buffer(receive.back(), me));
  }
  rank.run(AllToAllRequest{ins.ins(), send.data(), outs.outs(), receive.data(), call.dtype()});
  for (int r = 0; r < call.world_size; ++r)
    outs.each[static_cast<size_t>(r)].check(call.data(r, me, size(r, me)), "all_to_all ", call.call, " of ", r);
}

inline Bytes reduced(const Call& call, int to, int64_t numel) {
  const int64_t size = element_size(call.dtype());
  std::vector<Bytes> inputs;
  std::vector<const std::byte*> pointers;
  for (int r = 0; r < call.world_size; ++r) inputs.push_back(call.data(r, to, numel * size));
  for (const Bytes& input : inputs) pointers.push_back(input.data());
  Bytes result(static_cast<size_t>(numel * size));
  for (int64_t i = 0; i < numel; ++i) {
    const uint64_t bits = rank_order_bits(pointers, i, call.dtype(), call.op());
    std::memcpy(result.data() + i * size, &bits, static_cast<size_t>(size));
  }
  return result;
}

template <typename Rank>
void check_all_reduce(Rank& rank, const Call& call, Strategy strategy) {
  const int me = rank.rank();
  const int64_t numel = call.size(0, 0) / element_size(call.dtype()), bytes = numel * element_size(call.dtype());
  Buffer in(call.data(me, 0, bytes), call.shift(me)), out(bytes, call.shift(me + 1));
  Buffer& result = call.in_place() ? in : out;
  rank.run(AllReduceRequest{in.data(), result.data(), numel, call.dtype(), call.op(), strategy});
  result.check(reduced(call, 0, numel), "all_reduce ", call.call);
}

template <typename Rank>
void check_reduce(Rank& rank, const Call& call) {
  const int me = rank.rank(), root = call.root();
  const int64_t numel = call.size(0, 0) / element_size(call.dtype()), bytes = numel * element_size(call.dtype());
  Buffer in(call.data(me, 0, bytes), call.shift(me)), out(bytes, call.shift(me + 1));
  Buffer& result = call.in_place() ? in : out;
  rank.run(ReduceRequest{in.data(), me == root ? result.data() : nullptr, numel, root, call.dtype(), call.op()});
  if (me == root) result.check(reduced(call, 0, numel), "reduce ", call.call);
}

template <typename Rank>
void check_reduce_scatter(Rank& rank, const Call& call) {
  const int me = rank.rank();
  const int64_t size = element_size(call.dtype());
  std::vector<int64_t> numels;
  Buffers ins;
  for (int r = 0; r < call.world_size; ++r) {
    numels.push_back((call.uneven() ? call.size(r, 0) : call.size(0, 0)) / size);
    ins.push(Buffer(call.data(me, r, numels.back() * size), call.shift(r)));
  }
  const int64_t mine = numels[static_cast<size_t>(me)];
  Buffer out(mine * size, call.shift(me + 1));
  Buffer& result = call.in_place() ? ins.each[static_cast<size_t>(me)] : out;
  ReduceScatterRequest request{ins.ins(), result.data(), mine, nullptr, call.dtype(), call.op()};
  if (call.uneven()) request.numels = numels.data();
  rank.run(request);
  result.check(reduced(call, me, mine), "reduce_scatter ", call.call, " at ", me);
}

template <typename Rank>
void check_any(Rank& rank, const Call& call) {
  switch (call.random(0).below(7)) {
    case 0: check_scatter(rank, call); break;
    case 1: check_gather(rank, call); break;
    case 2: check_all_to_all(rank, call); break;
    case 3: check_all_reduce(rank, call, call.random(8).below(2) == 0 ? Strategy::kOneShot : Strategy::kTwoShot); break;
    case 4: check_reduce(rank, call); break;
    case 5: check_reduce_scatter(rank, call); break;
    default: rank.run(BarrierRequest{}); break;
  }
}

}  // namespace mnnvl::test
