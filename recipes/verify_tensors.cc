#include "recipes/verify_tensors.h"

#include "recipes/verify_pass.h"

namespace sala::recipes {

std::string Named(const std::string& tensor) {
  const std::string layer = LayerOfTensor(tensor);
  return layer.empty() ? tensor : tensor + " (" + layer + ")";
}

double TargetScale(const model::Batch& batch) {
  return 1.0 / static_cast<double>(std::max<int64_t>(1, batch.targets()));
}

Host::Host(Device* device) : arena(kArenaBlockBytes, device), scratch(kArenaBlockBytes, device) {
  ctx.pool = &pool;
  ctx.scratch = &scratch;
  ctx.device = device == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda;
  ctx.gpu = device;
}

std::string Worst::Text() const {
  return Named(tensor) + ": element " + std::to_string(element) + ": found " + ExactText(found) +
         ", expected " + ExactText(expected) + ", off by " + ShortText(difference) +
         " of the largest of its tensor";
}

}  // namespace sala::recipes
