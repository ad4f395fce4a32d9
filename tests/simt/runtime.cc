// The functions of simt_core.h: options, reports, and the way from a primitive to the running
// block.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "tests/simt/block.h"
#include "tests/simt/device.h"

namespace simt {
namespace {

constexpr unsigned kMaxGridYZ = 65535;

std::mutex stats_mutex;
Stats total_stats;

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text != nullptr && *text != 0 ? std::strtoull(text, nullptr, 10) : otherwise;
}

std::string Triple(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

[[noreturn]] void Finish(const std::string& text) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: %s\n", text.c_str());
  std::fflush(stderr);
  _exit(3);  // not exit(): destructors must not run on a fiber's stack
}

// Blocks are kept for the next launch: their stacks are the expensive part. Never destroyed, other
// threads may still run at the end. The mutex is no heap object and has no guard, since
// ThreadSanitizer does not see the guards of this file.
constinit std::mutex cache_mutex;
constinit std::multimap<int, std::unique_ptr<Block>>* cache = nullptr;

std::unique_ptr<Block> TakeBlock(int threads) {
  const std::lock_guard<std::mutex> lock(cache_mutex);
  if (cache == nullptr) cache = new std::multimap<int, std::unique_ptr<Block>>;
  auto found = cache->find(threads);
  if (found == cache->end()) return std::make_unique<Block>(threads);
  std::unique_ptr<Block> block = std::move(found->second);
  cache->erase(found);
  return block;
}

void GiveBlock(std::unique_ptr<Block> block) {
  const std::lock_guard<std::mutex> lock(cache_mutex);
  const int threads = block->thread_count();
  cache->emplace(threads, std::move(block));
}

void RunGrid(const Grid& grid) {
  RunningGrid running;
  running.grid = &grid;
  running.block_count = static_cast<uint64_t>(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  auto* tags = static_cast<sanitizer::Tag*>(std::calloc(2, sizeof(sanitizer::Tag)));
  running.start = tags;
  running.end = tags + 1;
  const int threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  auto work = [&running, threads] {
    std::unique_ptr<Block> block = TakeBlock(threads);
    block->RunAll(running);
    GiveBlock(std::move(block));
  };
  const auto workers =
      static_cast<int>(std::min<uint64_t>(std::max(1, options().os_threads), running.block_count));
  std::vector<std::thread> others;
  for (int i = 1; i < workers; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  sanitizer::Acquire(running.end);
  std::free(tags);
}

}  // namespace

Options& options() {
  static Options* values = [] {
    auto* fresh = new Options;
    fresh->seed = FromEnvironment("SALA_SIMT_SEED", 0);
    fresh->os_threads = static_cast<int>(FromEnvironment("SALA_SIMT_THREADS", 1));
    fresh->eager = FromEnvironment("SALA_SIMT_EAGER", 0) != 0;
    fresh->shared_bytes = FromEnvironment("SALA_SIMT_SHARED", fresh->shared_bytes);
    fresh->lenient = FromEnvironment("SALA_SIMT_LENIENT", 0) != 0;
    return fresh;
  }();
  return *values;
}

void AddStats(const Stats& stats) {
  const std::lock_guard<std::mutex> lock(stats_mutex);
  total_stats.switches += stats.switches;
  total_stats.collectives += stats.collectives;
  total_stats.barriers += stats.barriers;
  total_stats.blocks += stats.blocks;
}

Stats TakeStats() {
  const std::lock_guard<std::mutex> lock(stats_mutex);
  return std::exchange(total_stats, Stats());
}

// ---------------------------------------------------------------------------- reports

std::string PlaceName(const Where& where) {
  if (where.line() == 0) return "its start";
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string Block::Description() const {
  std::string text = "in kernel " + running_->grid->name + ", block " + Triple(blockIdx);
  if (current_fiber != nullptr) text += ", thread " + Triple(current_fiber->index);
  return text;
}

bool Block::Waits(const Fiber& fiber) const {
  const Warp& warp = warps_[fiber.warp];
  if ((warp.at_barrier >> warp.position[fiber.lane] & 1) != 0) return true;
  for (int g = 0; g < warp.group_count; ++g) {
    if ((warp.groups[g].arrived >> fiber.lane & 1) != 0) return true;
  }
  return false;
}

std::string Block::Threads() const {
  std::string text;
  int shown = 0;
  for (int first = 0, next = 0; first < thread_count_; first = next) {
    // Neighbours in the same state share a line.
    std::string state;
    for (next = first; next < thread_count_; ++next) {
      const Fiber& fiber = fibers_[next];
      const bool exited = (warps_[fiber.warp].exited >> fiber.lane & 1) != 0;
      std::string its_state = exited ? " ended" : Waits(fiber) ? " waiting" : " running, last seen";
      if (!exited) {
        if (fiber.doing != nullptr) its_state += std::string(" in ") + fiber.doing;
        its_state += " at " + PlaceName(fiber.where);
      }
      if (next == first) state = its_state;
      if (its_state != state) break;
    }
    text += "\n  thread " + std::to_string(first);
    if (next > first + 1) text += " to " + std::to_string(next - 1);
    text += state;
    if (++shown == 16) return text + "\n  ...";
  }
  return text;
}

void Block::Deadlock() {
  // Say which: lanes of one mask in different instructions are the most frequent cause.
  for (const Warp& warp : warps_) {
    if (warp.group_count == 0) continue;
    const Group& group = warp.groups[0];
    current_fiber = warp.fibers + std::countr_zero(group.arrived);
    char mask[32];
    std::snprintf(mask, sizeof mask, "0x%08x, arrived 0x%08x", group.mask, group.arrived);
    ReportAt(group.where, std::string("divergence: not all lanes of the mask come to this ") +
                              group.op->name + " (mask " + mask + ")" + Threads());
  }
  ReportAt(barrier_where_, "deadlock: no thread can run" + Threads());
}

void Report(const std::string& text) {
  if (current_block == nullptr) Finish(text);
  const size_t line = std::min(text.find('\n'), text.size());
  Finish(text.substr(0, line) + " (" + current_block->Description() + ")" + text.substr(line));
}

void ReportAt(const Where& where, const std::string& text) {
  Report(PlaceName(where) + ": " + text);
}

// ---------------------------------------------------------------------------- launching

cudaError_t LaunchGrid(Grid grid, cudaStream_t stream) {
  const dim3 b = grid.blocks;
  const dim3 t = grid.threads;
  const uint64_t threads = static_cast<uint64_t>(t.x) * t.y * t.z;
  const std::string launch = "launch of " + grid.name + ": ";
  if (b.x == 0 || b.y == 0 || b.z == 0 || threads == 0) Report(launch + "a dimension is zero");
  if (threads > kMaxThreads || t.z > 64) {
    Report(launch + "a block of " + std::to_string(threads) + " threads, the limit is 1024");
  }
  if (b.x > 0x7fffffffU || b.y > kMaxGridYZ || b.z > kMaxGridYZ) {
    Report(launch + "the grid is too large in y or z, the limit is 65535");
  }
  if (grid.shared_bytes > options().shared_bytes) {
    Report(launch + std::to_string(grid.shared_bytes) + " bytes of shared memory, the limit is " +
           std::to_string(options().shared_bytes));
  }
  if (const cudaError_t error = device::LaunchFailure(grid.name); error != cudaSuccess) {
    return error;
  }
  if (current_block != nullptr) Report(launch + "from within a kernel");
  if (!device::StreamExists(stream)) return device::Fail(cudaErrorInvalidResourceHandle);
  device::Enqueue(stream, [grid = std::move(grid)] { RunGrid(grid); });
  return cudaSuccess;
}

// ---------------------------------------------------------------------------- primitives

namespace {

Block& Running(const char* what) {
  if (current_block == nullptr) Report(std::string(what) + " outside of a kernel");
  return *current_block;
}

}  // namespace

int LaneIndex() {
  Running("a warp instruction");
  return current_fiber->lane;
}

int BlockBarrier(BarrierKind kind, int predicate, const Where& where) {
  return Running("__syncthreads").Barrier(kind, predicate, where);
}

uint64_t WarpCollective(const WarpOp& op, unsigned mask, uint64_t in, uint64_t aux,
                        const Where& where) {
  return Running(op.name).Collective(op, mask, in, aux, where);
}

void* TakeShared(int index, int64_t bytes, const Where& where) {
  return Running("SharedMemory::Take").TakeShared(index, bytes, where);
}

void AsyncCopy(void* destination, const void* source, int bytes, int source_bytes,
               const Where& where) {
  Running("cp.async");
  current_fiber->async.copies.push_back(Copy{destination, source, bytes, source_bytes, where});
}

void AsyncCommit() {
  Running("cp.async.commit_group");
  CopyQueue& queue = current_fiber->async;
  queue.groups.push_back(GroupEnd{queue.copies.size()});
}

void AsyncWait(int keep) {
  Block& block = Running("cp.async.wait_group");
  CopyQueue& queue = current_fiber->async;
  if (queue.groups.size() - queue.landed_groups <= static_cast<size_t>(keep)) return;
  block.LetOthersGoFirst();  // copies arrive as late as they can
  while (queue.groups.size() - queue.landed_groups > static_cast<size_t>(keep)) {
    const size_t end = queue.groups[queue.landed_groups++].copies;
    for (; queue.landed_copies < end; ++queue.landed_copies) {
      const Copy& copy = queue.copies[queue.landed_copies];
      sanitizer::ReadRange(copy.source, copy.source_bytes);
      sanitizer::WriteRange(copy.destination, copy.bytes);
      std::memcpy(copy.destination, copy.source, copy.source_bytes);
      std::memset(static_cast<char*>(copy.destination) + copy.source_bytes, 0,
                  copy.bytes - copy.source_bytes);
    }
  }
  if (queue.landed_copies == queue.copies.size()) queue.Clear();
}

}  // namespace simt
