// oracle_driver DIR: computes one case, so that an independent oracle can be compared with it.
//
// Reads
//   DIR/request.json   {"task": "cross_entropy" | "distillation" | "alignment",
//                       "arithmetic": "float32" | "float64" | "published_rounding",
//                       "sparse_attention": bool, "recompute": bool (true), "grad_scale": number
//                       (1), "ce_weight": number (0), "temperature": number (1),
//                       "alignment_loss": "mse" | "l2_norm" ("mse"), "logits": bool (false)}
//   DIR/model/         an exported folder; for distillation the student, for alignment a model
//                      whose layers are all linear, of which only the mixers are used
//   DIR/teacher/       an exported folder, for distillation and alignment
//   DIR/batch.safetensors   I32: tokens [T], labels [T] (-1: none), cu_seqlens [S + 1]
// and writes DIR/out.safetensors, F32 from the fast path (float32), else F64 from the reference:
//   "loss" [1]         cross_entropy: sum over the targets; distillation: KL summed over the tokens
//                      + ce_weight * cross entropy summed over the targets; alignment: the stage's
//                      mean over layers, tokens and features
//   "hidden" [T, H]    after the final norm, of the model (of the teacher for alignment)
//   "logits" [T, V]    when asked for, and with published_rounding; not for alignment
//   "grad/NAME"        of grad_scale * loss for every tensor of DIR/model (its mixers for
//                      alignment); not with published_rounding, which is a forward pass of
//                      cross_entropy only
//   "selection_margin" [1]   float64 and published_rounding: how close the closest choice of a
//                      sparse block was (model/reference.h)
// Sparse attention is the student's; the teacher of distillation uses it too when asked for.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "core/file.h"
#include "core/safetensors.h"
#include "model/loss.h"
#include "model/reference.h"
#include "nlohmann/json.hpp"
#include "parallel/communicator.h"
#include "parallel/mesh.h"
#include "recipes/halo/align.h"
#include "recipes/halo/transfer.h"
#include "recipes/hf_folder.h"

namespace sala {
namespace {

using model::Batch;
using model::ModelConfig;
using model::ParameterStore;

struct Request {
  std::string task, arithmetic;
  bool sparse_attention = false, recompute = true, logits = false;
  double grad_scale = 1, ce_weight = 0, temperature = 1;
  std::string alignment_loss = "mse";

  model::RunOptions options() const {
    return {.sparse_attention = sparse_attention, .recompute = recompute};
  }
  model::DistillationOptions distillation() const {
    return {.student = options(),
            .teacher = options(),
            .kl_grad_scale = static_cast<float>(grad_scale),
            .ce_grad_scale = static_cast<float>(grad_scale * ce_weight),
            .temperature = static_cast<float>(temperature)};
  }
};

struct Folder {
  ModelConfig config;
  ParameterStore params;
};

struct Case {
  Request request;
  Folder model, teacher;
  Batch batch;
};

// In whatever arithmetic; the writer picks the number type.
struct Output {
  double loss = 0;
  bool has_margin = false;
  double selection_margin = 0;
  std::vector<double> hidden, logits, gradients;
  std::vector<model::ParameterSpec> specs;  // of the gradients
};

Status Problem(const std::string& text) { return MakeError(ExitCode::kData, "ORACLE-CASE", text); }

StatusOr<Request> ReadRequest(const std::string& path) {
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  try {
    const auto json = nlohmann::json::parse(text);
    static const std::set<std::string> kKeys = {"task",        "arithmetic",     "sparse_attention",
                                                "recompute",   "grad_scale",     "ce_weight",
                                                "temperature", "alignment_loss", "logits"};
    for (const auto& item : json.items()) {
      if (kKeys.count(item.key()) == 0) return Problem(path + ": unknown key " + item.key());
    }
    Request r;
    r.task = json.at("task").get<std::string>();
    r.arithmetic = json.at("arithmetic").get<std::string>();
    r.sparse_attention = json.value("sparse_attention", r.sparse_attention);
    r.recompute = json.value("recompute", r.recompute);
    r.logits = json.value("logits", r.logits);
    r.grad_scale = json.value("grad_scale", r.grad_scale);
    r.ce_weight = json.value("ce_weight", r.ce_weight);
    r.temperature = json.value("temperature", r.temperature);
    r.alignment_loss = json.value("alignment_loss", r.alignment_loss);
    const auto one_of = [](const std::string& value, const std::set<std::string>& values) {
      return values.count(value) > 0;
    };
    if (!one_of(r.task, {"cross_entropy", "distillation", "alignment"}))
      return Problem(path + ": task " + r.task);
    if (!one_of(r.arithmetic, {"float32", "float64", "published_rounding"}))
      return Problem(path + ": arithmetic " + r.arithmetic);
    if (!one_of(r.alignment_loss, {"mse", "l2_norm"}))
      return Problem(path + ": alignment_loss " + r.alignment_loss);
    if (r.arithmetic == "published_rounding" && r.task != "cross_entropy")
      return Problem(path + ": published_rounding is for cross_entropy");
    return r;
  } catch (const nlohmann::json::exception& error) {
    return Problem(path + ": " + error.what());
  }
}

// As the folder has it: a tied head is one tensor.
StatusOr<Folder> ReadFolder(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const recipes::ModelFolder source,
                        recipes::ModelFolder::Open(directory, {.keep_tied = true}));
  SALA_RETURN_IF_ERROR(source.CheckValues());
  Folder folder{source.config(), ParameterStore(source.specs())};
  for (const model::ParameterSpec& spec : source.specs()) {
    SALA_RETURN_IF_ERROR(source.Read(spec, 0, spec.numel, folder.params.data() + spec.offset));
  }
  return folder;
}

StatusOr<std::vector<int32_t>> ReadIds(const SafetensorsFile& file, const std::string& name) {
  const SafetensorsEntry* entry = file.Find(name);
  if (entry == nullptr || entry->dtype != "I32" || entry->shape.size() != 1)
    return Problem("batch.safetensors: " + name + " is not a list of I32");
  std::vector<int32_t> ids(static_cast<size_t>(entry->shape[0]));
  std::memcpy(ids.data(), file.Data(*entry), ids.size() * sizeof(int32_t));
  return ids;
}

StatusOr<Batch> ReadBatch(const std::string& path, const ModelConfig& config) {
  SALA_ASSIGN_OR_RETURN(const SafetensorsFile file, SafetensorsFile::Open(path));
  Batch batch;
  SALA_ASSIGN_OR_RETURN(batch.tokens, ReadIds(file, "tokens"));
  SALA_ASSIGN_OR_RETURN(batch.labels, ReadIds(file, "labels"));
  SALA_ASSIGN_OR_RETURN(batch.cu_seqlens, ReadIds(file, "cu_seqlens"));
  const auto in_vocabulary = [&](int32_t id) { return id < config.vocab_size; };
  const bool sizes = batch.labels.size() == batch.tokens.size() && !batch.cu_seqlens.empty() &&
                     batch.cu_seqlens.front() == 0 && batch.cu_seqlens.back() == batch.size() &&
                     std::is_sorted(batch.cu_seqlens.begin(), batch.cu_seqlens.end());
  const bool ids = std::all_of(batch.tokens.begin(), batch.tokens.end(),
                               [&](int32_t id) { return id >= 0 && in_vocabulary(id); }) &&
                   std::all_of(batch.labels.begin(), batch.labels.end(), in_vocabulary);
  if (!sizes || !ids) return Problem(path + ": documents, labels and tokens do not fit");
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    for (int32_t t = batch.cu_seqlens[s]; t < batch.cu_seqlens[s + 1]; ++t)
      batch.positions.push_back(t - batch.cu_seqlens[s]);
  }
  return batch;
}

StatusOr<Case> ReadCase(const std::string& directory) {
  Case c;
  SALA_ASSIGN_OR_RETURN(c.request, ReadRequest(directory + "/request.json"));
  SALA_ASSIGN_OR_RETURN(c.model, ReadFolder(directory + "/model"));
  SALA_ASSIGN_OR_RETURN(c.batch, ReadBatch(directory + "/batch.safetensors", c.model.config));
  if (c.request.task == "cross_entropy") return c;
  SALA_ASSIGN_OR_RETURN(c.teacher, ReadFolder(directory + "/teacher"));
  if (c.teacher.config.vocab_size != c.model.config.vocab_size)
    return Problem("teacher and model have different vocabularies");
  return c;
}

struct Alignment {
  ModelConfig teacher_config;  // with the settings of linear layers that DIR/model has
  ModelConfig mixers_config;
  ParameterStore mixers;
};

StatusOr<Alignment> MakeAlignment(const Case& c) {
  Alignment a;
  a.teacher_config = c.teacher.config;
  const ModelConfig& linear = c.model.config;
  a.teacher_config.lightning_nh = linear.lightning_nh;
  a.teacher_config.lightning_head_dim = linear.lightning_head_dim;
  a.teacher_config.lightning_use_rope = linear.lightning_use_rope;
  a.teacher_config.qk_norm = linear.qk_norm;
  a.teacher_config.use_output_norm = linear.use_output_norm;
  a.teacher_config.use_output_gate = linear.use_output_gate;
  a.mixers_config = recipes::AllLinear(a.teacher_config);
  a.mixers = ParameterStore(recipes::AllMixerSpecs(a.mixers_config));
  for (const model::ParameterSpec& spec : a.mixers.specs()) {
    if (!c.model.params.Has(spec.name) || c.model.params.Spec(spec.name).shape != spec.shape)
      return Problem("model: no " + spec.name + " of the shape that the teacher's layers need");
    std::copy_n(c.model.params.data() + c.model.params.Spec(spec.name).offset, spec.numel,
                a.mixers.data() + spec.offset);
  }
  return a;
}

struct FastPath {
  FastPath() : pool(static_cast<int>(std::max(1U, std::thread::hardware_concurrency()))) {
    ctx.pool = &pool;
    ctx.scratch = &scratch;
  }
  ThreadPool pool;
  Arena arena, scratch;
  Context ctx;
};

std::vector<double> Wide(const float* data, int64_t n) { return {data, data + n}; }

StatusOr<Output> AlignFast(Case& c, FastPath& fast) {
  SALA_ASSIGN_OR_RETURN(Alignment a, MakeAlignment(c));
  const auto world = parallel::MakeSelfCommunicator();
  SALA_ASSIGN_OR_RETURN(const auto mesh, parallel::Mesh::Create(*world, {}, fast.ctx));
  const model::Model teacher(a.teacher_config, c.teacher.params);
  recipes::AlignTask task(
      fast.ctx, *mesh, teacher, a.mixers,
      c.request.alignment_loss == "mse" ? recipes::AlignLoss::kMse : recipes::AlignLoss::kL2Norm,
      nullptr);
  const recipes::StepCounts counts{.targets = c.batch.targets(), .tokens = c.batch.size()};
  ParameterStore gradients(a.mixers.specs());
  std::vector<double> sums(task.SumNames().size());
  SALA_RETURN_IF_ERROR(task.MicroBatch(fast.ctx, fast.arena, c.batch, counts, gradients, sums));
  Output out;
  out.loss = task.Values(sums, counts).front().second;
  out.specs = gradients.specs();
  out.gradients = Wide(gradients.data(), gradients.size());
  // The task has no scale of its own.
  for (double& g : out.gradients) g *= c.request.grad_scale;
  const Tensor hidden = teacher.ForwardOnly(fast.ctx, fast.arena, c.batch, {});
  out.hidden = Wide(hidden.Data<float>(), hidden.numel());
  return out;
}

StatusOr<Output> Fast(Case& c) {
  FastPath fast;
  if (c.request.task == "alignment") return AlignFast(c, fast);
  const model::Model model(c.model.config, c.model.params);
  ParameterStore gradients(c.model.params.specs());
  const model::ModelTensors tensors = model::BindTensors(c.model.config, gradients);
  Output out;
  if (c.request.task == "distillation") {
    const model::Model teacher(c.teacher.config, c.teacher.params);
    const auto result = model::DistillationStep(fast.ctx, fast.arena, teacher, model, c.batch,
                                                c.request.distillation(), tensors);
    out.loss = result.kl.loss_sum + c.request.ce_weight * result.ce.loss_sum;
  } else {
    out.loss = model::CrossEntropyStep(fast.ctx, fast.arena, model, c.batch, c.request.options(),
                                       static_cast<float>(c.request.grad_scale), tensors)
                   .loss_sum;
  }
  out.specs = gradients.specs();
  out.gradients = Wide(gradients.data(), gradients.size());
  const Tensor hidden = model.ForwardOnly(fast.ctx, fast.arena, c.batch, c.request.options());
  out.hidden = Wide(hidden.Data<float>(), hidden.numel());
  if (c.request.logits) {
    const std::vector<float> logits = model.Logits(fast.ctx, hidden);
    out.logits = {logits.begin(), logits.end()};
  }
  return out;
}

StatusOr<Output> Reference(const Case& c) {
  Output out;
  out.has_margin = true;
  const auto take = [&](model::ReferenceResult&& result) {
    out.loss = result.loss_sum;
    out.selection_margin = result.selection_margin;
    out.hidden = std::move(result.hidden);
    if (c.request.logits || c.request.arithmetic == "published_rounding")
      out.logits = std::move(result.logits);
    out.gradients = std::move(result.gradients);
  };
  out.specs = c.model.params.specs();
  if (c.request.task == "alignment") {
    SALA_ASSIGN_OR_RETURN(const Alignment a, MakeAlignment(c));
    out.specs = a.mixers.specs();
    take(model::ReferenceAlignment(
        a.teacher_config, c.teacher.params, a.mixers_config, a.mixers, c.batch,
        c.request.alignment_loss == "mse" ? model::MixerDistance::kMeanSquare
                                          : model::MixerDistance::kEuclidean,
        c.request.grad_scale));
  } else if (c.request.task == "distillation") {
    auto result = model::ReferenceDistillation(c.teacher.config, c.teacher.params, c.model.config,
                                               c.model.params, c.batch, c.request.distillation());
    const double ce = result.ce_sum;
    take(std::move(result));
    out.loss += c.request.ce_weight * ce;
  } else if (c.request.arithmetic == "published_rounding") {
    take(model::ReferenceForward(c.model.config, c.model.params, c.batch, c.request.options(),
                                 model::ReferenceArithmetic::kPublishedRounding));
  } else {
    take(model::ReferenceCrossEntropy(c.model.config, c.model.params, c.batch, c.request.options(),
                                      c.request.grad_scale));
  }
  return out;
}

template <typename T>
Status WriteOutput(const std::string& path, const Case& c, const Output& out) {
  std::vector<std::vector<T>> owned;
  std::vector<SafetensorsTensor> tensors;
  const auto add = [&](const std::string& name, const double* data, std::vector<int64_t> shape) {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    owned.emplace_back(data, data + n);
    tensors.push_back({name, DTypeOf<T>::value, std::move(shape), owned.back().data()});
  };
  const int64_t t = c.batch.size();
  add("loss", &out.loss, {1});
  if (out.has_margin) add("selection_margin", &out.selection_margin, {1});
  if (!out.hidden.empty())
    add("hidden", out.hidden.data(), {t, static_cast<int64_t>(out.hidden.size()) / t});
  if (!out.logits.empty()) add("logits", out.logits.data(), {t, c.model.config.vocab_size});
  if (!out.gradients.empty()) {
    for (const model::ParameterSpec& spec : out.specs)
      add("grad/" + spec.name, out.gradients.data() + spec.offset, spec.shape);
  }
  return WriteSafetensors(path, std::move(tensors), {{"arithmetic", c.request.arithmetic}});
}

Status Run(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(Case c, ReadCase(directory));
  const bool fast = c.request.arithmetic == "float32";
  SALA_ASSIGN_OR_RETURN(const Output out, fast ? Fast(c) : Reference(c));
  const std::string path = directory + "/out.safetensors";
  return fast ? WriteOutput<float>(path, c, out) : WriteOutput<double>(path, c, out);
}

}  // namespace
}  // namespace sala

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: oracle_driver DIR\n");
    return static_cast<int>(sala::ExitCode::kUsage);
  }
  const sala::Status status = sala::Run(argv[1]);
  if (status.ok()) return 0;
  std::fprintf(stderr, "oracle_driver: %s\n", sala::MessageOf(status).c_str());
  return static_cast<int>(sala::ExitCodeOf(status));
}
