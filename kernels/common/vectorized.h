// Hot loops in one copy per instruction set, chosen when they are called.
//
//   SALA_INLINE void ScaleBody(int64_t n, float factor, float* x) { ... }
//   constexpr Vectorized<ScaleBody> Scale{};   // called as Scale(n, factor, x)
//
// The compiler turns the body into vector code of each instruction set. With the functions of
// vector_math.h and -ffp-contract=off, which the project compiles with, all copies give the same
// bits. A body is SALA_INLINE, and so is what it calls in a loop: code that stays a function of its
// own is compiled for the oldest processor.
#pragma once

#include "kernels/common/instruction_set.h"
#include "kernels/common/vector_math.h"

namespace sala::kernels {

template <auto kBody>
struct Vectorized;

template <typename Result, typename... Arguments, Result (*kBody)(Arguments...)>
struct Vectorized<kBody> {
  Result operator()(Arguments... arguments) const {
#if defined(__x86_64__)
    switch (CurrentInstructionSet()) {
      case InstructionSet::kAvx512:
        return WithAvx512(arguments...);
      case InstructionSet::kAvx2:
        return WithAvx2(arguments...);
      case InstructionSet::kPortable:
        break;
    }
#endif
    return kBody(arguments...);
  }

 private:
#if defined(__x86_64__)
  __attribute__((target("arch=x86-64-v4"))) static Result WithAvx512(Arguments... arguments) {
    return kBody(arguments...);
  }
  __attribute__((target("arch=x86-64-v3"))) static Result WithAvx2(Arguments... arguments) {
    return kBody(arguments...);
  }
#endif
};

}  // namespace sala::kernels
