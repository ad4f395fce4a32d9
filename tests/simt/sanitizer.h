// What the emulator tells AddressSanitizer and ThreadSanitizer.
//
// The emulator itself is compiled without a sanitizer, so that its own reads and writes of the
// threads' data stay invisible; kernels and host code may be compiled with one. The hooks are weak:
// in a build without sanitizers they are null and every function here does nothing. All of them are
// always inlined, or the linker could take an instrumented copy, whose entry and exit would be
// counted for different threads.
#pragma once

#include <cstddef>
#include <cstdlib>

extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_set_fiber_name(void* fiber, const char* name);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __tsan_read_range(void* address, unsigned long size);
__attribute__((weak)) void __tsan_write_range(void* address, unsigned long size);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void* __asan_region_is_poisoned(void* begin, size_t size);
}

#define SIMT_INLINE __attribute__((always_inline)) inline

namespace simt::sanitizer {

SIMT_INLINE bool HasThread() { return &__tsan_create_fiber != nullptr; }
SIMT_INLINE bool HasAddress() { return &__asan_region_is_poisoned != nullptr; }

// A marker in memory through which ThreadSanitizer learns who comes after whom. It must be heap
// memory: freeing it makes the sanitizer forget it, so that a later block starts without history.
struct alignas(8) Tag {
  char byte[8];
};

SIMT_INLINE void Acquire(Tag* tag) {
  if (HasThread()) __tsan_acquire(tag);
}
SIMT_INLINE void Release(Tag* tag) {
  if (HasThread()) __tsan_release(tag);
}
SIMT_INLINE void ReadRange(const void* address, size_t size) {
  if (HasThread()) __tsan_read_range(const_cast<void*>(address), size);
}
SIMT_INLINE void WriteRange(void* address, size_t size) {
  if (HasThread()) __tsan_write_range(address, size);
}
SIMT_INLINE void* CurrentFiber() { return HasThread() ? __tsan_get_current_fiber() : nullptr; }
SIMT_INLINE void* CreateFiber() { return HasThread() ? __tsan_create_fiber(0) : nullptr; }
SIMT_INLINE void DestroyFiber(void* fiber) {
  if (fiber != nullptr) __tsan_destroy_fiber(fiber);
}

// Until its end, what this OS thread does counts as done by another thread of ThreadSanitizer. No
// order between the two is implied.
class AsFiber {
 public:
  SIMT_INLINE explicit AsFiber(void* fiber) : before_(CurrentFiber()) {
    if (HasThread()) __tsan_switch_to_fiber(fiber, 1);
  }
  AsFiber(const AsFiber&) = delete;
  AsFiber& operator=(const AsFiber&) = delete;
  SIMT_INLINE ~AsFiber() {
    if (HasThread()) __tsan_switch_to_fiber(before_, 1);
  }

 private:
  void* before_;
};

// Until its end ThreadSanitizer does not look at what this thread reads and writes.
class Unwatched {
 public:
  SIMT_INLINE Unwatched() {
    if (!HasThread()) return;
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
  SIMT_INLINE ~Unwatched() {
    if (!HasThread()) return;
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};

// free() without counting as a write: the threads that used the memory are not ordered before the
// one that frees it, as on a device.
SIMT_INLINE void FreeUnordered(void* memory) {
  const Unwatched unwatched;
  std::free(memory);
}

}  // namespace simt::sanitizer

#undef SIMT_INLINE
