// sala logits: what a model computes for given tokens, as a file for comparison with other engines.
#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "launch/command.h"
#include "launch/sparse_rule.h"
#include "model/reference.h"
#include "recipes/checkpointing.h"

namespace sala::launch {
namespace {

struct LogitsOptions {
  std::string model, tokens, to;
  std::string arithmetic = "float32";
  std::string sparse = "auto";
  int threads = 0;
};

// Appends one document. "" when `ids` is a list of one or more token ids, else what is wrong.
std::string AddDocument(const nlohmann::json& ids, int64_t vocabulary, model::Batch* batch) {
  if (ids.empty()) return "a document without tokens";
  for (size_t i = 0; i < ids.size(); ++i) {
    if (!ids[i].is_number_integer())
      return "found " + Printable(ids[i].dump()) + ", expected a token id";
    const auto id = ids[i].get<int64_t>();
    if (id < 0 || id >= vocabulary)
      return "token " + std::to_string(id) + ", expected 0 to " + std::to_string(vocabulary - 1) +
             ", the ids of the model";
    batch->tokens.push_back(static_cast<int32_t>(id));
    batch->positions.push_back(static_cast<int32_t>(i));
  }
  batch->labels.resize(batch->tokens.size(), -1);
  batch->cu_seqlens.push_back(static_cast<int32_t>(batch->tokens.size()));
  return "";
}

// "1,5,9", or a JSON file with a list of ids or a list of such lists, one for each document.
StatusOr<model::Batch> ReadTokens(const std::string& tokens, int64_t vocabulary) {
  const bool listed = tokens.find_first_not_of("0123456789, -") == std::string::npos;
  std::string text = "[" + tokens + "]";
  if (!listed) {
    if (!PathExists(tokens)) {
      return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                       "--tokens " + Printable(tokens) +
                           ": neither token ids nor a file that exists; write 1,5,9 or name a "
                           "JSON file");
    }
    SALA_ASSIGN_OR_RETURN(text, ReadFile(tokens));
  }
  const std::string where = listed ? "--tokens" : Printable(tokens);
  const nlohmann::json json = ParseJson(text);
  if (!json.is_array()) {
    return MakeError(ExitCode::kData, "TOK-LIST",
                     where +
                         ": no JSON list of token ids; write [1, 5, 9], or [[1, 5], [1, 9]] "
                         "for two documents");
  }
  const bool documents = !json.empty() && json[0].is_array();
  model::Batch batch;
  batch.cu_seqlens = {0};
  std::string problem;
  for (size_t i = 0; problem.empty() && i < (documents ? json.size() : 1); ++i) {
    if (documents && !json[i].is_array()) {
      problem = "found " + Printable(json[i].dump()) + " beside lists of token ids";
    } else {
      problem = AddDocument(documents ? json[i] : json, vocabulary, &batch);
    }
  }
  if (!problem.empty()) return MakeError(ExitCode::kData, "TOK-LIST", where + ": " + problem);
  return batch;
}

std::vector<float> FastLogits(const model::ModelConfig& config, model::ParameterStore& params,
                              const model::Batch& batch, const model::RunOptions& run,
                              int threads) {
  const auto cores = static_cast<int>(std::thread::hardware_concurrency());
  ThreadPool pool(threads > 0 ? threads : std::max(1, cores));
  Arena arena;
  Arena scratch;
  const Context ctx{.pool = &pool, .scratch = &scratch};
  const model::Model model(config, params);
  return model.Logits(ctx, model.ForwardOnly(ctx, arena, batch, run));
}

Status WriteLogits(const LogitsOptions& options) {
  if (PathExists(options.to)) {
    return MakeError(ExitCode::kIo, "EXP-EXISTS",
                     Printable(options.to) + " exists; name another file");
  }
  SALA_ASSIGN_OR_RETURN(recipes::LoadedModel loaded, recipes::LoadModel(options.model));
  SALA_ASSIGN_OR_RETURN(const model::Batch batch,
                        ReadTokens(options.tokens, loaded.config.vocab_size));
  SALA_ASSIGN_OR_RETURN(const bool sparse,
                        UseSparseAttention(options.sparse, options.model, loaded));
  const model::RunOptions run{.sparse_attention = sparse};

  std::vector<float> fast;
  std::vector<double> reference;
  SafetensorsTensor logits{.name = "logits", .shape = {batch.size(), loaded.config.vocab_size}};
  if (options.arithmetic == "float32") {
    fast = FastLogits(loaded.config, loaded.params, batch, run, options.threads);
    logits.dtype = DType::kF32;
    logits.data = fast.data();
  } else {
    const auto arithmetic = options.arithmetic == "float64"
                                ? model::ReferenceArithmetic::kFloat64
                                : model::ReferenceArithmetic::kPublishedRounding;
    reference =
        model::ReferenceForward(loaded.config, loaded.params, batch, run, arithmetic).logits;
    logits.dtype = DType::kF64;
    logits.data = reference.data();
  }
  return WriteSafetensors(options.to,
                          {std::move(logits),
                           {.name = "tokens",
                            .dtype = DType::kI32,
                            .shape = {batch.size()},
                            .data = batch.tokens.data()},
                           {.name = "cu_seqlens",
                            .dtype = DType::kI32,
                            .shape = {static_cast<int64_t>(batch.cu_seqlens.size())},
                            .data = batch.cu_seqlens.data()}},
                          {{"arithmetic", options.arithmetic},
                           {"model", Printable(options.model)},
                           {"sparse_attention", sparse ? "on" : "off"}});
}

}  // namespace

void AddLogitsCommand(CommandLine& line) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command = AddCommand(
      line.app, "logits", "write the logits of given tokens, for comparison with other engines",
      "sala logits exported --tokens 1,306,4966 --to logits.safetensors --arithmetic float64");
  command->add_option("model", options->model, "checkpoint directory or model folder")->required();
  command
      ->add_option("--tokens", options->tokens,
                   "ids with commas between, or a JSON file: a list of ids, or a list of lists, "
                   "one for each document")
      ->required();
  command->add_option("--to", options->to, "safetensors file to make")->required();
  command
      ->add_option("--arithmetic", options->arithmetic,
                   "float32: as in training; float64: the slow reference; published_rounding: the "
                   "reference with the bfloat16 roundings of the published code")
      ->check(CLI::IsMember({"float32", "float64", "published_rounding"}))
      ->capture_default_str();
  command
      ->add_option("--sparse", options->sparse,
                   "block-sparse attention for long documents: auto (as trained), on, off")
      ->check(CLI::IsMember({"auto", "on", "off"}))
      ->capture_default_str();
  command->add_option("--threads", options->threads, "compute threads of float32; 0: all cores")
      ->check(CLI::Range(0, 1024));
  line.OnUse(command, [options] { return WriteLogits(*options); });
}

}  // namespace sala::launch
