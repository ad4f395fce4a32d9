#include "core/arena.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace sala {
namespace {
constexpr size_t kAlignment = 64;
}  // namespace

void Arena::FreeDeleter::operator()(void* pointer) const { std::free(pointer); }

Arena::Arena(size_t block_bytes) : block_bytes_(block_bytes) {}

void* Arena::Allocate(size_t bytes) {
  const size_t size = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  while (block_ < blocks_.size() && offset_ + size > blocks_[block_].size) {
    ++block_;
    offset_ = 0;
  }
  if (block_ == blocks_.size()) {
    Block block;
    block.size = std::max(size, block_bytes_);
    block.data.reset(std::aligned_alloc(kAlignment, block.size));
    SALA_CHECK(block.data != nullptr)
        << "out of memory: arena asked for " << block.size << " bytes";
    blocks_.push_back(std::move(block));
    offset_ = 0;
  }
  void* pointer = static_cast<char*>(blocks_[block_].data.get()) + offset_;
  offset_ += size;
  used_ += size;
  peak_ = std::max(peak_, used_);
  return pointer;
}

Tensor Arena::New(DType dtype, std::initializer_list<int64_t> shape) {
  return Tensor(Allocate(static_cast<size_t>(NumElements(shape)) * SizeOf(dtype)), dtype, shape);
}

Tensor Arena::NewZeroed(DType dtype, std::initializer_list<int64_t> shape) {
  Tensor tensor = New(dtype, shape);
  std::memset(tensor.raw(), 0, static_cast<size_t>(tensor.numel()) * SizeOf(dtype));
  return tensor;
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
