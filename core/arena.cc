#include "core/arena.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/check.h"
#include "core/host_memory.h"

namespace sala {
namespace {
constexpr size_t kHostAlignment = 64;
constexpr size_t kDeviceAlignment = 256;  // what cudaMalloc gives and wide loads like
}  // namespace

void Arena::FreeDeleter::operator()(void* pointer) const {
  if (device != nullptr) {
    device->Free(pointer);
  } else {
    std::free(pointer);
  }
}

Arena::Arena(size_t block_bytes, Device* device)
    : block_bytes_(block_bytes),
      device_(device),
      alignment_(device == nullptr ? kHostAlignment : kDeviceAlignment) {}

void Arena::AddBlock(size_t bytes) {
  const size_t size = (bytes + alignment_ - 1) / alignment_ * alignment_;
  void* data = device_ == nullptr ? AllocateHostMemory(size) : device_->Allocate(size);
  blocks_.push_back({{data, FreeDeleter{device_}}, size});
}

void* Arena::Allocate(size_t bytes) {
  const size_t size = std::max(alignment_, (bytes + alignment_ - 1) / alignment_ * alignment_);
  while (block_ < blocks_.size() && offset_ + size > blocks_[block_].size) {
    ++block_;
    offset_ = 0;
  }
  if (block_ == blocks_.size()) {
    AddBlock(std::max(size, block_bytes_));
    offset_ = 0;
  }
  void* pointer = static_cast<char*>(blocks_[block_].data.get()) + offset_;
  offset_ += size;
  used_ += size;
  peak_ = std::max(peak_, used_);
  return pointer;
}

Tensor Arena::New(DType dtype, std::initializer_list<int64_t> shape) {
  return Tensor(Allocate(static_cast<size_t>(NumElements(shape)) * SizeOf(dtype)), dtype, shape,
                device_ == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda);
}

Tensor Arena::NewZeroed(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor = New(dtype, shape);
  const size_t bytes = static_cast<size_t>(tensor.numel()) * SizeOf(dtype);
  if (device_ != nullptr) {
    device_->Zero(tensor.raw(), bytes);
  } else {
    std::memset(tensor.raw(), 0, bytes);
  }
  return tensor;
}

void Arena::Reserve(size_t bytes) {
  SALA_CHECK(used_ == 0) << "an arena in use cannot be laid out anew";
  peak_ = 0;
  if (bytes > 0 && blocks_.size() == 1 && blocks_[0].size >= bytes) return;
  blocks_.clear();
  block_ = 0;
  offset_ = 0;
  if (bytes > 0) AddBlock(bytes);
}

void Arena::Release(const Mark& mark) {
  SALA_CHECK(mark.used <= used_) << "marks must be released last in, first out";
  block_ = mark.block;
  offset_ = mark.offset;
  used_ = mark.used;
}

size_t Arena::reserved_bytes() const {
  size_t total = 0;
  for (const Block& block : blocks_) total += block.size;
  return total;
}

}  // namespace sala
