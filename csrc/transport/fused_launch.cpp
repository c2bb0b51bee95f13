// A fused all-reduce as launches, each of as many rows as the workspace carries.
#include "common/error.h"
#include "kernels/kernels.h"
#include "protocol/fused_row.h"
#include "system/float_environment.h"
#include "transport/cuda_launch.h"

namespace mnnvl {
namespace {

constexpr int64_t kMaxRowBytes = int64_t{1} << 31;
constexpr int64_t kMaxAloneRows = 256;                 // at once
constexpr int64_t kMaxAloneLaunch = int64_t{1} << 30;  // rows

// Of a row, which the kernels count in 32 bits.
int64_t row_packs(const RowWork& work) {
  const int64_t bytes = work.hidden * element_size(work.dtype);
  if (bytes > kMaxRowBytes) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: fused all_reduce: a row of ", work.hidden, " elements is larger than ",
         kMaxRowBytes, " bytes");
  }
  return ceil_div(bytes, kPackBytes);
}

// The tensors of a request from this row on, but its scales.
FusedRequest from_row(FusedRequest request, int64_t row) {
  RowWork& work = request.work;
  const int64_t bytes = row * work.hidden * element_size(work.dtype);
  const auto move = [](auto*& tensor, int64_t by) {
    if (tensor != nullptr) tensor = static_cast<std::byte*>(const_cast<void*>(tensor)) + by;
  };
  move(request.in, bytes);
  move(work.residual, bytes);
  move(work.residual_out, bytes);
  move(work.norm, bytes);
  move(work.quantised, row * work.hidden / (work.quantization == Quantization::kNVFloat4 ? 2 : 1));
  return request;
}

bool is_packed(const FusedRequest& request) {
  const RowWork& work = request.work;
  auto all = static_cast<uintptr_t>(work.hidden * element_size(work.dtype));
  const void* const tensors[] = {request.in, work.residual, work.gamma, work.residual_out, work.norm, work.quantised};
  for (const void* p : tensors) all |= reinterpret_cast<uintptr_t>(p);
  return all % kPackBytes == 0;
}

void launch_rows(const kernels::KernelTable::Row<kernels::FusedParams>& kernel, const DeviceGroup& group,
                 const FusedRequest& request, const FusedChoice& choice, void* stream) {
  const RowWork& work = request.work;
  kernels::Launch shape;
  shape.threads = choice.threads;
  shape.cluster = choice.cluster;
  shape.pdl = request.pdl;
  shape.stream = stream;
  kernels::FusedParams params;
  params.group = group;
  params.packs = int(row_packs(work));
  params.row_bytes = uint32_t(work.hidden * element_size(work.dtype));
  while (1 << params.cluster_shift < choice.cluster) ++params.cluster_shift;
  while (1 << params.team_shift < choice.team) ++params.team_shift;
  {
    const FloatEnvironment ieee;  // rounded to nearest, whatever the caller's thread does
    params.inverse_hidden = fused::inverse(float(work.hidden));
    params.inverse_hidden_wide = fused::inverse(double(work.hidden));
  }
  params.blocks = choice.blocks;
  for (int64_t row = 0; row < work.rows; row += choice.launch_rows) {
    const FusedRequest rest = from_row(request, row);
    params.in = rest.in;
    params.work = rest.work;
    params.first_row = row;
    params.rows = int(min64(choice.launch_rows, work.rows - row));
    params.packed = is_packed(rest);
    kernel.launch(params, shape);
  }
}

}  // namespace

void launch_fused(const LaunchContext& context, const FusedRequest& request) {
  const Strategy strategy = request.strategy == Strategy::kAuto ? context.strategy : request.strategy;
  const FusedChoice choice = choose_fused(context.shape, request.work.rows, row_packs(request.work), strategy);
  if (choice.launch_rows == 0) {
    fail(ErrorKind::kInvalidArgument, "mnnvl: fused all_reduce: a row of ", request.work.hidden,
         " elements is larger than the workspace");
  }
  const kernels::KernelTable& table = kernels::table();
  const auto& kernel = choice.algorithm == Algorithm::kOneShotLamport ? table.oneshot_fused : table.twoshot_fused;
  launch_rows(kernel, context.group, request, choice, context.stream);
}

void launch_alone(const FusedRequest& request, void* stream) {
  FusedChoice choice;
  choice.launch_rows = kMaxAloneLaunch;
  static_cast<FusedShape&>(choice) =
      choose_fused_shape(request.work.rows, row_packs(request.work), GroupShape{}.multiprocessors);
  choice.blocks = int(min64(request.work.rows, kMaxAloneRows)) * choice.cluster;
  if (request.work.rows <= choice.blocks) choice.team = 0;  // a row a block
  DeviceGroup group{};
  group.world_size = 1;
  launch_rows(kernels::table().oneshot_fused, group, request, choice, stream);
}

}  // namespace mnnvl
