// The CUDA forms of the operations. Each has the signature of its contract header and lives in
// namespace cuda, in kernels/NAME/cuda.cu; the contract function calls it through this table when
// the context's device is a GPU. The table is filled by the CUDA module
// (kernels/common/cuda/table.cc).
#pragma once

#include "kernels/adamw/adamw.h"
#include "kernels/attention/attention.h"
#include "kernels/cross_entropy/cross_entropy.h"
#include "kernels/embedding/embedding.h"
#include "kernels/gemm/gemm.h"
#include "kernels/global_norm/global_norm.h"
#include "kernels/kl_divergence/kl_divergence.h"
#include "kernels/lightning/lightning.h"
#include "kernels/mse/mse.h"
#include "kernels/output_gate/output_gate.h"
#include "kernels/qk_norm_rope/qk_norm_rope.h"
#include "kernels/rms_norm/rms_norm.h"
#include "kernels/sparse_attention/sparse_attention.h"
#include "kernels/swiglu/swiglu.h"
#include "kernels/tensor_ops/tensor_ops.h"

#define SALA_CUDA_KERNELS(X) \
  X(AdamWStep)               \
  X(Add)                     \
  X(AttentionBackward)       \
  X(AttentionForward)        \
  X(Cast)                    \
  X(CopyColumns)             \
  X(CompressKeys)            \
  X(CrossEntropy)            \
  X(EmbeddingBackward)       \
  X(EmbeddingForward)        \
  X(GemmNN)                  \
  X(GemmNT)                  \
  X(GemmTN)                  \
  X(KlDivergence)            \
  X(LightningBackward)       \
  X(LightningForward)        \
  X(LightningStateGradient)  \
  X(LightningStates)         \
  X(MeanSquaredError)        \
  X(OutputGateBackward)      \
  X(OutputGateForward)       \
  X(QkNormRopeBackward)      \
  X(QkNormRopeForward)       \
  X(RmsNormBackward)         \
  X(RmsNormForward)          \
  X(RmsNormResidualForward)  \
  X(RopeTable)               \
  X(SelectBlocks)            \
  X(SparseAttentionBackward) \
  X(SparseAttentionForward)  \
  X(SumOfSquares)            \
  X(SwiGluBackward)          \
  X(SwiGluForward)

namespace sala::kernels {

struct CudaKernels {
#define SALA_FIELD(name) decltype(&::sala::kernels::name) name = nullptr;
  SALA_CUDA_KERNELS(SALA_FIELD)
#undef SALA_FIELD
};

// The table of the device that `ctx` works on.
inline const CudaKernels& Cuda(const Context& ctx) {
  return *static_cast<const CudaKernels*>(ctx.gpu->kernel_table());
}

namespace cuda {
#define SALA_DECLARE(name) decltype(::sala::kernels::name) name;
SALA_CUDA_KERNELS(SALA_DECLARE)
#undef SALA_DECLARE

// The filled table.
const CudaKernels& Table();
}  // namespace cuda

}  // namespace sala::kernels
