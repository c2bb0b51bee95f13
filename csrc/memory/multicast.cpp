#include "memory/multicast.h"

#include <algorithm>

#include "bootstrap/agreement.h"
#include "bootstrap/record.h"
#include "common/first_failure.h"
#include "memory/capabilities.h"

namespace mnnvl {
namespace {

// The plan has looked already; this stands before each way to the driver.
void check_allowed(const SetupContext& context) {
  if (!context.multicast_forbidden.empty())
    fail(ErrorKind::kUnsupported, "multicast is switched off by ", context.multicast_forbidden);
}

}  // namespace

size_t multicast_granularity(const SetupContext& context, size_t size) {
  std::vector<std::string> answers =
      agree_gather(context.exchange, "asking for the multicast granularity", context.where, [&] {
        check_allowed(context);
        CUmulticastObjectProp prop{};
        prop.numDevices = static_cast<unsigned int>(context.size());
        prop.size = size;
        prop.handleTypes = driver_handle_type(context.handle);
        size_t granularity = 0;
        check(context.driver, context.driver.multicast_get_granularity(&granularity, &prop, kGranularityMinimum),
              "cuMulticastGetGranularity");
        check_granularity(granularity, context.rank());
        return RecordWriter().put(static_cast<uint64_t>(granularity)).bytes();
      });
  uint64_t largest = 1;
  for (int rank = 0; rank < context.size(); ++rank) {
    uint64_t granularity = 0;
    RecordReader(answers[rank], rank).get(granularity).finish();
    check_granularity(granularity, rank);
    largest = std::max(largest, granularity);
  }
  return largest;
}

void Multicast::attach(const SetupContext& context, const Allocation& memory, size_t size, size_t alignment) {
  const CudaDriver& driver = context.driver;

  // Nobody creates before everybody has looked at the switches once more.
  agree(context.exchange, "checking the multicast switches", context.where, [&] { check_allowed(context); });

  std::vector<SharedHandle> handles =
      exchange_handles(context, /*nccl=*/nullptr, "the multicast object", [&]() -> const Allocation* {
        if (context.rank() != 0) return nullptr;
        check_allowed(context);
        object_ = Allocation::create_multicast(driver, context.handle, size, context.size());
        return &object_;
      });
  agree(context.exchange, "importing the multicast object", context.where, [&] {
    if (context.rank() != 0) object_ = handles[0].import(driver);
    if (object_.handle() == 0) fail(ErrorKind::kSystem, "the import succeeded but gave no multicast object");
  });
  handles.clear();

  agree(context.exchange, "adding devices to the multicast object", context.where, [&] {
    CUdevice device = 0;
    check(driver, driver.device_get(&device, context.device), "cuDeviceGet");
    check(driver, driver.multicast_add_device(object_.handle(), device), "cuMulticastAddDevice", " of device ",
          context.device);
  });
  agree(context.exchange, "binding memory to the multicast object", context.where,
        [&] { binding_ = std::make_unique<MulticastBinding>(driver, context.device, object_, memory, size); });
  agree(context.exchange, "mapping the multicast object", context.where, [&] {
    if (range_ == nullptr) range_ = std::make_unique<AddressRange>(driver, size, alignment);
    mapping_ = std::make_unique<Mapping>(*range_, context.device, object_);
  });
}

void Multicast::detach() {
  FirstFailure failure;
  if (mapping_ != nullptr) failure.guard([&] { mapping_->release(); });
  if (binding_ != nullptr) failure.guard([&] { binding_->release(); });
  failure.guard([&] { object_.release(); });
  mapping_.reset();
  binding_.reset();
  failure.check();
}

}  // namespace mnnvl
