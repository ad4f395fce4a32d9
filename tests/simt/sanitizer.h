// What the emulator tells AddressSanitizer and ThreadSanitizer.
//
// The emulator itself is compiled without a sanitizer, so that its own reads and writes of the
// threads' data stay invisible; kernels and host code may be compiled with one. The hooks are weak:
// in a build without sanitizers they are null and every function here does nothing.
#pragma once

#include <cstddef>
#include <cstdlib>

extern "C" {
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
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

namespace simt::sanitizer {

inline bool HasThread() { return &__tsan_create_fiber != nullptr; }
inline bool HasAddress() { return &__asan_region_is_poisoned != nullptr; }

// A marker in memory through which ThreadSanitizer learns who comes after whom. It must be heap
// memory: freeing it makes the sanitizer forget it, so that a later block starts without history.
struct alignas(8) Tag {
  char byte[8];
};

inline void Acquire(Tag* tag) {
  if (HasThread()) __tsan_acquire(tag);
}
inline void Release(Tag* tag) {
  if (HasThread()) __tsan_release(tag);
}
inline void ReadRange(const void* address, size_t size) {
  if (HasThread()) __tsan_read_range(const_cast<void*>(address), size);
}
inline void WriteRange(void* address, size_t size) {
  if (HasThread()) __tsan_write_range(address, size);
}
inline void* CurrentFiber() { return HasThread() ? __tsan_get_current_fiber() : nullptr; }
inline void* CreateFiber() { return HasThread() ? __tsan_create_fiber(0) : nullptr; }
inline void DestroyFiber(void* fiber) {
  if (fiber != nullptr) __tsan_destroy_fiber(fiber);
}

// Until its end, what this OS thread does counts as done by another thread of ThreadSanitizer. No
// order between the two is implied.
class AsFiber {
 public:
  explicit AsFiber(void* fiber) : before_(CurrentFiber()) {
    if (HasThread()) __tsan_switch_to_fiber(fiber, 1);
  }
  AsFiber(const AsFiber&) = delete;
  AsFiber& operator=(const AsFiber&) = delete;
  ~AsFiber() {
    if (HasThread()) __tsan_switch_to_fiber(before_, 1);
  }

 private:
  void* before_;
};

// free() without counting as a write: the threads that used the memory are not ordered before the
// one that frees it, as on a device.
inline void FreeUnordered(void* memory) {
  if (HasThread()) {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  std::free(memory);
  if (HasThread()) {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
}

}  // namespace simt::sanitizer
