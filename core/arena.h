// Arena: memory for activations and work space. Allocation moves a pointer; freeing goes back to a
// mark, last in first out.
//
//   Arena arena;
//   {
//     ArenaScope scope(arena);                       // everything allocated below is given back at
//     the closing brace Tensor h = arena.New(DType::kF32, {t, width}); // uninitialised
//   }
//   arena.peak_bytes();                              // the most that was ever in use
//
// Memory comes in blocks that are kept for the arena's life, so a step that repeats allocates
// nothing new. Sizes are rounded up to 64 bytes (256 on a device) and pointers aligned to that. Not
// thread-safe: one arena per rank, used from the thread that drives the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "core/device.h"
#include "core/tensor.h"

namespace sala {

constexpr size_t kArenaBlockBytes = size_t{64} << 20;

class Arena {
 public:
  // Memory of the host, or of `device`, which must outlive the arena.
  explicit Arena(size_t block_bytes = kArenaBlockBytes, Device* device = nullptr);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* Allocate(size_t bytes);
  Tensor New(DType dtype, std::initializer_list<int64_t> shape);
  Tensor NewZeroed(DType dtype, std::initializer_list<int64_t> shape);
  // Makes sure that `bytes` fit without a new block, as one block, and counts the peak anew; 0
  // gives all memory back. Only while nothing is in use.
  void Reserve(size_t bytes);

  struct Mark {
    size_t block = 0;
    size_t offset = 0;
    size_t used = 0;
  };
  Mark mark() const { return {block_, offset_, used_}; }
  void Release(const Mark& mark);

  size_t used_bytes() const { return used_; }
  size_t peak_bytes() const { return peak_; }
  size_t reserved_bytes() const;

 private:
  struct FreeDeleter {
    Device* device = nullptr;
    void operator()(void* pointer) const;
  };
  struct Block {
    std::unique_ptr<void, FreeDeleter> data;
    size_t size = 0;
  };
  void AddBlock(size_t bytes);

  size_t block_bytes_;
  Device* device_;
  size_t alignment_;
  std::vector<Block> blocks_;
  size_t block_ = 0;   // index of the block being filled
  size_t offset_ = 0;  // in that block
  size_t used_ = 0;    // sum of the rounded sizes handed out
  size_t peak_ = 0;
};

class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;
  ~ArenaScope() { arena_.Release(mark_); }

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace sala
