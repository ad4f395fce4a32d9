// The shapes that are measured: those of the 9B model, or a few numbers that only let the code run
// (--smoke).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace sala::bench {

// A stack of the model's layers. The hybrid has one softmax layer in four, as the released model
// has (8 of 32); the teacher has softmax layers alone, with rotary embedding and without gates.
model::ModelConfig HybridStack(bool smoke, int64_t layers);
model::ModelConfig TeacherStack(bool smoke, int64_t layers);

// The released model with all its 32 layers, for counting.
model::ModelConfig ReleasedModel();

}  // namespace sala::bench
