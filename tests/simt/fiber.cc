#include "tests/simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "tests/simt/sanitizer.h"

#ifndef SIMT_USES_UCONTEXT
asm(R"(
.text
.globl SimtSwitchStack
.hidden SimtSwitchStack
.type SimtSwitchStack,@function
SimtSwitchStack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size SimtSwitchStack,.-SimtSwitchStack
)");
#endif

namespace simt {
namespace {

// Frames grow under the sanitizers. Only touched pages cost memory.
size_t StackBytes() {
  const bool sanitized = sanitizer::HasAddress() || sanitizer::HasThread();
  return (sanitized ? 256 : 64) * size_t{1024};
}

constexpr size_t kColours = 64;  // cache lines of a page
constexpr size_t kCacheLine = 64;

}  // namespace

Stacks::Stacks(int count) : Stacks(count, StackBytes()) {}

Stacks::Stacks(int count, size_t bytes)
    : count_(count), guard_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
  stride_ = bytes + 2 * guard_;  // the guard page and one page for the shift
  Map(nullptr);
}

void Stacks::Map(void* place) {
  const int fixed = place != nullptr ? MAP_FIXED : 0;
  void* memory = mmap(place, static_cast<size_t>(count_) * stride_, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("simt: stacks of a block");
    std::abort();
  }
  base_ = static_cast<char*>(memory);
  if (sanitizer::HasThread()) return;  // mapped anew for each block: guards would cost too much
  for (int i = 0; i < count_; ++i) mprotect(base_ + i * stride_, guard_, PROT_NONE);
}

// ThreadSanitizer watches mmap.
void Stacks::Renew() {
  if (sanitizer::HasThread()) Map(base_);
}

Stacks::~Stacks() { munmap(base_, static_cast<size_t>(count_) * stride_); }

void Stacks::Start(Context* context, int index, void (*entry)()) const {
  char* top = base_ + (index + 1) * stride_ - (index * 5 % kColours + 1) * kCacheLine;
#ifdef SIMT_USES_UCONTEXT
  getcontext(context);
  context->uc_stack.ss_sp = const_cast<void*>(bottom(index));
  context->uc_stack.ss_size =
      static_cast<size_t>(top - static_cast<char*>(context->uc_stack.ss_sp));
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#else
  // At the entry of a function the stack pointer is 16 n + 8, as after the push of a return
  // address.
  auto** slot = reinterpret_cast<void**>(top - 8);
  *slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--slot = nullptr;
  context->stack_pointer = slot;
#endif
}

}  // namespace simt
