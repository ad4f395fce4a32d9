// The checks of `sala verify` that compute in this process: gradients, packed, export.
#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <set>
#include <utility>

#include "core/cuda_module.h"
#include "core/dtype.h"
#include "core/file.h"
#include "model/loss.h"
#include "model/reference.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/mpi_communicator.h"
#include "recipes/export.h"
#include "recipes/halo/align.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/transfer.h"
#include "recipes/verify.h"
#include "recipes/verify_pass.h"

namespace sala::recipes {
namespace {

using model::ParameterSpec;
using model::ParameterStore;

// "model.layers.3.mlp.up_proj.weight (layer 3)"
std::string Named(const std::string& tensor) {
  const std::string layer = LayerOfTensor(tensor);
  return layer.empty() ? tensor : tensor + " (" + layer + ")";
}

constexpr size_t kArenaBlock = size_t{64} << 20;

// What the passes compute on: a thread, work space, an arena for results; of a device where one is
// given.
struct Host {
  explicit Host(Device* device = nullptr)
      : arena(kArenaBlock, device), scratch(kArenaBlock, device) {
    ctx.pool = &pool;
    ctx.scratch = &scratch;
    ctx.device = device == nullptr ? DeviceKind::kCpu : DeviceKind::kCuda;
    ctx.gpu = device;
  }
  ThreadPool pool{1};
  Arena arena, scratch;
  Context ctx;
};

// The element that differs most, as a part of the largest expected one of its tensor.
struct Worst {
  double difference = 0;  // infinity: not finite, or where zero was expected
  std::string tensor;
  int64_t element = 0;
  double found = 0, expected = 0;

  void Take(const Worst& other) {
    if (!(other.difference <= difference)) *this = other;
  }
  std::string Text() const {
    return Named(tensor) + ": element " + std::to_string(element) + ": found " + ExactText(found) +
           ", expected " + ExactText(expected) + ", off by " + ShortText(difference) +
           " of the largest of its tensor";
  }
};

template <typename Expected>
Worst CompareTensor(const ParameterSpec& spec, const float* found, const Expected* expected) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  double largest = 0;
  for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i)
    largest = std::max(largest, std::abs(static_cast<double>(expected[i])));
  Worst worst;
  worst.tensor = spec.name;
  for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i) {
    const auto want = static_cast<double>(expected[i]);
    const auto have = static_cast<double>(found[i]);
    double difference = have == want ? 0 : std::abs(have - want) / largest;
    if (!std::isfinite(difference)) difference = kInfinity;
    if (difference > worst.difference || i == spec.offset)
      worst = {difference, spec.name, i - spec.offset, have, want};
  }
  return worst;
}

// ---- gradients ----

struct Gradients {
  double loss = 0;
  ParameterStore store;
};

// The loss is divided by its count as in a step, so that gradients have their usual size.
double TargetScale(const model::Batch& batch) {
  return 1.0 / static_cast<double>(std::max<int64_t>(1, batch.targets()));
}

bool IsTrained(const VerifyPass& pass, const ParameterSpec& spec) {
  return pass.plan.phase != PlanPhase::kDistil ||
         IsTrainable(pass.halo.trainable, pass.plan.model, spec);
}

model::DistillationOptions DistilOptionsOf(const VerifyPass& pass) {
  model::DistillationOptions options;
  options.student = pass.options();
  options.kl_grad_scale = static_cast<float>(1.0 / static_cast<double>(pass.batch.size()));
  options.ce_grad_scale = static_cast<float>(pass.halo.ce_weight * TargetScale(pass.batch));
  options.temperature = static_cast<float>(pass.halo.temperature);
  return options;
}

// The fast path, on a CPU or a GPU; the result lies in host memory.
StatusOr<Gradients> FastGradients(Host& host, VerifyPass& pass) {
  Device* device = host.ctx.gpu;
  Gradients result{.store = ParameterStore(pass.params.specs())};
  std::optional<ParameterStore> on_device;
  if (device != nullptr) on_device.emplace(pass.params.specs(), DType::kF32, device);
  ParameterStore& store = on_device ? *on_device : result.store;
  const model::ModelConfig& config = pass.plan.model;
  const bool align = pass.plan.phase == PlanPhase::kAlign;
  const bool taught = align || pass.plan.phase == PlanPhase::kDistil;
  std::optional<model::ComputeParameters> teacher_parameters;
  std::optional<model::Model> teacher;
  if (taught) {
    teacher_parameters.emplace(host.ctx, pass.teacher);
    teacher.emplace(align ? config : pass.plan.teacher, teacher_parameters->store());
  }
  if (align) {
    const auto self = parallel::MakeSelfCommunicator();
    SALA_ASSIGN_OR_RETURN(const auto mesh, parallel::Mesh::Create(*self, {}, host.ctx));
    AlignTask task(host.ctx, *mesh, *teacher, pass.params, pass.halo.align_loss, nullptr);
    std::vector<double> sums(task.SumNames().size());
    const StepCounts counts{.targets = pass.batch.targets(), .tokens = pass.batch.size()};
    SALA_RETURN_IF_ERROR(task.MicroBatch(host.ctx, host.arena, pass.batch, counts, store, sums));
    result.loss = task.Values(sums, counts)[0].second;
  } else {
    model::ComputeParameters parameters(host.ctx, pass.params);
    const model::Model model(config, parameters.store());
    const model::ModelTensors views = model::BindTensors(
        config, store, [&pass](const ParameterSpec& spec) { return IsTrained(pass, spec); });
    result.loss =
        taught ? model::DistillationStep(host.ctx, host.arena, *teacher, model, pass.batch,
                                         DistilOptionsOf(pass), views)
                     .kl.loss_sum
               : model::CrossEntropyStep(host.ctx, host.arena, model, pass.batch, pass.options(),
                                         static_cast<float>(TargetScale(pass.batch)), views)
                     .loss_sum;
  }
  if (device != nullptr) {
    const Tensor all = store.Flat();
    device->Download(result.store.data(), all.raw(),
                     static_cast<size_t>(all.numel()) * sizeof(float));
  }
  return result;
}

model::ReferenceResult Reference(const VerifyPass& pass) {
  const model::ModelConfig& config = pass.plan.model;
  switch (pass.plan.phase) {
    case PlanPhase::kAlign:
      return model::ReferenceAlignment(
          config, pass.teacher, AllLinear(config), pass.params, pass.batch,
          pass.halo.align_loss == AlignLoss::kMse ? model::MixerDistance::kMeanSquare
                                                  : model::MixerDistance::kEuclidean,
          1.0);
    case PlanPhase::kDistil:
      return model::ReferenceDistillation(pass.plan.teacher, pass.teacher, config, pass.params,
                                          pass.batch, DistilOptionsOf(pass));
    default:
      return model::ReferenceCrossEntropy(config, pass.params, pass.batch, pass.options(),
                                          static_cast<float>(TargetScale(pass.batch)));
  }
}

// A float32 gradient is a chain of some 12 rounded tensors a layer, 2^-24 = 6e-8 each, of 5 layers,
// forward and backward, and of sums over up to 300 terms: as a random walk sqrt(120 * 300) * 6e-8 =
// 1.1e-5 of the typical gradient, and the largest of a tensor is a few times the typical one; norms
// and softmax have condition numbers of a few.
constexpr double kGradientBound = 2e-5;

// Choices of blocks that lie closer than this may go the other way in float32: a score's relative
// error is 2^-24 = 6e-8 times the size of q.k (a few units) and a few units more.
constexpr double kLeastMargin = 2e-6;

// A pass with one draw of weights.
struct Compared {
  Worst worst;
  std::vector<std::string> failures;
  double margin = 0;
};

StatusOr<Compared> CompareWithReference(Host& host, VerifyPass& pass) {
  const model::ReferenceResult reference = Reference(pass);
  SALA_ASSIGN_OR_RETURN(const Gradients fast, FastGradients(host, pass));
  Compared compared;
  compared.margin = reference.selection_margin;
  const double loss_error = std::abs(fast.loss - reference.loss_sum) / std::abs(reference.loss_sum);
  if (!(loss_error <= kGradientBound)) {
    compared.failures.push_back(pass.where + ": loss: found " + ExactText(fast.loss) +
                                ", expected " + ExactText(reference.loss_sum));
  }
  const std::vector<double> zeros(reference.gradients.size());
  std::vector<Worst> off;
  for (const ParameterSpec& spec : pass.params.specs()) {
    const std::vector<double>& expected = IsTrained(pass, spec) ? reference.gradients : zeros;
    const Worst of_tensor = CompareTensor(spec, fast.store.data(), expected.data());
    compared.worst.Take(of_tensor);
    if (!(of_tensor.difference <= kGradientBound)) off.push_back(of_tensor);
  }
  // A fault is largest where it is made; what it spoils behind comes after.
  std::stable_sort(off.begin(), off.end(),
                   [](const Worst& a, const Worst& b) { return a.difference > b.difference; });
  for (const Worst& tensor : off)
    compared.failures.push_back(pass.where + ": gradient of " + tensor.Text());
  return compared;
}

// Other weights are drawn where a difference may come from a choice of blocks that went the other
// way; a fault of the computation shows with all of them.
StatusOr<Compared> CompareDraws(Host& host, VerifyPass& pass) {
  constexpr int64_t kDraws = 3;
  for (int64_t seed = 0;; ++seed) {
    if (seed > 0) DrawWeights(seed, &pass);
    SALA_ASSIGN_OR_RETURN(Compared compared, CompareWithReference(host, pass));
    if (compared.failures.empty() || compared.margin > kLeastMargin || seed + 1 == kDraws)
      return compared;
  }
}

// A tensor that is rounded to bfloat16 gets a relative error of 2^-9 (root mean square). About 20
// rounded tensors lie on the way through a layer and back, 5 layers: as a random walk sqrt(100) *
// 2^-9 = 2 %. Norms and softmax amplify by a factor of a few; a wrong formula changes a gradient by
// tens of percent.
constexpr double kGpuBound = 3 * 0.02;

// The form of a pass whose result does not hang on roundings: weights that bfloat16 holds, and a
// choice of blocks that takes all of them.
void PrepareForGpu(VerifyPass* pass) {
  for (ParameterStore* store : {&pass->params, &pass->teacher}) {
    for (const ParameterSpec& spec : store->specs()) {
      for (int64_t i = spec.offset; i < spec.offset + spec.numel; ++i)
        store->data()[i] = static_cast<float>(BF16(store->data()[i]));
    }
  }
  for (model::ModelConfig* config : {&pass->plan.model, &pass->plan.teacher})
    config->sparse.topk += pass->batch.size() / config->sparse.block_size + 1;
}

double Norm(int64_t n, const std::function<double(int64_t)>& element) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += element(i) * element(i);
  return std::sqrt(sum);
}

// Largest ||found - expected|| / ||expected|| of a tensor of the pass on the GPU.
StatusOr<double> CompareOnGpu(Host& gpu, VerifyPass& pass, VerifyRow* row) {
  PrepareForGpu(&pass);
  const model::ReferenceResult reference = Reference(pass);
  SALA_ASSIGN_OR_RETURN(const Gradients found, FastGradients(gpu, pass));
  double largest = 0;
  for (const ParameterSpec& spec : pass.params.specs()) {
    if (!IsTrained(pass, spec)) continue;
    const double* want = reference.gradients.data() + spec.offset;
    const float* have = found.store.data() + spec.offset;
    const double size = Norm(spec.numel, [&](int64_t i) { return want[i]; });
    const double off = Norm(spec.numel, [&](int64_t i) { return have[i] - want[i]; });
    const double difference = off == 0 ? 0 : off / size;
    if (!(difference <= largest)) largest = difference;
    if (!(difference <= kGpuBound)) {
      row->Fail(pass.where + ", GPU: gradient of " + Named(spec.name) + " differs by " +
                ShortText(difference) + " of its size, at most " + ShortText(kGpuBound));
    }
  }
  return largest;
}

// What was measured, or why the GPU path was not checked: it was asked for where run.device is
// cuda.
StatusOr<std::string> CheckGpu(const VerifyContext& context, std::vector<VerifyPass>& passes,
                               VerifyRow* row) {
  const std::string unchecked = "the GPU path was not checked: ";
  if (context.device != DeviceKind::kCuda) return unchecked + "run.device is cpu";
  const auto device = OpenCudaDevice({.host = parallel::HostName()});
  if (!device.ok()) {
    row->Fail(unchecked + MessageOf(device.status()) + "; --device cpu leaves it out");
    return unchecked + "no GPU";
  }
  if (const std::string problem = context.scaled->start.CudaProblem(); !problem.empty())
    return unchecked + problem;
  Host gpu(device->get());
  double largest = 0;
  size_t checked = 0;
  for (VerifyPass& pass : passes) {
    if (context.interrupted()) break;
    // On a CPU only.
    if (pass.plan.phase == PlanPhase::kAlign && pass.halo.align_loss == AlignLoss::kL2Norm)
      continue;
    context.progress("gradients on the GPU: " + pass.where);
    SALA_ASSIGN_OR_RETURN(const double difference, CompareOnGpu(gpu, pass, row));
    if (!(difference <= largest)) largest = difference;
    ++checked;
  }
  return "GPU (" + (*device)->info().name + "), " + std::to_string(checked) +
         " kinds of pass: gradients within " + ShortText(largest) +
         " of their size; bound: " + ShortText(kGpuBound);
}

}  // namespace

StatusOr<VerifyRow> VerifyGradients(const VerifyContext& context) {
  SALA_ASSIGN_OR_RETURN(std::vector<VerifyPass> passes, MakeVerifyPasses(*context.scaled));
  VerifyRow row;
  Host host;
  Worst worst;
  size_t tensors = 0;
  for (VerifyPass& pass : passes) {
    if (context.interrupted()) return row;
    context.progress("gradients: " + pass.where);
    SALA_ASSIGN_OR_RETURN(const Compared compared, CompareDraws(host, pass));
    tensors += pass.params.specs().size();
    worst.Take(compared.worst);
    for (const std::string& failure : compared.failures) row.Fail(failure);
  }
  row.compared = "float32 gradients with the float64 reference: " + std::to_string(tensors) +
                 " tensors of " + std::to_string(passes.size()) + " kinds of pass";
  row.measured = ShortText(worst.difference) + " of the largest of a tensor (" + worst.tensor + ")";
  row.bound = ShortText(kGradientBound);
  SALA_ASSIGN_OR_RETURN(const std::string gpu, CheckGpu(context, passes, &row));
  row.notes.push_back(gpu);
  return row;
}

// ---- packed ----

namespace {

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

// ---- export ----

namespace {

// One rounding to bfloat16, worked out from the two neighbours: the nearer one, of two equally near
// the one whose last bit is 0.
bool IsRoundedOnce(float value, float rounded) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const uint32_t below = bits & 0xffff0000U;  // towards zero
  const float low = std::bit_cast<float>(below);
  const float high = std::bit_cast<float>(below + 0x10000U);
  const double to_low = std::abs(static_cast<double>(value) - low);
  const double to_high = std::abs(static_cast<double>(high) - value);
  const bool take_low = to_low < to_high || (to_low == to_high && (below & 0x10000U) == 0);
  return std::bit_cast<uint32_t>(rounded) == std::bit_cast<uint32_t>(take_low ? low : high);
}

// Tensors of `params` in a folder that was read back; every one must be as `same` says.
void CompareFolder(const std::string& where, const ParameterStore& params, const HfFolder& folder,
                   bool (*same)(float, float), VerifyRow* row) {
  for (const ParameterSpec& spec : params.specs()) {
    if (!folder.params.Has(spec.name)) {
      row->Fail(where + ": " + Named(spec.name) + " is not in the exported folder");
      continue;
    }
    const float* expected = params.data() + spec.offset;
    const float* found = folder.params.data() + folder.params.Spec(spec.name).offset;
    for (int64_t i = 0; i < spec.numel; ++i) {
      if (same(expected[i], found[i])) continue;
      row->Fail(where + ": " + Named(spec.name) + ": element " + std::to_string(i) + ": exported " +
                ExactText(expected[i]) + ", read back " + ExactText(found[i]));
      break;
    }
  }
}

bool SameBits(float a, float b) { return std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b); }

// EXP-QKNORM is returned: the model has no place in the format.
Status RoundTrip(Host& host, const std::string& directory, VerifyPass& pass, VerifyRow* row) {
  for (const WeightType dtype : {WeightType::kF32, WeightType::kBF16}) {
    const bool f32 = dtype == WeightType::kF32;
    const std::string folder = directory + "/" + std::string(NameOf(dtype));
    SALA_RETURN_IF_ERROR(MakeDirectories(directory));
    SALA_RETURN_IF_ERROR(ExportModel(pass.plan.model, pass.params, nullptr, {},
                                     {.directory = folder, .dtype = dtype, .verify = true})
                             .status());
    SALA_ASSIGN_OR_RETURN(HfFolder loaded, LoadHfFolder(folder));
    CompareFolder(pass.where + ", " + std::string(NameOf(dtype)), pass.params, loaded,
                  f32 ? SameBits : IsRoundedOnce, row);
    if (!f32) continue;
    const auto loss = [&](const model::ModelConfig& config, ParameterStore& params) {
      return model::EvaluateCrossEntropy(host.ctx, host.arena, model::Model(config, params),
                                         pass.batch, pass.options())
          .loss_sum;
    };
    const double before = loss(pass.plan.model, pass.params);
    const double after = loss(loaded.config, loaded.params);
    if (std::bit_cast<uint64_t>(before) != std::bit_cast<uint64_t>(after)) {
      row->Fail(pass.where + ": loss of the exported model: before " + ExactText(before) +
                ", read back " + ExactText(after));
    }
  }
  return OkStatus();
}

}  // namespace

StatusOr<VerifyRow> VerifyExport(const VerifyContext& context) {
  SALA_ASSIGN_OR_RETURN(std::vector<VerifyPass> passes, MakeVerifyPasses(*context.scaled));
  VerifyRow row;
  Host host;
  std::set<std::string> seen;
  int64_t models = 0;
  int64_t tensors = 0;
  for (VerifyPass& pass : passes) {
    if (context.interrupted()) return row;
    // Between the phases of HALO the model is a mixture that is not handed on.
    const bool handed_on =
        pass.plan.phase == PlanPhase::kTrain || pass.plan.phase == PlanPhase::kFinetune;
    if (!handed_on || !seen.insert(EmitConfig(pass.plan.model)).second) continue;
    context.progress("export: the model of " + pass.where);
    const Status status =
        RoundTrip(host, context.directory + "/export-" + std::to_string(seen.size()), pass, &row);
    if (ErrorCodeOf(status) == "EXP-QKNORM") {
      row.notes.push_back("the model of " + pass.where + " was not checked: " + MessageOf(status));
      continue;
    }
    SALA_RETURN_IF_ERROR(status);
    ++models;
    tensors += static_cast<int64_t>(pass.params.specs().size());
  }
  row.compared = "exported folders, f32 and bf16, with what they were written from: " +
                 std::to_string(models) + " models, " + std::to_string(tensors) + " tensors";
  if (models == 0) {
    row.verdict = Verdict::kNotChecked;
    return row;
  }
  row.measured = row.verdict == Verdict::kHolds ? "f32 and losses of equal bits, bf16 rounded once"
                                                : "see below";
  row.bound = "equal bits";
  return row;
}

}  // namespace sala::recipes
