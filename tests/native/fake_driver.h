// The test double of libcuda: one object per simulated rank, over a shared World. Device memory is a memfd, a mapping
// is an mmap at a reserved address, a descriptor is a duplicate of the memfd, a fabric handle names the memfd through
// /proc/<pid>/fd and is refused outside the exporter's cluster and clique. Memory can't be touched before
// cuMemSetAccess. It keeps the real driver's rules where a mistake would only show on hardware: sizes are multiples
// of the granularity, a bind comes after all devices were added (the driver would block; here it fails), what is
// still mapped can't be unreserved.
#pragma once

#include <memory>

#include "driver/cuda_driver.h"
#include "native/fake_world.h"

namespace mnnvl::fake {

constexpr size_t kGranularity = 65536;  // of allocations
constexpr size_t kMulticastGranularity = 131072;  // larger, so that a set-up that ignores it is found out

// The driver of simulated rank `rank`, whose device has the ordinal `rank` and a current context.
std::unique_ptr<CudaDriver> make_driver(std::shared_ptr<World> world, int rank);

}  // namespace mnnvl::fake
