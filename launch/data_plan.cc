// sala data plan, trace and render: what training will see of its data, before it does.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "core/json.h"
#include "data/chat_sample.h"
#include "data/plan.h"
#include "data/stream.h"
#include "data/tokenizer.h"
#include "launch/command.h"
#include "nlohmann/json.hpp"
#include "recipes/config.h"

namespace sala::launch {
namespace {

// A part of a run that goes through data of its own: a stage, or a phase of a HALO stage.
struct Part {
  const recipes::StageConfig* stage;
  std::string phase;  // "": the stage itself
  recipes::BatchConfig batch;
  std::string name() const { return phase.empty() ? stage->name : stage->name + "/" + phase; }
  int64_t samples() const { return batch.steps * batch.global_batch_sequences(); }
};

std::vector<Part> PartsOf(const recipes::PipelineConfig& config) {
  std::vector<Part> parts;
  for (const recipes::StageConfig& stage : config.stages) {
    if (stage.kind != recipes::StageKind::kHalo) {
      parts.push_back({&stage, "", stage.batch});
      continue;
    }
    parts.push_back({&stage, "align", stage.halo->align.batch});
    parts.push_back({&stage, "distil", stage.halo->distil.batch});
    if (stage.halo->finetune) parts.push_back({&stage, "finetune", stage.halo->finetune->batch});
  }
  return parts;
}

// Those that `wanted` names, as STAGE or STAGE/PHASE; all when it is "".
StatusOr<std::vector<Part>> FindParts(const recipes::PipelineConfig& config,
                                      const std::string& wanted) {
  std::vector<Part> found;
  std::string names;
  for (const Part& part : PartsOf(config)) {
    names += (names.empty() ? "" : ", ") + part.name();
    if (wanted.empty() || wanted == part.name() || wanted == part.stage->name)
      found.push_back(part);
  }
  if (!found.empty()) return found;
  return MakeError(ExitCode::kUsage, "USAGE",
                   "--stage " + wanted + ": the configuration has " + names);
}

StatusOr<std::unique_ptr<data::SampleStream>> OpenStream(const Part& part,
                                                         const data::Tokenizer& tokenizer) {
  auto stream =
      data::SampleStream::Open(part.stage->data, part.name(), part.batch.seq_len_tokens, tokenizer);
  if (!stream.ok()) return Annotate(stream.status(), "stage " + part.name());
  return stream;
}

std::string Percent(double share) { return Format("%.2f %%", 100 * share); }

void PrintPlan(const Part& part, const data::DataPlan& plan, const data::ValidationSet& held_out) {
  std::printf("\n%s: %s samples of %s slots, %s tokens, padding %s\n", part.name().c_str(),
              WithCommas(plan.samples).c_str(), WithCommas(plan.seq_len).c_str(),
              WithCommas(plan.tokens()).c_str(), Percent(plan.padding_share()).c_str());
  if (held_out.size() > 0) {
    std::printf("  validation: %s samples of %s held-out documents\n",
                WithCommas(held_out.size()).c_str(), WithCommas(held_out.documents()).c_str());
  }
  for (const data::ViewPlan& view : plan.views) {
    const auto row = [](const char* name, const std::string& value) {
      std::printf("    %-22s %s\n", name, value.c_str());
    };
    const auto count = [&](const char* name, int64_t value) {
      if (value > 0) row(name, WithCommas(value));
    };
    std::printf("  %s  (%s)\n", view.name.c_str(), view.dataset.c_str());
    row("share of the samples", Percent(view.share));
    row("documents", WithCommas(view.documents) + " of " + WithCommas(view.dataset_documents) +
                         ", " + WithCommas(view.tokens) + " tokens");
    count("held out", view.removed.other_split);
    count("below min_tokens", view.removed.too_short);
    count("not below max_tokens", view.removed.too_long);
    count(view.chat ? "chats over seq_len" : "dropped over seq_len", view.removed.over_seq_len);
    count("truncated to seq_len", view.truncated);
    row("samples", WithCommas(view.samples) + " of " + WithCommas(view.samples_per_epoch) +
                       " an epoch: " + Format("%.2f", view.epochs()) + " epochs, max_epochs " +
                       std::to_string(view.max_epochs) +
                       (view.used_too_often() ? ": MIX-EPOCHS" : ""));
    if (view.measured == 0) continue;
    row("padding", Percent(view.padding_share(plan.seq_len)));
    row("segments of a sample",
        WithCommas(view.min_segments) + " to " + WithCommas(view.max_segments) + ", mean " +
            Format("%.1f",
                   static_cast<double>(view.segments) / static_cast<double>(view.measured)));
    row("learned tokens", Percent(view.learned_share(plan.seq_len)));
  }
}

struct PlanOptions {
  std::string config;
  std::vector<std::string> sets;
  std::string stage;
  bool json = false;
};

// Every stage is shown; the first one that would use a view too often is the error then.
Status Plan(const PlanOptions& options) {
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, options.sets));
  SALA_ASSIGN_OR_RETURN(const std::vector<Part> parts, FindParts(config, options.stage));
  Status verdict = OkStatus();
  auto rows = nlohmann::ordered_json::array();
  for (const Part& part : parts) {
    SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                          data::LoadTokenizer(part.stage->tokenizer));
    SALA_ASSIGN_OR_RETURN(const auto stream, OpenStream(part, *tokenizer));
    SALA_ASSIGN_OR_RETURN(const data::DataPlan plan, data::PlanData(*stream, part.samples()));
    SALA_ASSIGN_OR_RETURN(
        const auto held_out,
        data::ValidationSet::Open(part.stage->data, part.batch.seq_len_tokens, *tokenizer));
    if (options.json) {
      nlohmann::ordered_json row = data::ToJson(plan);
      row["stage"] = part.stage->name;
      row["phase"] = part.phase;
      row["validation_samples"] = held_out->size();
      row["validation_documents"] = held_out->documents();
      rows.push_back(std::move(row));
    } else {
      PrintPlan(part, plan, *held_out);
    }
    if (verdict.ok()) verdict = stream->CheckEpochs(part.samples());
  }
  if (options.json) std::printf("%s\n", nlohmann::ordered_json({{"stages", rows}}).dump(1).c_str());
  return verdict;
}

struct TraceOptions {
  std::string config;
  std::vector<std::string> sets;
  std::string stage;
  int64_t step = 0;
};

Status Trace(const TraceOptions& options) {
  SALA_ASSIGN_OR_RETURN(const recipes::PipelineConfig config,
                        recipes::LoadPipeline(options.config, options.sets));
  SALA_ASSIGN_OR_RETURN(const std::vector<Part> parts, FindParts(config, options.stage));
  if (parts.size() > 1) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--stage is needed, of a HALO stage with its phase (halo/distil): there are " +
                         std::to_string(parts.size()));
  }
  const Part& part = parts[0];
  if (options.step >= part.batch.steps) {
    return MakeError(ExitCode::kUsage, "USAGE",
                     "--step " + std::to_string(options.step) + ": stage " + part.name() +
                         " has the steps 0 to " + std::to_string(part.batch.steps - 1));
  }
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(part.stage->tokenizer));
  SALA_ASSIGN_OR_RETURN(const auto stream, OpenStream(part, *tokenizer));
  const int64_t sequences = part.batch.global_batch_sequences();
  SALA_ASSIGN_OR_RETURN(const std::string text,
                        data::TraceSamples(*stream, options.step * sequences, sequences));
  std::fputs(text.c_str(), stdout);
  return OkStatus();
}

struct RenderOptions {
  data::IngestOptions ingest;
  std::string file;
  std::string tokenizer;
  int64_t record = 0;
  bool json = false;
};

Status Render(RenderOptions options) {
  options.ingest.tokenizer_path = options.tokenizer;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  SALA_ASSIGN_OR_RETURN(
      const data::ChatPreview chat,
      data::PreviewChat(options.file, options.record, options.ingest, *tokenizer));
  const auto learned = std::count(chat.mask.begin(), chat.mask.end(), uint8_t{1});
  if (options.json) {
    auto spans = nlohmann::ordered_json::array();
    for (const data::ByteSpan& span : chat.learned) spans.push_back({span.begin, span.end});
    const nlohmann::ordered_json all = {{"shape", data::NameOf(chat.shape)},
                                        {"text", chat.text},
                                        {"learned", spans},
                                        {"tokens", chat.tokens},
                                        {"mask", chat.mask}};
    std::printf("%s\n", DumpJson(all).c_str());
    return OkStatus();
  }
  const bool terminal = isatty(STDOUT_FILENO) == 1;
  const data::LearnedMarks marks = terminal ? data::ColouredMarks() : data::LearnedMarks();
  std::printf("%s\nshape %s, %s tokens, %s learned (%s, marked)\n",
              data::MarkedText(*tokenizer, chat.tokens, chat.mask, marks, 0, 0).c_str(),
              data::NameOf(chat.shape),
              WithCommas(static_cast<int64_t>(chat.tokens.size())).c_str(),
              WithCommas(learned).c_str(),
              Percent(static_cast<double>(learned) /
                      static_cast<double>(std::max<size_t>(1, chat.tokens.size())))
                  .c_str());
  return OkStatus();
}

void AddConfigOptions(CLI::App* command, std::string* config, std::vector<std::string>* sets,
                      std::string* stage) {
  command->add_option("config", *config, "pipeline or stage file")->required();
  command->add_option("--set", *sets, "KEY.KEY=VALUE over the file; in a pipeline STAGE.KEY=VALUE")
      ->allow_extra_args(false);  // one value each, so that the file may follow
  command->add_option("--stage", *stage, "this stage only; of a HALO stage also STAGE/PHASE");
}

void AddRender(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<RenderOptions>();
  CLI::App* command = AddCommand(
      group, "render", "a chat record as ingest would make it, what is learned marked",
      "sala data render chats.jsonl --tokenizer bytes --chat-template chatml --record 3");
  command->add_option("file", options->file, ".jsonl of chat records")->required();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "directory, tokenizer.model or the word bytes")
      ->required();
  AddChatOptions(command, &options->ingest);
  command->add_option("--messages-field", options->ingest.messages_field, "of chat records")
      ->capture_default_str();
  command->add_option("--record", options->record, "number of the record, from 0")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_flag("--json", options->json,
                    "text, learned bytes, tokens and mask as one JSON object");
  line.OnUse(command, [options] { return Render(*options); });
}

}  // namespace

void AddChatOptions(CLI::App* command, data::IngestOptions* options) {
  command
      ->add_option("--chat-template", options->chat_template,
                   "chatml, qwen2, llama3, plain, a .jinja file, or the word tokenizer for the "
                   "template beside the tokenizer")
      ->capture_default_str();
  command
      ->add_option_function<std::string>(
          "--chat-mask",
          [options](const std::string& mask) {
            options->chat_mask = mask == "last"  ? data::ChatMask::kLastAssistant
                                 : mask == "all" ? data::ChatMask::kAllTokens
                                                 : data::ChatMask::kAllAssistant;
          },
          "what is learned of a chat: every assistant turn, the last one, or all tokens")
      ->check(CLI::IsMember({"assistant", "last", "all"}));
}

void AddDataPlanCommands(CommandLine& line, CLI::App& group) {
  auto plan = std::make_shared<PlanOptions>();
  CLI::App* command = AddCommand(
      group, "plan", "what each stage will see of its data: epochs, padding, what is left out",
      "sala data plan configs/tiny/pipeline.yaml --stage sft_1");
  AddConfigOptions(command, &plan->config, &plan->sets, &plan->stage);
  command->add_flag("--json", plan->json, "as one JSON object");
  line.OnUse(command, [plan] { return Plan(*plan); });

  auto trace = std::make_shared<TraceOptions>();
  command = AddCommand(group, "trace", "the documents in the samples of one step",
                       "sala data trace configs/tiny/pipeline.yaml --stage stable --step 100");
  AddConfigOptions(command, &trace->config, &trace->sets, &trace->stage);
  command->add_option("--step", trace->step, "of the stage, from 0")
      ->check(CLI::NonNegativeNumber)
      ->required();
  line.OnUse(command, [trace] { return Trace(*trace); });
  AddRender(line, group);
}

}  // namespace sala::launch
