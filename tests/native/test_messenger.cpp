// Messages between pairs of ranks: every byte, in every order that programs may ask for. Threads as ranks; several
// processes are tested from Python.
#include <map>
#include <tuple>

#include "native/message_exchange.h"

namespace mnnvl::test {
namespace {

constexpr int64_t kStepSlots = 4096;
constexpr int64_t kSmallSlots = 128;  // a ring holds less than 1 KiB
constexpr int64_t kLargeSlots = 1024;
constexpr int kAny = Message::kAnySource;

TEST(messenger_sizes) {
  Segments segments(2, kStepSlots, kLargeSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    for (int64_t bytes : {0, 1, 31, 32, 33, 992, 993, 5000, 8192, 100000}) {
      for (int from : {0, 1}) {
        const auto id = static_cast<uint64_t>(bytes);
        (rank.rank() == from ? isend(rank, id, bytes, 1 - from) : irecv(rank, id, bytes, from))->wait();
      }
    }
  });
}

// Both directions at once, larger than the rings; in one request, and in two whose sends are waited for first.
TEST(messenger_both_directions) {
  Segments segments(2, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    const int peer = 1 - rank.rank();
    const auto mine = static_cast<uint64_t>(rank.rank()), theirs = static_cast<uint64_t>(peer);
    for (int round = 0; round < iterations(10); ++round) {
      Exchange both;
      both.send(mine, 50000, peer, 1);
      both.receive(theirs, 50000, peer, 1);
      both.post(rank);
      both.wait();
      const auto out = isend(rank, mine, 50000, peer);
      const auto in = irecv(rank, theirs, 50000, peer);
      out->wait();
      in->wait();
    }
  });
}

// Each rank sends to all, and only then receives from all, waiting in any order.
TEST(messenger_sends_to_all_before_receives_from_all) {
  for (int world_size : {2, 3, 5, 8}) {
    Segments segments(world_size, kStepSlots, kSmallSlots);
    segments.with_unbounded_sleep();
    run_group(segments, [&](CpuRank& rank) {
      for (int64_t bytes : {0, 100, 20000}) {
        std::vector<std::unique_ptr<Exchange>> all;
        const auto id = [&](int from, int to) { return static_cast<uint64_t>(from * 100 + to); };
        for (int r = 0; r < world_size; ++r) {
          if (r != rank.rank()) all.push_back(isend(rank, id(rank.rank(), r), bytes, r));
        }
        rank.barrier();
        for (int r = world_size - 1; r >= 0; --r) {
          if (r != rank.rank()) all.push_back(irecv(rank, id(r, rank.rank()), bytes, r));
        }
        for (const auto& one : all) one->wait();
      }
    });
  }
}

// A receive takes the first message with its tag, whatever came before; the rest waits, also half-arrived.
TEST(messenger_tags_out_of_order) {
  Segments segments(2, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    std::vector<std::unique_ptr<Exchange>> all;
    if (rank.rank() == 0) {
      for (int i = 0; i < 6; ++i) all.push_back(isend(rank, static_cast<uint64_t>(i), 3000 * i, 1, i % 3));
    } else {
      for (int i : {2, 5, 1, 0, 4, 3}) {
        all.push_back(irecv(rank, static_cast<uint64_t>(i), 3000 * i, 0, i % 3));
        if (i == 5) all.back()->wait();
      }
    }
    for (const auto& one : all) one->wait();
  });
}

TEST(messenger_takes_any_source) {
  constexpr int kWorld = 4, kEach = 20;
  Segments segments(kWorld, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    const auto id = [](int from, int i) { return static_cast<uint64_t>(from * 1000 + i); };
    if (rank.rank() != 0) {
      for (int i = 0; i < kEach; ++i) isend(rank, id(rank.rank(), i), 700, 0, 5)->wait();
      return;
    }
    int taken[kWorld] = {};
    for (int i = 0; i < (kWorld - 1) * kEach; ++i) {
      const auto message = irecv(rank, Exchange::kUnknown, 700, kAny, 5);
      message->wait();
      const int source = message->source();
      CHECK(source > 0 && source < kWorld, source);
      message->expect(0, id(source, taken[source]++));
      message->check();
    }
    for (int r = 1; r < kWorld; ++r) CHECK(taken[r] == kEach, taken[r], " of ", r);
  });
}

// Nobody waits: the background threads move it. Then they sleep, and are woken for more.
TEST(messenger_moves_what_nobody_waits_for) {
  Segments segments(2, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    for (uint64_t round = 0; round < 3; ++round) {
      const auto message = rank.rank() == 0 ? isend(rank, round, 100000, 1) : irecv(rank, round, 100000, 0);
      message->await_over();
      CHECK(rank.messenger().wait_idle(std::chrono::milliseconds(kLongMs)));
      std::this_thread::sleep_for(std::chrono::milliseconds(30));
    }
  });
}

// Several threads of one rank wait for messages of their own, and take over from each other.
TEST(messenger_waiters_of_one_rank) {
  constexpr int kThreads = 4;
  Segments segments(2, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  CpuRank ranks[] = {CpuRank(segments, 0), CpuRank(segments, 1)};
  run_threads(2 * kThreads, [&](int i) {
    CpuRank& rank = ranks[i % 2];
    const int tag = i / 2;
    for (int round = 0; round < iterations(100); ++round) {
      const auto id = static_cast<uint64_t>(tag * 1000 + round);
      const int64_t bytes = round % 7 * 200;
      if ((round + rank.rank()) % 2 == 0) {
        isend(rank, id, bytes, 1 - rank.rank(), tag)->wait();
      } else {
        irecv(rank, id, bytes, 1 - rank.rank(), tag)->wait();
      }
    }
  });
}

// Most of these waits sleep: what wakes them is a message, or credit.
TEST(messenger_ping_pong_asleep) {
  Segments segments(2, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  run_group(segments, [&](CpuRank& rank) {
    Random random(static_cast<uint64_t>(rank.rank()));
    for (int round = 0; round < iterations(300); ++round) {
      for (int from : {0, 1}) {
        const auto id = static_cast<uint64_t>(round);
        const int64_t bytes = round % 10 == 0 ? 4000 : 8;
        if (rank.rank() == from) {
          std::this_thread::sleep_for(std::chrono::microseconds(random.below(600)));
          isend(rank, id, bytes, 1 - from)->wait();
        } else {
          irecv(rank, id, bytes, from)->wait();
        }
      }
    }
  });
}

// The bell alone, with sleeps that nothing bounds: one lost wake-up and this never ends.
TEST(messenger_bell_loses_no_wake_up) {
  const Segments segments(1, kStepSlots);
  cpu::Bell& bell = segments.control(0)->bell;
  std::atomic<uint32_t> posted{0}, taken{0};
  const uint32_t rounds = static_cast<uint32_t>(iterations(20000));
  std::thread sleeper([&] {
    for (uint32_t n = 1; n <= rounds; ++n) {
      bell.sleepers.fetch_add(1);
      for (;;) {
        const uint32_t seen = bell.rings.load();
        if (posted.load() == n) break;
        cpu::futex_wait(bell.rings, seen, std::chrono::hours(1));
      }
      bell.sleepers.fetch_sub(1);
      taken.store(n);
    }
  });
  for (uint32_t n = 1; n <= rounds; ++n) {
    posted.store(n);
    cpu::ring(bell);
    while (taken.load() != n) std::this_thread::yield();
  }
  sleeper.join();
}

struct Planned {
  uint64_t id;
  int from, to;
  int32_t tag;
  int64_t bytes;
};

// Any order but for those of one pair and tag.
std::vector<Planned> mixed(const std::vector<Planned>& messages, Random& random) {
  std::vector<Planned> order = messages;
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(static_cast<int64_t>(i))]);
  std::map<std::tuple<int, int, int>, std::deque<Planned>> queues;
  for (const Planned& m : messages) queues[{m.from, m.to, m.tag}].push_back(m);
  for (Planned& m : order) {
    auto& queue = queues[{m.from, m.to, m.tag}];
    m = queue.front();
    queue.pop_front();
  }
  return order;
}

// Posts the rank's part of the messages in requests of one to four, polling some on the way.
std::vector<std::unique_ptr<Exchange>> post_all(CpuRank& rank, const std::vector<Planned>& messages, Random& random) {
  std::vector<std::unique_ptr<Exchange>> requests;
  int left = 0;
  for (const Planned& m : mixed(messages, random)) {
    if (m.from != rank.rank() && m.to != rank.rank()) continue;
    if (left == 0) {
      if (!requests.empty()) requests.back()->post(rank);
      if (requests.size() > 1 && random.below(3) == 0)
        requests[static_cast<size_t>(random.below(static_cast<int64_t>(requests.size())))]->transfer().wait({});
      requests.push_back(std::make_unique<Exchange>());
      left = 1 + static_cast<int>(random.below(4));
    }
    --left;
    if (m.from == rank.rank()) {
      requests.back()->send(m.id, m.bytes, m.to, m.tag);
    } else {
      requests.back()->receive(m.id, m.bytes, m.from, m.tag);
    }
  }
  if (!requests.empty()) requests.back()->post(rank);
  return requests;
}

void random_messages(int world_size, int64_t slot_bytes, uint32_t first, int rounds) {
  Segments segments(world_size, kStepSlots, slot_bytes);
  segments.with_unbounded_sleep();
  segments.start_from(first);
  run_group(segments, [&](CpuRank& rank) {
    for (int round = 0; round < rounds; ++round) {
      Random plan(mix(first) + static_cast<uint64_t>(round * 100 + world_size));  // everybody's
      std::vector<Planned> messages;
      for (int64_t i = 3 * world_size + plan.below(20); i > 0; --i) {
        const int from = static_cast<int>(plan.below(world_size));
        const int to = (from + 1 + static_cast<int>(plan.below(world_size - 1))) % world_size;
        const int64_t bytes = plan.below((int64_t{1} << plan.below(16)));
        messages.push_back({plan.next(), from, to, static_cast<int32_t>(plan.below(3)), bytes});
      }
      Random own(plan.next() + static_cast<uint64_t>(rank.rank()));
      const auto requests = post_all(rank, messages, own);
      if (round % 3 == 0) rank.barrier();  // beside what is under way
      for (size_t i = requests.size(); i > 0; --i) requests[i - 1]->wait();
    }
    CHECK(rank.messenger().wait_idle(std::chrono::milliseconds(kLongMs)));
    rank.barrier();
  });
}

TEST(messenger_random_2) { random_messages(2, kLargeSlots, 0, iterations(60)); }
TEST(messenger_random_3) { random_messages(3, kSmallSlots, 0, iterations(40)); }
TEST(messenger_random_5) { random_messages(5, kLargeSlots, 0, iterations(30)); }
TEST(messenger_random_8) { random_messages(8, kSmallSlots, 0, iterations(15)); }
TEST(messenger_random_around_the_wrap) { random_messages(3, kSmallSlots, 0xffffffc0u, iterations(40)); }

// Each rank's second thread goes through collectives all the time.
TEST(messenger_beside_collectives) {
  constexpr int kWorld = 3;
  Segments segments(kWorld, kStepSlots, kSmallSlots);
  segments.with_unbounded_sleep();
  std::vector<std::unique_ptr<CpuRank>> ranks;
  for (int r = 0; r < kWorld; ++r) ranks.push_back(std::make_unique<CpuRank>(segments, r));
  run_threads(2 * kWorld, [&](int i) {
    CpuRank& rank = *ranks[static_cast<size_t>(i % kWorld)];
    const int next = (rank.rank() + 1) % kWorld, last = (rank.rank() + kWorld - 1) % kWorld;
    for (int round = 0; round < iterations(60); ++round) {
      const auto id = [&](int r) { return static_cast<uint64_t>(r * 1000 + round); };
      if (i < kWorld) {
        Exchange ring;
        ring.send(id(rank.rank()), 5000, next, round);
        ring.receive(id(last), 5000, last, round);
        ring.post(rank);
        ring.wait();
        continue;
      }
      std::vector<float> values(3000, 1.0f);
      rank.all_reduce({values.data(), values.data(), 3000});
      CHECK(values[0] == kWorld && values[2999] == kWorld);
    }
  });
}

TEST(messenger_divides_segments) {
  for (int world_size : {1, 2, 3, 8, kMaxWorldSize}) {
    const cpu::Division whole = cpu::divide(cpu::default_segment_bytes(world_size), world_size);
    CHECK(whole.step_slot_bytes == cpu::kMaxChunkBytes, whole.step_slot_bytes);
    CHECK(world_size == 1 || whole.ring_slot_bytes == cpu::kMaxRingSlotBytes, whole.ring_slot_bytes);
    for (size_t bytes : {size_t{1} << 20, size_t{3} << 20, size_t{64} << 20}) {  // from the least a user may give
      const cpu::Division part = cpu::divide(bytes, world_size);
      CHECK(cpu::segment_bytes_of(part.step_slot_bytes, part.ring_slot_bytes, world_size) <= bytes, bytes);
      CHECK(part.step_slot_bytes >= int64_t(bytes < (2u << 20) ? 128 << 10 : cpu::kMaxChunkBytes / 2), bytes);
      CHECK(world_size == 1 || part.ring_slot_bytes >= cpu::kMinRingSlotBytes, part.ring_slot_bytes);
    }
  }
}

}  // namespace
}  // namespace mnnvl::test
