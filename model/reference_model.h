// The forward pass of the whole model in plain loops, on any number type, built from the kernels'
// references: double for values, complex<double> for derivatives by complex step. Selection of
// sparse blocks looks at the real part only. model/reference.h says what it is for and adds the
// gradients.
//
// Stored says how tensors are kept between operations (kernels/common/stored.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention/reference.h"
#include "kernels/cross_entropy/reference.h"
#include "kernels/embedding/reference.h"
#include "kernels/gemm/reference.h"
#include "kernels/lightning/lightning.h"
#include "kernels/lightning/reference.h"
#include "kernels/logit_scale/reference.h"
#include "kernels/output_gate/reference.h"
#include "kernels/qk_norm_rope/reference.h"
#include "kernels/rms_norm/reference.h"
#include "kernels/sparse_attention/reference.h"
#include "kernels/swiglu/reference.h"
#include "model/model.h"

namespace sala::model {

// Sizes of one layer's mixer.
struct ReferenceMixerShape {
  bool softmax = false;
  int64_t heads = 0, kv_heads = 0, d = 0;
  std::string prefix;                   // of its tensors
  kernels::reference::RopeTables rope;  // empty without rotary embedding

  int64_t width() const { return heads * d; }
  const double* cos() const { return rope.cos.empty() ? nullptr : rope.cos.data(); }
  const double* sin() const { return rope.sin.empty() ? nullptr : rope.sin.data(); }
};

// chosen[(t - begin) * K + g]: the blocks that token t of the document sees, ascending; empty in a
// dense document.
using ChosenBlocks = std::vector<std::vector<int64_t>>;

// What the backward pass needs, as the forward pass had it.
template <typename Number>
struct ReferenceMixerTrace {
  std::vector<Number> x, q_raw, k_raw, v, q, k, o, z, u;
  std::vector<ChosenBlocks> chosen;  // per document, softmax layers
};

template <typename Number>
struct ReferenceLayerTrace {
  std::vector<Number> x, mid, n2, gate, up, h;
  ReferenceMixerTrace<Number> mixer;
};

template <typename Number>
struct ReferenceTrace {
  std::vector<ReferenceLayerTrace<Number>> layers;
  std::vector<Number> last;
};

template <typename Number, typename Stored = kernels::reference::Exact>
class ReferenceModel {
 public:
  using Vector = std::vector<Number>;
  // As LayerHook (model/model.h).
  using Hook = std::function<void(int64_t layer, const Vector& normed, const Vector& mixer_out)>;

  ReferenceModel(const ModelConfig& config, const std::vector<ParameterSpec>& specs,
                 Vector parameters)
      : config_(config), parameters_(std::move(parameters)) {
    for (const ParameterSpec& spec : specs) specs_[spec.name] = spec;
  }

  const ModelConfig& config() const { return config_; }
  bool Has(const std::string& name) const { return specs_.count(name) > 0; }
  const ParameterSpec& Spec(const std::string& name) const { return specs_.at(name); }
  // Null where the model has no such tensor.
  const Number* Get(const std::string& name) const {
    return Has(name) ? parameters_.data() + Spec(name).offset : nullptr;
  }
  const char* head() const {
    return config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
  }
  double logit_scale() const { return 1.0 / width_multiplier(); }
  // Not the configuration's own functions: what the fast path takes from them is checked too.
  double width_multiplier() const {
    return static_cast<double>(config_.hidden_size) / config_.dim_model_base;
  }
  double residual_scale() const {
    return config_.scale_depth / std::sqrt(static_cast<double>(config_.num_hidden_layers));
  }

  // The smallest margin of all selections so far (kernels/sparse_attention/reference.h).
  double selection_margin() const { return selection_margin_; }

  // Hidden states after the final norm, [T, H].
  Vector Hidden(const Batch& batch, const RunOptions& options,
                ReferenceTrace<Number>* trace = nullptr, const Hook& hook = nullptr) const {
    const int64_t t = batch.size();
    const int64_t hidden = config_.hidden_size;
    Vector x(static_cast<size_t>(t * hidden));
    kernels::reference::EmbeddingForward(t, hidden, batch.tokens.data(),
                                         Get("model.embed_tokens.weight"), config_.scale_emb,
                                         x.data());
    Store(&x);
    for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
      ReferenceLayerTrace<Number> s;
      s.x = x;
      const std::string prefix = LayerPrefix(l);
      const Vector n1 = Norm(x, prefix + "input_layernorm.weight");
      const Vector mixed = Mixer(l, n1, batch, options, &s.mixer);
      if (hook) hook(l, n1, mixed);
      AddScaled(mixed, &x);
      s.mid = x;
      s.n2 = Norm(x, prefix + "post_attention_layernorm.weight");
      s.gate = Project(s.n2, prefix + "mlp.gate_proj.weight");
      s.up = Project(s.n2, prefix + "mlp.up_proj.weight");
      s.h.resize(s.gate.size());
      kernels::reference::SwiGluForward(static_cast<int64_t>(s.h.size()), s.gate.data(),
                                        s.up.data(), s.h.data(), Stored());
      AddScaled(Project(s.h, prefix + "mlp.down_proj.weight"), &x);
      if (trace != nullptr) trace->layers.push_back(std::move(s));
    }
    if (trace != nullptr) trace->last = x;
    return Norm(x, "model.norm.weight");
  }

  // [T, V]
  Vector Logits(const Vector& hidden) const {
    Vector scaled = hidden;
    for (Number& value : scaled) value /= width_multiplier();
    Store(&scaled);
    Vector logits = kernels::reference::Logits(
        static_cast<int64_t>(hidden.size()) / config_.hidden_size, config_.hidden_size,
        config_.vocab_size, 1.0, scaled.data(), Get(head()));
    Store(&logits);
    return logits;
  }

  Number LossSum(const Batch& batch, const RunOptions& options) const {
    const Vector logits = Logits(Hidden(batch, options));
    return kernels::reference::CrossEntropyOfLogits(batch.size(), config_.vocab_size, logits.data(),
                                                    batch.labels.data());
  }

  // Output of one layer's mixer, [T, H], for its normalised input; only its own tensors are read.
  Vector Mixer(int64_t layer, const Vector& x, const Batch& batch, const RunOptions& options,
               ReferenceMixerTrace<Number>* trace = nullptr) const {
    const ReferenceMixerShape m = MixerShape(layer, batch);
    const int64_t t = batch.size();
    ReferenceMixerTrace<Number> s;
    s.x = x;
    const auto prepare = [&](const Vector& raw, const char* norm, int64_t heads) {
      Vector y(raw.size());
      kernels::reference::QkNormRopeForward(t, heads, m.d, raw.data(), Get(m.prefix + norm),
                                            config_.rms_norm_eps, m.cos(), m.sin(), y.data(),
                                            Stored());
      return y;
    };
    s.q_raw = Project(x, m.prefix + "q_proj.weight");
    s.k_raw = Project(x, m.prefix + "k_proj.weight");
    s.v = Project(x, m.prefix + "v_proj.weight");
    s.q = prepare(s.q_raw, "q_norm.weight", m.heads);
    s.k = prepare(s.k_raw, "k_norm.weight", m.kv_heads);
    if (m.softmax) ScaleByPosition(m, batch, options, &s.q);

    s.o.resize(static_cast<size_t>(t * m.width()));
    for (size_t document = 0; document + 1 < batch.cu_seqlens.size(); ++document) {
      const int64_t begin = batch.cu_seqlens[document];
      const int64_t end = batch.cu_seqlens[document + 1];
      const Vector q = Rows(s.q, m.width(), begin, end);
      const Vector k = Rows(s.k, m.kv_heads * m.d, begin, end);
      const Vector v = Rows(s.v, m.kv_heads * m.d, begin, end);
      Vector out;
      if (m.softmax) {
        const auto shape = AttentionShapeOf(m, end - begin);
        const bool sparse = options.sparse_attention && end - begin >= config_.sparse.dense_len;
        s.chosen.push_back(sparse ? Select(shape, q, k) : ChosenBlocks());
        out = kernels::reference::AttentionForward<Number>(shape, q, k, v,
                                                           AttendsTo(shape, s.chosen.back()))
                  .out;
      } else {
        out = kernels::reference::LightningForward(LightningShapeOf(m, end - begin), q, k, v,
                                                   Vector())
                  .out;
      }
      std::copy(out.begin(), out.end(), s.o.begin() + begin * m.width());
    }
    Store(&s.o);

    const Number* o_norm = Get(m.prefix + "o_norm.weight");
    if (Has(Gate(m))) s.z = Project(x, Gate(m));
    s.u = s.o;
    if (o_norm != nullptr || !s.z.empty()) {
      kernels::reference::OutputGateForward(t, m.width(), s.o.data(), o_norm,
                                            s.z.empty() ? nullptr : s.z.data(),
                                            config_.rms_norm_eps, s.u.data(), Stored());
    }
    Vector y = Project(s.u, m.prefix + "o_proj.weight");
    if (trace != nullptr) *trace = std::move(s);
    return y;
  }

  // The pieces of the forward pass that a backward pass goes through again.
  static std::string LayerPrefix(int64_t layer) {
    return "model.layers." + std::to_string(layer) + ".";
  }
  static std::string Gate(const ReferenceMixerShape& m) {
    return m.prefix + (m.softmax ? "o_gate.weight" : "z_proj.weight");
  }

  ReferenceMixerShape MixerShape(int64_t layer, const Batch& batch) const {
    ReferenceMixerShape m;
    m.softmax = config_.mixer(layer) == MixerType::kSoftmax;
    m.heads = m.softmax ? config_.num_attention_heads : config_.lightning_nh;
    m.kv_heads = m.softmax ? config_.num_key_value_heads : m.heads;
    m.d = m.softmax ? config_.head_dim : config_.lightning_head_dim;
    m.prefix = LayerPrefix(layer) + "self_attn.";
    if (m.softmax ? config_.attn_use_rope : config_.lightning_use_rope) {
      m.rope = kernels::reference::MakeRopeTables(batch.positions, m.d,
                                                  static_cast<float>(config_.rope_theta));
    }
    return m;
  }

  static kernels::reference::AttentionShape AttentionShapeOf(const ReferenceMixerShape& m,
                                                             int64_t n) {
    return {.n = n,
            .query_heads = m.heads,
            .kv_heads = m.kv_heads,
            .d = m.d,
            .scale = 1.0 / std::sqrt(static_cast<double>(m.d))};
  }
  static kernels::reference::LightningShape LightningShapeOf(const ReferenceMixerShape& m,
                                                             int64_t n) {
    return {.n = n,
            .heads = m.heads,
            .d = m.d,
            .scale = 1.0 / std::sqrt(static_cast<double>(m.d)),
            .slopes = kernels::reference::LightningSlopes(m.heads)};
  }

  // `chosen` must outlive what is returned.
  kernels::reference::Attends AttendsTo(const kernels::reference::AttentionShape& shape,
                                        const ChosenBlocks& chosen) const {
    if (chosen.empty()) return kernels::reference::AttendsAll;
    return [&chosen, kv_heads = shape.kv_heads, size = config_.sparse.block_size](
               int64_t t, int64_t g, int64_t j) {
      const auto& blocks = chosen[static_cast<size_t>(t * kv_heads + g)];
      return std::binary_search(blocks.begin(), blocks.end(), j / size);
    };
  }

  // HyPE's factor on the queries of softmax layers; its transpose is itself.
  template <typename Value>
  static void ScaleByPosition(const ReferenceMixerShape& m, const Batch& batch,
                              const RunOptions& options, std::vector<Value>* q) {
    if (options.logit_scale_base <= 0) return;
    for (size_t i = 0; i < q->size(); ++i) {
      const int32_t position = batch.positions[i / static_cast<size_t>(m.width())];
      (*q)[i] *= kernels::reference::LogitScale(position, options.logit_scale_base);
    }
  }

  template <typename Value>
  static std::vector<Value> Rows(const std::vector<Value>& x, int64_t width, int64_t begin,
                                 int64_t end) {
    return {x.begin() + begin * width, x.begin() + end * width};
  }

 private:
  static void Store(Vector* x) {
    for (Number& value : *x) value = Stored()(value);
  }

  Vector Norm(const Vector& x, const std::string& weight) const {
    Vector y(x.size());
    kernels::reference::RmsNormForward(
        static_cast<int64_t>(x.size()) / config_.hidden_size, config_.hidden_size, x.data(),
        Get(weight), config_.rms_norm_eps, y.data(), static_cast<Number*>(nullptr), Stored());
    return y;
  }

  Vector Project(const Vector& x, const std::string& name) const {
    const auto& shape = Spec(name).shape;
    const int64_t out = shape[0];
    const int64_t in = shape[1];
    const int64_t t = static_cast<int64_t>(x.size()) / in;
    Vector y(static_cast<size_t>(t * out));
    kernels::reference::Gemm<Number>(t, out, in, Number(1.0), x.data(), in, 1, Get(name), 1, in,
                                     y.data(), out, kernels::Write::kOverwrite);
    Store(&y);
    return y;
  }

  // The scaled branch is stored, then the sum.
  void AddScaled(const Vector& branch, Vector* x) const {
    const Stored stored;
    for (size_t i = 0; i < x->size(); ++i)
      (*x)[i] = stored((*x)[i] + stored(residual_scale() * branch[i]));
  }

  ChosenBlocks Select(const kernels::reference::AttentionShape& shape, const Vector& q,
                      const Vector& k) const {
    const auto real = [](const Vector& x) {
      std::vector<double> y;
      for (const Number& value : x) y.push_back(std::real(value));
      return y;
    };
    const std::vector<double> queries = real(q);
    const auto keys = kernels::reference::CompressKeys(shape, real(k), config_.sparse, Stored());
    ChosenBlocks chosen;
    for (int64_t t = 0; t < shape.n; ++t) {
      for (int64_t g = 0; g < shape.kv_heads; ++g) {
        auto selection =
            kernels::reference::Select(shape, queries, keys, config_.sparse, t, g, Stored());
        selection_margin_ = std::min(
            selection_margin_, kernels::reference::SelectionMargin(selection, config_.sparse, t));
        chosen.push_back(std::move(selection.chosen));
      }
    }
    return chosen;
  }

  ModelConfig config_;
  std::map<std::string, ParameterSpec> specs_;
  Vector parameters_;
  mutable double selection_margin_ = std::numeric_limits<double>::infinity();
};

}  // namespace sala::model
