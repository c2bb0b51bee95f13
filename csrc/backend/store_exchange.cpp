#include "backend/store_exchange.h"

#include <algorithm>
#include <cstdio>
#include <random>
#include <thread>

#include "bootstrap/record.h"
#include "system/deadline.h"

namespace mnnvl {
namespace {

using std::chrono::microseconds;
using std::chrono::milliseconds;

constexpr size_t kMaxLitter = 1000;  // keys that a record has room for

std::string here(int rank) { return str("here/", rank); }
std::string tries(int rank) { return str("tries/", rank); }

uint64_t fresh_nonce() {
  std::random_device random;
  uint64_t nonce = 0;
  while (nonce == 0) nonce = uint64_t{random()} << 32 | random();
  return nonce;
}

// "rank 1", "ranks 1, 4".
std::string list_of(const std::vector<int>& ranks) {
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  for (size_t i = 0; i < ranks.size(); ++i) text += str(i == 0 ? "" : ", ", ranks[i]);
  return text;
}

void check_length(const std::string& record, int rank) {
  if (record.size() <= kMaxRecordBytes) return;
  fail(ErrorKind::kSystem, "mnnvl set-up: what rank ", rank, " contributes has ", record.size(), " bytes, and at most ",
       kMaxRecordBytes, " are taken");
}

}  // namespace

// Polls instead of Store::wait(), which nothing but its time-out can end: quickly at first, and without a look at the
// records, since ranks mostly come within a moment of each other.
class StoreExchange::Wait {
 public:
  // Few ranks ask more often at first, and in the end: their questions are cheap. Each names every rank's key, so what
  // a store is asked for grows with the square of the ranks.
  Wait(milliseconds timeout, int size)
      : deadline_(timeout.count()),
        pause_(std::min(12 * size, 100)),
        longest_pause_(std::max(6400, 400 * size)),
        next_look_(Clock::now() + look_interval_) {}

  bool passed() const { return deadline_.passed(); }
  void pause() {
    std::this_thread::sleep_for(pause_);
    pause_ = std::min(pause_ * 2, longest_pause_);
  }
  bool time_to_look() {
    if (Clock::now() < next_look_) return false;
    look_interval_ = std::min(look_interval_ * 2, milliseconds(100));
    next_look_ = Clock::now() + look_interval_;
    return true;
  }

 private:
  using Clock = Deadline::Clock;
  Deadline deadline_;
  microseconds pause_;
  const microseconds longest_pause_;
  milliseconds look_interval_{10};
  Clock::time_point next_look_;
};

StoreExchange::StoreExchange(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size,
                             milliseconds timeout, const std::atomic<bool>& cancelled, int64_t owner)
    : store_(std::move(store), std::move(prefix), rank),
      rank_(rank),
      size_(size),
      timeout_(clamp_timeout_ms(timeout.count())),
      cancelled_(cancelled),
      owner_(owner),
      known_(size),
      records_(size) {}

StoreExchange::~StoreExchange() {
  if (published_ && !failure_ && !birthplace_.left()) leave(ErrorKind::kPeerFailed, /*word=*/"", /*for_all=*/false);
}

int64_t StoreExchange::new_owner(c10::intrusive_ptr<c10d::Store> store, const std::string& prefix, int rank) {
  return SetUpStore(std::move(store), prefix, rank).add(str("owners/", rank), 1);
}

std::vector<std::string> StoreExchange::all_gather(const std::string& mine) {
  if (failure_) throw *failure_;
  if (size_ == 1) return {mine};
  birthplace_.check("set-up");
  try {
    check_length(mine, rank_);
    Wait wait(timeout_, size_);
    if (met_.empty()) {
      meet(wait, mine);
    } else {
      run_round(wait, mine);
    }
    std::vector<std::string> all = store_.get(keys(round_));
    for (int r = 0; r < size_; ++r) check_length(all[r], r);
    // Whoever posted this round has read the last one, so that is no longer needed.
    if (round_ > 0) {
      store_.forget(key(round_ - 1, rank_));
      own().litter = {key(round_, rank_)};
    }
    ++round_;
    return all;
  } catch (const Error& error) {
    failure_ = error;
    leave(error.kind(), silent_ ? "" : error.what(), /*for_all=*/is_own(error.kind()));
    throw;
  }
}

void StoreExchange::give_up(const std::string& reason) noexcept {
  if (failure_ || size_ == 1 || birthplace_.left()) return;
  failure_ = Error(ErrorKind::kSystem, str("mnnvl set-up: rank ", rank_, " gave it up: ", reason));
  leave(ErrorKind::kPeerFailed, failure_->what(), /*for_all=*/true);
}

// --- The own record.

// In the store later: a rank that gives up before it has come was never present.
void StoreExchange::begin() {
  Record before;
  in_store_ = store_.add(tries(rank_), 0) > 0;
  if (in_store_) before = Record::parse(store_.get({here(rank_)})[0], rank_);
  own() = Record();
  own().count = std::max(before.count, static_cast<uint64_t>(owner_) << 32) + 1;
  own().nonce = fresh_nonce();
  own().process = host_identity("");
  own().litter = std::move(before.litter);
  known_[rank_] = begun_ = true;
}

void StoreExchange::publish() {
  store_.set(here(rank_), own().serialise());
  // In this order, so that who finds a try finds a record, whatever ends this process in between.
  if (!in_store_) store_.add(tries(rank_), 1);
  in_store_ = published_ = true;
}

void StoreExchange::leave(ErrorKind kind, const std::string& word, bool for_all) noexcept {
  try {
    if (!begun_) begin();
    if (published_) {
      const Record stored = Record::parse(store_.get({here(rank_)})[0], rank_);
      if (stored.nonce != own().nonce) return;  // another process's by now
    }
    if (!word.empty()) {
      learn_who_is_here();
      read_records();
      own().count = std::max(own().count, highest_present(for_all));
    }
    own().nonce = 0;
    own().kind = kind;
    own().word = readable(word);  // as long as the others read it
    publish();
  } catch (const std::exception&) {  // whoever waits for this rank has a deadline
  }
}

// --- Meeting.

void StoreExchange::meet(Wait& wait, const std::string& first) {
  begin();
  publish();
  std::vector<std::string> everybody;
  for (int r = 0; r < size_; ++r) everybody.push_back(here(r));
  for (;; wait.pause()) {
    if (!all_known() && store_.have(everybody)) known_.assign(size_, true);
    const bool looks = wait.time_to_look();
    if (looks) learn_who_is_here();
    if (looks || (all_known() && !all_present())) read_records();
    // In this order: who has met may be through with the set-up by now, even in the next one, and so look absent or
    // changed.
    if (complete()) break;
    if (looks) listen();
    if (all_present() && meeting_id() != id_) {
      id_ = meeting_id();
      tried_.clear();
      for (const Record& record : records_) tried_.push_back(record.nonce);
      post(first);
      if (complete()) break;
    }
    check_end(wait);
  }
  met_ = tried_;
  watch_peers();
  // Everybody has left what it did before.
  for (const std::string& old : own().litter) {
    if (old != key(0, rank_)) store_.forget(old);
  }
  own().litter = {key(0, rank_)};
  const uint64_t highest = highest_present(/*for_all=*/false);
  if (highest > own().count) {
    own().count = highest;
    publish();
  }
}

void StoreExchange::post(const std::string& mine) {
  std::vector<std::string>& litter = own().litter;
  if (litter.size() >= kMaxLitter) litter.erase(litter.begin());  // it stays in the store
  litter.push_back(key(round_, rank_));
  store_.set(key(round_, rank_), mine);
}

bool StoreExchange::complete() { return !id_.empty() && store_.have(keys(0)); }

// A record that has changed since is another try's.
void StoreExchange::watch_peers() {
  std::vector<HostIdentity> processes;
  for (const Record& record : records_) processes.push_back(record.process);
  const std::vector<int> pids = visible_pids(processes, rank_);
  for (int r = 0; r < size_; ++r) watches_.emplace_back(records_[r].nonce == met_[r] ? pids[r] : -1);
}

void StoreExchange::listen() {
  const uint64_t highest = highest_present(/*for_all=*/true);
  const Record* word = nullptr;
  for (const Record& record : records_) {
    const bool meant = !record.word.empty() && record.count >= highest;
    if (meant && (word == nullptr || record.count > word->count)) word = &record;
  }
  if (word != nullptr) hear(*word);
  if (highest > own().count) {
    own().count = highest;
    publish();
  }
}

void StoreExchange::hear(const Record& record) {
  own().count = std::max(own().count, record.count);
  silent_ = true;
  fail(record.kind == ErrorKind::kTimeout ? ErrorKind::kTimeout : ErrorKind::kPeerFailed, record.word);
}

// --- Rounds.

void StoreExchange::run_round(Wait& wait, const std::string& mine) {
  post(mine);
  for (; !store_.have(keys(round_)); wait.pause()) {
    if (wait.time_to_look()) look_in_round();
    check_end(wait);
  }
}

void StoreExchange::look_in_round() {
  read_records();
  std::vector<int> gone, dead;
  for (int r = 0; r < size_; ++r) {
    const bool left = records_[r].nonce != met_[r], ended = watches_[r].ended();
    // In this order: a rank that is through with the set-up takes its nonce away after its last contribution.
    if ((left || ended) && !store_.have({key(round_, r)})) (left ? gone : dead).push_back(r);
  }
  if (gone.empty() && dead.empty()) return;
  // The one that it began with has left word; it need not be one that is waited for.
  for (int r = 0; r < size_; ++r) {
    if (records_[r].nonce != met_[r] && !records_[r].word.empty()) hear(records_[r]);
  }
  if (!dead.empty()) {
    fail(ErrorKind::kPeerFailed, "mnnvl set-up: rank ", rank_, " waited for ", list_of(dead), " to reach step ", round_,
         " of ", store_.prefix(), ", whose process (pid ", watches_[dead[0]].pid(), ") has ended");
  }
  silent_ = true;
  fail(ErrorKind::kPeerFailed, "mnnvl set-up: rank ", rank_, " waited for ", list_of(gone), " to reach step ", round_,
       " of ", store_.prefix(), ", which left it before, or began anew");
}

// --- Both.

void StoreExchange::check_end(const Wait& wait) {
  if (cancelled_) fail(ErrorKind::kAborted, "mnnvl: abort() was called on rank ", rank_, " during the set-up");
  if (!wait.passed()) return;
  const std::vector<int> late = missing();
  if (late.empty()) return;  // they have come at this moment
  std::string ranks = list_of(late);
  fail(ErrorKind::kTimeout, "mnnvl set-up: rank ", rank_, " waited ", static_cast<double>(timeout_.count()) / 1000.0,
       " s for ", ranks, " to reach step ", round_, " of ", store_.prefix(), " (ranks [",
       ranks.substr(ranks.find(' ') + 1), "] of ", size_, " did not come): the timeout passed");
}

// Looks once more: a peer whose time-out came a moment earlier has left word of who is missing, and isn't itself.
std::vector<int> StoreExchange::missing() {
  if (met_.empty()) {
    learn_who_is_here();
    read_records();
    if (complete()) return {};
    listen();
  } else {
    look_in_round();
  }
  const bool posted = !met_.empty() || (all_present() && meeting_id() == id_);
  std::vector<int> ranks;
  for (int r = 0; r < size_; ++r) {
    const bool here = r == rank_ || (posted ? store_.have({key(round_, r)}) : records_[r].nonce != 0);
    if (!here) ranks.push_back(r);
  }
  return ranks;
}

void StoreExchange::learn_who_is_here() {
  for (int r = 0; r < size_; ++r) {
    if (known_[r]) continue;
    known_[r] = store_.can_check() ? store_.have({here(r)}) : store_.add(tries(r), 0) > 0;
  }
}

void StoreExchange::read_records() {
  std::vector<int> ranks;
  std::vector<std::string> names;
  for (int r = 0; r < size_; ++r) {
    if (!known_[r] || (r == rank_ && !published_)) continue;
    ranks.push_back(r);
    names.push_back(here(r));
  }
  const std::vector<std::string> values = store_.get(names);
  for (size_t i = 0; i < ranks.size(); ++i) {
    Record record = Record::parse(values[i], ranks[i]);
    if (ranks[i] != rank_) {
      records_[ranks[i]] = std::move(record);
    } else if (record.nonce != own().nonce) {
      silent_ = true;
      fail(ErrorKind::kSystem,
           "mnnvl set-up: another process, or another group over the same store, has taken the place of rank ", rank_,
           " in ", store_.prefix());
    }
  }
}

uint64_t StoreExchange::highest_present(bool for_all) const {
  uint64_t highest = records_[rank_].count;
  for (int r = 0; r < size_; ++r) {
    const bool present = met_.empty() || for_all ? records_[r].nonce != 0 : records_[r].nonce == met_[r];
    if (present) highest = std::max(highest, records_[r].count);
  }
  return highest;
}

bool StoreExchange::all_known() const {
  return std::all_of(known_.begin(), known_.end(), [](bool known) { return known; });
}

bool StoreExchange::all_present() const {
  return std::all_of(records_.begin(), records_.end(), [](const Record& record) { return record.nonce != 0; });
}

// FNV-1a over the nonces, and a mix of its bits.
std::string StoreExchange::meeting_id() const {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const Record& record : records_) {
    for (int byte = 0; byte < 8; ++byte) hash = (hash ^ (record.nonce >> 8 * byte & 0xff)) * 0x100000001b3u;
  }
  hash ^= hash >> 32;
  char text[20];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

std::string StoreExchange::key(uint64_t round, int rank) const { return str(id_, "/", round, "/", rank); }

std::vector<std::string> StoreExchange::keys(uint64_t round) const {
  std::vector<std::string> names;
  for (int r = 0; r < size_; ++r) names.push_back(key(round, r));
  return names;
}

}  // namespace mnnvl
