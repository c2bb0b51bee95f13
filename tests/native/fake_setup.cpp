#include "native/fake_setup.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <fstream>
#include <functional>
#include <thread>

#include "bootstrap/fd_channel.h"
#include "bootstrap/fd_message.h"
#include "memory/allocation.h"
#include "memory/host_segment.h"
#include "memory/symmetric_buffer.h"
#include "native/fake_driver.h"
#include "native/fake_nccl.h"
#include "native/fake_sleep.h"
#include "native/file_exchange.h"
#include "native/thread_exchange.h"

namespace mnnvl {
namespace {

// --- Device code's double: simulated device memory is ordinary memory, multicast stores go through the object.

void fake_store_words(int, uint64_t address, const uint32_t* words, size_t count, bool multicast) {
  if (multicast) return fake::multicast_store(address, words, count * sizeof(uint32_t));
  std::memcpy(reinterpret_cast<void*>(address), words, count * sizeof(uint32_t));
}

void fake_fill_words(int, uint64_t address, uint32_t value, size_t count) {
  std::fill_n(reinterpret_cast<uint32_t*>(address), count, value);
}

void fake_load_words(int, uint64_t address, uint32_t* words, size_t count) {
  std::memcpy(words, reinterpret_cast<const void*>(address), count * sizeof(uint32_t));
}

constexpr DeviceOps kFakeOps{fake_store_words, fake_fill_words, fake_load_words};
constexpr uint32_t kFill = 0x80000000u;

// --- What a process has open, to be the same before and after.

int count_descriptors() {
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  while (directory != nullptr && readdir(directory) != nullptr) ++count;
  if (directory != nullptr) closedir(directory);
  return count;
}

// Ours are memfds, and shared; everything else in the process may come and go.
int count_mappings() {
  int count = 0;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) count += line.find("/memfd:mnnvl") != std::string::npos;
  return count;
}

const char* name(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidArgument: return "invalid_argument";
    case ErrorKind::kUnsupported: return "unsupported";
    case ErrorKind::kSystem: return "system";
    case ErrorKind::kTimeout: return "timeout";
    case ErrorKind::kPeerFailed: return "peer_failed";
    case ErrorKind::kAborted: return "aborted";
  }
  return "?";
}

// --- One rank's row of the result, written by its thread alone.

struct Row {
  bool ok = false;
  std::string error, error_kind;
  double seconds = 0;
  bool verified = false;
  std::string handle_type;
  bool multicast = false;
  std::string multicast_problem;
  std::vector<int> peer_pids;
  int min_multiprocessors = 0;
  int64_t bytes = 0;
  FakeSleep sleep;

  // Runs `setup`, timing it and keeping its error, if any.
  void run(const std::function<void()>& setup) {
    auto begin = std::chrono::steady_clock::now();
    try {
      setup();
      ok = true;
    } catch (const Error& e) {
      error = e.what();
      error_kind = name(e.kind());
    } catch (const std::exception& e) {
      error = e.what();
      error_kind = "other";
    }
    seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  }
};

FakeSetupResult collect(const std::vector<Row>& rows) {
  FakeSetupResult result;
  for (const Row& row : rows) {
    result.ok.push_back(row.ok);
    result.errors.push_back(row.error);
    result.error_kinds.push_back(row.error_kind);
    result.seconds.push_back(row.seconds);
    result.verified.push_back(row.verified);
    result.handle_types.push_back(row.handle_type);
    result.multicast.push_back(row.multicast);
    result.multicast_problems.push_back(row.multicast_problem);
    result.peer_pids.push_back(row.peer_pids);
    result.min_multiprocessors.push_back(row.min_multiprocessors);
    result.bytes.push_back(row.bytes);
    result.addresses_kept.push_back(row.sleep.addresses_kept);
    result.sleep_errors.push_back(row.sleep.error);
    if (!row.sleep.held.empty()) result.asleep = row.sleep.held;
  }
  return result;
}

bool all_ok(const std::vector<Row>& rows) {
  return std::all_of(rows.begin(), rows.end(), [](const Row& row) { return row.ok; });
}

template <typename T>
T per_rank(const std::vector<T>& values, int rank, T otherwise) {
  if (values.empty()) return otherwise;
  return values.size() == 1 ? values[0] : values.at(rank);
}

using RankBody = std::function<void(int rank, Exchange& exchange, Row* row)>;

// The body on one rank; what it throws after the set-up itself makes the rank's check fail.
void run_rank(const RankBody& body, int rank, Exchange& exchange, Row* row) {
  *row = Row();
  try {
    body(rank, exchange, row);
  } catch (const std::exception& e) {
    row->verified = false;
    row->error += str("after the set-up: ", e.what());
  }
}

// Runs the body on every rank: as threads, or as the one rank that this process is.
std::vector<Row> run_ranks(const FakeSetupConfig& config, const RankBody& body) {
  if (config.world_size < 1) fail(ErrorKind::kInvalidArgument, "world_size ", config.world_size);
  const bool alone = !config.directory.empty();
  std::vector<Row> rows(alone ? 1 : config.world_size);
  FileExchange file_exchange(config.directory, config.rank, config.world_size, config.timeout_ms);
  for (int repeat = 0; repeat < config.repeats && (repeat == 0 || all_ok(rows)); ++repeat) {
    if (alone) {
      run_rank(body, config.rank, file_exchange, &rows[0]);
      continue;
    }
    auto exchanges = make_thread_exchanges(config.world_size, config.timeout_ms);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < config.world_size; ++rank) {
      threads.emplace_back([&, rank] { run_rank(body, rank, *exchanges[rank], &rows[rank]); });
    }
    for (std::thread& thread : threads) thread.join();
  }
  return rows;
}

// --- Symmetric buffers.

std::shared_ptr<fake::World> make_world(const FakeSetupConfig& config) {
  std::vector<fake::Device> devices(config.world_size);
  for (int rank = 0; rank < config.world_size; ++rank) {
    fake::Device& device = devices[rank];
    device.id = per_rank(config.devices, rank, rank);
    device.compute_capability = per_rank(config.compute_capabilities, rank, 90);
    device.multiprocessors = per_rank(config.multiprocessors, rank, 132);
    device.name = per_rank(config.device_names, rank, device.name);
    device.nvml_problem = per_rank(config.nvml_problems, rank, std::string());
    device.fd_handles = per_rank(config.fd_handles, rank, 1) != 0;
    device.fabric_handles = per_rank(config.fabric_handles, rank, std::string("yes"));
    device.cluster = per_rank(config.clusters, rank, std::string());
    device.clique = static_cast<uint32_t>(per_rank(config.cliques, rank, 0));
    device.multicast = per_rank(config.multicast_support, rank, 1) != 0;
  }
  std::vector<fake::Fault> faults;
  for (const auto& [rank, function, nth, code] : config.faults) faults.push_back({rank, function, nth, code});
  std::vector<fake::Corruption> corruptions;
  for (const auto& [rank, owner, kind] : config.corruptions) corruptions.push_back({rank, owner, kind});
  return std::make_shared<fake::World>(devices, faults, corruptions, config.multicast_lost_rank);
}

bool at_rest(const SymmetricBuffer& buffer, int rank) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(buffer.address(rank));
  return std::all_of(words, words + buffer.bytes() / sizeof(uint32_t), [](uint32_t word) { return word == kFill; });
}

// Independent of the self-test: everything at rest, then one word from every writer to every reader, and one by
// multicast.
bool verify(const SymmetricBuffer& buffer, Exchange& exchange) {
  const int rank = exchange.rank(), size = exchange.size();
  bool good = at_rest(buffer, rank);
  exchange.barrier();
  const size_t place = sizeof(uint32_t) * static_cast<size_t>(rank);
  const size_t multicast_place = place + sizeof(uint32_t) * static_cast<size_t>(size);
  const uint32_t mine = static_cast<uint32_t>(1000 + rank);
  for (int peer = 0; peer < size; ++peer) kFakeOps.store_words(rank, buffer.address(peer) + place, &mine, 1, false);
  if (buffer.multicast_address() != 0)
    kFakeOps.store_words(rank, buffer.multicast_address() + multicast_place, &mine, 1, true);
  exchange.barrier();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(buffer.address(rank));
  for (int peer = 0; peer < size; ++peer) {
    good = good && words[peer] == static_cast<uint32_t>(1000 + peer);
    if (buffer.multicast_address() != 0) good = good && words[size + peer] == static_cast<uint32_t>(1000 + peer);
  }
  return good;
}

void set_up_buffer(const FakeSetupConfig& config, std::shared_ptr<fake::World> world, int rank, Exchange& exchange,
                   Row* row) {
  std::unique_ptr<CudaDriver> driver = fake::make_driver(world, rank);
  std::unique_ptr<NcclLibrary> nccl = fake::make_nccl(world, rank);
  SymmetricBufferOptions options;
  options.device = rank;
  options.bytes = static_cast<size_t>(config.bytes);
  options.fill = kFill;
  options.bootstrap = config.bootstrap == "nccl"   ? Bootstrap::kNccl
                      : config.bootstrap == "auto" ? Bootstrap::kAuto
                                                   : Bootstrap::kStore;
  options.host_id = per_rank(config.host_ids, rank, std::string());
  options.timeout_ms = config.timeout_ms;
  options.multicast_forbidden = per_rank(config.multicast_forbidden, rank, std::string());
  for (int off : config.multicast_off_ranks) {
    if (off == rank) options.multicast = MulticastMode::kOff;
  }
  std::unique_ptr<SymmetricBuffer> buffer;
  row->run([&] { buffer = SymmetricBuffer::create(*driver, nccl.get(), kFakeOps, exchange, options); });
  if (buffer == nullptr) return;
  row->handle_type = buffer->handle_type() == HandleType::kFabric ? "fabric" : "fd";
  row->multicast = buffer->multicast_address() != 0;
  row->multicast_problem = buffer->multicast_problem();
  row->peer_pids = buffer->peer_pids();
  row->min_multiprocessors = buffer->min_multiprocessors();
  row->bytes = static_cast<int64_t>(buffer->bytes());
  row->verified = verify(*buffer, exchange);
  for (int i = 0; i < config.sleeps; ++i) {
    sleep_and_wake(*buffer, *world, exchange, &row->sleep);
    row->verified = row->verified && verify(*buffer, exchange);
  }
}

// --- Host segments.

void set_up_segments(const FakeSetupConfig& config, int rank, Exchange& exchange, Row* row) {
  HostSegmentsOptions options;
  options.bytes = static_cast<size_t>(config.bytes);
  options.host_id = per_rank(config.host_ids, rank, std::string());
  options.timeout_ms = config.timeout_ms;
  std::unique_ptr<HostSegments> segments;
  row->run([&] { segments = HostSegments::create(exchange, options); });
  if (segments == nullptr) return;
  row->peer_pids = segments->peer_pids();
  row->bytes = static_cast<int64_t>(segments->bytes());
  const std::byte* own = segments->address(rank);
  row->verified = std::all_of(own, own + segments->bytes(), [](std::byte b) { return b == std::byte{0}; });
  exchange.barrier();
  for (int peer = 0; peer < exchange.size(); ++peer) segments->address(peer)[rank] = static_cast<std::byte>(rank + 1);
  exchange.barrier();
  for (int peer = 0; peer < exchange.size(); ++peer)
    row->verified = row->verified && own[peer] == static_cast<std::byte>(peer + 1);
}

// --- Descriptors.

// Connects as nobody of the group would, with rubbish and descriptors, to a name that everybody can read.
void disturb(const std::string& address_of_rank) {
  const std::string name = address_of_rank.substr(0, kTokenBytes);
  UniqueFd connection(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::string full = "mnnvl-" + name;
  std::memcpy(address.sun_path + 1, full.data(), full.size());
  socklen_t length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + full.size());
  if (connect(connection.get(), reinterpret_cast<sockaddr*>(&address), length) != 0)
    fail_errno(errno, "connect of a stranger");
  char rubbish[] = "mnnvlfd1 but not really, and too short to be a message";
  iovec data{rubbish, sizeof(rubbish)};
  alignas(cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {};
  msghdr header{};
  header.msg_iov = &data;
  header.msg_iovlen = 1;
  header.msg_control = control;
  header.msg_controllen = sizeof(control);
  cmsghdr* rights = CMSG_FIRSTHDR(&header);
  rights->cmsg_level = SOL_SOCKET;
  rights->cmsg_type = SCM_RIGHTS;
  rights->cmsg_len = CMSG_LEN(2 * sizeof(int));
  int fds[2] = {0, 0};
  std::memcpy(CMSG_DATA(rights), fds, sizeof(fds));
  if (sendmsg(connection.get(), &header, MSG_NOSIGNAL) < 0) fail_errno(errno, "sendmsg of a stranger");
}

// A rank's part: passes a memfd that says whose it is, and reads what the peers' ones say.
void pass_descriptors(const std::string& scenario, int timeout_ms, int rank, Exchange& exchange, Row* row) {
  const bool odd = rank == 1;
  FdChannel channel;
  std::vector<std::string> addresses = exchange.all_gather(channel.address());
  if (scenario == "strangers") disturb(addresses[(rank + 1) % exchange.size()]);
  if (odd && scenario == "absent") {
    FdChannel gone = std::move(channel);
  } else if (!odd || scenario != "silent") {
    UniqueFd own = fake::make_memfd("mnnvl-descriptor", 100 + rank);
    row->run([&] {
      std::vector<UniqueFd> fds =
          channel.exchange(rank, addresses, odd && scenario == "none" ? -1 : own.get(), timeout_ms);
      row->verified = true;
      for (int peer = 0; peer < exchange.size(); ++peer) {
        off_t expected = peer == rank || (peer == 1 && scenario == "none") ? -1 : 100 + peer;
        row->verified = row->verified && lseek(fds[peer].get(), 0, SEEK_END) == expected;
      }
    });
  }
  exchange.barrier();  // a silent rank keeps its socket open until the others are done
}

}  // namespace

FakeSetupResult run_fake_setup(const FakeSetupConfig& config) {
  const int descriptors = count_descriptors(), mappings = count_mappings();
  std::shared_ptr<fake::World> world = make_world(config);
  FakeSetupResult result = collect(run_ranks(
      config, [&](int rank, Exchange& exchange, Row* row) { set_up_buffer(config, world, rank, exchange, row); }));
  result.leaks = world->leaks();
  for (int rank = 0; rank < config.world_size; ++rank) {
    result.calls_by_rank.push_back(world->calls(rank));
    for (const auto& [function, count] : result.calls_by_rank.back()) result.calls[function] += count;
  }
  world.reset();
  result.descriptors_leaked = count_descriptors() - descriptors;
  result.mappings_leaked = count_mappings() - mappings;
  return result;
}

int exported_descriptor_flags() {
  FakeSetupConfig config;
  config.world_size = 1;
  std::unique_ptr<CudaDriver> driver = fake::make_driver(make_world(config), 0);
  const Allocation memory = Allocation::create(*driver, 0, HandleType::kPosixFd, fake::kGranularity);
  const UniqueFd fd = memory.export_fd();
  return fcntl(fd.get(), F_GETFD);
}

FakeSetupResult run_host_setup(const FakeSetupConfig& config) {
  const int descriptors = count_descriptors(), mappings = count_mappings();
  FakeSetupResult result = collect(
      run_ranks(config, [&](int rank, Exchange& exchange, Row* row) { set_up_segments(config, rank, exchange, row); }));
  result.descriptors_leaked = count_descriptors() - descriptors;
  result.mappings_leaked = count_mappings() - mappings;
  return result;
}

FakeSetupResult run_descriptor_exchange(int world_size, const std::string& scenario, int timeout_ms) {
  const int descriptors = count_descriptors(), mappings = count_mappings();
  FakeSetupConfig config;
  config.world_size = world_size;
  config.timeout_ms = 4 * timeout_ms + 1000;  // of the exchange beside it, which must outlast the sockets
  FakeSetupResult result = collect(run_ranks(config, [&](int rank, Exchange& exchange, Row* row) {
    pass_descriptors(scenario, timeout_ms, rank, exchange, row);
  }));
  result.descriptors_leaked = count_descriptors() - descriptors;
  result.mappings_leaked = count_mappings() - mappings;
  return result;
}

}  // namespace mnnvl
