// Pair channels: how a message is cut into pieces, and where they stand in the workspaces. Pure functions, the same at
// both ends and on host and device. Why the protocol is safe: csrc/README.md, "Pair channels on the GPU".
#pragma once

#include <cstdint>

#include "common/math.h"

namespace mnnvl {

// Traffic that shares no word: a rank may wait for a message while it goes through collectives.
enum class ChannelKind : int { kCollective = 0, kPointToPoint = 1 };
constexpr int kChannelKinds = 2;

constexpr int kMaxLanes = 32;
constexpr int kChannelMessages = 4;  // of each lane under way: entries of its line ring, and of lane 0's headers
constexpr int kFewSlots = 4, kManySlots = 8;  // of each lane
static_assert((kChannelMessages & (kChannelMessages - 1)) == 0 && (kFewSlots & (kFewSlots - 1)) == 0 &&
                  (kManySlots & (kManySlots - 1)) == 0,
              "indices must not jump where counters wrap");

// A line carries 8 bytes of data and 8 of flag in one access.
constexpr int kLineData = 8;
constexpr int kLineBytes = 16;
constexpr int kHeaderLines = 2;  // CallDescriptor packed; tag

constexpr int64_t kMaxLineMessage = int64_t{256} << 10;  // larger messages go through slots, in large worlds sooner
constexpr int64_t kLineLaneBytes = 4096;                 // lines: from so many bytes on another lane takes part
constexpr int64_t kLeastPiece = 16 << 10;                // slots: pieces shrink no further,
constexpr int64_t kMostPiece = 24 << 10;                 // and grow no further: more of them are under way instead

// A channel's share of the workspace.
struct ChannelLayout {
  int32_t lanes;       // 0: no channels in this workspace
  int32_t line_bytes;  // data that one message may put into one lane's lines
  int32_t slots;       // of each lane
  int64_t slot_bytes;

  // Pieces that a source posts at a time while more are under way: what it posts goes behind a fence, which takes some
  // 3 µs when the link is full, where a piece takes 2. The other slots are on their way meanwhile.
  MNNVL_HOST_DEVICE constexpr uint32_t posted_at_once() const { return max64(1, slots * 3 / 8); }

  // `bytes`: of one channel. A quarter for lines, the rest for slots as far as they have a use for it; never less than
  // a line or two each.
  static constexpr ChannelLayout make(int64_t bytes) {
    constexpr int64_t kLeastLane = 16 << 10, kAlign = 128;
    ChannelLayout l{};
    if (bytes == 0) return l;
    l.lanes = int32_t(max64(1, min64(kMaxLanes, bytes / kLeastLane)));
    const int64_t lane = bytes / l.lanes;
    l.line_bytes = int32_t(max64(kAlign, align_down(lane / 4 / kChannelMessages, 2 * kAlign)) / 2);
    l.slots = lane * 3 / 4 / kManySlots >= kLeastPiece ? kManySlots : kFewSlots;
    l.slot_bytes = min64(kMostPiece, max64(kAlign, align_down(lane * 3 / 4 / l.slots, kAlign)));
    return l;
  }
};

// A message in pieces. Piece p is piece p / lanes of lane p % lanes; lanes beyond `lanes` take no part. A message
// without bytes is one empty piece of lane 0.
struct Cut {
  int64_t bytes;
  int32_t piece;
  int32_t pieces;
  int16_t lanes;
  bool lines;  // one piece a lane, through its lines; else through slots

  MNNVL_HOST_DEVICE static constexpr Cut make(const ChannelLayout& layout, int64_t bytes) {
    Cut cut{bytes, 0, 1, 1, true};
    if (bytes == 0) return cut;
    if (bytes <= min64(kMaxLineMessage, int64_t{layout.lanes} * layout.line_bytes)) {
      const int64_t lanes = min64(layout.lanes, ceil_div(bytes, min64(kLineLaneBytes, layout.line_bytes)));
      cut.piece = int32_t(min64(layout.line_bytes, align_up(ceil_div(bytes, lanes), 16)));
    } else {
      cut.lines = false;
      // Several pieces a lane, so that one is copied out while the next comes in.
      const int64_t even = align_up(ceil_div(bytes, int64_t{layout.lanes} * layout.slots), 128);
      cut.piece = int32_t(min64(layout.slot_bytes, max64(kLeastPiece, even)));
    }
    cut.pieces = int32_t(ceil_div(bytes, cut.piece));
    cut.lanes = int16_t(min64(layout.lanes, cut.pieces));
    return cut;
  }

  MNNVL_HOST_DEVICE constexpr int32_t pieces_of(int lane) const {
    return lane >= lanes ? 0 : (pieces - lane + lanes - 1) / lanes;
  }
  MNNVL_HOST_DEVICE constexpr int64_t begin(int lane, int32_t i) const { return (int64_t{i} * lanes + lane) * piece; }
  MNNVL_HOST_DEVICE constexpr int64_t bytes_of(int lane, int32_t i) const {
    return min64(piece, bytes - begin(lane, i));
  }
};

}  // namespace mnnvl
