#include "backend/stream_order.h"

#include "backend/errors.h"
#include "kernels/kernels.h"

namespace mnnvl {

bool StreamOrder::enter(c10::Stream stream) {
  current_id_ = at_torch_boundary([&] { return kernels::table().host.capture_id(stream.native_handle()); });
  const bool chained = !current_id_ || current_id_ == captured_id_;
  const std::optional<Last>& last = current_id_ ? captured_ : eager_;
  if (chained && last && last->stream != stream) stream.wait(*last->end);
  return current_id_.has_value();
}

void StreamOrder::leave(c10::Stream stream, std::shared_ptr<c10::Event> end) {
  (current_id_ ? captured_ : eager_) = Last{stream, std::move(end)};
  if (current_id_) captured_id_ = current_id_;
}

}  // namespace mnnvl
