#include "core/buffer.h"

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/host_memory.h"
#include "core/memory.h"

namespace sala {
namespace {

std::atomic<int64_t> host_bytes{0};
std::atomic<int64_t> host_peak{0};

// What the allocator gave: the same number when it is taken back, without a place to keep it.
void CountHost(void* pointer, int64_t sign) {
  const int64_t now = host_bytes +=
      sign * static_cast<int64_t>(pointer == nullptr ? 0 : malloc_usable_size(pointer));
  int64_t peak = host_peak;
  while (now > peak && !host_peak.compare_exchange_weak(peak, now)) {
  }
}

}  // namespace

int64_t HostBufferBytes() { return host_bytes; }
int64_t HostBufferPeakBytes() { return host_peak; }

void BufferFree::operator()(void* pointer) const {
  if (device != nullptr) {
    device->Free(pointer);
  } else {
    CountHost(pointer, -1);
    std::free(pointer);
  }
}

Buffer::Buffer(size_t bytes, Device* device) : bytes_(bytes) {
  if (bytes == 0) {
    data_ = {nullptr, BufferFree{device}};
    return;
  }
  if (device != nullptr) {
    data_ = {device->Allocate(bytes), BufferFree{device}};
    device->Zero(data_.get(), bytes);
    return;
  }
  data_ = {AllocateHostMemory(bytes), BufferFree{}};
  CountHost(data_.get(), 1);
  std::memset(data_.get(), 0, bytes);
}

Buffer::Buffer(const Buffer& other) : Buffer(other.bytes_, other.device()) {
  if (bytes_ == 0) return;
  if (device() != nullptr) {
    device()->Copy(data(), other.data(), bytes_);
  } else {
    std::memcpy(data(), other.data(), bytes_);
  }
}

Buffer& Buffer::operator=(const Buffer& other) {
  if (this != &other) *this = Buffer(other);
  return *this;
}

}  // namespace sala
