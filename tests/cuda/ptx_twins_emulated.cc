// The emulated form of ptx_twins: the language of a source belongs to the folder, and this one
// gives ptx_twins.cu to nvcc.
#include "tests/cuda/ptx_twins.cu"
