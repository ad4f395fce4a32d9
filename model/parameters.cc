#include "model/parameters.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/rng.h"

namespace sala::model {
namespace {

constexpr int64_t kAlignment = 16;

ParameterSpec Matrix(const std::string& name, int64_t out, int64_t in) {
  return {.name = name, .shape = {out, in}, .kind = ParameterKind::kMatrix};
}

ParameterSpec Vector(const std::string& name, int64_t n) {
  return {.name = name, .shape = {n}, .kind = ParameterKind::kVector};
}

}  // namespace

std::vector<ParameterSpec> MixerSpecs(const ModelConfig& config, int64_t layer, MixerType type) {
  const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
  const bool softmax = type == MixerType::kSoftmax;
  const int64_t hidden = config.hidden_size;
  const int64_t width = softmax ? config.attention_width() : config.lightning_width();
  const int64_t kv_width = softmax ? config.kv_width() : width;
  const int64_t head_dim = softmax ? config.head_dim : config.lightning_head_dim;
  std::vector<ParameterSpec> specs;
  specs.push_back(Matrix(prefix + "q_proj.weight", width, hidden));
  specs.push_back(Matrix(prefix + "k_proj.weight", kv_width, hidden));
  specs.push_back(Matrix(prefix + "v_proj.weight", kv_width, hidden));
  // Next to q, k and v: all that read the same input are one matrix product (model/projection.h).
  if (softmax && config.attn_use_output_gate)
    specs.push_back(Matrix(prefix + "o_gate.weight", width, hidden));
  if (!softmax && config.use_output_gate)
    specs.push_back(Matrix(prefix + "z_proj.weight", width, hidden));
  specs.push_back(Matrix(prefix + "o_proj.weight", hidden, width));
  if (softmax ? config.attn_qk_norm : config.qk_norm) {
    specs.push_back(Vector(prefix + "q_norm.weight", head_dim));
    specs.push_back(Vector(prefix + "k_norm.weight", head_dim));
  }
  if (!softmax && config.use_output_norm) specs.push_back(Vector(prefix + "o_norm.weight", width));
  return specs;
}

int64_t LayOut(std::vector<ParameterSpec>& specs) {
  int64_t offset = 0;
  for (ParameterSpec& spec : specs) {
    spec.numel = 1;
    for (int64_t n : spec.shape) spec.numel *= n;
    spec.offset = offset;
    offset += (spec.numel + kAlignment - 1) / kAlignment * kAlignment;
  }
  return offset;
}

std::vector<ParameterSpec> ParameterSpecs(const ModelConfig& config) {
  std::vector<ParameterSpec> specs;
  specs.push_back({.name = "model.embed_tokens.weight",
                   .shape = {config.vocab_size, config.hidden_size},
                   .kind = ParameterKind::kEmbedding});
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    specs.push_back(Vector(prefix + "input_layernorm.weight", config.hidden_size));
    for (ParameterSpec& spec : MixerSpecs(config, layer, config.mixer(layer)))
      specs.push_back(std::move(spec));
    specs.push_back(Vector(prefix + "post_attention_layernorm.weight", config.hidden_size));
    specs.push_back(
        Matrix(prefix + "mlp.gate_proj.weight", config.intermediate_size, config.hidden_size));
    specs.push_back(
        Matrix(prefix + "mlp.up_proj.weight", config.intermediate_size, config.hidden_size));
    specs.push_back(
        Matrix(prefix + "mlp.down_proj.weight", config.hidden_size, config.intermediate_size));
  }
  specs.push_back(Vector("model.norm.weight", config.hidden_size));
  if (!config.tie_word_embeddings) {
    specs.push_back({.name = "lm_head.weight",
                     .shape = {config.vocab_size, config.hidden_size},
                     .kind = ParameterKind::kHead});
  }
  LayOut(specs);
  return specs;
}

ParameterStore::ParameterStore(std::vector<ParameterSpec> specs, DType dtype, Device* device)
    : specs_(std::move(specs)), dtype_(dtype), size_(LayOut(specs_)) {
  data_ = Buffer(static_cast<size_t>(size_) * SizeOf(dtype), device);
  for (size_t i = 0; i < specs_.size(); ++i) {
    SALA_CHECK(index_.emplace(specs_[i].name, i).second)
        << "parameter " << specs_[i].name << " appears twice";
  }
}

DeviceKind ParameterStore::device_kind() const {
  return data_.device() == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda;
}

char* ParameterStore::At(int64_t offset) const {
  return static_cast<char*>(data_.data()) + offset * static_cast<int64_t>(SizeOf(dtype_));
}

float* ParameterStore::data() {
  SALA_CHECK(dtype_ == DType::kF32 && data_.device() == nullptr)
      << "the store holds " << NameOf(dtype_) << " or lies on a device";
  return static_cast<float*>(data_.data());
}

const float* ParameterStore::data() const { return const_cast<ParameterStore*>(this)->data(); }

Tensor ParameterStore::Flat() { return Flat(0, size_); }

Tensor ParameterStore::Flat(int64_t begin, int64_t end) {
  SALA_CHECK(0 <= begin && begin <= end && end <= size_)
      << "elements [" << begin << ", " << end << ") of " << size_;
  return Tensor(At(begin), dtype_, {end - begin}, device_kind());
}

void ParameterStore::Zero() {
  if (data_.bytes() == 0) return;
  if (data_.device() != nullptr) {
    data_.device()->Zero(data_.data(), data_.bytes());
  } else {
    std::memset(data_.data(), 0, data_.bytes());
  }
}

int64_t ParameterStore::parameters() const {
  int64_t n = 0;
  for (const ParameterSpec& spec : specs_) n += spec.numel;
  return n;
}

const ParameterSpec& ParameterStore::Spec(const std::string& name) const {
  const auto it = index_.find(name);
  SALA_CHECK(it != index_.end()) << "no parameter " << name;
  return specs_[it->second];
}

Tensor ParameterStore::Get(const std::string& name) {
  const ParameterSpec& spec = Spec(name);
  return spec.shape.size() == 1
             ? Tensor(At(spec.offset), dtype_, {spec.shape[0]}, device_kind())
             : Tensor(At(spec.offset), dtype_, {spec.shape[0], spec.shape[1]}, device_kind());
}

ConstTensor ParameterStore::Get(const std::string& name) const {
  return const_cast<ParameterStore*>(this)->Get(name);
}

ComputeParameters::ComputeParameters(const Context& ctx, ParameterStore& host) : host_(&host) {
  if (!ctx.cuda()) return;
  device_ = std::make_unique<ParameterStore>(host.specs(), DType::kBF16, ctx.gpu);
  Refresh(ctx);
}

void ComputeParameters::Refresh(const Context& ctx) {
  if (!device_) return;
  constexpr int64_t kPiece = int64_t{1} << 20;
  std::vector<BF16> rounded;
  const float* values = host_->data();
  for (int64_t begin = 0; begin < host_->size(); begin += kPiece) {
    const int64_t end = std::min(host_->size(), begin + kPiece);
    rounded.resize(static_cast<size_t>(end - begin));
    for (int64_t i = begin; i < end; ++i) rounded[static_cast<size_t>(i - begin)] = BF16(values[i]);
    ctx.gpu->Upload(device_->Flat(begin, end).raw(), rounded.data(), rounded.size() * sizeof(BF16));
  }
}

void InitialiseNormal(int64_t seed, const std::string& name, double standard_deviation,
                      const Tensor& tensor) {
  PhiloxStream rng("v1|" + std::to_string(seed) + "|init||0|parameter|" + name);
  auto* data = tensor.Data<float>();
  for (int64_t i = 0; i < tensor.numel(); ++i)
    data[i] = static_cast<float>(standard_deviation * rng.NextNormal());
}

void InitialiseParameters(const ModelConfig& config, int64_t seed, ParameterStore& store) {
  for (const ParameterSpec& spec : store.specs()) {
    const Tensor tensor = store.Get(spec.name);
    switch (spec.kind) {
      case ParameterKind::kVector:
        std::fill_n(tensor.Data<float>(), spec.numel, 1.0F);
        break;
      case ParameterKind::kMatrix:
        InitialiseNormal(seed, spec.name,
                         config.initializer_range / std::sqrt(config.width_multiplier()), tensor);
        break;
      case ParameterKind::kEmbedding:
      case ParameterKind::kHead:
        InitialiseNormal(seed, spec.name, config.initializer_range, tensor);
        break;
    }
  }
}

}  // namespace sala::model
