#include "tests/simt/block.h"

#include <pthread.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <numeric>

constinit thread_local uint3 threadIdx{};
constinit thread_local uint3 blockIdx{};
constinit thread_local dim3 blockDim{};
constinit thread_local dim3 gridDim{};

namespace simt {

constinit thread_local Block* current_block = nullptr;
constinit thread_local Fiber* current_fiber = nullptr;

namespace {

constexpr int64_t kMaxPieces = 64;
constexpr int64_t kTagCount = 2 * kMaxThreads + 4 + kMaxPieces;
constexpr int64_t kSharedAlignment = 128;
constexpr int64_t kCanaryBytes = 128;
constexpr unsigned char kCanary = 0xa5;

unsigned Bit(int lane) { return 1U << lane; }

unsigned Positions(const Warp& warp, unsigned lanes) {
  if (warp.natural || lanes == ~0U) return lanes;
  unsigned positions = 0;
  for (; lanes != 0; lanes &= lanes - 1) {
    positions |= Bit(warp.position[std::countr_zero(lanes)]);
  }
  return positions;
}

// The stack of the OS thread itself, which AddressSanitizer asks for at each return to it.
void OsStack(const void** bottom, size_t* size) {
  if (!sanitizer::HasAddress()) return;
  static thread_local const void* known_bottom = nullptr;
  static thread_local size_t known_size = 0;
  if (known_bottom == nullptr) {
    pthread_attr_t attributes;
    void* address = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &address, &known_size);
    pthread_attr_destroy(&attributes);
    known_bottom = address;
  }
  *bottom = known_bottom;
  *size = known_size;
}

// A small random generator and a shuffle of our own: an order belongs to its seed everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t n) {
    uint64_t z = state_ += 0x9e3779b97f4a7c15ULL;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ULL;
    z = (z ^ z >> 27) * 0x94d049bb133111ebULL;
    return (z ^ z >> 31) % n;
  }
  template <typename T>
  void Shuffle(T* values, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(values[i], values[Below(i + 1)]);
  }

 private:
  uint64_t state_;
};

// A bijection of [0, n): the order of blocks under a seed, without a table.
uint64_t Permute(uint64_t i, uint64_t n, uint64_t seed) {
  if (seed == 0 || n < 2) return i;
  uint64_t factor = (seed * 0x9e3779b97f4a7c15ULL >> 33) % n | 1;
  while (std::gcd(factor, n) != 1) factor += 2;
  return static_cast<uint64_t>((static_cast<unsigned __int128>(i) * factor + seed) % n);
}

// ThreadSanitizer's side of the threads. Making one costs 0.3 ms and 0.8 MB, so they are used
// again, the longest unused first: at least one other block comes in between. Two blocks of a grid
// that get the same ones look ordered, any others do not.
// (The mutex is no heap object and has no guard: ThreadSanitizer does not see the guards of this
// file.)
struct TsanFiber {
  void* handle;
};
constexpr size_t kLeastTsanFibers = 256;
constinit std::mutex tsan_mutex;
constinit std::deque<TsanFiber>* idle_tsan_fibers = nullptr;  // never destroyed
constinit size_t made_tsan_fibers = 0;

void TakeTsanFibers(std::vector<Fiber>& fibers) {
  if (!sanitizer::HasThread()) return;
  const std::lock_guard<std::mutex> lock(tsan_mutex);
  if (idle_tsan_fibers == nullptr) idle_tsan_fibers = new std::deque<TsanFiber>;
  const size_t wanted = std::max(2 * fibers.size(), kLeastTsanFibers);
  for (Fiber& fiber : fibers) {
    if (made_tsan_fibers < wanted || idle_tsan_fibers->empty()) {
      ++made_tsan_fibers;
      fiber.tsan = sanitizer::CreateFiber();
    } else {
      fiber.tsan = idle_tsan_fibers->front().handle;
      idle_tsan_fibers->pop_front();
    }
  }
}

void GiveTsanFibers(const std::vector<Fiber>& fibers) {
  if (!sanitizer::HasThread()) return;
  const std::lock_guard<std::mutex> lock(tsan_mutex);
  for (const Fiber& fiber : fibers) idle_tsan_fibers->push_back(TsanFiber{fiber.tsan});
}

}  // namespace

Block::Block(int thread_count)
    : thread_count_(thread_count),
      warp_count_((thread_count + kWarpSize - 1) / kWarpSize),
      stacks_(thread_count),
      fibers_(thread_count),
      warps_(warp_count_),
      warp_order_(warp_count_),
      warp_position_(warp_count_),
      pieces_(kMaxPieces) {}

Block::~Block() {
  for (Piece& piece : pieces_) FreePiece(piece);
}

// ---------------------------------------------------------------------------- taking turns

void Block::Jump(Context* save, Context* load, Fiber* to, bool last) {
  if (sanitizer::HasThread()) {
    __tsan_switch_to_fiber(to != nullptr ? to->tsan : scheduler_tsan_, 1);
  }
  if (!sanitizer::HasAddress()) return Switch(save, load);
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(last ? nullptr : &fake_stack,
                                 to != nullptr ? stacks_.bottom(to->id) : scheduler_bottom_,
                                 to != nullptr ? stacks_.size() : scheduler_size_);
  Switch(save, load);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}

// The next thread to run after `me` (or the first of all): of this warp as long as one of its lanes
// can, else of the next warp.
Fiber* Block::Next(const Fiber* me) {
  Fiber* next = NextRunnable(me);
  if (next != nullptr || !has_patient_) return next;
  has_patient_ = false;
  for (Warp& warp : warps_) {
    warp.runnable |= warp.patient;
    warp.patient = 0;
  }
  return NextRunnable(me);
}

Fiber* Block::NextRunnable(const Fiber* me) {
  int number = 0;
  if (me != nullptr) {
    Warp& warp = warps_[me->warp];
    if (warp.runnable != 0) {
      const unsigned later = warp.runnable & -2U << warp.position[me->lane];
      const int position = std::countr_zero(later != 0 ? later : warp.runnable);
      warp.runnable &= ~Bit(position);
      return warp.fibers + warp.order[position];
    }
    number = warp_position_[me->warp] + 1;
  }
  for (int step = 0; step < warp_count_; ++step, ++number) {
    if (number >= warp_count_) number -= warp_count_;
    Warp& warp = warps_[warp_order_[number]];
    if (warp.runnable == 0) continue;
    const int position = std::countr_zero(warp.runnable);
    warp.runnable &= ~Bit(position);
    return warp.fibers + warp.order[position];
  }
  return nullptr;
}

void Block::Yield(Fiber& me) {
  ++stats_.switches;
  Fiber* next = Next(&me);
  if (next == nullptr) Deadlock();
  if (next == &me) return;  // the only one left
  current_fiber = next;
  Jump(&me.context, &next->context, next, false);
  threadIdx = me.index;
}

void Block::LetOthersGoFirst() {
  Fiber& me = *current_fiber;
  Warp& warp = warps_[me.warp];
  warp.patient |= Bit(warp.position[me.lane]);
  has_patient_ = true;
  Yield(me);
}

void Block::FiberMain() {
  if (sanitizer::HasAddress()) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  Block& block = *current_block;
  Fiber& me = *current_fiber;
  threadIdx = me.index;
  sanitizer::Acquire(block.running_->start);
  block.running_->grid->body();
  block.Exit(me);
}

Fiber* Block::FirstAtBarrier() {
  for (const Warp& warp : warps_) {
    if (warp.at_barrier != 0) return warp.fibers + warp.order[std::countr_zero(warp.at_barrier)];
  }
  return nullptr;
}

void Block::Exit(Fiber& me) {
  if (me.async.landed_copies != me.async.copies.size()) {
    ReportAt(me.async.copies[me.async.landed_copies].where,
             "the thread ends without waiting for this cp.async");
  }
  sanitizer::Release(running_->end);
  Warp& warp = warps_[me.warp];
  warp.exited |= Bit(me.lane);
  --live_;
  for (int g = 0; g < warp.group_count; ++g) {
    const Group& group = warp.groups[g];
    if ((group.mask & Bit(me.lane)) == 0) continue;
    ReportAt(group.where, "divergence: lane " + std::to_string(me.lane) + " of warp " +
                              std::to_string(me.warp) + " ends while others wait for it in this " +
                              group.op->name + Threads());
  }
  // A barrier does not count who has exited: others may have waited for this thread alone.
  if (live_ > 0 && arrived_ == live_) OpenBarrier(*FirstAtBarrier());
  Fiber* next = Next(&me);
  if (next == nullptr && live_ > 0) Deadlock();
  current_fiber = next;
  Jump(&me.context, next != nullptr ? &next->context : &scheduler_, next, true);
  std::abort();
}

// ---------------------------------------------------------------------------- one block

void Block::Prepare(uint64_t number) {
  const uint64_t seed = options().seed;
  std::iota(warp_order_.begin(), warp_order_.end(), 0);
  Random random(seed * 1000003 + number);
  if (seed != 0) random.Shuffle(warp_order_.data(), warp_count_);
  for (int i = 0; i < warp_count_; ++i) warp_position_[warp_order_[i]] = i;
  const dim3 size = running_->grid->threads;
  for (int w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    const int lanes = std::min(kWarpSize, thread_count_ - w * kWarpSize);
    warp.exists = lanes == kWarpSize ? ~0U : Bit(lanes) - 1;
    warp.exited = warp.at_barrier = warp.patient = 0;
    warp.group_count = 0;
    warp.fibers = &fibers_[w * kWarpSize];
    std::iota(warp.order, warp.order + kWarpSize, 0);
    if (seed != 0) random.Shuffle(warp.order, kWarpSize);
    for (int i = 0; i < kWarpSize; ++i) warp.position[warp.order[i]] = i;
    warp.natural = seed == 0;
    warp.runnable = Positions(warp, warp.exists);
  }
  for (int i = 0; i < thread_count_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.id = i;
    fiber.warp = i / kWarpSize;
    fiber.lane = i % kWarpSize;
    fiber.where = Where();
    fiber.doing = nullptr;
    fiber.pieces_taken = 0;
    const auto linear = static_cast<unsigned>(i);
    fiber.index = {linear % size.x, linear / size.x % size.y, linear / (size.x * size.y)};
    fiber.async.Clear();
    stacks_.Start(&fiber.context, i, &FiberMain);
  }
  TakeTsanFibers(fibers_);
  NameTsanFibers();
  live_ = thread_count_;
  arrived_ = barrier_count_ = 0;
  has_patient_ = false;
  piece_count_ = 0;
  shared_used_ = 0;
}

// What reports of ThreadSanitizer call the threads.
void Block::NameTsanFibers() const {
  if (!sanitizer::HasThread()) return;
  for (const Fiber& fiber : fibers_) {
    char name[64];
    std::snprintf(name, sizeof name, "block %u,%u,%u thread %u,%u,%u", blockIdx.x, blockIdx.y,
                  blockIdx.z, fiber.index.x, fiber.index.y, fiber.index.z);
    __tsan_set_fiber_name(fiber.tsan, name);
  }
}

void Block::RunOne(uint64_t number) {
  if (sanitizer::HasThread()) {
    tags_ = static_cast<sanitizer::Tag*>(std::calloc(kTagCount, sizeof(sanitizer::Tag)));
  }
  stacks_.Renew();
  Prepare(number);
  current_fiber = nullptr;
  current_fiber = Next(nullptr);
  Jump(&scheduler_, &current_fiber->context, current_fiber, false);
  CheckPieces();
  GiveTsanFibers(fibers_);
  if (tags_ != nullptr) sanitizer::FreeUnordered(tags_);
  tags_ = nullptr;
  ++stats_.blocks;
}

void Block::RunAll(RunningGrid& running) {
  Block* outer_block = current_block;
  current_block = this;
  running_ = &running;
  scheduler_tsan_ = sanitizer::CurrentFiber();
  sanitizer::Release(running.start);
  OsStack(&scheduler_bottom_, &scheduler_size_);
  blockDim = running.grid->threads;
  gridDim = running.grid->blocks;
  const dim3 size = running.grid->blocks;
  for (uint64_t i = 0; (i = running.next++) < running.block_count;) {
    const uint64_t number = Permute(i, running.block_count, options().seed);
    blockIdx = {static_cast<unsigned>(number % size.x),
                static_cast<unsigned>(number / size.x % size.y),
                static_cast<unsigned>(number / size.x / size.y)};
    RunOne(number);
  }
  AddStats(stats_);
  stats_ = {};
  running_ = nullptr;
  current_fiber = nullptr;
  current_block = outer_block;
}

// ---------------------------------------------------------------------------- barrier

int Block::Barrier(BarrierKind kind, int predicate, const Where& where) {
  Fiber& me = *current_fiber;
  me.where = where;
  me.doing = "__syncthreads";
  if (arrived_ == 0) {
    barrier_kind_ = kind;
    barrier_where_ = where;
    barrier_count_ = 0;
  } else if (kind != barrier_kind_ || !SamePlace(where, barrier_where_)) {
    ReportAt(where, "threads of one block are at different barriers, others at " +
                        PlaceName(barrier_where_) + Threads());
  }
  barrier_count_ += predicate != 0 ? 1 : 0;
  sanitizer::Release(BarrierIn());
  ++arrived_;
  const int* result = &barrier_results_[barriers_ & 1];
  if (arrived_ == live_) {
    OpenBarrier(me);
    return *result;
  }
  sanitizer::Tag* opened = sanitizer::HasThread() ? BarrierOut() : nullptr;
  Warp& warp = warps_[me.warp];
  warp.at_barrier |= Bit(warp.position[me.lane]);
  Yield(me);
  sanitizer::Acquire(opened);
  return *result;
}

// By the last thread to arrive, or in the name of one that waits when another one exits: an exit
// orders nothing. Two sets of markers and results in turn are enough: all have left one barrier
// before any of them can be at the second one after it.
void Block::OpenBarrier(const Fiber& as) {
  ++stats_.barriers;
  if (sanitizer::HasThread()) {
    const sanitizer::AsFiber in_its_name(as.tsan);
    sanitizer::Acquire(BarrierIn());
    sanitizer::Release(BarrierOut());
  }
  int result = barrier_count_;
  if (barrier_kind_ == BarrierKind::kAnd) result = barrier_count_ == arrived_ ? 1 : 0;
  if (barrier_kind_ == BarrierKind::kOr) result = barrier_count_ != 0 ? 1 : 0;
  barrier_results_[barriers_ & 1] = result;
  for (Warp& warp : warps_) {
    warp.runnable |= warp.at_barrier;
    warp.at_barrier = 0;
  }
  arrived_ = 0;
  ++barriers_;
}

// ---------------------------------------------------------------------------- warp instructions

uint64_t Block::Collective(const WarpOp& op, unsigned mask, uint64_t in, uint64_t aux,
                           const Where& where) {
  Fiber& me = *current_fiber;
  Warp& warp = warps_[me.warp];
  me.where = where;
  me.doing = op.name;
  if ((mask & Bit(me.lane)) == 0) ReportAt(where, "the calling lane is not in its own mask");
  if ((mask & warp.exited) != 0) {
    ReportAt(where, std::string("divergence: the mask of this ") + op.name +
                        " names lanes that have ended" + Threads());
  }
  warp.lanes.in[me.lane] = in;
  warp.lanes.aux[me.lane] = aux;
  int number = 0;
  for (; number < warp.group_count; ++number) {
    const Group& group = warp.groups[number];
    if (group.op == &op && group.mask == mask && (op.any_place || SamePlace(group.where, where))) {
      break;
    }
  }
  if (number == warp.group_count) warp.groups[warp.group_count++] = Group{&op, mask, 0, where};
  Group& group = warp.groups[number];
  group.arrived |= Bit(me.lane);
  const bool ordered = sanitizer::HasThread() && (op.orders_memory || options().lenient);
  if (ordered) sanitizer::Release(InTag(me));
  if (group.arrived == (mask & warp.exists)) {
    Complete(warp, number, me);
  } else {
    Yield(me);
    if (ordered) sanitizer::Acquire(OutTag(me));
  }
  return warp.lanes.out[me.lane];
}

// By the last lane to arrive.
void Block::Complete(Warp& warp, int group_number, const Fiber& me) {
  const Group group = warp.groups[group_number];
  warp.groups[group_number] = warp.groups[--warp.group_count];
  if (group.op->full_warp && group.arrived != ~0U) {
    ReportAt(group.where,
             std::string(group.op->name) + " needs all 32 lanes of the warp" + Threads());
  }
  ++stats_.collectives;
  if (sanitizer::HasThread() && (group.op->orders_memory || options().lenient)) {
    for (unsigned lanes = group.arrived; lanes != 0; lanes &= lanes - 1) {
      sanitizer::Acquire(InTag(warp.fibers[std::countr_zero(lanes)]));
    }
    for (unsigned lanes = group.arrived; lanes != 0; lanes &= lanes - 1) {
      sanitizer::Release(OutTag(warp.fibers[std::countr_zero(lanes)]));
    }
  }
  warp.lanes.mask = group.arrived;
  group.op->run(warp.lanes);
  warp.runnable |= Positions(warp, group.arrived & ~Bit(me.lane));
}

// ---------------------------------------------------------------------------- shared memory

void* Block::TakeShared(int64_t index, int64_t bytes, const Where& where) {
  Fiber& me = *current_fiber;
  me.where = where;
  me.doing = "SharedMemory::Take";
  if (bytes < 0 || index >= kMaxPieces) ReportAt(where, "SharedMemory::Take: impossible size");
  Piece& piece = pieces_[index];
  if (index >= piece_count_) {
    piece_count_ = static_cast<int>(index) + 1;
    shared_used_ += (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
    if (shared_used_ > static_cast<int64_t>(running_->grid->shared_bytes)) {
      ReportAt(where, "shared memory: " + std::to_string(shared_used_) +
                          " bytes taken (pieces rounded up to 128), " +
                          std::to_string(running_->grid->shared_bytes) + " given at launch");
    }
    // Made and filled in the name of the scheduler, and every thread comes after that.
    const sanitizer::AsFiber as_scheduler(scheduler_tsan_);
    if (piece.memory == nullptr || piece.bytes != bytes || sanitizer::HasThread()) {
      FreePiece(piece);
      const int64_t margin = sanitizer::HasAddress() ? 0 : kCanaryBytes;
      void* memory = nullptr;
      if (posix_memalign(&memory, kSharedAlignment, bytes + 2 * margin) != 0) std::abort();
      piece.memory = static_cast<char*>(memory);
      piece.data = piece.memory + margin;
      piece.bytes = bytes;
      std::memset(piece.memory, kCanary, margin);
      std::memset(piece.data + bytes, kCanary, margin);
    }
    piece.where = where;
    std::memset(piece.data, 0xff, bytes);
    sanitizer::Release(PieceTag(index));
  } else if (piece.bytes != bytes) {
    ReportAt(where, "threads of one block take shared memory in different order or size: " +
                        std::to_string(bytes) + " bytes here, " + std::to_string(piece.bytes) +
                        " at " + PlaceName(piece.where));
  }
  sanitizer::Acquire(PieceTag(index));
  return piece.data;
}

void Block::FreePiece(Piece& piece) {
  if (piece.memory != nullptr) sanitizer::FreeUnordered(piece.memory);
  piece = Piece();
}

void Block::CheckPieces() {
  if (sanitizer::HasAddress()) return;
  for (int i = 0; i < piece_count_; ++i) {
    const Piece& piece = pieces_[i];
    for (int64_t k = 0; k < kCanaryBytes; ++k) {
      const bool below = static_cast<unsigned char>(piece.memory[k]) != kCanary;
      const bool above = static_cast<unsigned char>(piece.data[piece.bytes + k]) != kCanary;
      if (!below && !above) continue;
      const int64_t offset = below ? k - kCanaryBytes : piece.bytes + k;
      ReportAt(piece.where, "a write outside of piece " + std::to_string(i) +
                                " of shared memory: at byte " + std::to_string(offset) + " of " +
                                std::to_string(piece.bytes));
    }
  }
}

}  // namespace simt
