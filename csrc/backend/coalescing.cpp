#include "backend/coalescing.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>

#include "backend/tensors.h"
#include "backend/work.h"

namespace mnnvl {
namespace {

using Future = c10::ivalue::Future;

// Unlike an id of the system's, never that of a thread that has ended.
uint64_t this_thread() {
  static std::atomic<uint64_t> threads{0};
  thread_local const uint64_t number = ++threads;
  return number;
}

// The k-th message to oneself goes to the k-th receive of its tag: what pipelines send between stages of one rank.
void copy_own_messages(std::vector<Call>& calls, int rank) {
  const auto is_own = [rank](const std::vector<Message>& messages) {
    return messages.size() == 1 && messages[0].peer == rank;
  };
  for (Call& send : calls) {
    if (!is_own(send.sends)) continue;
    const Message& sent = send.sends[0];
    const auto receive = std::find_if(calls.begin(), calls.end(), [&](const Call& call) {
      return call.device == send.device && is_own(call.receives) && call.receives[0].tag == sent.tag;
    });
    TORCH_CHECK_VALUE(receive != calls.end(), "mnnvl send: dst: a message to oneself (rank ", rank, ") with tag ",
                      sent.tag, ": expected a recv of it in the same batch, got none");
    const at::Tensor& from = send.inputs[0];
    const at::Tensor& to = receive->outputs[0];
    TORCH_CHECK_VALUE(to.nbytes() == from.nbytes() && to.scalar_type() == from.scalar_type(),
                      "mnnvl recv: tensor: a message to oneself (rank ", rank, "): expected ", from.nbytes(),
                      " bytes of ", from.scalar_type(), " as sent, got ", to.nbytes(), " bytes of ", to.scalar_type());
    TORCH_CHECK_VALUE(at::get_overlap_status(from, to) == at::MemOverlapStatus::No,
                      "mnnvl recv: tensor: a message to oneself (rank ", rank,
                      "): expected memory of its own, got some of the tensor that is sent");
    receive->epilogue = [to, from] { flattened(to).copy_(flattened(from)); };
    receive->receives.clear();
    send.sends.clear();
  }
  for (const Call& call : calls) {
    TORCH_CHECK_VALUE(!is_own(call.receives), "mnnvl recv: src: a message to oneself (rank ", rank,
                      "): expected a send of it in the same batch, got none");
  }
}

// The call was made on another stream than the one that runs it, and its copies are memory of that one.
void hand_over(const Call& call, c10::Event& ready, const c10::Stream& now) {
  now.wait(ready);
  const c10::impl::VirtualGuardImpl guard(now.device_type());
  for (const std::vector<at::Tensor>* tensors : {&call.inputs, &call.outputs, &call.landing}) {
    for (const at::Tensor& tensor : *tensors) guard.recordDataPtrOnStream(tensor.storage().data_ptr(), now);
  }
}

Call merge(std::vector<Call> calls) {
  if (calls.size() == 1) return std::move(calls[0]);
  Call whole;
  whole.type = c10d::OpType::COALESCED;
  whole.title = "mnnvl:coalesced";
  whole.name = "coalesced";
  whole.device = calls[0].device;
  for (const Call& call : calls) {
    whole.async = whole.async || call.async;
    whole.timeout = std::max(whole.timeout, call.timeout);
  }
  return merged(std::move(whole), std::move(calls));
}

}  // namespace

size_t Coalescing::start() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Collected>& calls = calls_[this_thread()];
  const size_t left = calls.size();
  calls.clear();
  threads_ = calls_.size();
  return left;
}

bool Coalescing::collecting_here() {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_.count(this_thread()) != 0;
}

void Coalescing::add(Call call) {
  Collected collected;
  if (!call.device.is_cpu()) {
    collected.stream = current_stream(call.device);
    collected.ready = std::make_shared<c10::Event>(call.device.type());
    collected.ready->record(*collected.stream);
  }
  collected.call = std::move(call);
  std::lock_guard<std::mutex> lock(mutex_);
  calls_[this_thread()].push_back(std::move(collected));
}

std::vector<Call> Coalescing::end(int rank, std::chrono::milliseconds timeout) {
  std::vector<Collected> collected;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto mine = calls_.find(this_thread());
    TORCH_CHECK_VALUE(mine != calls_.end(), "mnnvl: endCoalescing without a startCoalescing on this thread");
    collected = std::move(mine->second);
    calls_.erase(mine);
    threads_ = calls_.size();
  }
  std::vector<Call> calls;
  for (Collected& one : collected) calls.push_back(std::move(one.call));
  copy_own_messages(calls, rank);
  std::vector<std::vector<Call>> alike;
  for (size_t i = 0; i < calls.size(); ++i) {
    Call& call = calls[i];
    if (call.timeout == c10d::kUnsetTimeout) call.timeout = timeout;
    if (collected[i].stream) {
      const c10::Stream now = current_stream(call.device);
      if (now != *collected[i].stream) hand_over(call, *collected[i].ready, now);
    }
    const auto same = std::find_if(alike.begin(), alike.end(), [&](const std::vector<Call>& others) {
      return others[0].device == call.device && others[0].has_messages() == call.has_messages();
    });
    if (same == alike.end()) {
      alike.emplace_back().push_back(std::move(call));
    } else {
      same->push_back(std::move(call));
    }
  }
  // Messages first: they wait for no collective of this rank. In an order that all ranks have, for the first on a
  // GPU may set the group up.
  const auto place = [](const std::vector<Call>& some) {
    return (some[0].has_messages() ? 0 : 2) + (some[0].device.is_cpu() ? 0 : 1);
  };
  std::stable_sort(alike.begin(), alike.end(), [&](const auto& a, const auto& b) { return place(a) < place(b); });
  std::vector<Call> merged;
  for (std::vector<Call>& some : alike) {
    merged.push_back(merge(std::move(some)));
    // Nobody has asked to wait yet: the rest of the group may be what a peer does first.
    if (merged.back().device.is_cpu()) merged.back().async = true;
  }
  return merged;
}

bool CoalescedWork::isCompleted() {
  return std::all_of(works_.begin(), works_.end(), [](const auto& work) { return work->isCompleted(); });
}

bool CoalescedWork::isSuccess() const { return exception() == nullptr; }

std::exception_ptr CoalescedWork::exception() const {
  for (const auto& work : works_) {
    if (auto failure = work->exception()) return failure;
  }
  return nullptr;
}

bool CoalescedWork::wait(std::chrono::milliseconds timeout) {
  for (const auto& work : works_) work->wait(timeout);
  return true;
}

void CoalescedWork::synchronize() {
  for (const auto& work : works_) work->synchronize();
}

void CoalescedWork::abort() {
  for (const auto& work : works_) work->abort();
}

c10::intrusive_ptr<Future> CoalescedWork::getFuture() {
  std::vector<c10::intrusive_ptr<Future>> parts;
  std::vector<c10::Device> devices;
  for (const auto& work : works_) {
    parts.push_back(work->getFuture());
    for (const c10::Device device : parts.back()->devices()) {
      if (std::find(devices.begin(), devices.end(), device) == devices.end()) devices.push_back(device);
    }
  }
  auto whole = c10::make_intrusive<Future>(c10::ListType::create(c10::TensorType::get()), devices);
  auto left = std::make_shared<std::atomic<size_t>>(parts.size());
  for (const auto& part : parts) {
    part->addCallback([whole, left, parts, results = result()](Future& /*ended*/) {
      if (--*left != 0) return;
      for (const auto& each : parts) {
        if (each->hasError()) return whole->setError(each->exception_ptr());
        each->wait();  // has ended: the current streams wait for its
      }
      whole->markCompleted(c10::IValue(results));
    });
  }
  return whole;
}

std::vector<at::Tensor> CoalescedWork::result() {
  std::vector<at::Tensor> all;
  for (const auto& work : works_) {
    for (const at::Tensor& tensor : work->result()) all.push_back(tensor);
  }
  return all;
}

}  // namespace mnnvl
