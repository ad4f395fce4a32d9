// The made documents of `sala verify`: token stores of the byte tokenizer whose content is drawn
// from Philox streams, the same everywhere.
#pragma once

#include <vector>

#include "core/status.h"
#include "recipes/verify_scale.h"

namespace sala::recipes {

// Writes every store. FILE-WRITE (74), DS-EXISTS (74).
Status WriteVerifyDatasets(const std::vector<VerifyDataset>& datasets);

}  // namespace sala::recipes
