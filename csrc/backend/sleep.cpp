// The process group's memory, given back and made anew. csrc/README.md, "Giving the memory back".
#include "backend/errors.h"
#include "backend/process_group.h"
#include "backend/store_exchange.h"

namespace mnnvl {

// One meeting in the store for all, of this attempt alone.
void ProcessGroupMNNVL::on_set_up(const std::function<void(Transport&, Exchange&)>& on_cpu,
                                  const std::function<void(CudaQueue&, Exchange&)>& on_cuda) {
  at_torch_boundary([this] { birthplace_.check("process group"); });
  const std::lock_guard<std::mutex> sleep_lock(sleep_mutex_);
  std::shared_ptr<CpuSetUp> cpu;
  std::shared_ptr<CudaQueue> cuda;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK_WITH(DistBackendError, !closed_, "mnnvl: this process group has been shut down");
    if (cpu_ && !cpu_->failed()) cpu = cpu_;
    cuda = cuda_;
  }
  at_torch_boundary([&] {
    StoreExchange exchange(store_, "mnnvl/memory", rank_, size_, std::chrono::milliseconds(timeout_ms_.load()),
                           state_->aborted(), owner_);
    try {
      if (cpu) cpu_queue_.run(cpu, [&](Transport& transport) { on_cpu(transport, exchange); });
      if (cuda) on_cuda(*cuda, exchange);
    } catch (const std::exception& error) {
      exchange.give_up(error.what());  // the others, should they still wait for this rank
      throw;
    }
  });
}

int64_t ProcessGroupMNNVL::release_memory() {
  size_t bytes = 0;
  on_set_up([&](Transport& transport, Exchange& exchange) { bytes += transport.detach(exchange); },
            [&](CudaQueue& queue, Exchange& exchange) { bytes += queue.detach(exchange); });
  return int64_t(bytes);
}

void ProcessGroupMNNVL::restore_memory() {
  on_set_up([](Transport& transport, Exchange& exchange) { transport.attach(exchange); },
            [](CudaQueue& queue, Exchange& exchange) { queue.attach(exchange); });
}

}  // namespace mnnvl
