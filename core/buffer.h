// Memory with an owner, of the host or of a device: what outlives a step (parameters, gradients,
// optimizer state). Activations and work space live in arenas (core/arena.h).
#pragma once

#include <cstddef>
#include <memory>

#include "core/device.h"

namespace sala {

// Gives memory back to where it came from.
struct BufferFree {
  Device* device = nullptr;
  size_t bytes = 0;  // that were asked for
  void operator()(void* pointer) const;
};

class Buffer {
 public:
  Buffer() = default;
  // Zero-filled; of the host where `device` is null. The device must outlive the buffer.
  explicit Buffer(size_t bytes, Device* device = nullptr);
  // A copy in the same memory.
  Buffer(const Buffer& other);
  Buffer& operator=(const Buffer& other);
  Buffer(Buffer&& other) noexcept = default;
  Buffer& operator=(Buffer&& other) noexcept = default;
  ~Buffer() = default;

  void* data() const { return data_.get(); }
  size_t bytes() const { return bytes_; }
  Device* device() const { return data_.get_deleter().device; }

 private:
  size_t bytes_ = 0;
  std::unique_ptr<void, BufferFree> data_;
};

}  // namespace sala
