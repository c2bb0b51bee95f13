#include "backend/function_group.h"

#include <ATen/MemoryOverlap.h>
#include <c10/core/DeviceGuard.h>

#include "backend/errors.h"
#include "backend/tensors.h"
#include "backend/work.h"
#include "common/math.h"

namespace mnnvl {

Workspace::Workspace(Exchange& exchange, at::Device device, int64_t buffer_bytes, TransportOptions options)
    : device_(device), buffer_bytes_(buffer_bytes), size_(exchange.size()) {
  TORCH_CHECK_VALUE(buffer_bytes > 0, "mnnvl workspace: buffer_size_in_bytes: expected more than 0, got ",
                    buffer_bytes);
  TORCH_CHECK_VALUE(size_ >= 1 && size_ <= kMaxWorldSize, "mnnvl workspace: world size: expected 1 to ", kMaxWorldSize,
                    ", got ", size_);
  if (size_ == 1) return;
  at_torch_boundary([&] {
    if (device.is_cpu()) {
      transport_ = make_cpu_transport(exchange, options);
    } else {
      const c10::DeviceGuard guard(device);
      options.stage_bytes = ceil_div(buffer_bytes, 2);
      transport_ = make_cuda_transport(exchange, device.index(), options);
    }
  });
}

void Workspace::all_reduce(const at::Tensor& input, at::Tensor& output, Strategy strategy, bool pdl) {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(!destroyed_, "mnnvl workspace: it has been destroyed");
  check_dense(input, "trtllm_mnnvl_allreduce", "input");
  check_dense(output, "trtllm_mnnvl_allreduce", "output");
  check_same(output, input, "trtllm_mnnvl_allreduce", "output");
  TORCH_CHECK_VALUE(input.device() == device_, "mnnvl trtllm_mnnvl_allreduce: input: expected a tensor on ", device_,
                    ", got one on ", input.device());
  TORCH_CHECK_VALUE(input.sizes() == output.sizes() && input.strides() == output.strides(),
                    "mnnvl trtllm_mnnvl_allreduce: output: expected sizes ", input.sizes(), " and strides ",
                    input.strides(), " like the input, got ", output.sizes(), " and ", output.strides());
  at::assert_no_partial_overlap(input, output);
  const std::optional<Dtype> dtype = kernel_dtype(input);
  TORCH_CHECK_TYPE(dtype, "mnnvl trtllm_mnnvl_allreduce: input: expected dtype float32, float16 or bfloat16, got ",
                   input.scalar_type());
  if (input.numel() == 0) return;
  if (size_ == 1) {
    if (!output.is_same(input)) output.copy_(input);
    return;
  }
  at_torch_boundary([&] {
    const auto reduce = [&](void* native) {
      transport_->all_reduce(input.data_ptr(), output.data_ptr(), input.numel(), *dtype, ReduceOp::kSum, strategy, pdl,
                             native);
    };
    if (device_.is_cpu()) return reduce(nullptr);
    const c10::DeviceGuard guard(device_);
    const c10::Stream stream = current_stream(device_);
    stream_order_.enter(stream);
    reduce(stream.native_handle());
    auto end = std::make_shared<c10::Event>(stream.device_type());
    end->record(stream);
    stream_order_.leave(stream, std::move(end));
  });
}

void Workspace::destroy() {
  std::lock_guard<std::mutex> lock(mutex_);
  destroyed_ = true;
  transport_.reset();
}

}  // namespace mnnvl
