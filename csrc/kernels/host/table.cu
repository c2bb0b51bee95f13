// The table of kernels, put together.
#include <mutex>
#include <set>

#include "kernels/host/launch.cuh"
#include "kernels/host/runtime.cuh"

namespace mnnvl::kernels {

// One line a kernel: the name of its row in KernelTable, and of the object that its .cu file defines in `rows`.
#define MNNVL_FOR_EACH_KERNEL(X) \
  X(oneshot_allreduce) \
  X(twoshot_allreduce) \
  X(reduce_scatter) \
  X(oneshot_fused) \
  X(twoshot_fused) \
  X(exchange) \
  X(reduce)

namespace rows {
#define MNNVL_DECLARE(row) extern const decltype(KernelTable::row) row;
MNNVL_FOR_EACH_KERNEL(MNNVL_DECLARE)
#undef MNNVL_DECLARE
}  // namespace rows

namespace {

#define MNNVL_COUNT(row) +1
static_assert(offsetof(KernelTable, host) == (0 MNNVL_FOR_EACH_KERNEL(MNNVL_COUNT)) * sizeof(KernelTable::exchange),
              "a row of KernelTable is missing from MNNVL_FOR_EACH_KERNEL");
#undef MNNVL_COUNT

// Once a device and process.
void load_all(int device) {
  static std::mutex mutex;
  static std::set<int> loaded;
  std::lock_guard<std::mutex> lock(mutex);
  if (loaded.count(device) != 0) return;
  const CurrentDevice current(device);
#define MNNVL_LOAD(row) rows::row.load();
  MNNVL_FOR_EACH_KERNEL(MNNVL_LOAD)
#undef MNNVL_LOAD
  load_probes();
  loaded.insert(device);
}

KernelTable make_table() {
  KernelTable table{};
#define MNNVL_TAKE(row) table.row = rows::row;
  MNNVL_FOR_EACH_KERNEL(MNNVL_TAKE)
#undef MNNVL_TAKE
  table.host = HostFunctions{load_all,    allocate_mailbox, free_mailbox, synchronize_device,
                             take_stream, give_back_stream, capture_id,   beside_captures};
  table.device_ops = kProbes;
  table.architectures = MNNVL_ARCHITECTURES;
  return table;
}

}  // namespace

// Built at the first call: the rows are constants, so the order of static initialisation doesn't matter.
const KernelTable& table() {
  static const KernelTable table = make_table();
  return table;
}

const KernelTable* find() { return &table(); }

}  // namespace mnnvl::kernels
