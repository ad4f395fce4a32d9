// The check of `sala verify` of every gradient against the float64 reference, on the CPU and, where
// it is asked for, on a GPU (recipes/verify.h).
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "core/cuda_module.h"
#include "core/dtype.h"
#include "model/loss.h"
#include "model/reference.h"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "parallel/mpi_communicator.h"
#include "recipes/halo/align.h"
#include "recipes/halo/distil.h"
#include "recipes/halo/transfer.h"
#include "recipes/verify.h"
#include "recipes/verify_pass.h"
#include "recipes/verify_tensors.h"

namespace sala::recipes {
namespace {

using model::ParameterSpec;
using model::ParameterStore;

struct Gradients {
  double loss = 0;
  ParameterStore store;
};

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

}  // namespace sala::recipes
