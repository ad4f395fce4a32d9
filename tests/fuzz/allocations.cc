// The largest piece of memory asked for: through the sanitizer's hook where there is one, else by
// operator new of our own (which libraries use too; malloc of C libraries is not seen then).
#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/fuzz/targets.h"

namespace {

std::atomic<size_t> largest{0};

void Note(size_t bytes) {
  size_t seen = largest.load(std::memory_order_relaxed);
  while (bytes > seen && !largest.compare_exchange_weak(seen, bytes)) {
  }
}

}  // namespace

#if defined(SALA_SANITIZED)

extern "C" int __sanitizer_install_malloc_and_free_hooks(void (*malloc_hook)(const volatile void*,
                                                                             size_t),
                                                         void (*free_hook)(const volatile void*));

namespace {
const int installed = __sanitizer_install_malloc_and_free_hooks(
    [](const volatile void*, size_t bytes) { Note(bytes); }, [](const volatile void*) {});
}  // namespace

#else

void* operator new(size_t bytes) {
  Note(bytes);
  void* memory = std::malloc(bytes);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

#endif

namespace sala::fuzz {

void ResetLargestAllocation() { largest = 0; }
size_t LargestAllocation() { return largest; }

}  // namespace sala::fuzz
