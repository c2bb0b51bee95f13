// The queue of jobs and the threads of callbacks: order, who runs what, and that everything ends.
#include <atomic>
#include <future>
#include <stdexcept>

#include "native/harness.h"
#include "system/callback_threads.h"
#include "system/job_queue.h"

namespace mnnvl::test {
namespace {

using std::chrono::seconds;

// A queue that is stopped at the end of the test, as its owner does.
struct OwnedQueue {
  std::shared_ptr<JobQueue> queue = std::make_shared<JobQueue>();
  ~OwnedQueue() { queue->stop(); }
  JobQueue* operator->() const { return queue.get(); }
};

struct OwnedCallbacks {
  std::shared_ptr<CallbackThreads> threads = std::make_shared<CallbackThreads>();
  ~OwnedCallbacks() { threads->leave(); }
  CallbackThreads* operator->() const { return threads.get(); }
};

void ignore(std::exception_ptr) {}

// A job that runs until it is told to go on.
class Gate {
 public:
  JobQueue::Job job() {
    return {[this] {
              entered_.set_value();
              opened_.get_future().wait();
            },
            ignore};
  }
  void await_entry() { entered_.get_future().wait(); }
  void open() { opened_.set_value(); }

 private:
  std::promise<void> entered_, opened_;
};

TEST(queue_runs_here_when_idle) {
  OwnedQueue queue;
  std::thread::id ran, completed;
  CHECK(queue->submit(
      {[&] { ran = std::this_thread::get_id(); }, [&](std::exception_ptr) { completed = std::this_thread::get_id(); }},
      /*here=*/true));
  CHECK(ran == std::this_thread::get_id() && completed == ran);
}

TEST(queue_keeps_the_order) {
  OwnedQueue queue;
  Gate gate;
  std::vector<int> order;
  CHECK(queue->submit(gate.job(), /*here=*/false));
  gate.await_entry();
  for (int i = 0; i < 100; ++i) {
    CHECK(queue->submit({[&order, i] { order.push_back(i); }, ignore}, /*here=*/i % 2 == 0));
  }
  CHECK(!queue->wait_idle(std::chrono::milliseconds(5)), "the first job still runs");
  gate.open();
  CHECK(queue->wait_idle(seconds(60)));
  for (int i = 0; i < 100; ++i) CHECK(order[static_cast<size_t>(i)] == i);
}

// What is submitted while a job runs on its submitter's thread waits for it: the worker starts nothing beside it.
TEST(queue_worker_waits_for_a_job_that_runs_elsewhere) {
  OwnedQueue queue;
  std::atomic<bool> began{false};
  bool beside = false;
  JobQueue::Job outer{[&] {
                        queue->submit({[&] { began = true; }, ignore}, /*here=*/false);
                        // It must not happen, so there is nothing to wait for: a watch of 30 ms.
                        const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(30);
                        while (!beside && std::chrono::steady_clock::now() < end) {
                          beside = began;
                          std::this_thread::yield();
                        }
                      },
                      ignore};
  CHECK(queue->submit(std::move(outer), /*here=*/true));
  CHECK(!beside, "two jobs at once");
  CHECK(queue->wait_idle(seconds(60)));
  CHECK(began);
}

// Two threads submit, inline and queued: never two jobs at once, and each thread's own stay in order. `inside` and
// `last` are plain variables, so that a sanitizer sees two jobs that overlap.
TEST(queue_two_submitters) {
  OwnedQueue queue;
  const int count = iterations(3000);
  int inside = 0, ran = 0;
  int last[2] = {-1, -1};
  std::atomic<int> completed{0}, wrong{0};
  run_threads(2, [&](int submitter) {
    for (int i = 0; i < count; ++i) {
      JobQueue::Job job{[&, submitter, i] {
                          wrong += ++inside != 1 || last[submitter] != i - 1;
                          last[submitter] = i;
                          ++ran;
                          if (i % 16 == 0) std::this_thread::yield();  // time for another job to begin, if one may
                          --inside;
                        },
                        [&](std::exception_ptr) { ++completed; }};
      CHECK(queue->submit(std::move(job), /*here=*/i % 3 != 0));
    }
  });
  queue->stop();
  CHECK(wrong == 0, wrong.load());
  CHECK(ran == 2 * count && completed == 2 * count, ran, " ", completed.load());
}

TEST(queue_hands_failures_to_the_completion) {
  OwnedQueue queue;
  for (bool here : {true, false}) {
    std::promise<std::string> text;
    queue->submit({[] { throw std::runtime_error("the job's words"); },
                   [&](std::exception_ptr failure) {
                     try {
                       std::rethrow_exception(failure);
                     } catch (const std::exception& error) {
                       text.set_value(error.what());
                     }
                   }},
                  here);
    CHECK(text.get_future().get() == "the job's words");
  }
  std::promise<bool> clean;
  queue->submit({[] {}, [&](std::exception_ptr failure) { clean.set_value(failure == nullptr); }}, /*here=*/false);
  CHECK(clean.get_future().get(), "a failure stays with its job");
}

TEST(queue_stop_while_busy) {
  OwnedQueue queue;
  Gate gate;
  std::atomic<int> ran{0};
  queue->submit(gate.job(), /*here=*/false);
  gate.await_entry();
  for (int i = 0; i < 10; ++i) queue->submit({[&] { ++ran; }, ignore}, /*here=*/false);
  std::thread stopper([&] {
    queue->stop();
    ran += 100;
  });
  // Until the stopper has come in.
  while (queue->submit({[&] { ++ran; }, ignore}, /*here=*/false)) std::this_thread::yield();
  CHECK(ran == 0, "stop() must wait for what was taken");
  gate.open();
  stopper.join();
  CHECK(ran >= 110, ran.load());
  CHECK(!queue->submit({[] {}, ignore}, /*here=*/true));
}

TEST(queue_left_behind_runs_what_it_took) {
  std::promise<void> last;
  std::weak_ptr<JobQueue> watch;
  Gate gate;
  {
    auto queue = std::make_shared<JobQueue>();
    watch = queue;
    queue->submit(gate.job(), /*here=*/false);
    queue->submit({[&] { last.set_value(); }, ignore}, /*here=*/false);
    gate.await_entry();
    queue->leave();
    CHECK(!queue->submit({[] {}, ignore}, /*here=*/false));
  }
  gate.open();
  last.get_future().wait();
  while (!watch.expired()) std::this_thread::yield();  // the worker lets go of it
}

// What a job keeps alive may own the queue: its worker then stops itself.
TEST(queue_dropped_by_its_own_job) {
  auto owner = std::make_shared<OwnedQueue>();
  std::weak_ptr<JobQueue> watch = owner->queue;
  Gate gate;
  std::shared_ptr<JobQueue> queue = owner->queue;
  queue->submit(gate.job(), /*here=*/false);
  gate.await_entry();
  queue->submit({[kept = std::move(owner)] {}, ignore}, /*here=*/false);
  queue.reset();
  gate.open();
  while (!watch.expired()) std::this_thread::yield();
}

// A callback that submits and waits for work queued behind others; the queue never runs callbacks, so it goes on.
TEST(callbacks_may_submit_and_wait) {
  OwnedQueue queue;
  OwnedCallbacks callbacks;
  const int count = iterations(200);
  std::atomic<int> done{0};
  for (int i = 0; i < count; ++i) {
    queue->submit({[] {},
                   [&](std::exception_ptr) {
                     callbacks->post([&] {
                       std::promise<void> finished;
                       queue->submit({[] {}, [&](std::exception_ptr) { finished.set_value(); }},
                                     /*here=*/done % 2 == 0);
                       finished.get_future().wait();
                       ++done;
                     });
                   }},
                  /*here=*/false);
  }
  CHECK(queue->wait_idle(seconds(60)));
  CHECK(callbacks->wait_idle(seconds(60)));
  CHECK(done == count, done.load());
}

// The first callback waits for the second: after a moment it gets a thread of its own.
TEST(callbacks_that_wait_for_each_other) {
  OwnedCallbacks callbacks;
  for (int round = 0; round < iterations(20); ++round) {
    std::promise<void> second;
    callbacks->post([&] { second.get_future().wait(); });
    callbacks->post([&] { second.set_value(); });
    CHECK(callbacks->wait_idle(seconds(60)), "round ", round);
  }
}

TEST(callbacks_begin_in_order) {
  OwnedCallbacks callbacks;
  std::vector<int> order;
  std::mutex mutex;
  for (int i = 0; i < 500; ++i) {
    callbacks->post([&, i] {
      std::lock_guard<std::mutex> lock(mutex);
      order.push_back(i);
    });
  }
  CHECK(callbacks->wait_idle(seconds(60)));
  CHECK(order.size() == 500);
  // One that is kept from its turn for long may overtake, so only most are in their places.
  int in_place = 0;
  for (int i = 0; i < 500; ++i) in_place += order[static_cast<size_t>(i)] == i;
  CHECK(in_place > 250, in_place);
}

TEST(callbacks_are_served_after_the_owner_has_left) {
  OwnedCallbacks callbacks;
  std::promise<void> before;
  callbacks->post([&] { before.get_future().wait(); });
  callbacks->leave();
  std::promise<std::thread::id> ran;
  callbacks->post([&] { ran.set_value(std::this_thread::get_id()); });  // must not wait for the one before
  CHECK(ran.get_future().get() != std::this_thread::get_id());
  before.set_value();
  CHECK(callbacks->wait_idle(seconds(60)));
}

// Each completion starts the next operation: 20,000 deep without a stack that grows, and without a pile of threads.
TEST(callbacks_in_a_long_chain) {
  OwnedQueue queue;
  OwnedCallbacks callbacks;
  const int length = iterations(20000);
  std::atomic<int> ran{0};
  std::promise<void> end;
  std::function<void()> link = [&] {
    queue->submit({[&] { ++ran; },
                   [&](std::exception_ptr) {
                     if (ran == length) return end.set_value();
                     callbacks->post(link);
                   }},
                  /*here=*/ran % 2 == 0);
  };
  link();
  CHECK(end.get_future().wait_for(seconds(90)) == std::future_status::ready, ran.load());
  CHECK(callbacks->wait_idle(seconds(60)));
  CHECK(queue->wait_idle(seconds(60)));
  CHECK(ran == length);
}

}  // namespace
}  // namespace mnnvl::test
