#include "backend/collectives/collectives.h"

namespace mnnvl::collectives {
namespace {

constexpr const char* kSend = "mnnvl:send";
constexpr const char* kRecv = "mnnvl:recv";

// A Call of one message. `peer` has been checked, or is Message::kAnySource.
Call one_message(c10d::OpType type, const char* title, const Tensors& tensors, int peer, int tag) {
  const char* name = public_name(title);
  const at::Tensor& tensor = only_dense_tensor(tensors, name);
  TORCH_CHECK_VALUE(tag >= 0, "mnnvl ", name, ": tag: expected 0 or more, got ", tag);
  c10d::BarrierOptions options;  // c10d gives messages no options
  options.asyncOp = true;        // on a stream of its own, beside collectives
  Call call = make_call(type, title, tensor.device(), options);
  call.inputs = call.outputs = tensors;
  Message message;
  message.data = tensor.data_ptr();
  message.bytes = int64_t(tensor.nbytes());
  message.peer = peer;
  message.tag = tag;
  message.dtype = message_dtype(tensor);
  (type == c10d::OpType::SEND ? call.sends : call.receives).push_back(message);
  return call;
}

void check_peer(GroupView group, const char* title, const char* argument, int peer) {
  const char* name = public_name(title);
  TORCH_CHECK_VALUE(peer >= 0 && peer < group.size, "mnnvl ", name, ": ", argument, ": expected a rank of 0 to ",
                    group.size - 1, " in the group, got ", peer);
  TORCH_CHECK_VALUE(peer != group.rank || group.coalescing, "mnnvl ", name, ": ", argument,
                    ": expected another rank than this one, got ", peer,
                    ", a message to oneself, which only a batch can hold, beside its other end");
}

}  // namespace

Call send(GroupView group, Tensors& tensors, int destination, int tag) {
  check_peer(group, kSend, "dst", destination);
  return one_message(c10d::OpType::SEND, kSend, tensors, destination, tag);
}

Call recv(GroupView group, Tensors& tensors, int source, int tag) {
  check_peer(group, kRecv, "src", source);
  return one_message(c10d::OpType::RECV, kRecv, tensors, source, tag);
}

Call recv_any_source(GroupView group, Tensors& tensors, int tag) {
  Call call = one_message(c10d::OpType::RECVANYSOURCE, kRecv, tensors, Message::kAnySource, tag);
  call.title = "mnnvl:recvAnySource";  // as torch's own backends call it in profiles; errors say recv
  TORCH_CHECK(call.device.is_cpu(), "mnnvl recv: src: expected a rank for a tensor on ", call.device,
              ", got none; messages from any source are for CPU tensors only");
  TORCH_CHECK_VALUE(group.size > 1, "mnnvl recv: src: expected a group of several ranks, got one");
  return call;
}

}  // namespace mnnvl::collectives
