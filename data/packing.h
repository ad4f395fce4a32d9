// Cutting the documents of one token file into samples of seq_len slots. Lengths and integers only:
// no token is read here.
//
//   concat          the documents form one stream, cut every seq_len tokens; the last sample is
//   padded best_fit        documents longer than seq_len are cut in pieces first; pieces, longest
//   first, go to the open bin with
//                   the least space that still holds them (equal: the older bin), else to a new
//                   one; a bin with max_segments pieces is closed
//   one_per_sample  every piece is a sample
#pragma once

#include <cstdint>
#include <vector>

namespace sala::data {

enum class Packing { kConcat, kBestFit, kOnePerSample };
// What happens to a document longer than seq_len (not with concat, which cuts wherever a sample
// ends). kAuto: split for text, drop for chat (a piece of a conversation without its start teaches
// nothing true).
enum class LongDocuments { kAuto, kSplit, kTruncate, kDrop };

struct PackRule {
  Packing packing = Packing::kBestFit;
  LongDocuments long_documents = LongDocuments::kSplit;  // not kAuto
  int64_t seq_len = 0;
  int64_t max_segments = 1024;
};

// A run of tokens of one document. `document` is the position in the list of lengths given to Pack.
struct Segment {
  int64_t document;
  int64_t start;  // in the document
  int64_t length;
};

// Samples as ranges of segments: sample s has segments [first[s], first[s + 1]).
struct PackedFile {
  std::vector<Segment> segments;
  std::vector<int64_t> first = {0};
  int64_t samples() const { return static_cast<int64_t>(first.size()) - 1; }
};

// `lengths` in the order of the epoch. All lengths >= 1.
PackedFile Pack(const std::vector<int64_t>& lengths, const PackRule& rule);

// The number of samples Pack would make; it does not depend on the order of the lengths.
int64_t CountSamples(const std::vector<int64_t>& lengths, const PackRule& rule);

}  // namespace sala::data
