// Part of the CUDA module: the table the program calls the kernels through.
#include "kernels/cuda_kernels.h"

namespace sala::kernels::cuda {

const CudaKernels& Table() {
  static const CudaKernels table = {
#define SALA_ENTRY(name) .name = &name,
      SALA_CUDA_KERNELS(SALA_ENTRY)
#undef SALA_ENTRY
  };
  return table;
}

}  // namespace sala::kernels::cuda
