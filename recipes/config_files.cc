// The files of `sala train`: reading pipelines and stages with overrides, writing them resolved,
// and whether a stage may go on with the configuration it has now (recipes/config.h).
#include <algorithm>
#include <set>
#include <sstream>

#include "core/file.h"
#include "data/synthetic.h"
#include "recipes/config.h"

namespace sala::recipes {
namespace {

// A file of `sala train`: `kind` decides which keys it has.
enum class FileKind : uint8_t { kPipeline, kPretrain, kHalo, kSft };

struct TrainFile {
  FileKind kind = FileKind::kPretrain;
  bool in_pipeline = false;
  std::string name;
  std::string tokenizer;
  RunConfig run;
  std::vector<std::string> stages;
  StageConfig stage;

  void Bind(ConfigBinder& b) {
    b.Enum("kind", &kind,
           {{"pipeline", FileKind::kPipeline},
            {"pretrain", FileKind::kPretrain},
            {"halo", FileKind::kHalo},
            {"sft", FileKind::kSft}},
           {.required = true});
    if (kind == FileKind::kPipeline) {
      if (b.reading() && in_pipeline)
        b.Error("kind", "CFG-CONFLICT", "a pipeline cannot be a stage of a pipeline");
      b.Field("name", &name, {.required = true});
      b.Field("tokenizer", &tokenizer);
      b.Section("run", &run, {.required = true});
      b.Field("stages", &stages, {.required = true});
      return;
    }
    if (b.reading() && in_pipeline && b.Present("run")) {
      b.Error(
          "run", "CFG-CONFLICT",
          "`run` belongs to the pipeline file when a stage is part of a pipeline; move it there");
    }
    if (!in_pipeline) b.Section("run", &run, {.required = true});
    stage.kind = kind == FileKind::kHalo  ? StageKind::kHalo
                 : kind == FileKind::kSft ? StageKind::kSft
                                          : StageKind::kPretrain;
    stage.Bind(b);
  }
};

// The body of EmitStage: the stage with its kind.
struct StageFile {
  StageConfig stage;

  void Bind(ConfigBinder& b) {
    b.Enum(
        "kind", &stage.kind,
        {{"pretrain", StageKind::kPretrain}, {"halo", StageKind::kHalo}, {"sft", StageKind::kSft}},
        {.required = true});
    stage.Bind(b);
  }
};

Status ConfigError(const std::string& code, const std::string& text) {
  return MakeError(ExitCode::kConfig, code, text);
}

std::string Directory(const std::string& path) {
  const size_t slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

// "configs/tiny/stable.yaml" -> "stable"
std::string Stem(const std::string& path) {
  std::string name = path.substr(Directory(path).size());
  const size_t dot = name.rfind('.');
  return dot == std::string::npos ? name : name.substr(0, dot);
}

// Overrides of a pipeline by whom they are for: "" the pipeline, otherwise a stage's stem.
StatusOr<std::vector<std::string>> OverridesFor(const std::string& stem,
                                                const std::vector<std::string>& sets) {
  std::vector<std::string> mine;
  for (const std::string& set : sets) {
    const std::string head = set.substr(0, set.find_first_of(".="));
    const bool for_pipeline =
        head == "run" || head == "name" || head == "tokenizer" || head == "stages";
    if (stem.empty()) {
      if (for_pipeline) mine.push_back(set);
    } else if (head == stem || head == "all") {
      if (set.size() <= head.size() + 1 || set[head.size()] != '.') {
        return ConfigError("CFG-SET",
                           "--set " + Printable(set) + ": expected " + head + ".KEY=VALUE");
      }
      mine.push_back(set.substr(head.size() + 1));
    }
  }
  return mine;
}

Status CheckOverrideHeads(const std::vector<std::string>& stems,
                          const std::vector<std::string>& sets) {
  std::vector<std::string> allowed = stems;
  allowed.insert(allowed.end(), {"all", "run", "name", "tokenizer", "stages"});
  for (const std::string& set : sets) {
    const std::string head = set.substr(0, set.find_first_of(".="));
    if (std::find(allowed.begin(), allowed.end(), head) != allowed.end()) continue;
    const std::string near = NearestWord(head, allowed);
    return ConfigError("CFG-SET",
                       "--set " + Printable(set) + ": '" + Printable(head) +
                           "' is neither a stage of the pipeline nor run, tokenizer or all" +
                           (near.empty() ? "" : "; did you mean '" + near + "'?"));
  }
  return OkStatus();
}

// The first key of the two that makes other prompts of a task; "" when they make the same.
std::string OtherPrompts(const EvalConfig& a, const EvalConfig& b, const std::string& task) {
  const auto differs = [](const std::string& key, const std::string& one,
                          const std::string& other) {
    return one == other ? std::string() : key + " (" + one + " and " + other + ")";
  };
  const auto recall = data::RecallTaskNamed(task);
  const bool text = !recall.ok() || data::WantsRunningText(*recall);
  std::string key = differs("samples", std::to_string(a.samples), std::to_string(b.samples));
  if (key.empty()) key = differs("seed", std::to_string(a.seed), std::to_string(b.seed));
  if (key.empty()) key = differs("chat", a.chat ? "true" : "false", b.chat ? "true" : "false");
  if (key.empty() && text) key = differs("haystack", a.haystack, b.haystack);
  return key;
}

// Gates that compare with another stage need that stage's numbers, of the same prompts.
Status CheckGates(const StageConfig& stage, const std::vector<StageConfig>& earlier) {
  if (!stage.eval) return OkStatus();
  for (const EvalGate& gate : stage.eval->gate) {
    if (gate.max_drop_from.empty() || gate.max_drop_from == "before") continue;
    const auto from = std::find_if(earlier.begin(), earlier.end(), [&gate](const StageConfig& s) {
      return s.name == gate.max_drop_from;
    });
    const auto measures = [&gate](const EvalConfig& eval) {
      const auto& lengths = eval.lengths_tokens;
      return eval.after() &&
             std::find(eval.tasks.begin(), eval.tasks.end(), gate.task) != eval.tasks.end() &&
             std::find(lengths.begin(), lengths.end(), gate.length) != lengths.end();
    };
    if (from != earlier.end() && from->eval && measures(*from->eval)) {
      const std::string key = OtherPrompts(*from->eval, *stage.eval, gate.task);
      if (key.empty()) continue;
      return ConfigError("CFG-CONFLICT", "stage " + stage.name + ": eval.gate: " + gate.task +
                                             " at length " + std::to_string(gate.length) +
                                             " cannot be compared with stage " + from->name +
                                             ", whose eval has another " + key +
                                             "; give both the same");
    }
    return ConfigError("CFG-CONFLICT", "stage " + stage.name + ": eval.gate: max_drop_from '" +
                                           Printable(gate.max_drop_from) + "' is no stage before " +
                                           "this one that measures " + gate.task + " at length " +
                                           std::to_string(gate.length) + " after it");
  }
  return OkStatus();
}

Status CheckStage(const StageConfig& stage, bool first) {
  const std::string where = "stage " + stage.name + ": ";
  if (stage.tokenizer.empty()) {
    return ConfigError(
        "CFG-MISSING",
        where + "`tokenizer` is not set; name a folder, a tokenizer.model or \"bytes\"");
  }
  if (first && !stage.init_from && !stage.model) {
    return ConfigError(
        "CFG-MISSING",
        where +
            "the first stage needs `model` (random weights) or `init_from` (a checkpoint or an "
            "exported folder)");
  }
  if (stage.eval && stage.eval->before() && first && !stage.init_from) {
    return ConfigError(
        "CFG-CONFLICT",
        where +
            "eval.when names before, but the first stage starts from random weights; "
            "leave before out");
  }
  if (stage.init_from && stage.model) {
    return ConfigError(
        "CFG-CONFLICT",
        where + "`model` describes new weights and `init_from` brings its own; remove one");
  }
  if (!first && (stage.init_from || stage.model)) {
    return ConfigError(
        "CFG-CONFLICT",
        where +
            "only the first stage of a pipeline may have `model` or `init_from`; later stages "
            "start from the one before");
  }
  return OkStatus();
}

}  // namespace

StatusOr<PipelineConfig> LoadPipeline(const std::string& path,
                                      const std::vector<std::string>& sets) {
  // The kind of the file decides what an override means, so the file is read once without
  // overrides. Errors that an override could repair (a missing run.dir, say) must not count then.
  TrainFile probe;
  SALA_ASSIGN_OR_RETURN(const ConfigDocument bare, ConfigDocument::Load(path));
  static_cast<void>(BindConfig(bare, &probe));
  PipelineConfig pipeline;
  if (probe.kind != FileKind::kPipeline) {
    TrainFile file;
    SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Load(path, sets));
    SALA_RETURN_IF_ERROR(BindConfig(document, &file));
    SALA_RETURN_IF_ERROR(CheckStage(file.stage, true));
    SALA_RETURN_IF_ERROR(CheckGates(file.stage, {}));
    pipeline.name = file.stage.name;
    pipeline.single_stage = true;
    pipeline.run = file.run;
    pipeline.stages.push_back(file.stage);
    return pipeline;
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> own, OverridesFor("", sets));
  TrainFile file;
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Load(path, own));
  SALA_RETURN_IF_ERROR(BindConfig(document, &file));
  if (file.stages.empty())
    return ConfigError("CFG-MISSING",
                       path + ": `stages` is empty; name the file of one stage at least");
  pipeline.name = file.name;
  pipeline.run = file.run;
  std::vector<std::string> stems;
  for (const std::string& stage : file.stages) {
    stems.push_back(Stem(stage));
    static const std::set<std::string> kReserved = {"all", "run", "name", "tokenizer", "stages"};
    if (kReserved.count(stems.back()) > 0 ||
        std::count(stems.begin(), stems.end(), stems.back()) > 1) {
      return ConfigError("CFG-CONFLICT",
                         path + ": stage file " + stage + ": '" + stems.back() +
                             "' is taken, and --set could not tell the two apart; rename the file");
    }
  }
  SALA_RETURN_IF_ERROR(CheckOverrideHeads(stems, sets));
  std::set<std::string> names;
  for (size_t i = 0; i < file.stages.size(); ++i) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> stage_sets, OverridesFor(stems[i], sets));
    TrainFile stage_file;
    stage_file.in_pipeline = true;
    SALA_ASSIGN_OR_RETURN(const ConfigDocument stage_document,
                          ConfigDocument::Load(Directory(path) + file.stages[i], stage_sets));
    SALA_RETURN_IF_ERROR(BindConfig(stage_document, &stage_file));
    StageConfig stage = stage_file.stage;
    if (stage.tokenizer.empty()) stage.tokenizer = file.tokenizer;
    if (!file.tokenizer.empty() && stage.tokenizer != file.tokenizer) {
      return ConfigError("CFG-CONFLICT", Directory(path) + file.stages[i] + ": tokenizer is " +
                                             stage.tokenizer + ", the pipeline says " +
                                             file.tokenizer + "; one run has one tokenizer");
    }
    SALA_RETURN_IF_ERROR(CheckStage(stage, i == 0));
    SALA_RETURN_IF_ERROR(CheckGates(stage, pipeline.stages));
    if (stage.carry_optimizer && i > 0 && pipeline.stages.back().kind == StageKind::kHalo) {
      return ConfigError("CFG-CONFLICT",
                         "stage " + stage.name +
                             ": carry_optimizer is on, but the HALO stage before it leaves no "
                             "optimizer state (the model has changed); turn it off");
    }
    if (!names.insert(stage.name).second) {
      return ConfigError("CFG-CONFLICT",
                         path + ": two stages are named '" + stage.name + "'; rename one");
    }
    pipeline.stages.push_back(std::move(stage));
  }
  return pipeline;
}

std::string EmitStage(const StageConfig& config) { return EmitConfig(StageFile{config}); }

std::vector<std::pair<std::string, std::string>> EmitPipeline(const PipelineConfig& config) {
  std::vector<std::pair<std::string, std::string>> files;
  TrainFile top;
  top.run = config.run;
  if (config.single_stage) {
    top.stage = config.stages[0];
    top.kind = top.stage.kind == StageKind::kHalo  ? FileKind::kHalo
               : top.stage.kind == StageKind::kSft ? FileKind::kSft
                                                   : FileKind::kPretrain;
    return {{"config.yaml", EmitConfig(top)}};
  }
  top.kind = FileKind::kPipeline;
  top.name = config.name;
  top.tokenizer = config.stages[0].tokenizer;
  for (const StageConfig& stage : config.stages) {
    top.stages.push_back("stages/" + stage.name + ".yaml");
    files.emplace_back(top.stages.back(), EmitStage(stage));
  }
  files.insert(files.begin(), {"config.yaml", EmitConfig(top)});
  return files;
}

Status CheckResumable(const StageConfig& now, const std::string& saved_yaml,
                      const std::string& checkpoint) {
  StageFile saved;
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document,
                        ConfigDocument::Parse(saved_yaml, checkpoint + "/config.yaml"));
  SALA_RETURN_IF_ERROR(BindConfig(document, &saved));
  const auto fixed_part = [](StageConfig stage) {
    stage.parallel = {};
    stage.checkpoint = {};
    stage.validation = {};
    stage.eval.reset();
    stage.recompute = true;
    stage.batch.micro_batch_sequences = 1;
    if (stage.halo) {
      stage.halo->align.batch.micro_batch_sequences = 1;
      stage.halo->distil.batch.micro_batch_sequences = 1;
      if (stage.halo->finetune) stage.halo->finetune->batch.micro_batch_sequences = 1;
    }
    return EmitStage(stage);
  };
  std::istringstream a(fixed_part(saved.stage));
  std::istringstream b(fixed_part(now));
  std::string saved_line;
  std::string line;
  while (true) {
    const bool more_saved = static_cast<bool>(std::getline(a, saved_line));
    const bool more = static_cast<bool>(std::getline(b, line));
    if (!more_saved && !more) return OkStatus();
    if (more_saved && more && saved_line == line) continue;
    return ConfigError("CFG-RESUME",
                       "stage " + now.name + ": the configuration differs from the one of " +
                           checkpoint + ": saved '" + Printable(more_saved ? saved_line : "(end)") +
                           "', now '" + Printable(more ? line : "(end)") +
                           "'; restore the value, or start another run directory with init_from");
  }
}

}  // namespace sala::recipes
