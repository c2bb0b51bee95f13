// The test double of libnccl: communicators between the simulated ranks of one World. Like the real one in
// non-blocking mode, every call returns at once and completion is asked for; and it refuses two ranks on one device.
#pragma once

#include <memory>
#include <string>

#include "driver/nccl.h"
#include "native/fake_world.h"

namespace mnnvl::fake {

std::unique_ptr<NcclLibrary> make_nccl(std::shared_ptr<World> world, int rank);

// For the driver's cuStreamQuery: delivers an all-gather to which all ranks have contributed. The world's mutex is
// held.
bool finish_all_gather(World::Pending* pending);

}  // namespace mnnvl::fake
