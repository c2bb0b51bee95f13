#include "backend/process_group.h"

#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/Logging.h>

#include <algorithm>

#include "backend/comms_record.h"
#include "backend/errors.h"
#include "backend/live_groups.h"
#include "backend/store_exchange.h"
#include "kernels/kernels.h"
#include "system/deadline.h"

namespace mnnvl {

ProcessGroupMNNVL::ProcessGroupMNNVL(c10::intrusive_ptr<c10d::Store> store, int rank, int size,
                                     c10::intrusive_ptr<Options> options)
    : Backend(rank, size),
      store_(std::move(store)),
      options_(std::move(options)),
      timeout_ms_(options_->timeout.count()),
      state_(std::make_shared<GroupState>(rank)),
      cpu_queue_(state_) {
  TORCH_CHECK_VALUE(size >= 1 && size <= kMaxWorldSize, "mnnvl: world size: expected 1 to ", kMaxWorldSize, ", got ",
                    size);
  TORCH_CHECK_VALUE(rank >= 0 && rank < size, "mnnvl: rank: expected 0 to ", size - 1, ", got ", rank);
  TORCH_CHECK_VALUE(options_->timeout.count() > 0, "mnnvl: timeout: expected more than 0 ms, got ",
                    options_->timeout.count());
  options_->transport.log = [recorder = state_->recorder()](const std::string& text) {
    LOG(ERROR) << text;
    recorder->report();
  };
  options_->transport.counters = std::make_shared<TransportCounters>();
  state_->recorder()->name_group(str("a group of ", size, size == 1 ? " rank" : " ranks"));
  if (size > 1) owner_ = at_torch_boundary([&] { return StoreExchange::new_owner(store_, "mnnvl", rank); });
  LiveGroups::get().add(this);
}

ProcessGroupMNNVL::~ProcessGroupMNNVL() { LiveGroups::get().remove(this); }

void ProcessGroupMNNVL::check_usable() const {
  TORCH_CHECK_WITH(DistBackendError, !closed_, "mnnvl: this process group has been shut down");
  state_->check();
}

std::shared_ptr<CpuSetUp> ProcessGroupMNNVL::cpu_set_up(bool waits) {
  birthplace_.check("process group");  // before any lock, which a thread that the child lacks may hold
  const auto find = [&](const std::shared_ptr<CpuSetUp>& begun) {
    std::lock_guard<std::mutex> lock(mutex_);
    check_usable();
    if (cpu_ && !cpu_->failed()) {
      if (const auto made = cpu_->made()) check_attached(*made);
      return cpu_;
    }
    if (begun) cpu_ = begun;
    return begun;
  };
  if (auto known = find(nullptr)) return known;
  name_in_records();
  return find(std::make_shared<CpuSetUp>(make_cpu(waits)));
}

// Holds nothing of this object, which may be gone when the queue comes to it.
CpuSetUp::Make ProcessGroupMNNVL::make_cpu(bool waits) const {
  constexpr const char* kPrefix = "mnnvl/cpu";
  TransportOptions options = options_->transport;
  options.timeout_ms = timeout_ms_;
  auto store = waits ? store_ : SetUpStore(store_, kPrefix, rank_).apart();
  return [options, store, state = state_, size = size_, owner = owner_] {
    return at_torch_boundary([&] {
      state->check();
      StoreExchange exchange(store, kPrefix, state->rank(), size, std::chrono::milliseconds(options.timeout_ms),
                             state->aborted(), owner);
      std::shared_ptr<Transport> made = make_cpu_transport(exchange, options);
      state->add(made);  // if the group has failed meanwhile, it tells the peers, who believe in it
      state->check();
      return made;
    });
  };
}

std::shared_ptr<CudaQueue> ProcessGroupMNNVL::cuda_queue(at::Device device) {
  birthplace_.check("process group");
  const auto existing = [&]() -> std::shared_ptr<CudaQueue> {
    std::lock_guard<std::mutex> lock(mutex_);
    check_usable();
    TORCH_CHECK_VALUE(!cuda_ || cuda_->device() == device, "mnnvl: this rank of the group uses ", cuda_->device(),
                      ", got a tensor on ", device, "; a rank has one GPU");
    if (cuda_) check_attached(*cuda_->transport());
    return cuda_;
  };
  if (auto queue = existing()) return queue;
  TORCH_CHECK(
      !kernels::table().host.capture_id(current_stream(device).native_handle()),
      "mnnvl: the first collective on a GPU sets the group up, which can't be captured: make one call before the "
      "capture, or give init_process_group a device_id");
  set_up_cuda(device);
  return existing();
}

void ProcessGroupMNNVL::set_up_cuda(at::Device device) {
  std::lock_guard<std::mutex> setup_lock(setup_mutex_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    check_usable();
    if (cuda_) return;
  }
  name_in_records();
  TransportOptions options = options_->transport;
  options.timeout_ms = timeout_ms_;
  StoreExchange exchange(store_, "mnnvl/cuda", rank_, size_, std::chrono::milliseconds(options.timeout_ms),
                         state_->aborted(), owner_);
  const c10::DeviceGuard guard(device);
  std::shared_ptr<Transport> made = make_cuda_transport(exchange, device.index(), options);
  // A group that was aborted or shut down meanwhile tells the peers, who believe in it.
  state_->add(made);
  std::lock_guard<std::mutex> lock(mutex_);
  if (closed_) made->abort(FailureCause::kLocalAbort);
  check_usable();
  cuda_ = std::make_shared<CudaQueue>(std::move(made), device);
}

// By c10d's names, which come after the constructor, and which only the threads that call may read.
void ProcessGroupMNNVL::name_in_records() {
  std::string ranks;
  for (const uint64_t one : options_->global_ranks_in_group) ranks += str(ranks.empty() ? "" : ", ", one);
  state_->recorder()->name_group(str("group ", getGroupUid(), " (", getGroupDesc(), ") of ",
                                     ranks.empty() ? str("all ", size_, " ranks") : str("ranks ", ranks)));
}

ProcessGroupMNNVL::Stats ProcessGroupMNNVL::stats() const {
  const TransportCounters& counters = *options_->transport.counters;
  return {recorder()->counts(),
          {{"cpu_oneshot", counters.cpu_oneshot},
           {"cpu_twoshot", counters.cpu_twoshot},
           {"oneshot_lamport", counters.oneshot_lamport},
           {"twoshot_lamport", counters.twoshot_lamport},
           {"pair_channels", counters.pair_channels}},
          counters.slept};
}

ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::run(Call call) {
  if (!at::hasCallbacks()) return begin(std::move(call));
  WorkPtr work;
  const uint64_t sequence = sequence_ + (call.has_messages() ? 0 : 1);
  record_comms(call, *this, options_->global_ranks_in_group, sequence, [&] { work = begin(std::move(call)); });
  return work;
}

ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::begin(Call&& call) {
  if (!coalescing_.collecting()) return run_now(std::move(call));
  coalescing_.add(std::move(call));
  return nullptr;
}

void ProcessGroupMNNVL::startCoalescing() {
  if (const size_t left = coalescing_.start(); left != 0) {
    LOG(WARNING) << "mnnvl: " << left << " calls of rank " << rank_
                 << " were collected for coalescing and never run: an exception ended their context";
  }
}

ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::endCoalescing() {
  std::vector<WorkPtr> works;
  for (Call& call : coalescing_.end(rank_, std::chrono::milliseconds(timeout_ms_.load()))) {
    works.push_back(run_now(std::move(call)));
  }
  if (works.empty()) return nullptr;
  if (works.size() == 1) return works[0];
  return c10::make_intrusive<CoalescedWork>(std::move(works));
}

ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::run_now(Call&& call) {
  if (!call.body && !call.has_messages()) return run_here(call);
  return at_torch_boundary([&]() -> WorkPtr {
    const int64_t own_ms = call.timeout.count();
    const int64_t timeout_ms = own_ms > 0 ? own_ms : timeout_ms_.load();
    if (call.device.is_cpu()) {
      std::shared_ptr<CpuSetUp> set_up = cpu_set_up(/*waits=*/!call.async);
      call.sequence = next_sequence(call);
      if (call.has_messages()) return cpu_queue_.post(std::move(call), set_up, timeout_ms);
      return cpu_queue_.submit(std::move(call), std::move(set_up), timeout_ms);
    }
    const std::shared_ptr<CudaQueue> queue = cuda_queue(call.device);
    call.sequence = next_sequence(call);
    return run_on_cuda(call, queue, timeout_ms);
  });
}

// Nothing to send: on the CPU the call is over as soon as it begins, on a GPU it is the current stream's.
ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::run_here(const Call& call) {
  if (call.device.is_cpu()) {
    auto work = c10::make_intrusive<CpuWork>(rank_, call, nullptr);
    if (call.epilogue) run_below_autograd(call.epilogue);
    work->complete(nullptr);
    return work;
  }
  const c10::DeviceGuard guard(call.device);
  if (call.epilogue) run_below_autograd(call.epilogue);
  const c10::Stream stream = current_stream(call.device);
  CudaWork::Place place{stream, stream, std::make_shared<c10::Event>(call.device.type())};
  place.end->record(stream);
  place.capturing = kernels::find() != nullptr && at_torch_boundary([&] {
                      return kernels::table().host.capture_id(stream.native_handle()).has_value();
                    });
  return c10::make_intrusive<CudaWork>(call, std::move(place), state_, nullptr);
}

ProcessGroupMNNVL::WorkPtr ProcessGroupMNNVL::run_on_cuda(const Call& call, const std::shared_ptr<CudaQueue>& queue,
                                                          int64_t timeout_ms) {
  WorkPtr made;
  FlightRecorder& recorder = *state_->recorder();
  const FlightRecorder::Ticket ticket = recorder.begin(call);
  const auto work = [&](void* stream) {
    Run run;
    run.timeout_ms = timeout_ms;
    run.stream = stream;
    run.beside_compute = call.async;
    state_->run_body(call, *queue->transport(), run);
    if (call.epilogue) run_below_autograd(call.epilogue);
  };
  const auto then = [&](const CudaQueue::Enqueued& enqueued) {
    recorder.enqueued(ticket, enqueued.end, enqueued.capturing);
    CudaWork::Place place{enqueued.stream, enqueued.submitted, enqueued.end};
    place.capturing = enqueued.capturing;
    place.blocking = options_->blocking_wait || call.type == c10d::OpType::BARRIER;
    place.timeout_ms = timeout_ms;
    made = c10::make_intrusive<CudaWork>(call, std::move(place), state_, queue->transport());
  };
  try {
    if (call.has_messages()) {
      queue->enqueue_messages(call.messages(), work, then);
    } else {
      queue->enqueue(call.async, work, then);
    }
  } catch (...) {
    recorder.end(ticket, /*failed=*/true);
    throw;
  }
  return made;
}

void ProcessGroupMNNVL::monitoredBarrier(const c10d::BarrierOptions& opts, bool /*wait_all_ranks*/) {
  at_torch_boundary([&] {
    birthplace_.check("process group");
    const std::lock_guard<std::mutex> lock(monitored_mutex_);
    check_usable();
    // Zero is a timeout as well: who isn't there now is late.
    const int64_t timeout_ms = opts.timeout.count() >= 0 ? opts.timeout.count() : timeout_ms_.load();
    StoreExchange exchange(store_, "mnnvl/monitored_barrier", rank_, size_, std::chrono::milliseconds(timeout_ms),
                           state_->aborted(), owner_);
    try {
      (void)exchange.all_gather("");
    } catch (const Error& error) {
      // With gloo's words for a time-out, which programs (and PyTorch's tests) look for.
      const std::string words =
          error.kind() == ErrorKind::kTimeout ? str("Rank ", rank_, " timed out in monitoredBarrier: ") : std::string();
      fail(error.kind(), "mnnvl monitored_barrier: not all ranks came: ", words, error.what());
    }
  });
}

std::optional<at::Device> ProcessGroupMNNVL::bound_device() {
  if (getBoundDeviceId()) return *getBoundDeviceId();
  at_torch_boundary([this] { birthplace_.check("process group"); });
  std::lock_guard<std::mutex> lock(mutex_);
  return cuda_ ? std::optional<at::Device>(cuda_->device()) : std::nullopt;
}

c10::intrusive_ptr<c10d::Backend> ProcessGroupMNNVL::split(const c10::intrusive_ptr<c10d::Store>& store,
                                                           const std::vector<int>& ranks,
                                                           const c10::intrusive_ptr<c10d::Backend::Options>& opts) {
  const auto mine = std::find(ranks.begin(), ranks.end(), rank_);
  if (mine == ranks.end()) return nullptr;
  auto options = c10::make_intrusive<Options>(*options_);
  if (opts) options->timeout = opts->timeout;
  options->global_ranks_in_group.clear();
  for (const int one : ranks) {
    const auto& parent = options_->global_ranks_in_group;
    options->global_ranks_in_group.push_back(parent.empty() ? one : parent[one]);
  }
  return c10::make_intrusive<ProcessGroupMNNVL>(store, int(mine - ranks.begin()), int(ranks.size()), options);
}

void ProcessGroupMNNVL::eagerConnectSingleDevice(at::Device device) {
  if (size_ == 1) return;
  at_torch_boundary([&] {
    if (device.is_cpu()) {
      cpu_queue_.run(cpu_set_up(/*waits=*/true), [](Transport&) {});
    } else {
      cuda_queue(device);
    }
  });
}

void ProcessGroupMNNVL::setTimeout(std::chrono::milliseconds timeout) {
  TORCH_CHECK_VALUE(timeout.count() > 0, "mnnvl: timeout: expected more than 0 ms, got ", timeout.count());
  options_->timeout = timeout;
  timeout_ms_ = timeout.count();
}

c10d::ErrorType ProcessGroupMNNVL::getError() {
  if (birthplace_.left()) return c10d::ErrorType::COMM_ERROR;  // what would tell more isn't mapped
  std::lock_guard<std::mutex> lock(mutex_);
  try {
    state_->check();
    if (const auto cpu = cpu_ ? cpu_->made() : nullptr) cpu->check();
    if (cuda_) cuda_->transport()->check();
  } catch (const Error& error) {
    return error.kind() == ErrorKind::kTimeout      ? c10d::ErrorType::TIMEOUT
           : error.kind() == ErrorKind::kPeerFailed ? c10d::ErrorType::REMOTE_ERROR
                                                    : c10d::ErrorType::COMM_ERROR;
  }
  return c10d::ErrorType::SUCCESS;
}

void ProcessGroupMNNVL::abort() {
  if (!birthplace_.left()) state_->abort();
}

void ProcessGroupMNNVL::shutdown() {
  closed_ = true;
  if (birthplace_.left()) return;
  cpu_queue_.stop();
  std::shared_ptr<CpuSetUp> set_up;
  std::shared_ptr<CudaQueue> cuda;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    set_up.swap(cpu_);
    cuda.swap(cuda_);
  }
  // Works still held by the user keep the objects, to ask them about failures, but not their memory.
  if (const auto cpu = set_up ? set_up->made() : nullptr) cpu->close();
  if (cuda) cuda->close();
  // Not before: a kernel may be waiting for a late peer, and abort() must find it.
  (void)state_->take_transports();
}

void ProcessGroupMNNVL::finish(std::chrono::milliseconds grace) noexcept {
  try {
    closed_ = true;  // nothing begins any more
    std::shared_ptr<CudaQueue> cuda;
    std::shared_ptr<CpuSetUp> set_up;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      cuda = cuda_;
      set_up = cpu_;
    }
    const auto messages_end = [&] {
      const auto cpu = set_up ? set_up->made() : nullptr;
      const auto messenger = cpu ? cpu->messenger() : nullptr;
      return !messenger || messenger->wait_idle(grace);
    };
    if (!cpu_queue_.wait_idle(grace) || !messages_end() || (cuda && !cuda->wait_idle(grace))) abort();
    shutdown();
    cpu_queue_.wait_idle(grace);  // callbacks of what was aborted
  } catch (const std::exception& error) {
    LOG(WARNING) << "mnnvl: at exit: " << error.what();
  }
}

}  // namespace mnnvl
