#include "model/reference.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "core/check.h"
#include "kernels/kl_divergence/reference.h"
#include "kernels/mse/reference.h"
#include "model/reference_model.h"

namespace sala::model {
namespace {

using Vector = std::vector<double>;
using ExactModel = ReferenceModel<double>;
using PublishedModel = ReferenceModel<double, kernels::reference::RoundedToBf16>;

Vector Values(const ParameterStore& store) {
  SALA_CHECK(store.whole()) << "the reference needs all parameters";
  return {store.data(), store.data() + store.size()};
}

ExactModel Exact(const ModelConfig& config, const ParameterStore& store) {
  return {config, store.specs(), Values(store)};
}

PublishedModel Published(const ModelConfig& config, const ParameterStore& store) {
  Vector values = Values(store);
  for (double& value : values) value = kernels::reference::RoundedToBf16()(value);
  return {config, store.specs(), std::move(values)};
}

template <typename Model>
ReferenceResult Forward(const Model& model, const Batch& batch, const RunOptions& options,
                        ReferenceTrace<double>* trace) {
  ReferenceResult result;
  result.hidden = model.Hidden(batch, options, trace);
  result.logits = model.Logits(result.hidden);
  result.loss_sum = kernels::reference::CrossEntropyOfLogits(
      batch.size(), model.config().vocab_size, result.logits.data(), batch.labels.data());
  result.count = batch.targets();
  result.selection_margin = model.selection_margin();
  return result;
}

// [rows, columns] -> [columns, rows]
Vector Transposed(const double* x, int64_t rows, int64_t columns) {
  Vector y(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) y[static_cast<size_t>(j * rows + i)] = x[i * columns + j];
  }
  return y;
}

void Add(const Vector& term, Vector* sum) {
  for (size_t i = 0; i < term.size(); ++i) (*sum)[i] += term[i];
}

Vector Scaled(double factor, const Vector& x) {
  Vector y = x;
  for (double& value : y) value *= factor;
  return y;
}

// The backward pass on what a trace holds. Gradients of parameters accumulate.
class Backward {
 public:
  Backward(const ExactModel& model, const Batch& batch, const RunOptions& options,
           Vector* gradients)
      : model_(model), batch_(batch), options_(options), gradients_(gradients) {}

  // dlogits [T, V] -> the gradient of everything below.
  void Run(const ReferenceTrace<double>& trace, const Vector& hidden, const Vector& dlogits) {
    const ModelConfig& config = model_.config();
    Vector dhidden(hidden.size());
    kernels::reference::HeadBackward(
        batch_.size(), config.hidden_size, config.vocab_size, model_.logit_scale(), dlogits.data(),
        hidden.data(), model_.Get(model_.head()), dhidden.data(), Gradient(model_.head()));
    Vector dx = Norm(dhidden, trace.last, "model.norm.weight");
    for (int64_t l = config.num_hidden_layers - 1; l >= 0; --l)
      Layer(l, trace.layers[static_cast<size_t>(l)], &dx);
    kernels::reference::EmbeddingBackward(batch_.size(), config.hidden_size, batch_.tokens.data(),
                                          dx.data(), config.scale_emb,
                                          Gradient("model.embed_tokens.weight"));
  }

  // dy [T, H]: of the mixer's output; returns that of its input.
  Vector Mixer(int64_t layer, const ReferenceMixerTrace<double>& s, const Vector& dy) {
    const ModelConfig& config = model_.config();
    const ReferenceMixerShape m = model_.MixerShape(layer, batch_);
    Vector dout = Project(dy, s.u, m.prefix + "o_proj.weight");
    Vector dx(s.x.size());
    const std::string o_norm = m.prefix + "o_norm.weight";
    if (model_.Has(o_norm) || !s.z.empty()) {
      const Vector du = dout;
      Vector dz(s.z.size());
      kernels::reference::OutputGateBackward(batch_.size(), m.width(), du.data(), s.o.data(),
                                             model_.Get(o_norm), s.z.empty() ? nullptr : s.z.data(),
                                             config.rms_norm_eps, dout.data(), dz.data(),
                                             Gradient(o_norm));
      if (!s.z.empty()) Add(Project(dz, s.x, ExactModel::Gate(m)), &dx);
    }

    Vector dq(s.q.size());
    Vector dk(s.k.size());
    Vector dv(s.v.size());
    for (size_t document = 0; document + 1 < batch_.cu_seqlens.size(); ++document)
      Document(m, s, document, dout, &dq, &dk, &dv);
    if (m.softmax) ExactModel::ScaleByPosition(m, batch_, options_, &dq);
    Add(Project(Unprepare(m, m.heads, dq, s.q_raw, "q_norm.weight"), s.x,
                m.prefix + "q_proj.weight"),
        &dx);
    Add(Project(Unprepare(m, m.kv_heads, dk, s.k_raw, "k_norm.weight"), s.x,
                m.prefix + "k_proj.weight"),
        &dx);
    Add(Project(dv, s.x, m.prefix + "v_proj.weight"), &dx);
    return dx;
  }

 private:
  double* Gradient(const std::string& name) {
    return model_.Has(name) ? gradients_->data() + model_.Spec(name).offset : nullptr;
  }

  // dx [T, H] is the gradient after the layer, then before it.
  void Layer(int64_t layer, const ReferenceLayerTrace<double>& s, Vector* dx) {
    const std::string prefix = ExactModel::LayerPrefix(layer);
    const double residual = model_.residual_scale();
    const Vector dh = Project(Scaled(residual, *dx), s.h, prefix + "mlp.down_proj.weight");
    Vector dgate(dh.size());
    Vector dup(dh.size());
    kernels::reference::SwiGluBackward(static_cast<int64_t>(dh.size()), dh.data(), s.gate.data(),
                                       s.up.data(), dgate.data(), dup.data());
    Vector dn2 = Project(dgate, s.n2, prefix + "mlp.gate_proj.weight");
    Add(Project(dup, s.n2, prefix + "mlp.up_proj.weight"), &dn2);
    Add(Norm(dn2, s.mid, prefix + "post_attention_layernorm.weight"), dx);
    const Vector dn1 = Mixer(layer, s.mixer, Scaled(residual, *dx));
    Add(Norm(dn1, s.x, prefix + "input_layernorm.weight"), dx);
  }

  // Adds the document's rows of dq, dk and dv.
  void Document(const ReferenceMixerShape& m, const ReferenceMixerTrace<double>& s, size_t document,
                const Vector& dout, Vector* dq, Vector* dk, Vector* dv) {
    const int64_t begin = batch_.cu_seqlens[document];
    const int64_t end = batch_.cu_seqlens[document + 1];
    const int64_t kv_width = m.kv_heads * m.d;
    const Vector q = ExactModel::Rows(s.q, m.width(), begin, end);
    const Vector k = ExactModel::Rows(s.k, kv_width, begin, end);
    const Vector v = ExactModel::Rows(s.v, kv_width, begin, end);
    const Vector d = ExactModel::Rows(dout, m.width(), begin, end);
    const auto put = [&](const Vector& part, int64_t width, Vector* whole) {
      std::copy(part.begin(), part.end(), whole->begin() + begin * width);
    };
    if (m.softmax) {
      const auto shape = ExactModel::AttentionShapeOf(m, end - begin);
      const auto grad = kernels::reference::AttentionBackward(
          shape, q, k, v, d, model_.AttendsTo(shape, s.chosen[document]));
      put(grad.dq, m.width(), dq);
      put(grad.dk, kv_width, dk);
      put(grad.dv, kv_width, dv);
    } else {
      const auto shape = ExactModel::LightningShapeOf(m, end - begin);
      const auto grad = kernels::reference::LightningBackward(shape, q, k, v, d, {}, {});
      put(grad.dq, m.width(), dq);
      put(grad.dk, kv_width, dk);
      put(grad.dv, kv_width, dv);
    }
  }

  // Through rotation and norm of queries or keys.
  Vector Unprepare(const ReferenceMixerShape& m, int64_t heads, const Vector& dy, const Vector& raw,
                   const char* norm) {
    Vector dx(raw.size());
    kernels::reference::QkNormRopeBackward(
        batch_.size(), heads, m.d, dy.data(), raw.data(), model_.Get(m.prefix + norm),
        model_.config().rms_norm_eps, m.cos(), m.sin(), dx.data(), Gradient(m.prefix + norm));
    return dx;
  }

  Vector Norm(const Vector& dy, const Vector& x, const std::string& weight) {
    Vector dx(x.size());
    kernels::reference::RmsNormBackward(batch_.size(), model_.config().hidden_size, dy.data(),
                                        x.data(), model_.Get(weight), model_.config().rms_norm_eps,
                                        dx.data(), Gradient(weight));
    return dx;
  }

  // y = x W^T: dW += dy^T x; returns dx = dy W. Transposed copies let both sums run along memory.
  Vector Project(const Vector& dy, const Vector& x, const std::string& name) {
    const int64_t t = batch_.size();
    const int64_t out = model_.Spec(name).shape[0];
    const int64_t in = model_.Spec(name).shape[1];
    const Vector weight = Transposed(model_.Get(name), out, in);
    Vector dx(x.size());
    kernels::reference::Gemm(t, in, out, 1.0, dy.data(), out, 1, weight.data(), 1, out, dx.data(),
                             in, kernels::Write::kOverwrite);
    const Vector dy_columns = Transposed(dy.data(), t, out);
    const Vector x_columns = Transposed(x.data(), t, in);
    kernels::reference::Gemm(out, in, t, 1.0, dy_columns.data(), t, 1, x_columns.data(), 1, t,
                             Gradient(name), in, kernels::Write::kAccumulate);
    return dx;
  }

  const ExactModel& model_;
  const Batch& batch_;
  const RunOptions& options_;
  Vector* gradients_;
};

// The loss of one layer's mixer and the gradient of scale * loss with respect to its output y.
double Distance(MixerDistance distance, int64_t width, const Vector& y, const Vector& target,
                double scale, Vector* dy) {
  const auto n = static_cast<int64_t>(y.size());
  const auto elements = static_cast<double>(n);
  dy->assign(y.size(), 0.0);
  if (distance == MixerDistance::kMeanSquare) {
    kernels::reference::SquaredErrorBackward(n, y.data(), target.data(), scale / elements,
                                             dy->data());
    return kernels::reference::SquaredError(n, y.data(), target.data()) / elements;
  }
  const double mean = std::sqrt(static_cast<double>(width)) / elements;  // 1 / (T sqrt(width))
  double loss = 0;
  for (int64_t at = 0; at < n; at += width) {
    const double norm =
        std::sqrt(kernels::reference::SquaredError(width, y.data() + at, target.data() + at));
    loss += mean * norm;
    if (norm == 0) continue;  // no direction: the subgradient zero
    kernels::reference::SquaredErrorBackward(width, y.data() + at, target.data() + at,
                                             scale * mean / (2 * norm), dy->data() + at);
  }
  return loss;
}

}  // namespace

ReferenceResult ReferenceForward(const ModelConfig& config, const ParameterStore& store,
                                 const Batch& batch, const RunOptions& options,
                                 ReferenceArithmetic arithmetic) {
  if (arithmetic == ReferenceArithmetic::kPublishedRounding)
    return Forward(Published(config, store), batch, options, nullptr);
  return Forward(Exact(config, store), batch, options, nullptr);
}

ReferenceResult ReferenceCrossEntropy(const ModelConfig& config, const ParameterStore& store,
                                      const Batch& batch, const RunOptions& options,
                                      double grad_scale) {
  const ExactModel model = Exact(config, store);
  ReferenceTrace<double> trace;
  ReferenceResult result = Forward(model, batch, options, &trace);
  result.gradients.assign(static_cast<size_t>(store.size()), 0.0);
  Vector dlogits = result.logits;
  kernels::reference::CrossEntropyLogitGradient(batch.size(), config.vocab_size, grad_scale,
                                                batch.labels.data(), dlogits.data());
  Backward(model, batch, options, &result.gradients).Run(trace, result.hidden, dlogits);
  return result;
}

ReferenceDistillationResult ReferenceDistillation(const ModelConfig& teacher_config,
                                                  const ParameterStore& teacher,
                                                  const ModelConfig& student_config,
                                                  const ParameterStore& student, const Batch& batch,
                                                  const DistillationOptions& options) {
  SALA_CHECK(teacher_config.vocab_size == student_config.vocab_size)
      << "teacher and student share a vocabulary";
  const int64_t tokens = batch.size();
  const int64_t vocabulary = student_config.vocab_size;
  const auto tau = static_cast<double>(options.temperature);
  const ReferenceResult target = ReferenceForward(teacher_config, teacher, batch, options.teacher);
  const ExactModel model = Exact(student_config, student);
  ReferenceTrace<double> trace;
  ReferenceDistillationResult result{Forward(model, batch, options.student, &trace)};
  result.ce_sum = std::exchange(
      result.loss_sum, kernels::reference::KlDivergenceForward(
                           tokens, vocabulary, tau, target.logits.data(), result.logits.data()));
  result.targets = std::exchange(result.count, tokens);
  result.selection_margin = std::min(result.selection_margin, target.selection_margin);
  result.gradients.assign(static_cast<size_t>(student.size()), 0.0);

  Vector dlogits(result.logits.size());
  kernels::reference::KlDivergenceBackward(
      tokens, vocabulary, tau, static_cast<double>(options.kl_grad_scale), target.logits.data(),
      result.logits.data(), dlogits.data());
  if (options.ce_grad_scale > 0) {
    Vector dce = result.logits;
    kernels::reference::CrossEntropyLogitGradient(tokens, vocabulary,
                                                  static_cast<double>(options.ce_grad_scale),
                                                  batch.labels.data(), dce.data());
    Add(dce, &dlogits);
  }
  Backward(model, batch, options.student, &result.gradients).Run(trace, result.hidden, dlogits);
  return result;
}

ReferenceResult ReferenceAlignment(const ModelConfig& teacher_config, const ParameterStore& teacher,
                                   const ModelConfig& mixers_config, const ParameterStore& mixers,
                                   const Batch& batch, MixerDistance distance, double grad_scale) {
  const RunOptions options;
  const auto layers = static_cast<double>(teacher_config.num_hidden_layers);
  const ExactModel teacher_model = Exact(teacher_config, teacher);
  const ExactModel model = Exact(mixers_config, mixers);
  ReferenceResult result;
  result.count = batch.size();
  result.gradients.assign(static_cast<size_t>(mixers.size()), 0.0);
  Backward backward(model, batch, options, &result.gradients);
  result.hidden = teacher_model.Hidden(
      batch, options, nullptr, [&](int64_t layer, const Vector& normed, const Vector& target) {
        ReferenceMixerTrace<double> trace;
        const Vector y = model.Mixer(layer, normed, batch, options, &trace);
        Vector dy;
        result.loss_sum +=
            Distance(distance, teacher_config.hidden_size, y, target, grad_scale / layers, &dy) /
            layers;
        backward.Mixer(layer, trace, dy);
      });
  return result;
}

}  // namespace sala::model
