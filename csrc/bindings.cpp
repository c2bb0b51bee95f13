// The only pybind11 file: what Python sees of the compiled core. mnnvl_backend/_C.pyi is its stub.
#include <torch/csrc/utils/pybind.h>

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <set>
#include <string>

#include "tuning/choose.h"
#include "backend/process_group.h"
#include "backend/function_group.h"
#include "kernels/kernels.h"
#include "memory/probe.h"

#ifndef MNNVL_NVCC_VERSION
#define MNNVL_NVCC_VERSION ""
#endif

namespace py = pybind11;

namespace mnnvl {
namespace {

// A caller's Python communicator with all_gather(bytes) -> list[bytes].
class PythonExchange final : public Exchange {
 public:
  PythonExchange(py::object comm, int rank, int size) : comm_(std::move(comm)), rank_(rank), size_(size) {}
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::vector<std::string> all_gather(const std::string& mine) override {
    py::gil_scoped_acquire gil;
    std::vector<std::string> all;
    for (const py::handle item : comm_.attr("all_gather")(py::bytes(mine))) all.push_back(py::cast<std::string>(item));
    TORCH_CHECK_VALUE(int(all.size()) == size_, "comm_backend: allgather: expected ", size_, " items, got ",
                      all.size());
    return all;
  }

 private:
  py::object comm_;
  int rank_, size_;
};

TransportOptions transport_options(int64_t timeout_ms, int strategy, bool multicast, int bootstrap, std::string host_id,
                                   std::string nccl_path) {
  TransportOptions options;
  options.timeout_ms = timeout_ms;
  options.strategy = Strategy(strategy);
  options.multicast = multicast;
  options.bootstrap = Bootstrap(bootstrap);
  options.host_id = std::move(host_id);
  options.nccl_path = std::move(nccl_path);
  return options;
}

void bind_process_group(py::module_& m) {
  const py::object base = py::module_::import("torch._C._distributed_c10d").attr("Backend");
  // Read and copied by torch before it splits a group.
  using Options = ProcessGroupMNNVL::Options;
  const auto copy = [](const Options& self) { return c10::make_intrusive<Options>(self); };
  py::class_<Options, c10::intrusive_ptr<Options>>(m, "ProcessGroupOptions", base.attr("Options"))
      .def("__copy__", copy)
      .def("__deepcopy__", [copy](const Options& self, const py::dict& /*memo*/) { return copy(self); });
  py::class_<ProcessGroupMNNVL, c10::intrusive_ptr<ProcessGroupMNNVL>>(m, "ProcessGroupMNNVL", base)
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, int64_t timeout_ms,
                       int64_t workspace_bytes, int strategy, bool multicast, int bootstrap, std::string host_id,
                       bool blocking_wait, std::string nccl_path) {
             auto options = c10::make_intrusive<ProcessGroupMNNVL::Options>(std::chrono::milliseconds(timeout_ms));
             options->transport = transport_options(timeout_ms, strategy, multicast, bootstrap, std::move(host_id),
                                                    std::move(nccl_path));
             options->transport.workspace_bytes = workspace_bytes;
             options->blocking_wait = blocking_wait;
             return c10::make_intrusive<ProcessGroupMNNVL>(store, rank, size, options);
           }),
           py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("timeout_ms"), py::arg("workspace_bytes"),
           py::arg("strategy"), py::arg("multicast"), py::arg("bootstrap"), py::arg("host_id"),
           py::arg("blocking_wait"), py::arg("nccl_path"), py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("options", &ProcessGroupMNNVL::options)
      .def("abort", &ProcessGroupMNNVL::abort, py::call_guard<py::gil_scoped_release>())
      .def("shutdown", &ProcessGroupMNNVL::shutdown, py::call_guard<py::gil_scoped_release>())
      // new_group() of torch calls this on the ranks outside a new group when the parent supports splitting; a split here
      // shares nothing with its parent, so there is nothing to do.
      .def("perform_nocolor_split", [](ProcessGroupMNNVL&, const py::object& /*device*/) {});
}

void bind_workspace(py::module_& m) {
  // A destructor may wait for kernels, and peers that are threads here need the GIL meanwhile.
  struct WithoutGil {
    void operator()(Workspace* workspace) const {
      py::gil_scoped_release no_gil;
      delete workspace;
    }
  };
  using Holder = std::unique_ptr<Workspace, WithoutGil>;
  py::class_<Workspace, Holder>(m, "Workspace")
      .def(py::init([](py::object comm, int rank, int size, const std::string& device_type, int device_index,
                       int64_t buffer_size_bytes, int64_t timeout_ms, bool multicast, int bootstrap,
                       std::string host_id, std::string nccl_path) {
             PythonExchange exchange(std::move(comm), rank, size);
             const at::Device device =
                 device_type == "cpu" ? at::Device(at::kCPU) : at::Device(at::kCUDA, at::DeviceIndex(device_index));
             py::gil_scoped_release no_gil;
             return Holder(new Workspace(exchange, device, buffer_size_bytes,
                                         transport_options(timeout_ms, int(Strategy::kAuto), multicast, bootstrap,
                                                           std::move(host_id), std::move(nccl_path))));
           }),
           py::arg("comm"), py::arg("rank"), py::arg("size"), py::arg("device_type"), py::arg("device_index"),
           py::arg("buffer_size_bytes"), py::arg("timeout_ms"), py::arg("multicast"), py::arg("bootstrap"),
           py::arg("host_id"), py::arg("nccl_path"))
      .def_property_readonly("buffer_size_bytes", &Workspace::buffer_bytes)
      .def(
          "all_reduce",
          [](Workspace& self, const at::Tensor& input, at::Tensor output, int strategy, bool pdl) {
            self.all_reduce(input, output, Strategy(strategy), pdl);
          },
          py::arg("input"), py::arg("output"), py::arg("strategy"), py::arg("pdl"),
          py::call_guard<py::gil_scoped_release>())
      .def("destroy", &Workspace::destroy, py::call_guard<py::gil_scoped_release>());
}

// The algorithm choice, for tests: (algorithm, blocks, threads, launch_elements).
py::tuple choose(int world_size, int64_t numel, int dtype, int strategy, int64_t workspace_bytes) {
  GroupShape shape;
  shape.world_size = world_size;
  shape.layout = WorkspaceLayout::for_group(workspace_bytes, world_size);
  const AllReduceChoice choice = choose_all_reduce(shape, numel, Dtype(dtype), Strategy(strategy));
  return py::make_tuple(name(choice.algorithm), choice.blocks, choice.threads, choice.launch_elements);
}

// What this machine offers: the fields of MachineProbe.
py::dict probe(const std::string& nccl_path) {
  const MachineProbe machine = [&] {
    py::gil_scoped_release no_gil;
    return probe_machine(nccl_path);
  }();
  py::list devices;
  for (const DeviceProbe& d : machine.devices) {
    devices.append(py::dict(
        py::arg("ordinal") = d.ordinal, py::arg("name") = d.name, py::arg("uuid") = d.uuid,
        py::arg("compute_capability") = d.compute_capability, py::arg("multiprocessors") = d.multiprocessors,
        py::arg("virtual_memory") = d.virtual_memory, py::arg("fd_handles") = d.fd_handles,
        py::arg("fabric_handles") = d.fabric_handles, py::arg("multicast") = d.multicast,
        py::arg("fabric_state") = d.fabric_state, py::arg("cluster_uuid") = d.cluster_uuid,
        py::arg("clique") = d.clique, py::arg("fabric_problem") = d.fabric_problem, py::arg("problem") = d.problem));
  }
  return py::dict(py::arg("driver_loaded") = machine.driver_loaded, py::arg("driver_problem") = machine.driver_problem,
                  py::arg("driver_version") = machine.driver_version, py::arg("nvml_loaded") = machine.nvml_loaded,
                  py::arg("nvml_problem") = machine.nvml_problem, py::arg("nccl_loaded") = machine.nccl_loaded,
                  py::arg("nccl_problem") = machine.nccl_problem, py::arg("nccl_version") = machine.nccl_version,
                  py::arg("imex_channels") = machine.imex_channels, py::arg("host_id") = machine.host_id,
                  py::arg("multicast_forbidden") = machine.multicast_forbidden, py::arg("devices") = devices);
}

}  // namespace
}  // namespace mnnvl

PYBIND11_MODULE(_C, m) {
  using namespace mnnvl;
  bind_process_group(m);
  bind_workspace(m);
  m.def("build_info", [] {
    py::dict info;
    info["cuda"] = kernels::available();
    info["archs"] = kernels::architectures();
    info["nvcc"] = MNNVL_NVCC_VERSION;
    return info;
  });
  m.def("probe", &probe, py::arg("nccl_path"));
  m.def("choose_all_reduce", &choose, py::arg("world_size"), py::arg("numel"), py::arg("dtype"), py::arg("strategy"),
        py::arg("workspace_bytes"));
}
