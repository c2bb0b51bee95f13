// The table of kernels of the native tests: those whose source runs under emulation. Stands in for csrc/kernels/host/.
#include "kernels/kernels.h"

namespace mnnvl::kernels {

namespace rows {
extern const KernelTable::Row<AllReduceParams> oneshot_allreduce, twoshot_allreduce;
extern const KernelTable::Row<ReduceScatterParams> reduce_scatter;
extern const KernelTable::Row<FusedParams> oneshot_fused, twoshot_fused;
extern const KernelTable::Row<ExchangeParams> exchange;
extern const KernelTable::Row<ReduceParams> reduce;
}  // namespace rows

const KernelTable& table() {
  static const KernelTable table = [] {
    KernelTable made{};
    made.oneshot_allreduce = rows::oneshot_allreduce;
    made.twoshot_allreduce = rows::twoshot_allreduce;
    made.reduce_scatter = rows::reduce_scatter;
    made.oneshot_fused = rows::oneshot_fused;
    made.twoshot_fused = rows::twoshot_fused;
    made.exchange = rows::exchange;
    made.reduce = rows::reduce;
    return made;
  }();
  return table;
}

const KernelTable* find() { return &table(); }

}  // namespace mnnvl::kernels
