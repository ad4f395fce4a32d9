// Barriers, warp instructions and atomics under their CUDA names.
//
// A mask may name lanes that the block does not have, but none that has ended: stricter than CUDA,
// which forgives it as long as nobody reads from such a lane. There are no floating-point atomics
// on purpose: their order, and so the result, would differ from run to run.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <concepts>
#include <cstring>

#include "tests/simt/simt_core.h"

namespace simt {

template <typename T>
concept Shuffled = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, long> ||
    std::same_as<T, unsigned long> || std::same_as<T, long long> ||
    std::same_as<T, unsigned long long> || std::same_as<T, float> || std::same_as<T, double> ||
    std::same_as<T, __half> || std::same_as<T, __half2> || std::same_as<T, __nv_bfloat16> ||
    std::same_as<T, __nv_bfloat162>;

template <typename T>
uint64_t ToBits(const T& value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <Shuffled T>
T ShuffleFrom(unsigned mask, const T& value, int source_lane, const Where& where) {
  const uint64_t bits =
      WarpCollective(kShuffle, mask, ToBits(value), static_cast<uint64_t>(source_lane), where);
  T result;
  std::memcpy(static_cast<void*>(&result), &bits, sizeof result);
  return result;
}

inline void CheckWidth(int width, const Where& where) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    ReportAt(where, "the width of a shuffle is not a power of two up to 32");
  }
}

}  // namespace simt

inline void __syncthreads(const simt::Where& where = simt::Where::current()) {
  simt::BlockBarrier(simt::BarrierKind::kPlain, 0, where);
}
inline int __syncthreads_count(int predicate, const simt::Where& where = simt::Where::current()) {
  return simt::BlockBarrier(simt::BarrierKind::kCount, predicate, where);
}
inline int __syncthreads_and(int predicate, const simt::Where& where = simt::Where::current()) {
  return simt::BlockBarrier(simt::BarrierKind::kAnd, predicate, where);
}
inline int __syncthreads_or(int predicate, const simt::Where& where = simt::Where::current()) {
  return simt::BlockBarrier(simt::BarrierKind::kOr, predicate, where);
}
inline void __syncwarp(unsigned mask = ~0U, const simt::Where& where = simt::Where::current()) {
  simt::WarpCollective(simt::kSyncWarp, mask, 0, 0, where);
}

// As in CUDA the warp is cut in segments of `width` lanes; a lane whose source would lie in a later
// segment keeps its own value.
template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const simt::Where& where = simt::Where::current()) {
  simt::CheckWidth(width, where);
  const int lane = simt::LaneIndex();
  return simt::ShuffleFrom(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), where);
}
template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                  const simt::Where& where = simt::Where::current()) {
  simt::CheckWidth(width, where);
  const int lane = simt::LaneIndex();
  const int source = lane ^ lane_mask;
  const bool outside = source < 0 || source >= (lane & ~(width - 1)) + width;
  return simt::ShuffleFrom(mask, value, outside ? lane : source, where);
}
template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const simt::Where& where = simt::Where::current()) {
  simt::CheckWidth(width, where);
  const int lane = simt::LaneIndex();
  const int source = lane + static_cast<int>(delta);
  return simt::ShuffleFrom(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source,
                           where);
}
template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const simt::Where& where = simt::Where::current()) {
  simt::CheckWidth(width, where);
  const int lane = simt::LaneIndex();
  const int source = lane - static_cast<int>(delta);
  return simt::ShuffleFrom(mask, value, source < (lane & ~(width - 1)) ? lane : source, where);
}

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const simt::Where& where = simt::Where::current()) {
  return static_cast<unsigned>(
      simt::WarpCollective(simt::kBallot, mask, predicate != 0 ? 1 : 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate,
                      const simt::Where& where = simt::Where::current()) {
  return static_cast<int>(simt::WarpCollective(simt::kAny, mask, predicate != 0 ? 1 : 0, 0, where));
}
inline int __all_sync(unsigned mask, int predicate,
                      const simt::Where& where = simt::Where::current()) {
  return static_cast<int>(simt::WarpCollective(simt::kAll, mask, predicate != 0 ? 1 : 0, 0, where));
}
template <typename T>
requires(std::is_arithmetic_v<T> && sizeof(T) >= 4) unsigned __match_any_sync(
    unsigned mask, T value, const simt::Where& where = simt::Where::current()) {
  return static_cast<unsigned>(
      simt::WarpCollective(simt::kMatchAny, mask, simt::ToBits(value), 0, where));
}

#define SIMT_REDUCE(name, type, op)                                                                \
  inline type name(unsigned mask, type value, const simt::Where& where = simt::Where::current()) { \
    return static_cast<type>(                                                                      \
        simt::WarpCollective(simt::op, mask, static_cast<uint32_t>(value), 0, where));             \
  }
SIMT_REDUCE(__reduce_add_sync, unsigned, kReduceAddUnsigned)
SIMT_REDUCE(__reduce_add_sync, int, kReduceAddSigned)
SIMT_REDUCE(__reduce_min_sync, unsigned, kReduceMinUnsigned)
SIMT_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
SIMT_REDUCE(__reduce_max_sync, unsigned, kReduceMaxUnsigned)
SIMT_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
SIMT_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
SIMT_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
SIMT_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef SIMT_REDUCE

// Atomics order memory here (sequentially consistent), more than the device promises.
namespace simt {

template <typename T, typename Change>
T AtomicChange(T* address, const Change& change) {
  const std::atomic_ref<T> cell(*address);
  T old = cell.load();
  while (!cell.compare_exchange_weak(old, change(old))) {
  }
  return old;
}

}  // namespace simt

#define SIMT_ATOMICS(type)                                                                       \
  inline type atomicAdd(type* address, type value) {                                             \
    return std::atomic_ref<type>(*address).fetch_add(value);                                     \
  }                                                                                              \
  inline type atomicOr(type* address, type value) {                                              \
    return std::atomic_ref<type>(*address).fetch_or(value);                                      \
  }                                                                                              \
  inline type atomicAnd(type* address, type value) {                                             \
    return std::atomic_ref<type>(*address).fetch_and(value);                                     \
  }                                                                                              \
  inline type atomicXor(type* address, type value) {                                             \
    return std::atomic_ref<type>(*address).fetch_xor(value);                                     \
  }                                                                                              \
  inline type atomicExch(type* address, type value) {                                            \
    return std::atomic_ref<type>(*address).exchange(value);                                      \
  }                                                                                              \
  inline type atomicCAS(type* address, type expected, type value) {                              \
    std::atomic_ref<type>(*address).compare_exchange_strong(expected, value);                    \
    return expected;                                                                             \
  }                                                                                              \
  inline type atomicMax(type* address, type value) {                                             \
    return simt::AtomicChange(address, [value](type old) { return old < value ? value : old; }); \
  }                                                                                              \
  inline type atomicMin(type* address, type value) {                                             \
    return simt::AtomicChange(address, [value](type old) { return value < old ? value : old; }); \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS

inline int atomicSub(int* address, int value) {
  return std::atomic_ref<int>(*address).fetch_sub(value);
}
inline unsigned atomicSub(unsigned* address, unsigned value) {
  return std::atomic_ref<unsigned>(*address).fetch_sub(value);
}

// Blocks and threads take turns on one memory: there is nothing to order.
inline void __threadfence() {}
inline void __threadfence_block() {}
