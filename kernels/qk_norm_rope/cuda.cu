// Norm and rotation of heads on the GPU. Bound by memory: each head is read and written once.
//
// A head of D channels belongs to D / 16 neighbouring lanes. Lane i of them holds the channels
// [8 i, 8 i + 8) of the first half and those of the second half that they are rotated with, so the
// rotation needs no other lane and the norm's sum is a butterfly over the head's lanes. A warp
// works on one token, 512 / D heads at a time; the forward pass keeps its cosines and sines in
// registers.
//
// Backward, with dn the gradient turned back:
//   dx_i = r (w_i dn_i - (x_i r) mean_j(w_j dn_j x_j r))
//   dw_i = sum over tokens and heads of dn_i x_i r
// dw is kept in registers over all tokens of a block; one row of partial sums a block, which
// AddColumnSums joins.
#include <vector>

#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"
#include "kernels/qk_norm_rope/frequencies.h"

namespace sala::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kForwardSteps = 4;   // times 512 / D heads: what a warp of the forward pass takes
constexpr int kBackwardSteps = 2;  // whose loads are under way together
constexpr int64_t kMostPieces = 1024;
constexpr int64_t kMostHeads = 1 << 20;  // 32-bit indices of heads are safe

// angle = float32(position) * float32 frequency, rounded to float32; its cosine and sine are worked
// out in float64, which also reduces large angles exactly.
__global__ void __launch_bounds__(kPackThreads)
    TableKernel(const int32_t* positions, const float* frequency, float* cos, int64_t cos_stride,
                float* sin, int64_t sin_stride, int64_t tokens, int64_t half) {
  for (PackLoop i(tokens, half); i.more(); i.Next()) {
    const float angle = __fmul_rn(static_cast<float>(positions[i.row]), frequency[i.pack()]);
    double s, c;
    sincos(static_cast<double>(angle), &s, &c);
    cos[i.row * cos_stride + i.pack()] = static_cast<float>(c);
    sin[i.row * sin_stride + i.pack()] = static_cast<float>(s);
  }
}

// [T, N, D]
struct Heads {
  Bf16* data;
  int64_t token_stride, head_stride;
};
struct ConstHeads {
  const Bf16* data;
  int64_t token_stride, head_stride;
};

struct Shape {
  int64_t tokens;
  int heads;  // at most kMostHeads
  int half;   // D / 2
  int lanes;  // D / 16
};

struct Tables {
  const float* cos;  // null: no rotation
  int64_t cos_stride;
  const float* sin;
  int64_t sin_stride;
};

// The lane's channels of one head: `first` and the partners in the second half.
struct Channels {
  float first[8], second[8];
};
struct PackedChannels {
  Bf16x8 first, second;
};

__device__ __forceinline__ PackedChannels LoadChannels(const Bf16* from, int half) {
  return {LoadPack(from), LoadPack(from + half)};
}
__device__ __forceinline__ void UnpackChannels(const PackedChannels& packed, Channels& x) {
  Unpack(packed.first, x.first);
  Unpack(packed.second, x.second);
}
__device__ __forceinline__ void StoreChannels(Bf16* to, int half, const Channels& x) {
  Store8(to, x.first);
  Store8(to + half, x.second);
}

// The cosines and sines of the lane's channels.
struct Rotation {
  float cos[8], sin[8];
};
__device__ __forceinline__ Rotation LoadRotation(const Tables& tables, int64_t token, int channel) {
  Rotation r;
  Load8(tables.cos + token * tables.cos_stride + channel, r.cos);
  Load8(tables.sin + token * tables.sin_stride + channel, r.sin);
  return r;
}

// (a, b) -> (a c - b s, b c + a s); kBack turns back.
template <bool kBack>
__device__ __forceinline__ void Rotate(const Rotation& r, Channels& x) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float a = x.first[j];
    const float b = x.second[j];
    const float s = kBack ? -r.sin[j] : r.sin[j];
    x.first[j] = a * r.cos[j] - b * s;
    x.second[j] = b * r.cos[j] + a * s;
  }
}

// The sum over the lanes of a head. All lanes of the warp call this.
__device__ __forceinline__ float HeadSum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullMask, value, offset);
  }
  return value;
}

// As BlockSquare (cuda_rows.h), of each head.
__device__ __forceinline__ float HeadSquare(const Channels& x, int lanes) {
  const auto sum = [&](float factor) {
    float square = 0.0F;
    AddSquares(x.first, factor, square);
    AddSquares(x.second, factor, square);
    return HeadSum(square, lanes);
  };
  const float square = sum(1.0F);
  const bool beyond = square == INFINITY;
  if (!__any_sync(kFullMask, beyond ? 1 : 0)) return square;
  const float shrunk = sum(kShrink);
  return beyond ? -shrunk : square;
}

__global__ void __launch_bounds__(kThreads)
    ForwardKernel(ConstHeads x, const Bf16* weight, float eps, Tables tables, Heads y, float* rstd,
                  int64_t rstd_stride, Shape shape) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t token = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (token >= shape.tokens) return;
  const int channel = lane % shape.lanes * 8;
  const int together = kWarp / shape.lanes;  // heads of one step
  const int first_head =
      static_cast<int>(blockIdx.y) * kForwardSteps * together + lane / shape.lanes;

  PackedChannels packed[kForwardSteps] = {};
#pragma unroll
  for (int step = 0; step < kForwardSteps; ++step) {
    const int head = first_head + step * together;
    if (head < shape.heads) {
      packed[step] = LoadChannels(x.data + token * x.token_stride + head * x.head_stride + channel,
                                  shape.half);
    }
  }
  Channels w;
  if (weight != nullptr) UnpackChannels(LoadChannels(weight + channel, shape.half), w);
  Rotation rotation;
  if (tables.cos != nullptr) rotation = LoadRotation(tables, token, channel);
#pragma unroll
  for (int step = 0; step < kForwardSteps; ++step) {
    const int head = first_head + step * together;
    Channels v;
    UnpackChannels(packed[step], v);
    if (weight != nullptr) {
      const float r = RstdOf(HeadSquare(v, shape.lanes), 2 * shape.half, eps);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        v.first[j] *= r * w.first[j];
        v.second[j] *= r * w.second[j];
      }
      if (channel == 0 && head < shape.heads) rstd[token * rstd_stride + head] = r;
    }
    if (tables.cos != nullptr) Rotate<false>(rotation, v);
    if (head < shape.heads) {
      StoreChannels(y.data + token * y.token_stride + head * y.head_stride + channel, shape.half,
                    v);
    }
  }
}

struct Backward {
  ConstHeads dy, x;
  const Bf16* weight;  // null: no norm
  const float* rstd;
  int64_t rstd_stride;
  Tables tables;
  Heads dx;
  float* parts;  // [gridDim.x, D] or null
  Shape shape;
};

__global__ void __launch_bounds__(kThreads, 2) BackwardKernel(Backward b) {
  SharedMemory shared;
  float* warp_sums = shared.Take<float>(kWarps * 2 * b.shape.half);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int channel = lane % b.shape.lanes * 8;
  const int together = kWarp / b.shape.lanes;
  Channels sums = {};
  for (int64_t token = int64_t{blockIdx.x} * kWarps + warp; token < b.shape.tokens;
       token += int64_t{gridDim.x} * kWarps) {
    for (int first = 0; first < b.shape.heads; first += kBackwardSteps * together) {
      PackedChannels dy_pack[kBackwardSteps] = {}, x_pack[kBackwardSteps] = {};
      float rstd[kBackwardSteps] = {};
#pragma unroll
      for (int step = 0; step < kBackwardSteps; ++step) {
        const int head = first + step * together + lane / b.shape.lanes;
        if (head >= b.shape.heads) continue;
        dy_pack[step] =
            LoadChannels(b.dy.data + token * b.dy.token_stride + head * b.dy.head_stride + channel,
                         b.shape.half);
        if (b.weight == nullptr) continue;
        x_pack[step] = LoadChannels(
            b.x.data + token * b.x.token_stride + head * b.x.head_stride + channel, b.shape.half);
        rstd[step] = b.rstd[token * b.rstd_stride + head];
      }
#pragma unroll
      for (int step = 0; step < kBackwardSteps; ++step) {
        const int head = first + step * together + lane / b.shape.lanes;
        Channels dn;
        UnpackChannels(dy_pack[step], dn);
        // Read again for each head, from the L1 cache: the registers do not hold them beside the
        // sums.
        if (b.tables.cos != nullptr) Rotate<true>(LoadRotation(b.tables, token, channel), dn);
        if (b.weight != nullptr) {
          Channels x, w;
          UnpackChannels(x_pack[step], x);
          UnpackChannels(LoadChannels(b.weight + channel, b.shape.half), w);
          float dot = 0.0F;
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            dot += w.first[j] * dn.first[j] * x.first[j] + w.second[j] * dn.second[j] * x.second[j];
          }
          dot = HeadSum(dot, b.shape.lanes);
          const float r = rstd[step];
          const float mean = dot * r / static_cast<float>(2 * b.shape.half);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            sums.first[j] += dn.first[j] * (x.first[j] * r);
            sums.second[j] += dn.second[j] * (x.second[j] * r);
            dn.first[j] = r * (w.first[j] * dn.first[j] - x.first[j] * r * mean);
            dn.second[j] = r * (w.second[j] * dn.second[j] - x.second[j] * r * mean);
          }
        }
        if (head < b.shape.heads) {
          StoreChannels(b.dx.data + token * b.dx.token_stride + head * b.dx.head_stride + channel,
                        b.shape.half, dn);
        }
      }
    }
  }
  if (b.parts == nullptr) return;

  // Over the heads that the warp has side by side, then over the warps in order.
  for (int offset = b.shape.lanes; offset < kWarp; offset *= 2) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums.first[j] += __shfl_xor_sync(kFullMask, sums.first[j], offset);
      sums.second[j] += __shfl_xor_sync(kFullMask, sums.second[j], offset);
    }
  }
  const int width = 2 * b.shape.half;
  if (lane < b.shape.lanes) {
    Store8(warp_sums + warp * width + channel, sums.first);
    Store8(warp_sums + warp * width + b.shape.half + channel, sums.second);
  }
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= width) return;
  float sum = 0.0F;
  for (int w = 0; w < kWarps; ++w) sum += warp_sums[w * width + column];
  b.parts[int64_t{blockIdx.x} * width + column] = sum;
}

void CheckHeads(const ConstTensor& x, int64_t tokens, int64_t heads, int64_t d) {
  CheckShape(x, {tokens, heads, d}, DType::kBF16);
  SALA_CHECK(x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 && Aligned16(x.raw()))
      << "found " << ShapeText(x) << " with strides " << x.stride(0) << " and " << x.stride(1)
      << ", expected strides and an address that are multiples of 8 elements";
}

Shape Check(const ConstTensor& x, const ConstTensor& weight, const ConstTensor& rstd,
            const ConstTensor& cos, const ConstTensor& sin) {
  SALA_CHECK(x.rank() == 3) << ShapeText(x);
  const int64_t tokens = x.dim(0);
  const int64_t heads = x.dim(1);
  const int64_t d = x.dim(2);
  SALA_CHECK(d == 16 || d == 32 || d == 64 || d == 128)
      << "head dimension " << d << ", expected 16, 32, 64 or 128 on a GPU";
  SALA_CHECK(heads <= kMostHeads) << heads << " heads, at most " << kMostHeads;
  CheckHeads(x, tokens, heads, d);
  if (!weight.empty()) {
    CheckPackedVector(weight, d);
    CheckShape(rstd, {tokens, heads});
  }
  SALA_CHECK(cos.empty() == sin.empty()) << "cos and sin go together";
  if (!cos.empty()) {
    for (const ConstTensor& table : {cos, sin}) {
      CheckShape(table, {tokens, d / 2});
      SALA_CHECK(table.stride(0) % 4 == 0 && Aligned16(table.raw()))
          << "found " << ShapeText(table) << " with row stride " << table.stride(0)
          << ", expected a row stride and an address that are multiples of 4 elements";
    }
  }
  return {.tokens = tokens,
          .heads = static_cast<int>(heads),
          .half = static_cast<int>(d / 2),
          .lanes = static_cast<int>(d / 16)};
}

ConstHeads HeadsOf(const Op& op, const ConstTensor& x) {
  return {op.Data<Bf16>(x), x.stride(0), x.stride(1)};
}
Heads HeadsOf(const Op& op, const Tensor& x) {
  return {op.Data<Bf16>(x), x.stride(0), x.stride(1)};
}
Tables TablesOf(const Op& op, const ConstTensor& cos, const ConstTensor& sin) {
  return {op.Data<float>(cos), cos.stride(0), op.Data<float>(sin), sin.stride(0)};
}

}  // namespace

void cuda::RopeTable(const Context& ctx, const ConstTensor& positions, int64_t head_dim,
                     float theta, const Tensor& cos, const Tensor& sin) {
  const Op op(ctx, "RopeTable", cos);
  SALA_CHECK(positions.rank() == 1 && head_dim % 2 == 0) << "head dimension " << head_dim;
  const int64_t tokens = positions.dim(0);
  const int64_t half = head_dim / 2;
  CheckVector(positions, tokens, DType::kI32);
  CheckShape(cos, {tokens, half});
  CheckShape(sin, {tokens, half});
  const ArenaScope scope(*ctx.scratch);
  const std::vector<float> frequency = RopeFrequencies(head_dim, theta);
  const float* device_frequency = UploadScratch(ctx, frequency.data(), half);
  op.Launch(TableKernel, dim3(PackBlocks(op, tokens * half)), dim3(kPackThreads), 0,
            op.Data<int32_t>(positions), device_frequency, op.Data<float>(cos), cos.stride(0),
            op.Data<float>(sin), sin.stride(0), tokens, half);
}

void cuda::QkNormRopeForward(const Context& ctx, const ConstTensor& x, const ConstTensor& weight,
                             float eps, const ConstTensor& cos, const ConstTensor& sin,
                             const Tensor& y, const Tensor& rstd) {
  const Op op(ctx, "QkNormRopeForward", x);
  const Shape shape = Check(x, weight, rstd, cos, sin);
  CheckHeads(y, shape.tokens, shape.heads, x.dim(2));
  const int64_t heads_of_warp = int64_t{kForwardSteps} * (kWarp / shape.lanes);
  const bool norm = !weight.empty();
  op.Launch(ForwardKernel,
            dim3(static_cast<unsigned>(CeilDiv(shape.tokens, kWarps)),
                 static_cast<unsigned>(CeilDiv(shape.heads, heads_of_warp))),
            dim3(kThreads), 0, HeadsOf(op, x), op.Data<Bf16>(weight), eps, TablesOf(op, cos, sin),
            HeadsOf(op, y), norm ? op.Data<float>(rstd) : nullptr, norm ? rstd.stride(0) : 0,
            shape);
}

void cuda::QkNormRopeBackward(const Context& ctx, const ConstTensor& dy, const ConstTensor& x,
                              const ConstTensor& weight, const ConstTensor& rstd,
                              const ConstTensor& cos, const ConstTensor& sin, const Tensor& dx,
                              const Tensor& dweight) {
  const Op op(ctx, "QkNormRopeBackward", x);
  const Shape shape = Check(x, weight, rstd, cos, sin);
  const int64_t d = x.dim(2);
  CheckHeads(dy, shape.tokens, shape.heads, d);
  CheckHeads(dx, shape.tokens, shape.heads, d);
  const bool norm = !weight.empty();
  const bool sums = !dweight.empty();
  if (sums) {
    SALA_CHECK(norm) << "dweight without a norm";
    CheckVector(dweight, d);
  }
  const ArenaScope scope(*ctx.scratch);
  const int64_t blocks = CeilDiv(shape.tokens, kWarps);
  const int64_t pieces = sums ? std::min(blocks, kMostPieces) : blocks;
  const Tensor parts = sums ? ctx.scratch->New(DType::kF32, {pieces, d}) : Tensor();
  const Backward b = {.dy = HeadsOf(op, dy),
                      .x = HeadsOf(op, x),
                      .weight = op.Data<Bf16>(weight),
                      .rstd = norm ? op.Data<float>(rstd) : nullptr,
                      .rstd_stride = norm ? rstd.stride(0) : 0,
                      .tables = TablesOf(op, cos, sin),
                      .dx = HeadsOf(op, dx),
                      .parts = op.Data<float>(parts),
                      .shape = shape};
  op.Launch(BackwardKernel, dim3(static_cast<unsigned>(pieces)), dim3(kThreads),
            SharedBytes<float>(kWarps * d), b);
  if (sums) AddColumnSums(op, b.parts, pieces, d, op.Data<float>(dweight));
}

}  // namespace sala::kernels
