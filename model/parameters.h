// Named parameters in one flat buffer, and the same layout again for gradients and optimizer
// moments.
//
// Names are those of the exported model ("model.layers.0.self_attn.q_proj.weight"), weights are
// [out, in]. Every tensor starts at a multiple of 16 elements; the gap elements stay zero. A flat
// layout makes communication few and large and lets the optimizer state be cut anywhere.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/buffer.h"
#include "core/context.h"
#include "core/tensor.h"
#include "model/config.h"

namespace sala::model {

// What muP and weight decay need to know of a tensor (docs/training.md).
enum class ParameterKind : uint8_t {
  kMatrix,     // 2-D weights of the blocks
  kVector,     // norm weights
  kEmbedding,  // input embedding (also the head, when tied)
  kHead,       // untied output head
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
  ParameterKind kind = ParameterKind::kMatrix;
  int64_t offset = 0;  // elements, in the flat buffer
  int64_t numel = 0;
};

// All parameters of a model in a fixed order: embedding, layers, final norm, head.
std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config);

// The tensors of one mixer of the given type with the prefix "model.layers.I.self_attn.".
std::vector<ParameterSpec> MixerSpecs(const ModelConfig& config, int64_t layer, MixerType type);

// Assigns offsets in order; returns the size of the flat buffer in elements.
int64_t LayOut(std::vector<ParameterSpec>& specs);

class ParameterStore {
 public:
  ParameterStore() = default;
  // Zero-filled float32 in host memory.
  explicit ParameterStore(std::vector<ParameterSpec> specs)
      : ParameterStore(std::move(specs), DType::kF32, nullptr) {}
  // Zero-filled, in memory of `device` (null: of the host).
  ParameterStore(std::vector<ParameterSpec> specs, DType dtype, Device* device);

  const std::vector<ParameterSpec>& specs() const { return specs_; }
  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }  // elements with gaps
  int64_t parameters() const;             // elements without gaps
  // The elements of a float32 store in host memory.
  float* data();
  const float* data() const;
  // The whole buffer [size()], gaps included; and a range of it.
  Tensor Flat();
  Tensor Flat(int64_t begin, int64_t end);
  void Zero();

  bool Has(const std::string& name) const { return index_.count(name) > 0; }
  const ParameterSpec& Spec(const std::string& name) const;
  Tensor Get(const std::string& name);  // CHECKs that it exists
  ConstTensor Get(const std::string& name) const;

 private:
  DeviceKind device_kind() const;
  char* At(int64_t offset) const;

  std::vector<ParameterSpec> specs_;
  std::map<std::string, size_t> index_;
  DType dtype_ = DType::kF32;
  int64_t size_ = 0;
  Buffer data_;
};

// The parameters a model computes with. On a CPU they are the float32 store itself. On a GPU they
// are a second store on the device, rounded to bfloat16; the float32 store in host memory then is
// where training starts from and what a checkpoint is written from, and the optimizer keeps the
// masters in between (recipes/optimizer.h).
class ComputeParameters {
 public:
  // `host` must outlive this and stay where it is.
  ComputeParameters(const Context& ctx, ParameterStore& host);

  ParameterStore& host() { return *host_; }
  ParameterStore& store() { return device_ ? *device_ : *host_; }
  bool on_device() const { return device_ != nullptr; }
  // Rounds the host's values onto the device again, after they were changed there.
  void Refresh(const Context& ctx);

 private:
  ParameterStore* host_;
  std::unique_ptr<ParameterStore> device_;
};

// Normal draws with the muP standard deviations (matrices initializer_range / sqrt(m), embedding
// and head initializer_range; training.md), norm weights 1. Draws depend on (seed, tensor name)
// only.
void InitialiseParameters(const ModelConfig& config, int64_t seed, ParameterStore& store);

// One tensor: normal with this standard deviation.
void InitialiseNormal(int64_t seed, const std::string& name, double standard_deviation,
                      const Tensor& tensor);

}  // namespace sala::model
