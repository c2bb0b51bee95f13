#include "bootstrap/presence.h"

#include "bootstrap/record.h"

namespace mnnvl {

std::string Presence::serialise() const {
  RecordWriter writer;
  writer.put(count).put(nonce).put(kind).put(word);
  process.serialise(writer);
  writer.put(static_cast<uint32_t>(litter.size()));
  for (const std::string& key : litter) writer.put(key);
  return writer.bytes();
}

Presence Presence::parse(const std::string& bytes, int rank) {
  Presence presence;
  uint32_t size = 0;
  RecordReader reader(bytes, rank);
  reader.get(presence.count).get(presence.nonce).get(presence.kind, ErrorKind::kAborted).get_text(presence.word);
  presence.process = HostIdentity::parse(reader);
  reader.get(size);
  // Each takes bytes of the record, so that no more are made than it holds.
  for (uint32_t i = 0; i < size; ++i) reader.get(presence.litter.emplace_back());
  reader.finish();
  return presence;
}

}  // namespace mnnvl
