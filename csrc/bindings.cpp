// The only pybind11 file: what Python sees of the compiled core. mnnvl_backend/_C.pyi is its stub.
#include <pybind11/chrono.h>
#include <torch/csrc/utils/pybind.h>

#include <torch/version.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>

#include <set>
#include <string>

#include "backend/errors.h"
#include "backend/function_group.h"
#include "backend/live_groups.h"
#include "backend/process_group.h"
#include "backend/store_exchange.h"
#include "kernels/kernels.h"
#include "memory/probe.h"
#include "system/deadline.h"
#include "tuning/choose.h"

#ifndef MNNVL_NVCC_VERSION
#define MNNVL_NVCC_VERSION ""
#endif

namespace py = pybind11;

namespace mnnvl {
namespace {

constexpr auto kDefaultTimeout = std::chrono::milliseconds(30 * 60 * 1000);  // c10d's

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

// The options of groups by their names in Python, where all of them are keyword arguments; the same for both kinds
// of group.
class Fields {
 public:
  explicit Fields(const py::kwargs& given) : given_(given) {}

  template <typename T>
  void read(const char* name, T& value) {
    known_.insert(name);
    if (given_.contains(name)) value = py::cast<T>(given_[name]);
  }
  template <typename T>
  void read_enum(const char* name, T& value) {
    int code = int(value);
    read(name, code);
    value = T(code);
  }
  void read(TransportOptions& options) {
    read("timeout_ms", options.timeout_ms);
    read("workspace_bytes", options.workspace_bytes);
    read_enum("strategy", options.strategy);
    read("cpu_oneshot_bytes", options.cpu_oneshot_bytes);
    read("cuda_oneshot_bytes", options.cuda_oneshot_bytes);
    read("pdl", options.pdl);
    read("max_ctas", options.max_ctas);
    read("async_max_ctas", options.async_max_ctas);
    read("multicast", options.multicast);
    read("multicast_forbidden", options.multicast_forbidden);
    read_enum("bootstrap", options.bootstrap);
    read("host_id", options.host_id);
    read("nccl_path", options.nccl_path);
  }
  void refuse_others() const {
    for (const auto& item : given_) {
      const std::string name = py::cast<std::string>(item.first);
      TORCH_CHECK_TYPE(known_.count(name), "unexpected keyword argument '", name, "'");
    }
  }

 private:
  const py::kwargs& given_;
  std::set<std::string> known_;
};

using Options = ProcessGroupMNNVL::Options;

c10::intrusive_ptr<Options> make_options(const py::kwargs& given) {
  auto options = c10::make_intrusive<Options>(kDefaultTimeout);
  options->transport.timeout_ms = options->timeout.count();
  Fields fields(given);
  fields.read(options->transport);
  fields.read("blocking_wait", options->blocking_wait);
  fields.read("global_ranks", options->global_ranks_in_group);
  fields.refuse_others();
  options->timeout = std::chrono::milliseconds(options->transport.timeout_ms);
  return options;
}

// Python's last reference may be the last one of all, and the destructor may wait for kernels or for another thread
// that wants the GIL.
template <typename T>
class NoGilPtr {
 public:
  NoGilPtr() = default;
  explicit NoGilPtr(T* object) : object_(c10::intrusive_ptr<T>::unsafe_steal_from_new(object)) {}
  NoGilPtr(c10::intrusive_ptr<T> object) : object_(std::move(object)) {}  // NOLINT: as pybind casts it
  NoGilPtr(const NoGilPtr&) = default;
  NoGilPtr(NoGilPtr&&) noexcept = default;
  NoGilPtr& operator=(const NoGilPtr&) = default;
  NoGilPtr& operator=(NoGilPtr&&) noexcept = default;
  ~NoGilPtr() {
    if (PyGILState_Check()) {
      py::gil_scoped_release no_gil;
      object_.reset();
    }
  }
  T* get() const { return object_.get(); }
  T& operator*() const { return *object_; }
  T* operator->() const { return object_.get(); }
  operator c10::intrusive_ptr<T>() const { return object_; }  // NOLINT

 private:
  c10::intrusive_ptr<T> object_;
};

}  // namespace
}  // namespace mnnvl

PYBIND11_DECLARE_HOLDER_TYPE(T, mnnvl::NoGilPtr<T>, true)

namespace mnnvl {
namespace {

py::list last_operations(const ProcessGroupMNNVL& group) {
  const std::vector<FlightRecorder::Operation> operations = [&] {
    py::gil_scoped_release no_gil;
    return group.recorder()->operations();
  }();
  py::list all;
  for (const FlightRecorder::Operation& one : operations) {
    const std::chrono::duration<double> time = one.begun.time_since_epoch();
    py::dict row(py::arg("sequence") = one.sequence, py::arg("operation") = one.name, py::arg("bytes") = one.bytes,
                 py::arg("dtype") = one.dtype, py::arg("device") = one.device, py::arg("state") = name(one.state),
                 py::arg("time") = time.count());
    row["async"] = one.async;
    all.append(row);
  }
  return all;
}

py::dict stats(const ProcessGroupMNNVL& group) {
  const ProcessGroupMNNVL::Stats all = group.stats();
  py::dict operations;
  for (const auto& [name, count] : all.operations) {
    operations[py::str(name)] =
        py::dict(py::arg("calls") = count.calls, py::arg("failed") = count.failed, py::arg("bytes") = count.bytes);
  }
  return py::dict(py::arg("operations") = operations, py::arg("algorithms") = all.algorithms,
                  py::arg("slept") = all.slept);
}

void bind_process_group(py::module_& m) {
  const py::object base = py::module_::import("torch._C._distributed_c10d").attr("Backend");
  // Read and copied by torch before it splits a group.
  const auto copy = [](const Options& self) { return c10::make_intrusive<Options>(self); };
  py::class_<Options, c10::intrusive_ptr<Options>>(m, "ProcessGroupOptions", base.attr("Options"))
      .def(py::init([](const py::kwargs& fields) { return make_options(fields); }))
      .def("__copy__", copy)
      .def("__deepcopy__", [copy](const Options& self, const py::dict& /*memo*/) { return copy(self); });
  py::class_<ProcessGroupMNNVL, NoGilPtr<ProcessGroupMNNVL>>(m, "ProcessGroupMNNVL", base)
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int size, const py::kwargs& fields) {
             auto options = make_options(fields);
             py::gil_scoped_release no_gil;
             return NoGilPtr<ProcessGroupMNNVL>(
                 c10::make_intrusive<ProcessGroupMNNVL>(store, rank, size, std::move(options)));
           }),
           py::arg("store"), py::arg("rank"), py::arg("size"))
      .def_property_readonly("options", &ProcessGroupMNNVL::options)
      // What newer torch binds on Backend, for older ones too.
      .def("_set_default_timeout", &ProcessGroupMNNVL::setTimeout, py::arg("timeout"))
      .def("_get_sequence_number_for_group", &ProcessGroupMNNVL::getSequenceNumberForGroup)
      .def("last_operations", &last_operations)
      .def("stats", &stats)
      .def("release_memory", &ProcessGroupMNNVL::release_memory, py::call_guard<py::gil_scoped_release>())
      .def("restore_memory", &ProcessGroupMNNVL::restore_memory, py::call_guard<py::gil_scoped_release>())
      .def("abort", &ProcessGroupMNNVL::abort, py::call_guard<py::gil_scoped_release>())
      .def("shutdown", &ProcessGroupMNNVL::shutdown, py::call_guard<py::gil_scoped_release>())
      // new_group() of torch calls this on the ranks outside a new group when the parent supports splitting; a split
      // here shares nothing with its parent, so there is nothing to do.
      .def("perform_nocolor_split", [](ProcessGroupMNNVL&, const py::object& /*device*/) {});
  m.def(
      "finish_groups", [](int64_t grace_ms) { LiveGroups::get().finish(std::chrono::milliseconds(grace_ms)); },
      py::arg("grace_ms"), py::call_guard<py::gil_scoped_release>());
  m.def("operations_of_all", [] { return LiveGroups::get().operations(); }, py::call_guard<py::gil_scoped_release>());
  m.def(
      "write_on_signal", [](int signum) { at_torch_boundary([&] { LiveGroups::write_on_signal(signum); }); },
      py::arg("signum"));
}

void fused_all_reduce(FunctionGroup& self, const at::Tensor& input, const FusedTensors::Maybe& residual,
                      const at::Tensor& gamma, const FusedTensors::Maybe& output, const at::Tensor& residual_out,
                      const FusedTensors::Maybe& quantised, const FusedTensors::Maybe& scales,
                      const FusedTensors::Maybe& scale, double scale_value, double epsilon, double weight_bias,
                      int quantization, int layout, int group, int strategy, bool pdl) {
  FusedTensors t{input, residual, gamma, output, residual_out, quantised, scales, scale};
  t.scale_value = scale_value;
  t.epsilon = epsilon;
  t.weight_bias = weight_bias;
  t.quantization = Quantization(quantization);
  t.layout = ScaleLayout(layout);
  t.group = group;
  self.fused_all_reduce(t, Strategy(strategy), pdl);
}

void bind_function_group(py::module_& m) {
  struct WithoutGil {
    void operator()(FunctionGroup* group) const {
      py::gil_scoped_release no_gil;
      if (!group->is_parents()) delete group;
    }
  };
  using Holder = std::unique_ptr<FunctionGroup, WithoutGil>;
  py::class_<FunctionGroup, Holder>(m, "FunctionGroup")
      .def(py::init([](py::object comm, int rank, int size, const std::string& device_type, int device_index,
                       int64_t buffer_size_bytes, const py::kwargs& given) {
             const at::Device device =
                 device_type == "cpu" ? at::Device(at::kCPU) : at::Device(at::kCUDA, at::DeviceIndex(device_index));
             TransportOptions options = make_options(given)->transport;
             // A process group's: here the buffer's size says it all, and every call brings its strategy.
             options.workspace_bytes = 0;
             options.strategy = Strategy::kAuto;
             options.pdl = false;
             options.cpu_oneshot_bytes.clear();
             options.cuda_oneshot_bytes.clear();
             PythonExchange exchange(std::move(comm), rank, size);
             py::gil_scoped_release no_gil;
             return Holder(new FunctionGroup(exchange, device, buffer_size_bytes, std::move(options)));
           }),
           py::arg("comm"), py::arg("rank"), py::arg("size"), py::arg("device_type"), py::arg("device_index"),
           py::arg("buffer_size_bytes"))
      .def_property_readonly("buffer_size_bytes", &FunctionGroup::buffer_bytes)
      .def(
          "all_reduce",
          [](FunctionGroup& self, const at::Tensor& input, at::Tensor output, int strategy, bool pdl) {
            self.all_reduce(input, output, Strategy(strategy), pdl);
          },
          py::arg("input"), py::arg("output"), py::arg("strategy"), py::arg("pdl"),
          py::call_guard<py::gil_scoped_release>())
      .def(
          "all_reduce_if_usual",
          [](FunctionGroup& self, const at::Tensor& input, const at::Tensor& output, int strategy, bool pdl,
             int64_t oneshot_bytes) {
            return self.all_reduce_if_usual(input, output, Strategy(strategy), pdl, oneshot_bytes);
          },
          py::arg("input"), py::arg("output"), py::arg("strategy"), py::arg("pdl"), py::arg("oneshot_bytes"),
          py::call_guard<py::gil_scoped_release>())
      .def("fused_all_reduce", &fused_all_reduce, py::arg("input"), py::arg("residual_in"), py::arg("gamma"),
           py::arg("output"), py::arg("residual_out"), py::arg("quant_out"), py::arg("scale_out"), py::arg("scale"),
           py::arg("scale_value"), py::arg("epsilon"), py::arg("weight_bias"), py::arg("quantization"),
           py::arg("layout"), py::arg("group_size"), py::arg("strategy"), py::arg("pdl"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "detach",
          [](FunctionGroup& self, py::object comm, int rank, int size) {
            PythonExchange exchange(std::move(comm), rank, size);
            py::gil_scoped_release no_gil;
            return self.detach(exchange);
          },
          py::arg("comm"), py::arg("rank"), py::arg("size"))
      .def(
          "attach",
          [](FunctionGroup& self, py::object comm, int rank, int size) {
            PythonExchange exchange(std::move(comm), rank, size);
            py::gil_scoped_release no_gil;
            self.attach(exchange);
          },
          py::arg("comm"), py::arg("rank"), py::arg("size"))
      // Without the GIL: who holds the group's mutex may want it.
      .def_property_readonly("attached",
                             py::cpp_function(&FunctionGroup::attached, py::call_guard<py::gil_scoped_release>()))
      .def("destroy", &FunctionGroup::destroy, py::call_guard<py::gil_scoped_release>());
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
                  py::arg("devices") = devices);
}

// The set-up's control plane, for flashinfer/control.py and tests. A time-out is a TimeoutError, so that who waits in
// Python can tell it from a peer's failure.
void bind_store_exchange(py::module_& m) {
  struct Bound {
    Bound(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size, int64_t timeout_ms)
        : exchange(std::move(store), std::move(prefix), rank, size,
                   std::chrono::milliseconds(clamp_timeout_ms(timeout_ms)), cancelled) {}
    std::atomic<bool> cancelled{false};
    StoreExchange exchange;
  };
  // Its destructor uses the store, which another thread may hold while it wants the GIL.
  struct WithoutGil {
    void operator()(Bound* bound) const {
      py::gil_scoped_release no_gil;
      delete bound;
    }
  };
  py::class_<Bound, std::unique_ptr<Bound, WithoutGil>>(m, "StoreExchange")
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, std::string prefix, int rank, int size,
                       int64_t timeout_ms) {
             TORCH_CHECK_VALUE(rank >= 0 && rank < size, "StoreExchange: rank: expected 0 to ", size - 1, ", got ",
                               rank);
             return std::unique_ptr<Bound, WithoutGil>(new Bound(store, std::move(prefix), rank, size, timeout_ms));
           }),
           py::arg("store"), py::arg("prefix"), py::arg("rank"), py::arg("size"), py::arg("timeout_ms"))
      .def(
          "all_gather",
          [](Bound& self, const std::string& data) {
            std::vector<std::string> all;
            try {
              py::gil_scoped_release no_gil;
              all = self.exchange.all_gather(data);
            } catch (const Error& error) {
              if (error.kind() != ErrorKind::kTimeout) throw_as_torch(error);
              PyErr_SetString(PyExc_TimeoutError, error.what());
              throw py::error_already_set();
            }
            py::list list;
            for (const std::string& item : all) list.append(py::bytes(item));
            return list;
          },
          py::arg("data"))
      .def(
          "give_up", [](Bound& self, const std::string& reason) { self.exchange.give_up(reason); }, py::arg("reason"),
          py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace mnnvl

PYBIND11_MODULE(_C, m) {
  using namespace mnnvl;
  bind_process_group(m);
  bind_function_group(m);
  bind_store_exchange(m);
  m.def("build_info", [] {
    py::dict info;
    const kernels::KernelTable* table = kernels::find();
    info["cuda"] = table != nullptr;
    info["archs"] = table != nullptr ? table->architectures : "";
    info["torch"] = TORCH_VERSION;
    info["nvcc"] = MNNVL_NVCC_VERSION;
    return info;
  });
  m.def("probe", &probe, py::arg("nccl_path"));
  m.def("choose_all_reduce", &choose, py::arg("world_size"), py::arg("numel"), py::arg("dtype"), py::arg("strategy"),
        py::arg("workspace_bytes"));
}
