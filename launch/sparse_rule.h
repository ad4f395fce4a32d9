// Whether a command that runs a model uses block-sparse attention: --sparse auto, on or off.
#pragma once

#include <string>

#include "core/status.h"
#include "recipes/checkpointing.h"

namespace sala::launch {

// auto: as the model was trained. A stage's configuration says so; an exported hybrid is one whose
// long stages used it. `path` is where `loaded` came from, for messages.
StatusOr<bool> UseSparseAttention(const std::string& choice, const std::string& path,
                                  const recipes::LoadedModel& loaded);

}  // namespace sala::launch
