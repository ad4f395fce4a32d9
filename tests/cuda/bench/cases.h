// The parts of cuda_bench. Each adds its rows to the bench.
#pragma once

#include "tests/cuda/bench/measure.h"

namespace sala::bench {

// What this device can do, measured: a copy on the device and a large product. Always first: other
// rows are read against these.
void LimitCases(Bench& bench);
// The matrix products of the model.
void ProductCases(Bench& bench);
// Norms, gates, SwiGLU, embedding, losses, optimizer.
void TokenCases(Bench& bench);
// Dense and sparse attention, selection, Lightning.
void MixerCases(Bench& bench);
// Training steps of stacks of layers, hybrid beside teacher; one row for each length.
void StepCases(Bench& bench);
// The forward pass over one long document, as when a prompt is read.
void PrefillCases(Bench& bench);

}  // namespace sala::bench
