#include "backend/flight_recorder.h"

#include <c10/core/DeviceGuard.h>
#include <c10/util/Logging.h>

#include <algorithm>
#include <iomanip>
#include <sstream>

#include "kernels/kernels.h"

namespace mnnvl {
namespace {

// A lost context has no ends: then the state stays what it was.
bool has_ended(const c10::Event& end) noexcept {
  try {
    return end.query();
  } catch (const std::exception&) {
    return false;
  }
}

void write_row(std::ostream& out, const FlightRecorder::Operation& operation,
               std::chrono::system_clock::time_point now) {
  const std::chrono::duration<double> age = now - operation.begun;
  out << '\n'
      << std::right << std::setw(10) << operation.sequence << "  " << std::left << std::setw(34) << operation.name
      << std::right << std::setw(14) << operation.bytes << "  " << std::left << std::setw(14)
      << (operation.dtype ? c10::toString(*operation.dtype) : "-") << std::setw(8) << operation.device.str()
      << std::setw(6) << (operation.async ? "async" : "") << std::setw(10) << name(operation.state) << std::fixed
      << std::setprecision(3) << age.count() << " s ago";
}

}  // namespace

const char* name(FlightRecorder::State state) {
  switch (state) {
    case FlightRecorder::State::kEnqueued: return "enqueued";
    case FlightRecorder::State::kCaptured: return "captured";
    case FlightRecorder::State::kEnded: return "ended";
    case FlightRecorder::State::kCompleted: return "completed";
    case FlightRecorder::State::kFailed: return "failed";
  }
  return "?";
}

void FlightRecorder::name_group(std::string name) {
  std::lock_guard<std::mutex> lock(mutex_);
  group_ = std::move(name);
}

// Under the lock.
size_t FlightRecorder::place_of(const char* name) {
  for (size_t i = 0; i < counts_.size(); ++i) {
    if (counts_[i].name == name) return i;
  }
  counts_.emplace_back().name = name;
  return counts_.size() - 1;
}

FlightRecorder::Ticket FlightRecorder::begin(const Call& call) {
  const std::vector<at::Tensor>& tensors = call.inputs.empty() ? call.outputs : call.inputs;
  Operation operation;
  operation.sequence = call.sequence;
  operation.name = call.name;
  for (const at::Tensor& tensor : tensors) operation.bytes += int64_t(tensor.nbytes());
  if (!tensors.empty()) operation.dtype = tensors[0].scalar_type();
  operation.device = call.device;
  operation.async = call.async;
  operation.begun = std::chrono::system_clock::now();
  std::shared_ptr<c10::Event> old;  // goes when the lock is free
  std::lock_guard<std::mutex> lock(mutex_);
  operation.ticket = ++tickets_;
  old = std::move(at(operation.ticket).end);
  const size_t place = place_of(operation.name);
  ++counts_[place].calls;
  counts_[place].bytes += operation.bytes;
  at(operation.ticket) = std::move(operation);
  return {tickets_, place};
}

void FlightRecorder::enqueued(Ticket ticket, std::shared_ptr<c10::Event> end, bool capturing) {
  std::lock_guard<std::mutex> lock(mutex_);
  Operation& operation = at(ticket.number);
  if (operation.ticket != ticket.number) return;
  if (capturing) {
    operation.state = State::kCaptured;
  } else {
    operation.end = std::move(end);
  }
}

void FlightRecorder::end(Ticket ticket, bool failed) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (failed) ++counts_[ticket.count].failed;
  Operation& operation = at(ticket.number);
  if (operation.ticket == ticket.number) operation.state = failed ? State::kFailed : State::kCompleted;
}

std::vector<FlightRecorder::Operation> FlightRecorder::operations() const {
  std::vector<Operation> all;
  all.reserve(ring_.size());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    std::copy_if(ring_.begin(), ring_.end(), std::back_inserter(all), [](const auto& one) { return one.ticket != 0; });
  }
  std::sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.ticket < b.ticket; });
  const auto look_at_ends = [](void* operations) {
    for (Operation& one : *static_cast<std::vector<Operation>*>(operations)) {
      if (one.state == State::kEnqueued && one.end && has_ended(*one.end)) one.state = State::kEnded;
      one.end.reset();
    }
  };
  // Whoever looks, perhaps at the first failure of some group, has nothing to do with what another thread captures. It
  // may be a thread without a device, where the last reference to an event would make a context on the first one.
  const auto on_gpu = std::find_if(all.begin(), all.end(), [](const auto& one) { return one.end != nullptr; });
  if (on_gpu == all.end()) return all;
  try {
    const c10::DeviceGuard there(on_gpu->end->device());
    kernels::table().host.beside_captures(look_at_ends, &all);
  } catch (const std::exception&) {  // the context is lost, or another process's: then the states stay what they were
  }
  return all;
}

std::map<std::string, FlightRecorder::Count> FlightRecorder::counts() const {
  std::map<std::string, Count> all;
  std::lock_guard<std::mutex> lock(mutex_);
  for (const NamedCount& one : counts_) {
    Count& sum = all[one.name];
    sum.calls += one.calls;
    sum.failed += one.failed;
    sum.bytes += one.bytes;
  }
  return all;
}

std::string FlightRecorder::table() const {
  const std::vector<Operation> all = operations();
  std::ostringstream out;
  out << "mnnvl: the last operations of rank " << rank_ << " in ";
  {
    std::lock_guard<std::mutex> lock(mutex_);
    out << group_;
  }
  if (all.empty()) {
    out << ": none";
    return out.str();
  }
  out << " (sequence, operation, bytes, dtype, device, state, when it was begun):";
  const auto now = std::chrono::system_clock::now();
  for (const Operation& one : all) write_row(out, one, now);
  return out.str();
}

void FlightRecorder::report() noexcept {
  if (reported_.exchange(true)) return;
  try {
    if (!counts().empty()) LOG(ERROR) << table();
  } catch (const std::exception& error) {  // no memory: the failure itself is told by others
    LOG(ERROR) << "mnnvl: cannot tell the last operations: " << error.what();
  }
}

}  // namespace mnnvl
