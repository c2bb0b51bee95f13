// The table of kernels of the native tests: those whose source runs under emulation. Stands in for csrc/kernels/host/.
#include "kernels/channel/exchange.cu"

namespace mnnvl::kernels {

const KernelTable& table() {
  static const KernelTable table = [] {
    KernelTable made{};
    made.exchange = rows::exchange;
    return made;
  }();
  return table;
}

const KernelTable* find() { return &table(); }

}  // namespace mnnvl::kernels
