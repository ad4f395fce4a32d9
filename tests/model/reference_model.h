// The whole model in plain loops on any number type, built from the kernels' references: double for
// values, complex<double> for complex-step derivatives. Selection of sparse blocks looks at the
// real part only and follows model.md section 4.
#pragma once

#include <algorithm>
#include <cmath>
#include <complex>
#include <string>
#include <vector>

#include "kernels/attention/reference.h"
#include "kernels/cross_entropy/reference.h"
#include "kernels/embedding/reference.h"
#include "kernels/gemm/reference.h"
#include "kernels/lightning/lightning.h"
#include "kernels/lightning/reference.h"
#include "kernels/output_gate/reference.h"
#include "kernels/qk_norm_rope/reference.h"
#include "kernels/rms_norm/reference.h"
#include "kernels/swiglu/reference.h"
#include "model/model.h"

namespace sala::model::testing {

namespace ref = kernels::reference;

template <typename Number>
class ReferenceModel {
 public:
  using Vector = std::vector<Number>;

  ReferenceModel(const ModelConfig& config, const std::vector<ParameterSpec>& specs,
                 Vector parameters)
      : config_(config), parameters_(std::move(parameters)) {
    for (const ParameterSpec& spec : specs) specs_[spec.name] = spec;
  }

  // Hidden states after the final norm, [T, H].
  Vector Hidden(const Batch& batch, const RunOptions& options) const {
    const int64_t t = batch.size();
    const int64_t hidden = config_.hidden_size;
    Vector x(static_cast<size_t>(t * hidden));
    ref::EmbeddingForward(t, hidden, batch.tokens.data(), Get("model.embed_tokens.weight"),
                          config_.scale_emb, x.data());
    for (int64_t l = 0; l < config_.num_hidden_layers; ++l) {
      const std::string prefix = "model.layers." + std::to_string(l) + ".";
      AddScaled(Mixer(l, Norm(x, prefix + "input_layernorm.weight"), batch, options), &x);
      const Vector n = Norm(x, prefix + "post_attention_layernorm.weight");
      const Vector gate = Project(n, prefix + "mlp.gate_proj.weight");
      const Vector up = Project(n, prefix + "mlp.up_proj.weight");
      Vector h(gate.size());
      ref::SwiGluForward(static_cast<int64_t>(h.size()), gate.data(), up.data(), h.data());
      AddScaled(Project(h, prefix + "mlp.down_proj.weight"), &x);
    }
    return Norm(x, "model.norm.weight");
  }

  Number LossSum(const Batch& batch, const RunOptions& options) const {
    const Vector hidden = Hidden(batch, options);
    const std::string head =
        config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight";
    return ref::CrossEntropyForward(batch.size(), config_.hidden_size, config_.vocab_size,
                                    1.0 / config_.width_multiplier(), hidden.data(), Get(head),
                                    batch.labels.data());
  }

  // Output of one layer's mixer, [T, H], for its normalised input; only its own tensors are read.
  Vector Mixer(int64_t layer, const Vector& x, const Batch& batch,
               const RunOptions& options) const {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".self_attn.";
    const bool softmax = config_.mixer(layer) == MixerType::kSoftmax;
    const int64_t heads = softmax ? config_.num_attention_heads : config_.lightning_nh;
    const int64_t kv_heads = softmax ? config_.num_key_value_heads : heads;
    const int64_t d = softmax ? config_.head_dim : config_.lightning_head_dim;
    const int64_t t = batch.size();
    const bool rope = softmax ? config_.attn_use_rope : config_.lightning_use_rope;
    std::vector<double> cos;
    std::vector<double> sin;
    if (rope) Tables(batch, d, &cos, &sin);

    const auto prepare = [&](const char* projection, const char* norm, int64_t n) {
      const Vector raw = Project(x, prefix + projection);
      Vector y(raw.size());
      ref::QkNormRopeForward(t, n, d, raw.data(), Get(prefix + norm), config_.rms_norm_eps,
                             rope ? cos.data() : nullptr, rope ? sin.data() : nullptr, y.data());
      return y;
    };
    const Vector q = prepare("q_proj.weight", "q_norm.weight", heads);
    const Vector k = prepare("k_proj.weight", "k_norm.weight", kv_heads);
    const Vector v = Project(x, prefix + "v_proj.weight");

    Vector o(static_cast<size_t>(t * heads * d));
    for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
      const int64_t begin = batch.cu_seqlens[s];
      const int64_t end = batch.cu_seqlens[s + 1];
      const auto part = [&](const Vector& from, int64_t n) {
        return Vector(from.begin() + begin * n * d, from.begin() + end * n * d);
      };
      const Vector out =
          softmax
              ? Softmax(part(q, heads), part(k, kv_heads), part(v, kv_heads), end - begin, options)
              : Linear(part(q, heads), part(k, heads), part(v, heads), end - begin);
      std::copy(out.begin(), out.end(), o.begin() + begin * heads * d);
    }

    const std::string gate = prefix + (softmax ? "o_gate.weight" : "z_proj.weight");
    Vector u = o;
    const Number* o_norm = Get(prefix + "o_norm.weight");
    if (Get(gate) != nullptr || o_norm != nullptr) {
      const Vector z = Get(gate) != nullptr ? Project(x, gate) : Vector();
      ref::OutputGateForward(t, heads * d, o.data(), o_norm, z.empty() ? nullptr : z.data(),
                             config_.rms_norm_eps, u.data());
    }
    return Project(u, prefix + "o_proj.weight");
  }

 private:
  const Number* Get(const std::string& name) const {
    const auto it = specs_.find(name);
    return it == specs_.end() ? nullptr : parameters_.data() + it->second.offset;
  }

  Vector Norm(const Vector& x, const std::string& weight) const {
    Vector y(x.size());
    ref::RmsNormForward(static_cast<int64_t>(x.size()) / config_.hidden_size, config_.hidden_size,
                        x.data(), Get(weight), config_.rms_norm_eps, y.data(),
                        static_cast<Number*>(nullptr));
    return y;
  }

  Vector Project(const Vector& x, const std::string& name) const {
    const auto& shape = specs_.at(name).shape;
    const int64_t out = shape[0];
    const int64_t in = shape[1];
    const int64_t t = static_cast<int64_t>(x.size()) / in;
    Vector y(static_cast<size_t>(t * out));
    ref::Gemm<Number>(t, out, in, Number(1.0), x.data(), in, 1, Get(name), 1, in, y.data(), out,
                      kernels::Write::kOverwrite);
    return y;
  }

  void AddScaled(const Vector& branch, Vector* x) const {
    for (size_t i = 0; i < x->size(); ++i) (*x)[i] += config_.residual_scale() * branch[i];
  }

  // cos and sin of the float32 angle (the kernels' rule), as double.
  void Tables(const Batch& batch, int64_t d, std::vector<double>* cos,
              std::vector<double>* sin) const {
    for (int32_t position : batch.positions) {
      for (int64_t i = 0; i < d / 2; ++i) {
        const auto frequency = static_cast<float>(
            std::pow(config_.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(d)));
        const float angle = static_cast<float>(position) * frequency;
        cos->push_back(std::cos(static_cast<double>(angle)));
        sin->push_back(std::sin(static_cast<double>(angle)));
      }
    }
  }

  Vector Linear(const Vector& q, const Vector& k, const Vector& v, int64_t n) const {
    ref::LightningShape shape;
    shape.n = n;
    shape.heads = config_.lightning_nh;
    shape.d = config_.lightning_head_dim;
    shape.scale = 1.0 / std::sqrt(static_cast<double>(shape.d));
    for (float slope : kernels::LightningSlopes(shape.heads)) shape.slopes.push_back(slope);
    return ref::LightningForward(shape, q, k, v, Vector()).out;
  }

  Vector Softmax(const Vector& q, const Vector& k, const Vector& v, int64_t n,
                 const RunOptions& options) const {
    ref::AttentionShape shape;
    shape.n = n;
    shape.query_heads = config_.num_attention_heads;
    shape.kv_heads = config_.num_key_value_heads;
    shape.d = config_.head_dim;
    shape.scale = 1.0 / std::sqrt(static_cast<double>(shape.d));
    if (!options.sparse_attention || n < config_.sparse.dense_len)
      return ref::AttentionForward(shape, q, k, v).out;
    const std::vector<std::vector<bool>> chosen = Select(shape, q, k);
    return ref::AttentionForward<Number>(
               shape, q, k, v,
               [&](int64_t t, int64_t g, int64_t j) {
                 return chosen[static_cast<size_t>(t * shape.kv_heads + g)]
                              [static_cast<size_t>(j / config_.sparse.block_size)];
               })
        .out;
  }

  static double Real(const Number& x) { return std::real(x); }

  // Mean keys of full windows of `size` tokens every `stride`, [windows][K * D].
  std::vector<std::vector<double>> Compress(const ref::AttentionShape& shape, const Vector& k,
                                            int64_t size, int64_t stride) const {
    std::vector<std::vector<double>> windows;
    const int64_t width = shape.kv_heads * shape.d;
    for (int64_t begin = 0; begin + size <= shape.n; begin += stride) {
      std::vector<double> mean(static_cast<size_t>(width), 0.0);
      for (int64_t j = begin; j < begin + size; ++j) {
        for (int64_t c = 0; c < width; ++c) {
          mean[static_cast<size_t>(c)] +=
              Real(k[static_cast<size_t>(j * width + c)]) / static_cast<double>(size);
        }
      }
      windows.push_back(mean);
    }
    return windows;
  }

  // chosen[t * K + g][block]
  std::vector<std::vector<bool>> Select(const ref::AttentionShape& shape, const Vector& q,
                                        const Vector& k) const {
    const SparseConfig& c = config_.sparse;
    const auto fine = Compress(shape, k, c.kernel_size, c.kernel_stride);
    const auto coarse = Compress(shape, k, c.coarse_size(), c.coarse_stride());
    const int64_t blocks = (shape.n + c.block_size - 1) / c.block_size;
    std::vector<std::vector<bool>> chosen;
    for (int64_t t = 0; t < shape.n; ++t) {
      for (int64_t g = 0; g < shape.kv_heads; ++g) {
        const auto score = [&](int64_t h, const std::vector<double>& window) {
          double sum = 0;
          for (int64_t d = 0; d < shape.d; ++d) {
            sum += Real(q[shape.Query(t, h) + static_cast<size_t>(d)]) *
                   window[static_cast<size_t>(g * shape.d + d)];
          }
          return shape.scale * sum;
        };
        std::vector<double> r(fine.size(), 0.0);
        for (int64_t h = g * shape.group(); h < (g + 1) * shape.group(); ++h) {
          double z = 0;
          for (size_t i = 0; i < coarse.size(); ++i) {
            if (static_cast<int64_t>(i) * c.coarse_stride() + c.coarse_size() - 1 <= t)
              z += std::exp(score(h, coarse[i]));
          }
          if (z == 0) continue;
          for (size_t i = 0; i < fine.size(); ++i) {
            if (static_cast<int64_t>(i) * c.kernel_stride + c.kernel_size - 1 <= t)
              r[i] += std::exp(score(h, fine[i])) / z;
          }
        }
        chosen.push_back(Choose(t, blocks, r));
      }
    }
    return chosen;
  }

  std::vector<bool> Choose(int64_t t, int64_t blocks, const std::vector<double>& r) const {
    const SparseConfig& c = config_.sparse;
    const int64_t own = t / c.block_size;
    const int64_t s = c.block_size / c.kernel_stride;
    std::vector<std::pair<double, int64_t>>
        order;  // (-score, block): best first, lower block on ties
    for (int64_t b = 0; b <= own; ++b) {
      double best = 0;
      for (int64_t i = s * b - 1; i <= s * b + s - 1; ++i) {
        if (i >= 0 && i < static_cast<int64_t>(r.size()))
          best = std::max(best, r[static_cast<size_t>(i)]);
      }
      if (b < c.init_blocks || b >= own - c.window_size / c.block_size) best = INFINITY;
      order.emplace_back(-best, b);
    }
    std::sort(order.begin(), order.end());
    std::vector<bool> chosen(static_cast<size_t>(blocks), false);
    for (size_t i = 0; i < order.size() && static_cast<int64_t>(i) < c.total_blocks(); ++i) {
      chosen[static_cast<size_t>(order[i].second)] = true;
    }
    return chosen;
  }

  ModelConfig config_;
  std::map<std::string, ParameterSpec> specs_;
  Vector parameters_;
};

}  // namespace sala::model::testing
