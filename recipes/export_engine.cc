#include "recipes/export_engine.h"

#include <algorithm>

#include "core/file.h"
#include "data/tokenizer_files.h"

namespace sala::recipes {
namespace {

using nlohmann::json;

const char* NameOf(Engine engine) {
  switch (engine) {
    case Engine::kSglang:
      return "SGLang";
    case Engine::kVllm:
      return "vLLM";
    case Engine::kHf:
      break;
  }
  return "transformers";
}

Status Refused(Engine engine, const std::string& field, const std::string& found,
               const std::string& text) {
  return MakeError(
      ExitCode::kData, "EXP-ENGINE",
      "config.json: " + field + ": found " + found + ", which " + NameOf(engine) + " " + text);
}

std::string TextOf(const json& config, const char* key) {
  const auto at = config.find(key);
  return at != config.end() && at->is_string() ? at->get<std::string>() : "";
}

// Newer libraries write "dtype" only.
std::string DtypeOf(const json& config) {
  const std::string old = TextOf(config, "torch_dtype");
  return old.empty() ? TextOf(config, "dtype") : old;
}

bool HasOwnCode(const json& config) {
  const auto at = config.find("auto_map");
  return at != config.end() && at->is_object() && !at->empty();
}

// In a shell.
std::string Quoted(const std::string& text) {
  const bool plain = !text.empty() && std::all_of(text.begin(), text.end(), [](char c) {
    return (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
           std::string("/._-+").find(c) != std::string::npos;
  });
  if (plain) return text;
  std::string quoted = "'";
  for (const char c : text) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

// In Python.
std::string Literal(const std::string& text) {
  std::string literal = "\"";
  for (const char c : text)
    literal += c == '"' || c == '\\' ? std::string{'\\', c} : std::string(1, c);
  return literal + "\"";
}

constexpr char kNameBase[] =
    "; name a folder with the published configuration_*.py and modeling_*.py as --base";

// Every class of auto_map is loaded from a file of the folder. SGLang takes no model's class.
Status CheckModules(Engine engine, const json& config, const std::vector<std::string>& files) {
  if (!HasOwnCode(config)) return OkStatus();
  for (const auto& [key, value] : config["auto_map"].items()) {
    if (engine == Engine::kSglang && key.rfind("AutoModel", 0) == 0) continue;
    for (const json& each : value.is_array() ? value : json::array({value})) {
      // "module.Class", or "repository--module.Class", which is loaded from elsewhere.
      const std::string name = each.is_string() ? each.get<std::string>() : "";
      const std::string file = name.substr(0, name.rfind('.')) + ".py";
      if (name.empty() || name.find("--") != std::string::npos ||
          std::find(files.begin(), files.end(), file) != files.end())
        continue;
      return Refused(
          engine, "auto_map." + key, Printable(name),
          "loads from " + Printable(file) + ", which will not be in the folder" + kNameBase);
    }
  }
  return OkStatus();
}

// The published model code makes linear layers of the softmax layers' heads, and counts cached
// tokens in layer 0.
Status CheckHybridCode(Engine engine, const json& config) {
  for (const auto& [own, used] : {std::make_pair("lightning_nh", "num_attention_heads"),
                                  std::make_pair("lightning_head_dim", "head_dim")}) {
    if (config.value(own, json()) == config.value(used, json())) continue;
    return Refused(engine, own, config.value(own, json()).dump(),
                   "with the published model code cannot load: it takes " + std::string(used) +
                       ", " + config.value(used, json()).dump());
  }
  const json mixers = config.value("mixer_types", json::array());
  if (!mixers.empty() && mixers[0] != "minicpm4") {
    return Refused(engine, "mixer_types[0]", mixers[0].dump(),
                   "with the published model code cannot generate from: it counts cached tokens in "
                   "layer 0, which must be a softmax layer (minicpm4)");
  }
  return OkStatus();
}

}  // namespace

std::optional<Engine> ParseEngine(const std::string& name) {
  if (name == "hf") return Engine::kHf;
  if (name == "sglang") return Engine::kSglang;
  if (name == "vllm") return Engine::kVllm;
  return std::nullopt;
}

Status CheckEngineConfig(Engine engine, const json& config, const std::vector<std::string>& files) {
  const std::string type = TextOf(config, "model_type");
  const bool hybrid = type == "minicpm_sala";
  if (engine != Engine::kHf && DtypeOf(config) == "float64")
    return Refused(engine, "torch_dtype", "float64", "does not compute in; use --dtype bf16");
  if (engine == Engine::kVllm && hybrid) {
    return Refused(engine, "model_type", type,
                   "has no model for; use --engine sglang, or hf with the published model code");
  }
  // Servers have models of their own, and SGLang the configuration of hybrids.
  std::vector<std::string> classes;
  if (engine == Engine::kHf && (hybrid || type == "minicpm")) {
    classes = {kAutoConfig, "AutoModelForCausalLM"};
  } else if (type == "minicpm") {
    classes = {kAutoConfig};
  }
  for (const std::string& name : classes) {
    if (HasOwnCode(config) && config["auto_map"].contains(name)) continue;
    return Refused(engine, HasOwnCode(config) ? "auto_map." + name : "auto_map", "none",
                   "needs for model_type " + type + std::string(kNameBase));
  }
  SALA_RETURN_IF_ERROR(CheckModules(engine, config, files));
  return engine == Engine::kHf && hybrid ? CheckHybridCode(engine, config) : OkStatus();
}

Status CheckEngineFolder(Engine engine, const std::string& directory) {
  if (engine == Engine::kHf || PathExists(directory + "/" + data::kHfTokenizerFile) ||
      PathExists(directory + "/" + data::kSentencePieceFile))
    return OkStatus();
  return MakeError(ExitCode::kData, "EXP-ENGINE",
                   std::string("tokenizer: found neither ") + data::kHfTokenizerFile + " nor " +
                       data::kSentencePieceFile + " to put in, one of which " + NameOf(engine) +
                       " needs to serve; name such a tokenizer with --tokenizer");
}

std::string LoadCommand(Engine engine, const std::string& directory, const json& config) {
  const bool own = HasOwnCode(config);
  const std::string trust = own ? " --trust-remote-code" : "";
  switch (engine) {
    case Engine::kSglang:
      return "python -m sglang.launch_server --model-path " + Quoted(directory) + trust +
             "  # upstream SGLang (sgl-project/sglang)";
    case Engine::kVllm:
      return "vllm serve " + Quoted(directory) + trust;
    case Engine::kHf:
      break;
  }
  return "python -c " + Quoted(
                            "from transformers import AutoModelForCausalLM; "
                            "AutoModelForCausalLM.from_pretrained(" +
                            Literal(directory) + ", torch_dtype=\"auto\"" +
                            (own ? ", trust_remote_code=True" : "") + ")");
}

StatusOr<std::vector<std::string>> EvalCommands(std::optional<Engine> engine,
                                                const std::string& directory, const json& config) {
  if (directory.find_first_of(",=") != std::string::npos) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     Printable(directory) +
                         ": lm_eval separates its --model_args by , and =; --print-eval-commands "
                         "needs a path without them");
  }
  std::string model;
  if (engine.value_or(Engine::kHf) == Engine::kHf) {
    const std::string dtype = DtypeOf(config);
    const std::string arguments = "pretrained=" + directory +
                                  ",dtype=" + (dtype.empty() ? "auto" : dtype) +
                                  (HasOwnCode(config) ? ",trust_remote_code=True" : "");
    model = "lm_eval --model hf --model_args " + Quoted(arguments) + " --batch_size auto";
  } else {
    const char* port = *engine == Engine::kSglang ? "30000" : "8000";  // that of the server
    const json length = config.value("max_position_embeddings", json());
    model = "lm_eval --model local-completions --model_args " +
            Quoted("model=" + directory + ",tokenizer=" + directory +
                   ",base_url=http://localhost:" + port +
                   "/v1/completions,num_concurrent=8,max_retries=3,tokenized_requests=False" +
                   (length.is_number_integer() ? ",max_length=" + length.dump() : "") +
                   (HasOwnCode(config) ? ",trust_remote_code=True" : ""));
  }
  return std::vector<std::string>{
      model + " --tasks arc_easy,arc_challenge,hellaswag,winogrande --output_path results",
      model + " --tasks mmlu --num_fewshot 5 --output_path results",
      model + " --tasks gsm8k --num_fewshot 5 --output_path results",
      model + " --tasks ruler --output_path results",
      "sala eval --ckpt " + Quoted(directory) +
          " --tasks passkey,niah_single_1,niah_multikey_3,kv --lengths 4096 --to " +
          Quoted(directory + "-eval")};
}

}  // namespace sala::recipes
