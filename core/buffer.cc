#include "core/buffer.h"

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

// What was asked for: what the allocator has beside a large piece is never written.
void CountHost(int64_t bytes) {
  const int64_t now = host_bytes += bytes;
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
    CountHost(-static_cast<int64_t>(bytes));
    std::free(pointer);
  }
}

Buffer::Buffer(size_t bytes, Device* device) : bytes_(bytes) {
  if (bytes == 0) {
    data_ = {nullptr, BufferFree{.device = device}};
    return;
  }
  if (device != nullptr) {
    data_ = {device->Allocate(bytes), BufferFree{.device = device, .bytes = bytes}};
    device->Zero(data_.get(), bytes);
    return;
  }
  data_ = {AllocateHostMemory(bytes), BufferFree{.bytes = bytes}};
  CountHost(static_cast<int64_t>(bytes));
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
