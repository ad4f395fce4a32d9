// Whole-tensor operations on the GPU: bound by memory, eight elements a thread and step where the
// addresses allow 16-byte accesses, one where not (a part of a flat buffer may begin anywhere).
#include "kernels/common/cuda_rows.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

__device__ __forceinline__ float ToFloat(float x) { return x; }
__device__ __forceinline__ float ToFloat(Bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void Store1(float* to, float value) { *to = value; }
__device__ __forceinline__ void Store1(Bf16* to, float value) { *to = __float2bfloat16(value); }

// to = from, or to += from. The first `packs` times eight elements go by packs, the rest one by
// one.
template <bool kAdd, typename From, typename To>
__global__ void __launch_bounds__(kPackThreads)
    FlatKernel(const From* from, To* to, int64_t packs, int64_t count) {
  const int64_t first = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  const int64_t step = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = first; i < packs; i += step) {
    float v[8];
    Load8(from + 8 * i, v);
    if (kAdd) {
      float old[8];
      Load8(to + 8 * i, old);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = old[j] + v[j];
    }
    Store8(to + 8 * i, v);
  }
  for (int64_t i = 8 * packs + first; i < count; i += step) {
    const float v = ToFloat(from[i]);
    Store1(to + i, kAdd ? ToFloat(to[i]) + v : v);
  }
}

template <bool kAdd, typename From, typename To>
void LaunchFlat(const Op& op, const ConstTensor& from, const Tensor& to) {
  const int64_t count = to.numel();
  const int64_t packs = Aligned16(from.raw()) && Aligned16(to.raw()) ? count / 8 : 0;
  op.Launch(FlatKernel<kAdd, From, To>, dim3(PackBlocks(op, std::max(packs, count - 8 * packs))),
            dim3(kPackThreads), 0, op.Data<From>(from), op.Data<To>(to), packs, count);
}

// Rows of `width` units of 16 bytes.
__global__ void __launch_bounds__(kPackThreads)
    ColumnsKernel(const int4* from, int64_t from_stride, int4* to, int64_t to_stride, int64_t width,
                  int64_t count) {
  const int64_t step = int64_t{gridDim.x} * kPackThreads;
  for (int64_t i = int64_t{blockIdx.x} * kPackThreads + threadIdx.x; i < count; i += step) {
    to[i / width * to_stride + i % width] = from[i / width * from_stride + i % width];
  }
}

void CheckFlat(const ConstTensor& a, const ConstTensor& b) {
  SALA_CHECK(a.contiguous() && b.contiguous() && a.numel() == b.numel())
      << ShapeText(a) << " and " << ShapeText(b) << " must be contiguous and of one size";
}

[[noreturn]] void RefuseTypes(const ConstTensor& a, const ConstTensor& b) {
  SALA_CHECK(false) << "found " << ShapeText(a) << " and " << ShapeText(b)
                    << ", expected f32 or bf16 (of one type where they are added)";
  std::abort();
}

}  // namespace

void cuda::Cast(const Context& ctx, const ConstTensor& from, const Tensor& to) {
  const Op op(ctx, "Cast", from);
  CheckFlat(from, to);
  if (from.dtype() == DType::kF32 && to.dtype() == DType::kF32) {
    ctx.gpu->Copy(op.Data<float>(to), op.Data<float>(from),
                  static_cast<size_t>(to.numel()) * sizeof(float));
  } else if (from.dtype() == DType::kBF16 && to.dtype() == DType::kBF16) {
    ctx.gpu->Copy(op.Data<Bf16>(to), op.Data<Bf16>(from),
                  static_cast<size_t>(to.numel()) * sizeof(Bf16));
  } else if (from.dtype() == DType::kF32 && to.dtype() == DType::kBF16) {
    LaunchFlat<false, float, Bf16>(op, from, to);
  } else if (from.dtype() == DType::kBF16 && to.dtype() == DType::kF32) {
    LaunchFlat<false, Bf16, float>(op, from, to);
  } else {
    RefuseTypes(from, to);
  }
}

void cuda::CopyColumns(const Context& ctx, const ConstTensor& from, const Tensor& to) {
  const Op op(ctx, "CopyColumns", from);
  SALA_CHECK(from.rank() == 2 && to.rank() == 2 && from.dim(0) == to.dim(0) &&
             from.dim(1) == to.dim(1) && from.dtype() == to.dtype())
      << ShapeText(from) << " to " << ShapeText(to);
  const auto unit = static_cast<int64_t>(16 / SizeOf(from.dtype()));
  SALA_CHECK(from.dim(1) % unit == 0 && from.stride(0) % unit == 0 && to.stride(0) % unit == 0 &&
             Aligned16(from.raw()) && Aligned16(to.raw()))
      << ShapeText(from) << " with row strides " << from.stride(0) << " and " << to.stride(0)
      << ", expected rows of whole units of 16 bytes";
  const int64_t width = from.dim(1) / unit;
  const int64_t count = from.dim(0) * width;
  if (count == 0) return;
  op.Launch(ColumnsKernel, dim3(PackBlocks(op, count)), dim3(kPackThreads), 0,
            static_cast<const int4*>(from.raw()), from.stride(0) / unit,
            static_cast<int4*>(to.raw()), to.stride(0) / unit, width, count);
}

void cuda::Add(const Context& ctx, const ConstTensor& term, const Tensor& sum) {
  const Op op(ctx, "Add", sum);
  CheckFlat(term, sum);
  if (term.dtype() == DType::kF32 && sum.dtype() == DType::kF32) {
    LaunchFlat<true, float, float>(op, term, sum);
  } else if (term.dtype() == DType::kBF16 && sum.dtype() == DType::kBF16) {
    LaunchFlat<true, Bf16, Bf16>(op, term, sum);
  } else {
    RefuseTypes(term, sum);
  }
}

}  // namespace sala::kernels
