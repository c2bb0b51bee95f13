#include "backend/stream_order.h"

#include <c10/core/Event.h>

#include "kernels/launch.h"

namespace mnnvl {
namespace {

void chain(c10::Stream from, c10::Stream to) {
  if (from == to) return;
  c10::Event event(from.device_type());
  event.record(from);
  to.wait(event);
}

}  // namespace

bool StreamOrder::enter(c10::Stream stream) {
  const std::optional<uint64_t> capture = kernels::capture_id(stream.native_handle());
  if (!capture) {
    if (eager_) chain(*eager_, stream);
    eager_ = stream;
    return false;
  }
  if (captured_ && captured_->id == *capture) chain(captured_->stream, stream);
  captured_ = Captured{*capture, stream};
  return true;
}

}  // namespace mnnvl
