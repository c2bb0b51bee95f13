// The tensors of a fused all-reduce: what the standalone functions hand over, checked and made a request.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "protocol/requests.h"

namespace mnnvl {

struct FusedTensors {
  using Maybe = std::optional<at::Tensor>;
  at::Tensor input;  // [rows, hidden], contiguous, as are those like it
  Maybe residual;    // like `input`
  at::Tensor gamma;  // [hidden], of the input's dtype or float32
  Maybe output;      // like `input`: the norm
  at::Tensor residual_out;  // like `input`
  Maybe quantised;          // as RowWork's
  Maybe scales;             // as RowWork's; its storage from its offset on
  Maybe scale;              // float32, the first element counts
  double scale_value = 1, epsilon = 0, weight_bias = 0;
  Quantization quantization = Quantization::kNone;
  ScaleLayout layout = ScaleLayout::kLinear;
  int group = 0;
};

// ValueError for what would read or write other memory, or is on another device. The callers in Python have looked at
// all of it, in the words of their arguments; but an operator can be called by anybody.
FusedRequest fused_request(const FusedTensors& tensors, at::Device device);

}  // namespace mnnvl
