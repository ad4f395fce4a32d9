// Stacks and the switch between them: what a CUDA thread runs on.
//
// On x86-64 a switch saves six registers (about 8 ns); elsewhere it is ucontext, which makes system
// calls and costs some 200 ns. Stacks lie at equal distances with a guard page below each, so an
// overflow ends in a fault instead of in a neighbour's data; the place where a stack begins is
// shifted by an odd number of cache lines from one to the next, or all of them would share one
// cache set.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(SALA_SIMT_UCONTEXT)
#define SIMT_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace simt {

#ifdef SIMT_USES_UCONTEXT
using Context = ucontext_t;
#else
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void SimtSwitchStack(void** save, void* load);
#endif

// Leaves the running context in `from` and goes on with `to`.
inline void Switch(Context* from, Context* to) {
#ifdef SIMT_USES_UCONTEXT
  swapcontext(from, to);
#else
  SimtSwitchStack(&from->stack_pointer, to->stack_pointer);
#endif
}

class Stacks {
 public:
  explicit Stacks(int count);  // of a size that is enough for the threads of a block
  Stacks(int count, size_t bytes);
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  const void* bottom(int index) const { return base_ + index * stride_ + guard_; }
  size_t size() const { return stride_ - guard_; }
  // The first switch to `context` calls entry on stack `index`. entry must not return.
  void Start(Context* context, int index, void (*entry)()) const;
  // Makes ThreadSanitizer forget who used the stacks: the threads of the next block are not ordered
  // after those of the last one. Contents are lost.
  void Renew();

 private:
  void Map(void* place);

  int count_;
  size_t guard_;
  size_t stride_;
  char* base_;
};

}  // namespace simt
