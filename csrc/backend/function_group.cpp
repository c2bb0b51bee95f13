#include "backend/function_group.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/record_function.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "backend/call.h"
#include "backend/errors.h"
#include "backend/tensors.h"
#include "common/math.h"

namespace mnnvl {
namespace {

constexpr const char* kName = "trtllm_mnnvl_allreduce";

void check_arguments(const at::Tensor& input, const at::Tensor& output, at::Device device) {
  check_dense(input, kName, "input");
  check_dense(output, kName, "output");
  check_same(output, input, kName, "output");
  TORCH_CHECK_VALUE(input.device() == device, "mnnvl ", kName, ": input: expected a tensor on ", device,
                    ", got one on ", input.device());
  TORCH_CHECK_VALUE(input.sizes() == output.sizes() && input.strides() == output.strides(), "mnnvl ", kName,
                    ": output: expected sizes ", input.sizes(), " and strides ", input.strides(),
                    " like the input, got ", output.sizes(), " and ", output.strides());
  TORCH_CHECK_VALUE(at::get_overlap_status(input, output) != at::MemOverlapStatus::Partial, "mnnvl ", kName,
                    ": output: expected the input itself or memory apart from it, got memory that overlaps it in part");
  const bool is_added = is_float_sum(message_dtype(input), ReduceOp::kSum);
  TORCH_CHECK_TYPE(is_added, "mnnvl ", kName, ": input: expected dtype float32, float16 or bfloat16, got ",
                   input.scalar_type());
}

// Nothing that torch would do on the way to an operator: the tensor's own keys are its device's, and autocast's and
// autograd's, which have nothing to do for it.
bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kUsual({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU,
                                        DispatchKey::AutogradCUDA, DispatchKey::ADInplaceOrView,
                                        DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  return tensor.defined() && (tensor.key_set() | kUsual) == kUsual && !tensor.requires_grad();
}

// Whether anything of this thread wants to see operators: fake tensors, functionalisation, transforms, tracing, modes.
// Autocast has nothing to do for this one.
bool is_traced() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet kAtRest(
      {DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView, DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
  const c10::DispatchKeySet included = c10::impl::tls_local_dispatch_key_set().included_;
  return (included | kAtRest) != kAtRest || at::impl::torch_function_mode_enabled();
}

}  // namespace

FunctionGroup::FunctionGroup(Exchange& exchange, at::Device device, int64_t buffer_bytes, TransportOptions options)
    : device_(device),
      buffer_bytes_(buffer_bytes),
      timeout_ms_(options.timeout_ms),
      rank_(exchange.rank()),
      size_(exchange.size()) {
  TORCH_CHECK_VALUE(buffer_bytes > 0, "mnnvl workspace: buffer_size_in_bytes: expected more than 0, got ",
                    buffer_bytes);
  TORCH_CHECK_VALUE(size_ >= 1 && size_ <= kMaxWorldSize, "mnnvl workspace: world size: expected 1 to ", kMaxWorldSize,
                    ", got ", size_);
  at_torch_boundary([&] {
    if (size_ == 1) {
      if (!device.is_cpu()) prepare_alone(device.index());
      return;
    }
    if (device.is_cpu()) {
      cpu_ = make_cpu_transport(exchange, options);
    } else {
      const c10::DeviceGuard guard(device);
      options.stage_bytes = ceil_div(buffer_bytes, 2);
      cuda_.emplace(make_cuda_transport(exchange, device.index(), options), device);
    }
  });
}

void FunctionGroup::all_reduce(const at::Tensor& input, at::Tensor& output, Strategy strategy, bool pdl) {
  if (!attached()) at_torch_boundary([] { fail_detached(); });
  check_arguments(input, output, device_);
  all_reduce_checked(input, output, strategy, pdl);
}

bool FunctionGroup::all_reduce_if_usual(const at::Tensor& input, const at::Tensor& output, Strategy strategy, bool pdl,
                                        int64_t oneshot_bytes) {
  if (at::hasCallbacks() || is_traced() || !attached()) return false;
  const bool usual =
      is_plain(input) && is_plain(output) && input.device() == device_ && output.device() == device_ &&
      input.dim() == 2 && input.sizes() == output.sizes() && input.is_contiguous() && output.is_contiguous() &&
      input.scalar_type() == output.scalar_type() &&
      (input.is_same(output) || at::get_overlap_status(input, output) == at::MemOverlapStatus::No) &&
      (input.scalar_type() == at::kFloat || input.scalar_type() == at::kHalf || input.scalar_type() == at::kBFloat16);
  if (!usual) return false;
  const auto bytes = int64_t(input.nbytes());
  if (strategy == Strategy::kAuto) strategy = bytes * size_ <= oneshot_bytes ? Strategy::kOneShot : Strategy::kTwoShot;
  const int64_t rows = input.size(0), row_bytes = rows == 0 ? 0 : bytes / rows;
  const int64_t needed =
      strategy == Strategy::kOneShot ? bytes * size_ : 2 * align_up(rows, int64_t{size_}) * row_bytes;
  if (needed > buffer_bytes_) return false;
  all_reduce_checked(input, output, strategy, pdl);
  return true;
}

void FunctionGroup::all_reduce_checked(const at::Tensor& input, const at::Tensor& output, Strategy strategy, bool pdl) {
  if (input.numel() == 0) return;
  if (size_ == 1) {
    if (!output.is_same(input)) run_below_autograd([&] { output.copy_(input); });
    return;
  }
  AllReduceRequest request;
  request.in = input.data_ptr();
  request.out = output.data_ptr();
  request.numel = input.numel();
  request.dtype = message_dtype(input);
  request.strategy = strategy;
  request.pdl = pdl;
  at_torch_boundary([&] { run(request); });
}

void FunctionGroup::fused_all_reduce(const FusedTensors& tensors, Strategy strategy, bool pdl) {
  FusedRequest request = fused_request(tensors, device_);
  if (!attached()) at_torch_boundary([] { fail_detached(); });
  if (tensors.input.numel() == 0) return;
  request.strategy = strategy;
  request.pdl = pdl;
  at_torch_boundary([&] { size_ == 1 ? run_alone(request) : run(request); });
}

void FunctionGroup::run_alone(const FusedRequest& request) {
  Run run;
  if (device_.is_cpu()) return mnnvl::run_alone(request, -1, run);
  const c10::DeviceGuard guard(device_);
  run.stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  mnnvl::run_alone(request, device_.index(), run);
}

void FunctionGroup::run(const Request& request) {
  Run run;
  run.timeout_ms = timeout_ms_;
  if (!device_.is_cpu()) {
    const auto reduce = [&](void* stream) {
      run.stream = stream;
      cuda_->transport()->run(request, run);
    };
    return cuda_->enqueue(/*async=*/false, reduce, [](const CudaQueue::Enqueued&) {});
  }
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!destroyed_, "mnnvl workspace: it has been destroyed");
  cpu_->run(request, run);
}

bool FunctionGroup::attached() {
  // Before the lock, which a thread that the child lacks may hold.
  at_torch_boundary([this] { birthplace_.check("workspace"); });
  if (cuda_) return cuda_->transport()->attached();
  std::lock_guard<std::mutex> lock(mutex_);
  return cpu_ ? cpu_->attached() : alone_attached_.load();
}

void FunctionGroup::check_same_ranks(const Exchange& exchange) const {
  at_torch_boundary([this] { birthplace_.check("workspace"); });
  TORCH_CHECK_VALUE(exchange.rank() == rank_ && exchange.size() == size_, "comm_backend: expected rank ", rank_, " of ",
                    size_, ", as when the workspace was made, got rank ", exchange.rank(), " of ", exchange.size());
}

int64_t FunctionGroup::detach(Exchange& exchange) {
  check_same_ranks(exchange);
  size_t bytes = 0;
  at_torch_boundary([&] {
    if (cuda_) bytes = cuda_->detach(exchange);
    std::lock_guard<std::mutex> lock(mutex_);
    if (cpu_) bytes = cpu_->detach(exchange);
  });
  alone_attached_ = false;
  return static_cast<int64_t>(bytes);
}

void FunctionGroup::attach(Exchange& exchange) {
  check_same_ranks(exchange);
  at_torch_boundary([&] {
    if (cuda_) cuda_->attach(exchange);
    std::lock_guard<std::mutex> lock(mutex_);
    if (cpu_) cpu_->attach(exchange);
  });
  alone_attached_ = true;
}

void FunctionGroup::destroy() {
  if (is_parents()) return;
  if (cuda_) cuda_->close();
  std::lock_guard<std::mutex> lock(mutex_);
  destroyed_ = true;
  cpu_.reset();
}

}  // namespace mnnvl
