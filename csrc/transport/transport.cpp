#include "transport/transport.h"

#include "bootstrap/agreement.h"
#include "bootstrap/record.h"
#include "cpu/fused_rows.h"
#include "kernels/kernels.h"
#include "transport/cuda_launch.h"

namespace mnnvl {

void Transport::exchange(const ExchangeRequest& /*request*/, const Run& /*run*/) {
  fail(ErrorKind::kUnsupported, "mnnvl: messages between CPU tensors go through the messenger");
}

void prepare_alone(int device) {
  if (kernels::find() != nullptr) kernels::table().host.load_all(device);
}

void run_alone(const FusedRequest& request, int device, const Run& run) {
  if (device < 0) return cpu::run_alone(request);
  launch_alone(request, run.stream);
}

void fail_detached() {
  fail(ErrorKind::kUnsupported,
       "mnnvl: the workspace's memory is not attached: it was given back, and every rank has to restore it "
       "before the next call");
}

int64_t tuned(const std::map<int, int64_t>& oneshot_bytes, int world_size) {
  const auto row = oneshot_bytes.find(world_size);
  return row == oneshot_bytes.end() ? -1 : row->second;
}

void agree_on_options(Exchange& exchange, const TransportOptions& options, int64_t oneshot_bytes) {
  const std::string mine =
      str("strategy ", int(options.strategy), ", workspace_bytes ", options.workspace_bytes, ", buffer_size_in_bytes ",
          2 * options.stage_bytes, options.max_ctas == 0 ? "" : str(", max_ctas ", options.max_ctas),
          oneshot_bytes < 0 ? "" : str(", MNNVL_TUNING with oneshot_bytes ", oneshot_bytes));
  const std::vector<std::string> all = exchange.all_gather(mine);
  for (int r = 1; r < exchange.size(); ++r) {
    if (all[r] != all[0]) {
      fail(ErrorKind::kInvalidArgument, "mnnvl: the ranks' options differ: rank 0 has ", readable(all[0]), "; rank ", r,
           " has ", readable(all[r]));
    }
  }
}

}  // namespace mnnvl
