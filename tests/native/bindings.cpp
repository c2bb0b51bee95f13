// The Python module of the test double, mnnvl_native: built by tests (build.py), never shipped. Keyword arguments are
// FakeSetupConfig's fields, the result's keys FakeSetupResult's.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <string>
#include <type_traits>

#include "native/fake_setup.h"

namespace py = pybind11;

namespace mnnvl {
namespace {

FakeSetupConfig fake_config(const py::kwargs& kwargs) {
  FakeSetupConfig config;
  std::set<std::string> known;
  const auto field = [&](const char* name, auto& value) {
    known.insert(name);
    if (kwargs.contains(name)) value = py::cast<std::decay_t<decltype(value)>>(kwargs[name]);
  };
#define MNNVL_FIELD(name) field(#name, config.name)
  MNNVL_FIELD(world_size);
  MNNVL_FIELD(bytes);
  MNNVL_FIELD(timeout_ms);
  MNNVL_FIELD(repeats);
  MNNVL_FIELD(sleeps);
  MNNVL_FIELD(bootstrap);
  MNNVL_FIELD(multicast_forbidden);
  MNNVL_FIELD(multicast_off_ranks);
  MNNVL_FIELD(host_ids);
  MNNVL_FIELD(devices);
  MNNVL_FIELD(compute_capabilities);
  MNNVL_FIELD(multiprocessors);
  MNNVL_FIELD(device_names);
  MNNVL_FIELD(nvml_problems);
  MNNVL_FIELD(fd_handles);
  MNNVL_FIELD(fabric_handles);
  MNNVL_FIELD(clusters);
  MNNVL_FIELD(cliques);
  MNNVL_FIELD(multicast_support);
  MNNVL_FIELD(faults);
  MNNVL_FIELD(corruptions);
  MNNVL_FIELD(multicast_lost_rank);
  MNNVL_FIELD(directory);
  MNNVL_FIELD(rank);
#undef MNNVL_FIELD
  for (const auto& item : kwargs) {
    const std::string name = py::cast<std::string>(item.first);
    if (known.count(name) == 0) throw py::type_error("unknown field " + name);
  }
  return config;
}

py::dict fake_result(const FakeSetupResult& result) {
  py::dict dict;
#define MNNVL_FIELD(name) dict[#name] = result.name
  MNNVL_FIELD(ok);
  MNNVL_FIELD(errors);
  MNNVL_FIELD(error_kinds);
  MNNVL_FIELD(seconds);
  MNNVL_FIELD(verified);
  MNNVL_FIELD(handle_types);
  MNNVL_FIELD(multicast);
  MNNVL_FIELD(multicast_problems);
  MNNVL_FIELD(peer_pids);
  MNNVL_FIELD(min_multiprocessors);
  MNNVL_FIELD(bytes);
  MNNVL_FIELD(addresses_kept);
  MNNVL_FIELD(sleep_errors);
  MNNVL_FIELD(asleep);
  MNNVL_FIELD(leaks);
  MNNVL_FIELD(descriptors_leaked);
  MNNVL_FIELD(mappings_leaked);
  MNNVL_FIELD(calls);
  MNNVL_FIELD(calls_by_rank);
#undef MNNVL_FIELD
  return dict;
}

template <typename... Args>
py::dict without_gil(FakeSetupResult (*run)(Args...), const std::decay_t<Args>&... args) {
  FakeSetupResult result;
  {
    py::gil_scoped_release no_gil;
    result = run(args...);
  }
  return fake_result(result);
}

}  // namespace
}  // namespace mnnvl

PYBIND11_MODULE(mnnvl_native, m) {
  using namespace mnnvl;
  m.def("run_fake_setup", [](const py::kwargs& kwargs) { return without_gil(run_fake_setup, fake_config(kwargs)); });
  m.def("run_host_setup", [](const py::kwargs& kwargs) { return without_gil(run_host_setup, fake_config(kwargs)); });
  m.def("exported_descriptor_flags", &exported_descriptor_flags);
  m.def("run_descriptor_exchange", [](int world_size, const std::string& scenario, int timeout_ms) {
    return without_gil(run_descriptor_exchange, world_size, scenario, timeout_ms);
  });
}
