#include "core/buffer.h"

#include <cstdlib>
#include <cstring>
#include <utility>

#include "core/check.h"

namespace sala {

void BufferFree::operator()(void* pointer) const {
  if (device != nullptr) {
    device->Free(pointer);
  } else {
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
  constexpr size_t kAlignment = 64;
  data_ = {std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment),
           BufferFree{}};
  SALA_CHECK(data_ != nullptr) << "out of memory: " << bytes << " bytes";
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
