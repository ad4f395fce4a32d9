// The check of `sala verify` that a packed batch is its documents (recipes/verify.h).
#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "model/loss.h"
#include "recipes/verify.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_tensors.h"

namespace sala::recipes {
namespace {

using model::ParameterSpec;
using model::ParameterStore;

// Document s of a batch, alone.
model::Batch Document(const model::Batch& batch, size_t s) {
  const auto part = [&](const std::vector<int32_t>& all) {
    return std::vector<int32_t>(all.begin() + batch.cu_seqlens[s],
                                all.begin() + batch.cu_seqlens[s + 1]);
  };
  model::Batch alone;
  alone.tokens = part(batch.tokens);
  alone.labels = part(batch.labels);
  alone.positions = part(batch.positions);
  alone.cu_seqlens = {0, batch.cu_seqlens[s + 1] - batch.cu_seqlens[s]};
  return alone;
}

std::vector<float> TokenLosses(Host& host, const model::Model& model, const model::Batch& batch,
                               const model::RunOptions& options) {
  std::vector<float> losses(static_cast<size_t>(batch.size()));
  model::EvaluateCrossEntropy(host.ctx, host.arena, model, batch, options,
                              Tensor(losses.data(), {batch.size()}));
  return losses;
}

// The batch with other tokens in every second document, from the first or the second on.
model::Batch WithOtherTokens(const model::Batch& batch, size_t first, int64_t vocabulary) {
  model::Batch changed = batch;
  for (size_t s = first; s + 1 < batch.cu_seqlens.size(); s += 2) {
    for (int32_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t) {
      int32_t& token = changed.tokens[static_cast<size_t>(t)];
      token = static_cast<int32_t>((token + 1) % vocabulary);
    }
  }
  return changed;
}

// Where a document begins on the grid of chunks of the linear layers decides the order of their
// sums (kernels/lightning), so a document alone has other roundings than in a batch: some 60
// rounded tensors, sums over 64 terms, 2^-24 = 6e-8 each: as a random walk sqrt(60 * 64) * 6e-8
// = 3.7e-6 of logits of a few units. Without linear layers the bits are equal.
constexpr double kLossBound = 2e-5;  // nats

// Gradients of documents are added in another order as well: 2^-24 = 6e-8 of the sum so far, over
// up to 700 tokens as a random walk sqrt(700) * 6e-8 = 1.6e-6. With the 3.7e-6 above that is 5e-6
// of the sums on the way, which are about twice the largest of the tensor where terms cancel.
constexpr double kPackedBound = 1e-5;

class PackedCheck {
 public:
  PackedCheck(Host& host, VerifyPass& pass, VerifyRow* row)
      : host_(host),
        pass_(pass),
        row_(row),
        model_(pass.plan.model, pass.params),
        packed_(TokenLosses(host, model_, pass.batch, pass.options())) {}

  void Run() {
    Labels();
    Isolation();
    ParameterStore together = GradientsOf({pass_.batch});
    std::vector<model::Batch> alone;
    for (size_t s = 0; s < documents(); ++s) alone.push_back(Document(pass_.batch, s));
    for (size_t s = 0; s < documents(); ++s) Alone(s, alone[s]);
    const ParameterStore apart = GradientsOf(alone);
    for (const ParameterSpec& spec : pass_.params.specs()) {
      const Worst of_tensor = CompareTensor(spec, together.data(), apart.data());
      gradient_.Take(of_tensor);
      if (!(of_tensor.difference <= kPackedBound)) {
        row_->Fail(pass_.where +
                   ": gradient of the packed batch (found) and the sum of those of its documents "
                   "(expected): " +
                   of_tensor.Text());
      }
    }
  }

  size_t documents() const { return pass_.batch.cu_seqlens.size() - 1; }
  double loss() const { return loss_; }  // largest difference
  const Worst& gradient() const { return gradient_; }

 private:
  // What each token learns to predict is the one after it; a chat's first words, which the made
  // documents mask (recipes/verify_data.cc), are not learned. Joined documents are not looked at.
  void Labels() {
    if (!pass_.document_mask) return;
    const model::Batch& batch = pass_.batch;
    for (size_t s = 0; s < documents(); ++s) {
      for (int32_t t = batch.cu_seqlens[s]; t + 1 < batch.cu_seqlens[s + 1]; ++t) {
        const auto at = static_cast<size_t>(t);
        const int32_t label = batch.labels[at];
        const bool user = pass_.chat && batch.tokens[at] == pass_.plan.model.bos_token_id;
        const bool right =
            label == (user ? -1 : batch.tokens[at + 1]) || (pass_.chat && label == -1);
        if (right) continue;
        row_->Fail(pass_.where + ": label of token " + std::to_string(t - batch.cu_seqlens[s]) +
                   " of document " + std::to_string(s) + ": found " + std::to_string(label) +
                   ", expected " +
                   (user ? std::string("none: a chat's first words are not learned")
                         : "the next token, " + std::to_string(batch.tokens[at + 1])));
        return;
      }
    }
  }

  // A document's losses do not depend on the tokens of the others by a bit.
  void Isolation() {
    for (const size_t first : {0, 1}) {
      const std::vector<float> changed = TokenLosses(
          host_, model_, WithOtherTokens(pass_.batch, first, pass_.plan.model.vocab_size),
          pass_.options());
      for (size_t s = 1 - first; s < documents(); s += 2)
        Compare(s, "with other documents around it", 0, changed.data() + pass_.batch.cu_seqlens[s]);
    }
  }

  void Alone(size_t s, const model::Batch& alone) {
    const std::vector<float> losses = TokenLosses(host_, model_, alone, pass_.options());
    Compare(s, "alone", pass_.plan.model.has_lightning() ? kLossBound : 0, losses.data());
  }

  // Losses of the tokens of document s that have a target; the first that differs by more is told.
  void Compare(size_t s, const std::string& how, double bound, const float* other) {
    const int32_t begin = pass_.batch.cu_seqlens[s];
    const int32_t end = pass_.batch.cu_seqlens[s + 1];
    for (int32_t t = begin; t < end; ++t) {
      if (pass_.batch.labels[static_cast<size_t>(t)] < 0) continue;
      const float packed = packed_[static_cast<size_t>(t)];
      const double difference = std::abs(static_cast<double>(packed) - other[t - begin]);
      if (bound > 0) loss_ = std::max(loss_, difference);
      if (difference <= bound) continue;
      row_->Fail(pass_.where + ": loss of token " + std::to_string(t - begin) + " of document " +
                 std::to_string(s) + " (of " + std::to_string(end - begin) + " tokens): packed " +
                 ExactText(packed) + ", " + how + " " + ExactText(other[t - begin]));
      return;
    }
  }

  ParameterStore GradientsOf(const std::vector<model::Batch>& batches) {
    ParameterStore gradients(pass_.params.specs());
    const auto scale = static_cast<float>(TargetScale(pass_.batch));
    for (const model::Batch& batch : batches) {
      model::CrossEntropyStep(host_.ctx, host_.arena, model_, batch, pass_.options(), scale,
                              model::BindTensors(pass_.plan.model, gradients));
    }
    return gradients;
  }

  Host& host_;
  VerifyPass& pass_;
  VerifyRow* row_;
  model::Model model_;
  std::vector<float> packed_;  // loss of each token
  double loss_ = 0;
  Worst gradient_;
};

}  // namespace

StatusOr<VerifyRow> VerifyPacked(const VerifyContext& context) {
  SALA_ASSIGN_OR_RETURN(std::vector<VerifyPass> passes, MakeVerifyPasses(*context.scaled));
  VerifyRow row;
  Host host;
  Worst worst;
  double loss = 0;
  size_t documents = 0;
  for (VerifyPass& pass : passes) {
    if (context.interrupted()) return row;
    // Alignment has no loss of tokens; its teacher is the model of the stage before.
    if (pass.plan.phase == PlanPhase::kAlign) continue;
    context.progress("packed: " + pass.where);
    PackedCheck check(host, pass, &row);
    check.Run();
    worst.Take(check.gradient());
    loss = std::max(loss, check.loss());
    documents += check.documents();
  }
  row.compared = "packed batches with each document alone, and with other documents around it: " +
                 std::to_string(documents) + " documents";
  row.measured = "alone: losses within " + ShortText(loss) + " nats, gradients within " +
                 ShortText(worst.difference) + " of the largest of a tensor" +
                 (row.verdict == Verdict::kHolds ? "; others around it: equal bits" : "");
  row.bound = ShortText(kLossBound) + " (equal bits without linear layers), " +
              ShortText(kPackedBound) + "; equal bits";
  return row;
}

}  // namespace sala::recipes
