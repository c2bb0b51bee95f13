#include "bootstrap/agreement.h"

#include "bootstrap/record.h"

namespace mnnvl {
namespace {

struct Outcome {
  bool ok = false;
  ErrorKind kind = ErrorKind::kSystem;
  std::string where;
  std::string payload;  // bytes when ok, else the reason

  std::string serialise() const { return RecordWriter().put(ok).put(kind).put(where).put(payload).bytes(); }
  static Outcome parse(const std::string& bytes, int rank) {
    Outcome outcome;
    RecordReader reader(bytes, rank);
    reader.get(outcome.ok).get(outcome.kind, ErrorKind::kAborted).get_text(outcome.where).get(outcome.payload).finish();
    if (!outcome.ok) outcome.payload = readable(outcome.payload);
    return outcome;
  }
};

Outcome run(const std::string& where, const std::function<std::string()>& local) {
  Outcome outcome;
  try {
    outcome.payload = local();
    outcome.ok = true;
    return outcome;
  } catch (const Error& error) {
    outcome.kind = error.kind();
    outcome.payload = error.what();
  } catch (const std::exception& error) {
    outcome.payload = error.what();
  }
  outcome.payload = readable(outcome.payload);  // no longer than a record can hold
  outcome.where = where;
  return outcome;
}

// The failure that all ranks report: the lowest rank's own failure, else the lowest rank's.
void throw_root_cause(const std::string& stage, const std::vector<Outcome>& outcomes) {
  const Outcome* root = nullptr;
  for (const Outcome& outcome : outcomes) {
    if (outcome.ok) continue;
    if (root == nullptr || (!is_own(root->kind) && is_own(outcome.kind))) root = &outcome;
  }
  if (root == nullptr) return;
  throw AgreedError(root->kind,
                    str(stage, " failed on rank ", root - outcomes.data(), " (", root->where, "): ", root->payload));
}

}  // namespace

std::vector<std::string> agree_gather(Exchange& exchange, const std::string& stage, const std::string& where,
                                      const std::function<std::string()>& local) {
  std::vector<Outcome> outcomes{run(where, local)};
  if (exchange.size() > 1) {
    std::vector<std::string> records;
    try {
      records = exchange.all_gather(outcomes[0].serialise());
    } catch (const Error& error) {
      // This rank's own failure, if any, tells more than the exchange's.
      std::string own = outcomes[0].ok ? "" : str(" (this rank had failed: ", outcomes[0].payload, ")");
      fail(error.kind(), stage, ": ", error.what(), own);
    }
    outcomes.clear();
    MNNVL_ASSERT(static_cast<int>(records.size()) == exchange.size(), records.size(), " records of ", exchange.size(),
                 " ranks");
    for (const std::string& record : records)
      outcomes.push_back(Outcome::parse(record, static_cast<int>(outcomes.size())));
  }
  throw_root_cause(stage, outcomes);
  std::vector<std::string> payloads;
  for (Outcome& outcome : outcomes) payloads.push_back(std::move(outcome.payload));
  return payloads;
}

void agree(Exchange& exchange, const std::string& stage, const std::string& where, const std::function<void()>& local) {
  agree_gather(exchange, stage, where, [&local] {
    local();
    return std::string();
  });
}

}  // namespace mnnvl
