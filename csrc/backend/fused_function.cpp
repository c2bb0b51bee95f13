#include "backend/fused_function.h"

#include <c10/util/SmallVector.h>

#include "backend/tensors.h"
#include "common/math.h"
#include "protocol/fused_row.h"

namespace mnnvl {
namespace {

constexpr const char* kName = "trtllm_mnnvl_fused_allreduce";

template <typename... What>
void expect(bool good, const char* argument, const What&... what) {
  TORCH_CHECK_VALUE(good, "mnnvl ", kName, ": ", argument, ": expected ", what...);
}

void check_here(const at::Tensor& tensor, at::Device device, const char* argument) {
  check_tensor(tensor, kName, argument);
  expect(tensor.device() == device, argument, "a tensor on ", device, ", got one on ", tensor.device());
}

void check_like(const FusedTensors::Maybe& tensor, const at::Tensor& input, const char* argument) {
  if (!tensor) return;
  check_here(*tensor, input.device(), argument);
  expect(tensor->sizes() == input.sizes() && tensor->scalar_type() == input.scalar_type() && tensor->is_contiguous(),
         argument, "a contiguous tensor of the input's shape and dtype, ", input.sizes(), " ", input.scalar_type(),
         ", got ", tensor->sizes(), " ", tensor->scalar_type());
}

// What is written or read, from the tensor's first element on: `bytes`, in elements of `alignment`.
void check_room(const FusedTensors::Maybe& tensor, int64_t bytes, int alignment, at::Device device,
                const char* argument) {
  expect(tensor.has_value(), argument, "a tensor of at least ", bytes, " bytes, got None");
  check_here(*tensor, device, argument);
  const int64_t offset = tensor->storage_offset() * tensor->element_size();
  const int64_t room = int64_t(tensor->storage().nbytes()) - offset;
  expect(room >= bytes, argument, "at least ", bytes, " bytes, got ", room);
  expect(reinterpret_cast<uintptr_t>(tensor->data_ptr()) % uintptr_t(alignment) == 0, argument, "memory aligned to ",
         alignment, " bytes");
}

int64_t quantised_bytes(const RowWork& w) {
  return w.quantization == Quantization::kNVFloat4 ? w.rows * w.hidden / 2 : w.rows * w.hidden;
}

int64_t scales_bytes(const RowWork& w) {
  switch (w.quantization) {
    case Quantization::kNone:
    case Quantization::kFloat8: return 0;
    case Quantization::kDynamicFloat8: return w.rows * int64_t(sizeof(float));
    case Quantization::kGroupFloat8: return ((fused::group_words(w) - 1) * align_up(w.rows, 4) + w.rows) * 4;
    case Quantization::kNVFloat4: break;
  }
  const int64_t blocks = fused::nv_blocks(w);
  return w.layout == ScaleLayout::kLinear ? w.rows * blocks : align_up(w.rows, 128) * align_up(blocks, 4);
}

// Outputs that are read as inputs must be exactly those, element by element; nothing else may meet. By the bytes that
// are touched, which of scales can be more than the view says.
void check_overlaps(const FusedTensors& t, const RowWork& w) {
  struct Range {
    const char* name;
    const at::Tensor* tensor;
    int64_t bytes;
    bool like_input;
  };
  using Ranges = c10::SmallVector<Range, 4>;  // a call allocates nothing for it
  Ranges inputs, outputs;
  const auto add = [](Ranges& to, const char* name, const at::Tensor* tensor, int64_t bytes, bool like) {
    if (tensor != nullptr && bytes > 0) to.push_back({name, tensor, bytes, like});
  };
  const auto given = [](const FusedTensors::Maybe& tensor) { return tensor ? &*tensor : nullptr; };
  const int64_t bytes = int64_t(t.input.nbytes());
  add(inputs, "input", &t.input, bytes, true);
  add(inputs, "residual_in", given(t.residual), bytes, true);
  add(inputs, "gamma", &t.gamma, int64_t(t.gamma.nbytes()), false);
  add(inputs, "output_scale", given(t.scale), int64_t(sizeof(float)), false);
  add(outputs, "residual_out", &t.residual_out, bytes, true);
  add(outputs, "output", given(t.output), bytes, true);
  add(outputs, "quant_out", given(t.quantised), w.quantization == Quantization::kNone ? 0 : quantised_bytes(w), false);
  add(outputs, "scale_out", given(t.scales), scales_bytes(w), false);
  const auto check = [](const Range& output, const Range& other, bool may_be_same) {
    const auto* a = static_cast<const std::byte*>(output.tensor->data_ptr());
    const auto* b = static_cast<const std::byte*>(other.tensor->data_ptr());
    if (may_be_same && a == b) return;
    expect(a + output.bytes <= b || b + other.bytes <= a, output.name, "memory apart from ", other.name,
           may_be_same ? ", or exactly its" : "", ", got memory that overlaps it");
  };
  for (size_t i = 0; i < outputs.size(); ++i) {
    for (const Range& input : inputs) check(outputs[i], input, outputs[i].like_input && input.like_input);
    for (size_t j = 0; j < i; ++j) check(outputs[i], outputs[j], false);
  }
}

}  // namespace

FusedRequest fused_request(const FusedTensors& t, at::Device device) {
  check_here(t.input, device, "input");
  expect(t.input.dim() == 2 && t.input.is_contiguous(), "input", "a contiguous tensor [num_tokens, hidden_dim], got ",
         t.input.sizes(), " with strides ", t.input.strides());
  FusedRequest request;
  RowWork& work = request.work;
  work.rows = t.input.size(0);
  work.hidden = t.input.size(1);
  work.dtype = message_dtype(t.input);
  expect(is_float_sum(work.dtype, ReduceOp::kSum), "input", "dtype float32, float16 or bfloat16, got ",
         t.input.scalar_type());
  check_like(t.residual, t.input, "residual_in");
  check_like(t.output, t.input, "output");
  check_like(t.residual_out, t.input, "residual_out");
  check_here(t.gamma, device, "gamma");
  work.gamma_is_float32 = t.gamma.scalar_type() == at::kFloat;
  expect(t.gamma.numel() == work.hidden && t.gamma.is_contiguous() &&
             (work.gamma_is_float32 || t.gamma.scalar_type() == t.input.scalar_type()),
         "gamma", work.hidden, " contiguous elements of the input's dtype or float32, got ", t.gamma.sizes(), " ",
         t.gamma.scalar_type());
  work.quantization = t.quantization;
  work.layout = t.layout;
  work.group = t.group;
  if (work.quantization == Quantization::kNVFloat4) {
    expect(work.hidden % fused::kNVBlock == 0 && work.dtype != Dtype::kFloat32, "input",
           "for NVFP4 float16 or bfloat16 rows of a multiple of ", fused::kNVBlock, " elements, got ", t.input.sizes(),
           " ", t.input.scalar_type());
  }
  if (work.quantization == Quantization::kGroupFloat8) {
    expect(work.group > 0 && work.hidden % work.group == 0, "group_size", "a divisor of ", work.hidden, ", got ",
           work.group);
  }
  if (work.quantization != Quantization::kNone) {
    check_room(t.quantised, quantised_bytes(work), 1, device, "quant_out");
    expect(t.quantised->is_contiguous(), "quant_out", "a contiguous tensor, got strides ", t.quantised->strides());
  }
  if (scales_bytes(work) != 0) {
    const bool words = work.quantization != Quantization::kNVFloat4;
    check_room(t.scales, scales_bytes(work), words ? int(sizeof(float)) : 1, device, "scale_out");
  }
  if (t.scale) {
    check_room(t.scale, int64_t(sizeof(float)), int(sizeof(float)), device, "output_scale");
    expect(t.scale->scalar_type() == at::kFloat && t.scale->numel() > 0, "output_scale", "float32, got ",
           t.scale->scalar_type());
  }
  check_overlaps(t, work);
  const auto data = [](const FusedTensors::Maybe& tensor) { return tensor ? tensor->data_ptr() : nullptr; };
  request.in = t.input.data_ptr();
  work.residual = data(t.residual);
  work.gamma = t.gamma.data_ptr();
  work.epsilon = float(t.epsilon);
  work.weight_bias = float(t.weight_bias);
  work.residual_out = t.residual_out.data_ptr();
  work.norm = data(t.output);
  work.quantised = data(t.quantised);
  work.scales = data(t.scales);
  work.scale = static_cast<const float*>(data(t.scale));
  work.scale_value = float(t.scale_value);
  return request;
}

}  // namespace mnnvl
