// Number types of tensors.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>

namespace sala {

enum class DType : uint8_t { kF32, kBF16, kF64, kI32, kI64, kU8, kU16 };

size_t SizeOf(DType dtype);
std::string_view NameOf(DType dtype);  // "f32", "bf16", ...
std::optional<DType> ParseDType(std::string_view name);

// bfloat16: the upper 16 bits of an IEEE float32.
struct BF16 {
  uint16_t bits = 0;

  BF16() = default;
  explicit BF16(float value) : bits(RoundToNearestEven(value)) {}
  explicit operator float() const {
    return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  }

  // NaN stays NaN (quiet); everything else rounds to nearest, ties to even, overflowing to
  // infinity.
  static uint16_t RoundToNearestEven(float value) {
    const auto u = std::bit_cast<uint32_t>(value);
    if ((u & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((u >> 16) | 0x0040U);
    return static_cast<uint16_t>((u + 0x7fffU + ((u >> 16) & 1U)) >> 16);
  }
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<BF16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};
template <>
struct DTypeOf<uint16_t> {
  static constexpr DType value = DType::kU16;
};

}  // namespace sala
