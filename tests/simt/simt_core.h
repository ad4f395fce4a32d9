// The emulator as its callers see it: options, launching a grid, and what the warp and block
// primitives of simt_warp.h and simt_ptx.h are made of.
//
// Each thread of a block is a fiber of one OS thread. A fiber runs until it must wait for others:
// at a barrier of the block, or in a warp instruction, where every lane leaves its operands and the
// last one to arrive computes for all. Blocks run one after the other on each OS thread, in any
// order, and no two blocks of a grid are ordered with each other.
//
// A rule broken by a kernel ends the process with a report on stderr and exit code 3.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace simt {

// Where in the kernel's source a primitive was called.
using Where = std::source_location;

struct Options {
  uint64_t seed = 0;   // order of lanes, warps and blocks; 0: the natural order. SALA_SIMT_SEED
  int os_threads = 1;  // OS threads that take blocks. SALA_SIMT_THREADS
  bool eager = false;  // streams run their work at once. SALA_SIMT_EAGER
  // Most shared memory a block may have. Fewer stages fit in the 99 KiB of the smaller devices, and
  // kernels take other paths there. SALA_SIMT_SHARED
  size_t shared_bytes = 227 * 1024;
  // By the memory model only barriers and __syncwarp order memory; a shuffle, vote or mma does not.
  // True makes all of them do so in the eyes of ThreadSanitizer. SALA_SIMT_LENIENT
  bool lenient = false;
};
// Read from the environment at first use; tests may change it between launches.
Options& options();

struct Stats {
  uint64_t switches = 0;
  uint64_t collectives = 0;
  uint64_t barriers = 0;
  uint64_t blocks = 0;
};
// Counts since the last call.
Stats TakeStats();

// Prints "simt: <text>", with kernel, block and thread when called from a kernel, and ends the
// process with exit code 3.
[[noreturn]] void Report(const std::string& text);
[[noreturn]] void ReportAt(const Where& where, const std::string& text);

struct Grid {
  std::string name;
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes = 0;
  std::function<void()> body;  // what one thread runs
};
// Checks the limits and queues the grid on the stream. A failure asked for by SALA_SIMT_FAIL is
// returned, and kept as the last error of the runtime.
cudaError_t LaunchGrid(Grid grid, cudaStream_t stream);

template <typename... Parameters, typename... Arguments>
cudaError_t Launch(const char* name, dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, void (*kernel)(Parameters...), Arguments&&... arguments) {
  auto body = [kernel, copies = std::tuple<std::decay_t<Parameters>...>(
                           std::forward<Arguments>(arguments)...)] { std::apply(kernel, copies); };
  return LaunchGrid(Grid{name, grid, block, shared_bytes, std::move(body)}, stream);
}

// Shared memory: piece number `index` of the block, of exactly `bytes`; made at the first call.
void* TakeShared(int index, int64_t bytes, const Where& where);

enum class BarrierKind { kPlain, kCount, kAnd, kOr };
int BlockBarrier(BarrierKind kind, int predicate, const Where& where);

// An instruction that the lanes of a mask execute together. Each brings two numbers and takes one.
struct WarpLanes {
  unsigned mask;  // lanes taking part
  uint64_t in[32];
  uint64_t aux[32];
  uint64_t out[32];
};
struct WarpOp {
  const char* name;
  void (*run)(WarpLanes& lanes);
  bool full_warp = false;      // needs all 32 lanes
  bool orders_memory = false;  // what was written before is visible after
  bool any_place = false;      // lanes may be at different source lines
};
uint64_t WarpCollective(const WarpOp& op, unsigned mask, uint64_t in, uint64_t aux,
                        const Where& where);
int LaneIndex();

extern const WarpOp kSyncWarp, kShuffle, kBallot, kAny, kAll, kMatchAny;
extern const WarpOp kReduceAddUnsigned, kReduceAddSigned, kReduceMinUnsigned, kReduceMinSigned,
    kReduceMaxUnsigned, kReduceMaxSigned, kReduceAnd, kReduceOr, kReduceXor;
extern const WarpOp kMmaBf16, kLdMatrix2, kLdMatrix2Trans, kLdMatrix4, kLdMatrix4Trans;

// Asynchronous copies: `source_bytes` of `bytes` come from the source, the rest are zero. The data
// arrive when the group is waited for.
void AsyncCopy(void* destination, const void* source, int bytes, int source_bytes,
               const Where& where);
void AsyncCommit();
void AsyncWait(int keep);

}  // namespace simt
