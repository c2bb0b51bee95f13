#include "backend/coalescing.h"

#include <algorithm>
#include <iterator>

namespace mnnvl {
namespace {

template <typename T>
void append(std::vector<T>& to, std::vector<T>& from) {
  to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
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
    const Message& received = receive->receives[0];
    TORCH_CHECK_VALUE(received.bytes == sent.bytes && received.dtype == sent.dtype,
                      "mnnvl recv: tensor: a message to oneself (rank ", rank, "): expected ", sent.bytes, " bytes of ",
                      send.inputs[0].scalar_type(), " as sent, got ", received.bytes, " bytes of ",
                      receive->outputs[0].scalar_type());
    receive->epilogue = [to = receive->outputs[0], from = send.inputs[0]] {
      const auto flat = [](const at::Tensor& t) { return t.as_strided({t.numel()}, {1}, t.storage_offset()); };
      flat(to).copy_(flat(from));
    };
    receive->receives.clear();
    send.sends.clear();
  }
  for (const Call& call : calls) {
    TORCH_CHECK_VALUE(!is_own(call.receives), "mnnvl recv: src: a message to oneself (rank ", rank,
                      "): expected a send of it in the same batch, got none");
  }
}

Call merge(std::vector<Call> calls) {
  if (calls.size() == 1) return std::move(calls[0]);
  Call merged;
  merged.type = c10d::OpType::COALESCED;
  merged.title = "mnnvl:coalesced";
  merged.name = "coalesced";
  merged.device = calls[0].device;
  std::vector<Body> bodies;
  std::vector<Local> epilogues;
  for (Call& call : calls) {
    merged.async = merged.async || call.async;
    merged.timeout = std::max(merged.timeout, call.timeout);
    append(merged.inputs, call.inputs);
    append(merged.outputs, call.outputs);
    append(merged.landing, call.landing);
    append(merged.sends, call.sends);
    append(merged.receives, call.receives);
    if (call.body) bodies.push_back(std::move(call.body));
    if (call.epilogue) epilogues.push_back(std::move(call.epilogue));
  }
  merged.body = in_turn(std::move(bodies));
  if (!epilogues.empty()) {
    merged.epilogue = [epilogues = std::move(epilogues)] {
      for (const Local& epilogue : epilogues) epilogue();
    };
  }
  return merged;
}

}  // namespace

size_t Coalescing::start() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<Call>& calls = calls_[std::this_thread::get_id()];
  const size_t left = calls.size();
  calls.clear();
  threads_ = calls_.size();
  return left;
}

bool Coalescing::collecting_here() {
  std::lock_guard<std::mutex> lock(mutex_);
  return calls_.count(std::this_thread::get_id()) != 0;
}

void Coalescing::add(Call call) {
  std::lock_guard<std::mutex> lock(mutex_);
  calls_[std::this_thread::get_id()].push_back(std::move(call));
}

std::vector<Call> Coalescing::end(int rank) {
  std::vector<Call> calls;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto mine = calls_.find(std::this_thread::get_id());
    TORCH_CHECK_VALUE(mine != calls_.end(), "mnnvl: endCoalescing without a startCoalescing on this thread");
    calls = std::move(mine->second);
    calls_.erase(mine);
    threads_ = calls_.size();
  }
  copy_own_messages(calls, rank);
  std::vector<std::vector<Call>> alike;
  for (Call& call : calls) {
    const auto same = std::find_if(alike.begin(), alike.end(), [&](const std::vector<Call>& others) {
      return others[0].device == call.device && others[0].has_messages() == call.has_messages();
    });
    if (same == alike.end()) {
      alike.emplace_back().push_back(std::move(call));
    } else {
      same->push_back(std::move(call));
    }
  }
  // Messages first: they wait for no collective of this rank.
  std::stable_partition(alike.begin(), alike.end(), [](const auto& some) { return some[0].has_messages(); });
  std::vector<Call> merged;
  for (std::vector<Call>& some : alike) merged.push_back(merge(std::move(some)));
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

c10::intrusive_ptr<c10::ivalue::Future> CoalescedWork::getFuture() {
  c10::List<c10::intrusive_ptr<c10::ivalue::Future>> futures(
      c10::FutureType::create(c10::ListType::create(c10::TensorType::get())));
  for (const auto& work : works_) futures.push_back(work->getFuture());
  return c10::collectAll(futures);
}

std::vector<at::Tensor> CoalescedWork::result() {
  std::vector<at::Tensor> all;
  for (const auto& work : works_) {
    for (const at::Tensor& tensor : work->result()) all.push_back(tensor);
  }
  return all;
}

}  // namespace mnnvl
