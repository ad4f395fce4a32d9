// Emulated twins of the PTX wrappers in kernels/common/ptx.h, which includes this file and has the
// contracts.
//
// A lane reads and writes its own operands here, in code compiled with the kernel: the sanitizers
// then see each access in the lane and at the line it belongs to. Only the exchange between lanes
// is inside the emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tests/simt/mma.h"
#include "tests/simt/simt_core.h"

namespace sala::kernels::ptx {

namespace emulated {

inline void CheckAligned(const void* address, uintptr_t bytes, const char* what,
                         const simt::Where& where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    simt::ReportAt(where,
                   std::string(what) + " is not aligned to " + std::to_string(bytes) + " bytes");
  }
}

// Lanes from `lanes` on give no address: the hardware does not read theirs.
template <int kMatrices>
inline void LdMatrix(const simt::WarpOp& op, uint32_t (&r)[kMatrices], const void* shared,
                     const simt::Where& where) {
  simt::MatrixRow row;
  row.result = r;
  if (simt::LaneIndex() < 8 * kMatrices) {
    CheckAligned(shared, 16, "a row address of ldmatrix", where);
    const auto* elements = static_cast<const uint16_t*>(shared);
    for (int i = 0; i < 8; ++i) row.elements[i] = elements[i];
  }
  simt::WarpCollective(op, ~0U, reinterpret_cast<uint64_t>(&row), 0, where);
}

template <typename Word>
inline void CpAsync(void* shared, const void* global, int words, int valid_bytes,
                    const simt::Where& where) {
  const int bytes = words * static_cast<int>(sizeof(Word));
  CheckAligned(shared, bytes, "the shared address of cp.async", where);
  CheckAligned(global, bytes, "the global address of cp.async", where);
  if (valid_bytes < 0 || valid_bytes > bytes) {
    simt::ReportAt(where, "valid_bytes of cp.async is out of range");
  }
  // The source is read (for the sanitizers) and the destination is lost from now on; the data
  // arrive at the wait.
  if (valid_bytes == bytes) {
    const auto* source = static_cast<const volatile Word*>(global);
    for (int i = 0; i < words; ++i) static_cast<void>(source[i]);
  } else {
    const auto* source = static_cast<const volatile unsigned char*>(global);
    for (int i = 0; i < valid_bytes; ++i) static_cast<void>(source[i]);
  }
  auto* destination = static_cast<Word*>(shared);
  for (int i = 0; i < words; ++i) destination[i] = ~Word{0};
  simt::AsyncCopy(shared, global, bytes, valid_bytes, where);
}

}  // namespace emulated

inline void MmaBf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                    const simt::Where& where = simt::Where::current()) {
  simt::MmaOperands operands{c, a, {b0, b1}};
  simt::WarpCollective(simt::kMmaBf16, ~0U, reinterpret_cast<uint64_t>(&operands), 0, where);
}

inline void LdMatrix4(uint32_t (&r)[4], const void* shared,
                      const simt::Where& where = simt::Where::current()) {
  emulated::LdMatrix<4>(simt::kLdMatrix4, r, shared, where);
}
inline void LdMatrix4Trans(uint32_t (&r)[4], const void* shared,
                           const simt::Where& where = simt::Where::current()) {
  emulated::LdMatrix<4>(simt::kLdMatrix4Trans, r, shared, where);
}
inline void LdMatrix2(uint32_t (&r)[2], const void* shared,
                      const simt::Where& where = simt::Where::current()) {
  emulated::LdMatrix<2>(simt::kLdMatrix2, r, shared, where);
}
inline void LdMatrix2Trans(uint32_t (&r)[2], const void* shared,
                           const simt::Where& where = simt::Where::current()) {
  emulated::LdMatrix<2>(simt::kLdMatrix2Trans, r, shared, where);
}

inline void CpAsync16(void* shared, const void* global, int valid_bytes = 16,
                      const simt::Where& where = simt::Where::current()) {
  emulated::CpAsync<uint64_t>(shared, global, 2, valid_bytes, where);
}
inline void CpAsync4(void* shared, const void* global, int valid_bytes = 4,
                     const simt::Where& where = simt::Where::current()) {
  emulated::CpAsync<uint32_t>(shared, global, 1, valid_bytes, where);
}
inline void CpAsyncCommit() { simt::AsyncCommit(); }
template <int kKeep>
inline void CpAsyncWait() {
  static_assert(kKeep >= 0);
  simt::AsyncWait(kKeep);
}

inline int Opaque(int x) { return x; }

namespace emulated {

// ftz: subnormal numbers are zero.
inline float Flush(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0F, x) : x;
}

}  // namespace emulated

inline float Exp2(float x) { return emulated::Flush(std::exp2(emulated::Flush(x))); }
inline float Log2(float x) { return std::log2(emulated::Flush(x)); }
inline float Rcp(float x) { return emulated::Flush(1.0F / emulated::Flush(x)); }

}  // namespace sala::kernels::ptx
