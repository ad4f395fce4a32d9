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
// nothing new. Pointers are aligned to 64 bytes. Not thread-safe: one arena per rank, used from the
// thread that drives the model.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <vector>

#include "core/tensor.h"

namespace sala {

class Arena {
 public:
  explicit Arena(size_t block_bytes = size_t{64} << 20);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* Allocate(size_t bytes);
  Tensor New(DType dtype, std::initializer_list<int64_t> shape);
  Tensor NewZeroed(DType dtype, std::initializer_list<int64_t> shape);

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
    void operator()(void* pointer) const;
  };
  struct Block {
    std::unique_ptr<void, FreeDeleter> data;
    size_t size = 0;
  };

  size_t block_bytes_;
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
