#include "kernels/common/documents.h"

#include <algorithm>

#include "core/check.h"

namespace sala::kernels {

std::vector<DocumentRange> Documents(std::span<const int32_t> cu_seqlens) {
  SALA_CHECK(!cu_seqlens.empty() && cu_seqlens.front() == 0) << "cu_seqlens must start with 0";
  std::vector<DocumentRange> documents;
  documents.reserve(cu_seqlens.size() - 1);
  for (size_t s = 0; s + 1 < cu_seqlens.size(); ++s) {
    SALA_CHECK(cu_seqlens[s] <= cu_seqlens[s + 1])
        << "cu_seqlens falls from " << cu_seqlens[s] << " to " << cu_seqlens[s + 1] << " at " << s;
    if (cu_seqlens[s] < cu_seqlens[s + 1]) documents.push_back({cu_seqlens[s], cu_seqlens[s + 1]});
  }
  return documents;
}

DocumentRange PartOf(const DocumentRange& document, int64_t first, int64_t count) {
  const auto inside = [&document](int64_t token) {
    return std::clamp<int64_t>(token - document.begin, 0, document.length());
  };
  return {inside(first), inside(first + count)};
}

}  // namespace sala::kernels
