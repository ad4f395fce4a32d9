// How an operation that is cut over ranks shares small float32 numbers with the other ranks.
// Kernels know no ranks: the caller gives these.
//
// What is gathered is joined in rank order, by the same code on every rank, so that all ranks end
// with the same bits. How often an operation gathers and how much follows from the number of tokens
// and its options; its header has the formula. Without tokens nothing is gathered.
#pragma once

#include <cstdint>
#include <functional>

#include "core/check.h"
#include "core/context.h"

namespace sala::kernels {

struct RankExchange {
  int64_t rank = 0;
  int64_t ranks = 1;
  // mine f32 [n], all f32 [ranks, n] (rank order), contiguous, on the context's device, ordered
  // with its compute stream. Every rank calls it equally often with equal n. Bits must arrive as
  // they are: some of the numbers are integers in disguise. It may use ctx.scratch and gives back
  // what it takes. Called on a dry device too.
  std::function<void(const Context& ctx, const ConstTensor& mine, const Tensor& all)> gather;
};

// The caller's exchange is complete.
inline void CheckExchange(const RankExchange& exchange) {
  SALA_CHECK(exchange.gather && exchange.rank >= 0 && exchange.rank < exchange.ranks)
      << "rank " << exchange.rank << " of " << exchange.ranks
      << (exchange.gather ? "" : ", no way to gather");
}

// Room for one gathering of `n` numbers, in scratch of the caller's scope.
struct GatherBuffer {
  GatherBuffer(const Context& ctx, const RankExchange& exchange, int64_t n)
      : mine(ctx.scratch->New(DType::kF32, {n})),
        all(ctx.scratch->New(DType::kF32, {exchange.ranks, n})) {}
  // The first n numbers of `mine`, to all ranks: rank k's stand at all + k * n.
  void Gather(const Context& ctx, const RankExchange& exchange, int64_t n) const {
    exchange.gather(ctx, mine.Rows(0, n),
                    Tensor(all.raw(), DType::kF32, {exchange.ranks, n}, all.device()));
  }
  Tensor mine, all;
};

}  // namespace sala::kernels
