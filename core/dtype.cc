#include "core/dtype.h"

#include <array>

#include "core/check.h"

namespace sala {
namespace {

struct Row {
  DType dtype;
  std::string_view name;
  size_t size;
};

constexpr std::array<Row, 7> kRows = {{{DType::kF32, "f32", 4},
                                       {DType::kBF16, "bf16", 2},
                                       {DType::kF64, "f64", 8},
                                       {DType::kI32, "i32", 4},
                                       {DType::kI64, "i64", 8},
                                       {DType::kU8, "u8", 1},
                                       {DType::kU16, "u16", 2}}};

const Row& RowOf(DType dtype) {
  for (const Row& row : kRows) {
    if (row.dtype == dtype) return row;
  }
  SALA_CHECK(false) << "unknown dtype " << static_cast<int>(dtype);
  return kRows[0];
}

}  // namespace

size_t SizeOf(DType dtype) { return RowOf(dtype).size; }

std::string_view NameOf(DType dtype) { return RowOf(dtype).name; }

std::optional<DType> ParseDType(std::string_view name) {
  for (const Row& row : kRows) {
    if (row.name == name) return row.dtype;
  }
  return std::nullopt;
}

}  // namespace sala
