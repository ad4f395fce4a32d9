// Documents inside packed tokens. Nothing crosses a document: attention, block selection, key
// compression and the linear state all restart at each one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace sala::kernels {

// Tokens [begin, end) of the packed buffer form one document (or one piece of it).
struct DocumentRange {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t length() const { return end - begin; }
};

// cu_seqlens [S + 1], rising from 0 to T (empty documents allowed) -> the non-empty documents in
// order.
std::vector<DocumentRange> Documents(std::span<const int32_t> cu_seqlens);

// The tokens of `document` that lie in [first, first + count), counted from the document's first
// token. Begin and end lie in the document, and are equal where there are none.
DocumentRange PartOf(const DocumentRange& document, int64_t first, int64_t count);

// Whether a kernel's result replaces what the output holds or is added to it.
enum class Write : uint8_t { kOverwrite, kAccumulate };

}  // namespace sala::kernels
