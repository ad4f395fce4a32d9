#include "data/packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

#include "core/check.h"

namespace sala::data {
namespace {

PackedFile Concat(const std::vector<int64_t>& lengths, int64_t seq_len) {
  PackedFile out;
  int64_t used = 0;  // of the sample being filled
  for (size_t d = 0; d < lengths.size(); ++d) {
    for (int64_t start = 0; start < lengths[d];) {
      const int64_t length = std::min(lengths[d] - start, seq_len - used);
      out.segments.push_back({static_cast<int64_t>(d), start, length});
      start += length;
      used += length;
      if (used == seq_len) {
        out.first.push_back(static_cast<int64_t>(out.segments.size()));
        used = 0;
      }
    }
  }
  if (used > 0) out.first.push_back(static_cast<int64_t>(out.segments.size()));
  return out;
}

std::vector<Segment> Pieces(const std::vector<int64_t>& lengths, const PackRule& rule) {
  std::vector<Segment> pieces;
  for (size_t d = 0; d < lengths.size(); ++d) {
    const int64_t document = static_cast<int64_t>(d);
    if (lengths[d] <= rule.seq_len) {
      pieces.push_back({document, 0, lengths[d]});
    } else if (rule.long_documents == LongDocuments::kTruncate) {
      pieces.push_back({document, 0, rule.seq_len});
    } else if (rule.long_documents == LongDocuments::kSplit) {
      for (int64_t start = 0; start < lengths[d]; start += rule.seq_len)
        pieces.push_back({document, start, std::min(rule.seq_len, lengths[d] - start)});
    }
  }
  return pieces;
}

PackedFile BestFit(std::vector<Segment> pieces, const PackRule& rule) {
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Segment& a, const Segment& b) { return a.length > b.length; });
  std::vector<std::vector<Segment>> bins;
  std::set<std::pair<int64_t, int64_t>> open;  // (free slots, bin): equal space gives the older bin
  for (const Segment& piece : pieces) {
    auto fit = open.lower_bound({piece.length, 0});
    int64_t free = rule.seq_len;
    size_t bin = bins.size();
    if (fit == open.end()) {
      bins.emplace_back();
    } else {
      free = fit->first;
      bin = static_cast<size_t>(fit->second);
      open.erase(fit);
    }
    bins[bin].push_back(piece);
    free -= piece.length;
    if (free > 0 && static_cast<int64_t>(bins[bin].size()) < rule.max_segments)
      open.emplace(free, static_cast<int64_t>(bin));
  }
  PackedFile out;
  for (const auto& bin : bins) {
    out.segments.insert(out.segments.end(), bin.begin(), bin.end());
    out.first.push_back(static_cast<int64_t>(out.segments.size()));
  }
  return out;
}

PackedFile OnePerSample(std::vector<Segment> pieces) {
  PackedFile out;
  out.first.assign(pieces.size() + 1, 0);
  std::iota(out.first.begin(), out.first.end(), 0);
  out.segments = std::move(pieces);
  return out;
}

}  // namespace

PackedFile Pack(const std::vector<int64_t>& lengths, const PackRule& rule) {
  SALA_CHECK(rule.seq_len > 0 && rule.max_segments > 0) << "a sample needs slots";
  SALA_CHECK(rule.long_documents != LongDocuments::kAuto) << "resolve the rule before packing";
  switch (rule.packing) {
    case Packing::kConcat:
      return Concat(lengths, rule.seq_len);
    case Packing::kBestFit:
      return BestFit(Pieces(lengths, rule), rule);
    case Packing::kOnePerSample:
      return OnePerSample(Pieces(lengths, rule));
  }
  return {};
}

int64_t CountSamples(const std::vector<int64_t>& lengths, const PackRule& rule) {
  if (rule.packing != Packing::kConcat) return Pack(lengths, rule).samples();
  const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  return (tokens + rule.seq_len - 1) / rule.seq_len;
}

}  // namespace sala::data
