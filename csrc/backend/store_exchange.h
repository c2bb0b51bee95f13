// The control plane over a c10d store: how the ranks of a set-up meet, exchange, and hear of each other's failures, in
// a store that may hold what earlier tries, other processes of the same ranks, and other groups left there.
//
// What stands in the store, below the prefix:
//
//   here/R          R's record {count, nonce, word, process, litter}; written by R's present try alone
//   tries/R         more than 0 once here/R exists (so that a store without `check` can be asked, by add(…, 0))
//   ID/ROUND/R      what R contributes to a round of the meeting ID
//
// A try of rank R begins with a record of a fresh random nonce, without a word, whose count is one more than the count
// found in R's previous record. The ranks *meet*: each waits until everybody's record has a nonce, calls the digest of
// all nonces ID, and posts its first contribution under ID/0. It has met when all of ID/0 is there. While it waits it
// looks at the records again, and where one has changed, and all of ID/0 is still not there, goes on to the new ID. A
// try that ends leaves a record without a nonce: after a success or after hearing of a peer's failure with nothing
// else, after a failure of its own (deadline, abort, give_up) with a word: the reason. Who waits for a rank that left a
// word with a count not below its own fails with that word at once.
//
// Why it holds:
// - No try takes part in two meetings, and all of a meeting have the same ID. ID/0/R is written only by the try that
//   owns R's nonce in ID, after it had read all the other nonces in ID; nonces are never used twice. So what a dead
//   process or an earlier try left is never taken for a rank's presence: at worst its nonce makes an ID that nobody
//   completes.
// - Who has met may be through with the set-up, and in the next one, before a slow rank looks again. But it changed its
//   record after all of ID/0 was there. So who reads a changed record and *then* finds all of ID/0 has met; who finds
//   it incomplete knows that the changed rank did not meet by this ID, and goes on.
// - Ranks that all keep waiting meet: once the last of the records was written, everybody's next look finds the same
//   nonces.
// - It doesn't matter how often each rank has tried before: counts take no part in meeting. They only tell an old word
//   from one that is meant for this try, and they are brought together: whoever looks raises its own to the highest
//   among those present, whoever leaves a word gives it at least that, and whoever hears a word goes on counting from
//   there. After a meeting only those met count as present for a word that blames a peer (deadline, dead process): who
//   has come in its place waits for the next try. A failure of this rank's own (abort, give_up) is meant for all. A
//   word that is wrongly taken for old costs a wait until the deadline, one wrongly taken for new costs a failure at
//   once; the next try has neither.
// - `owner` (new_owner()) is the upper half of a count: words of tries that another owner made, say a group that was
//   since destroyed, are old for the next owner's ranks, however often the former had tried. Without it (0) a rank that
//   comes to a retry earlier than the one which failed alone would still find that one's word.
// - After a meeting a peer's nonce must stay until its contribution is there: a peer without both has left, or begun
//   anew.
// - A process that has met and ended without its contribution will not make it. One that ended before is like a rank
//   that has not come: its place may be taken.
// - A rank that was replaced (its record has another's nonce) fails, and leaves the record alone.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "backend/set_up_store.h"
#include "bootstrap/exchange.h"
#include "bootstrap/host_identity.h"
#include "bootstrap/presence.h"
#include "common/error.h"
#include "system/birthplace.h"
#include "system/peer_watch.h"

namespace mnnvl {

// One try. One thread at a time, and one exchange at a time per rank and prefix. A child by fork() takes no part in it.
class StoreExchange final : public Exchange {
 public:
  // `prefix` names what is set up (two things that ranks may set up in different order have different prefixes); it
  // need not be fresh. Every all_gather() ends after `timeout`, or with Error(kAborted) soon after `cancelled` is set.
  StoreExchange(c10::intrusive_ptr<c10d::Store> store, std::string prefix, int rank, int size,
                std::chrono::milliseconds timeout, const std::atomic<bool>& cancelled, int64_t owner = 0);
  // Ends the try: the peers that still wait for this rank hear of it.
  ~StoreExchange() override;

  // A number for who makes tries under this prefix from now on (a process group, in its constructor), one higher than
  // the last one's. Not collective.
  static int64_t new_owner(c10::intrusive_ptr<c10d::Store> store, const std::string& prefix, int rank);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  // The first one meets. kTimeout names the ranks that did not come, on every rank that waits; kPeerFailed gives the
  // word of a peer that gave up, or names one that left; kSystem: the store failed, or another process took this rank's
  // place, or a record does not parse or is longer than kMaxRecordBytes. A failure ends the try, and later calls repeat
  // it. A group of one never touches the store. In a child: kSystem, and nothing else happens.
  std::vector<std::string> all_gather(const std::string& mine) override;

  // Ends the try with a word for the peers, also before it began: for an error of this rank's own that keeps it from
  // calling all_gather(). Nothing if the try has failed already, or in a child. Never throws.
  void give_up(const std::string& reason) noexcept;

 private:
  using Record = Presence;
  class Wait;

  void begin();
  void publish();
  void meet(Wait& wait, const std::string& first);
  void run_round(Wait& wait, const std::string& mine);
  void post(const std::string& mine);
  bool complete();
  void watch_peers();
  void listen();
  void look_in_round();
  void check_end(const Wait& wait);
  [[noreturn]] void hear(const Record& record);
  void leave(ErrorKind kind, const std::string& word, bool for_all) noexcept;

  void learn_who_is_here();
  void read_records();
  Record& own() { return records_[rank_]; }
  uint64_t highest_present(bool for_all) const;  // not for all: after the meeting, of those it has met
  bool all_known() const;
  bool all_present() const;
  std::string meeting_id() const;
  std::string key(uint64_t round, int rank) const;
  std::vector<std::string> keys(uint64_t round) const;
  std::vector<int> missing();

  const Birthplace birthplace_;
  SetUpStore store_;
  const int rank_, size_;
  const std::chrono::milliseconds timeout_;
  const std::atomic<bool>& cancelled_;
  const int64_t owner_;

  bool begun_ = false, published_ = false, in_store_ = false;
  bool silent_ = false;  // the failure was a peer's, or another process took this rank's place
  std::vector<bool> known_;  // by rank: it has a record
  std::vector<Record> records_;  // by rank, as read last; the own one as written last
  std::string id_;  // of the meeting, or of the one that is tried
  std::vector<uint64_t> tried_;  // the nonces of id_, by rank
  std::vector<uint64_t> met_;  // nonces of the meeting, by rank; empty before it
  std::vector<PeerWatch> watches_;  // of the meeting's processes, by rank
  uint64_t round_ = 0;
  std::optional<Error> failure_;
};

}  // namespace mnnvl
