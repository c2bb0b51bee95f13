#include "memory/host_segment.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "bootstrap/agreement.h"
#include "bootstrap/fd_channel.h"
#include "bootstrap/host_identity.h"

namespace mnnvl {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

UniqueFd create_segment(size_t bytes) {
  UniqueFd fd(memfd_create("mnnvl-segment", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) fail_errno(errno, "memfd_create");
  if (ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0)
    fail_errno(errno, "ftruncate of a segment to ", bytes, " bytes");
  // No peer can truncate it under the others' mappings.
  if (fcntl(fd.get(), F_ADD_SEALS, kSeals) != 0) fail_errno(errno, "sealing a segment's size");
  return fd;
}

class MappedSegment {
 public:
  MappedSegment(int fd, size_t bytes) : bytes_(bytes) {
    struct stat status{};
    if (fstat(fd, &status) != 0) fail_errno(errno, "fstat of a segment");
    int seals = fcntl(fd, F_GET_SEALS);
    if (static_cast<size_t>(status.st_size) != bytes || seals < 0 || (seals & kSeals) != kSeals) {
      fail(ErrorKind::kSystem, "a segment has ", status.st_size, " bytes instead of ", bytes,
           ", or its size is not sealed");
    }
    void* address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) fail_errno(errno, "mmap of a segment of ", bytes, " bytes");
    address_ = static_cast<std::byte*>(address);
    // A child has no use for it, and would keep it when this process gives it back.
    madvise(address, bytes, MADV_DONTFORK);
  }
  ~MappedSegment() { munmap(address_, bytes_); }
  MappedSegment(const MappedSegment&) = delete;
  MappedSegment& operator=(const MappedSegment&) = delete;
  std::byte* address() const { return address_; }

 private:
  const size_t bytes_;
  std::byte* address_ = nullptr;
};

struct RankRecord {
  HostIdentity host;
  uint64_t bytes = 0;

  std::string serialise() const {
    RecordWriter writer;
    host.serialise(writer);
    return writer.put(bytes).bytes();
  }
  static RankRecord parse(const std::string& bytes, int rank) {
    RecordReader reader(bytes, rank);
    RankRecord record;
    record.host = HostIdentity::parse(reader);
    reader.get(record.bytes).finish();
    return record;
  }
};

// Pure: the same error on every rank.
void check_ranks(const std::vector<RankRecord>& ranks) {
  std::vector<HostIdentity> hosts;
  std::string table;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].bytes != ranks[0].bytes) {
      fail(ErrorKind::kInvalidArgument, "the ranks ask for different segments: rank 0 ", ranks[0].bytes,
           " bytes, rank ", rank, " ", ranks[rank].bytes);
    }
    const HostIdentity& host = ranks[rank].host;
    hosts.push_back(host);
    table += str("\n  rank ", rank, ": host ", host.hostname, ", pid ", host.pid, " [host id ", host.host_id, "]");
  }
  if (count_hosts(hosts) > 1) {
    fail(ErrorKind::kUnsupported, "CPU tensors are served within one host, and the group's ranks are on ",
         count_hosts(hosts),
         " (containers with a network of their own count as hosts); use gloo for them, as in \"cpu:gloo,cuda:mnnvl\"",
         table);
  }
}

class HostSegmentsImpl final : public HostSegments {
 public:
  size_t bytes() const override { return bytes_; }
  std::byte* address(int rank) const override { return mappings_[rank]->address(); }
  const std::vector<int>& peer_pids() const override { return peer_pids_; }

  void set_up(Exchange& exchange, const HostSegmentsOptions& options) {
    const int64_t timeout_ms =
        std::max<int64_t>(1, (options.timeout_ms > 0 ? options.timeout_ms : kDefaultSetUpTimeoutMs) / 2);
    const int rank = exchange.rank(), size = exchange.size();
    bytes_ = options.bytes;
    const HostIdentity self = host_identity(options.host_id);
    const std::string where = str("host ", self.hostname, ", pid ", self.pid);

    // Stage 1. Who is where.
    std::vector<std::string> records = agree_gather(exchange, "comparing hosts", where, [&] {
      if (bytes_ == 0) fail(ErrorKind::kInvalidArgument, "host segments of 0 bytes");
      check_known(self);
      return RankRecord{self, bytes_}.serialise();
    });
    std::vector<RankRecord> ranks;
    std::vector<HostIdentity> hosts;
    for (const std::string& record : records) {
      ranks.push_back(RankRecord::parse(record, static_cast<int>(ranks.size())));
      hosts.push_back(ranks.back().host);
    }
    check_ranks(ranks);
    peer_pids_ = visible_pids(hosts, rank);

    // Stage 2. Own segment, and the socket on which peers' ones come.
    UniqueFd own;
    std::unique_ptr<FdChannel> channel;
    std::vector<std::string> addresses = agree_gather(exchange, "creating shared host memory", where, [&] {
      own = create_segment(bytes_);
      if (size == 1) return std::string();
      channel = std::make_unique<FdChannel>();
      return channel->address();
    });

    // Stage 3. Pass and map.
    agree(exchange, "mapping the ranks' host memory", where, [&] {
      std::vector<UniqueFd> fds(1);
      if (size > 1) fds = channel->exchange(rank, addresses, own.get(), timeout_ms);
      for (int peer = 0; peer < size; ++peer) {
        mappings_.push_back(std::make_unique<MappedSegment>(peer == rank ? own.get() : fds[peer].get(), bytes_));
      }
    });
  }

 private:
  size_t bytes_ = 0;
  std::vector<int> peer_pids_;
  std::vector<std::unique_ptr<MappedSegment>> mappings_;
};

}  // namespace

std::unique_ptr<HostSegments> HostSegments::create(Exchange& exchange, const HostSegmentsOptions& options) {
  auto segments = std::make_unique<HostSegmentsImpl>();
  segments->set_up(exchange, options);
  return segments;
}

}  // namespace mnnvl
