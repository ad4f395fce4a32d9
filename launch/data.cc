// sala data: token stores from text, chat and synthetic tasks; looking into them.
#include <cmath>
#include <cstdio>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/file.h"
#include "core/log.h"
#include "data/commands.h"
#include "data/ingest.h"
#include "data/megatron.h"
#include "data/shuffle.h"
#include "data/synthetic.h"
#include "data/tokenizer.h"
#include "launch/command.h"
#include "launch/record_rules.h"

namespace sala::launch {
namespace {

struct IngestCommand {
  data::IngestOptions options;
  std::string tokenizer;
  std::vector<std::string> inputs;
  std::vector<std::string> rules;
  std::string license;
  std::string note;
  std::string separator;
  std::string max_rejects;
  bool blank_lines = false;
  bool no_bos = false;
  bool no_eos = false;
};

// "NAME=PATH" names a source; a bare path belongs to the source that has the dataset's name.
std::vector<data::IngestSource> Sources(const IngestCommand& command) {
  std::vector<data::IngestSource> sources;
  std::map<std::string, size_t> place;
  for (const std::string& input : command.inputs) {
    const size_t equals = input.find('=');
    const bool named = equals != std::string::npos && input.find('/') > equals;
    const std::string name = named ? input.substr(0, equals) : command.options.name;
    const auto [it, added] = place.emplace(name, sources.size());
    if (added)
      sources.push_back(
          {.name = name, .license = command.license, .note = command.note, .inputs = {}});
    sources[it->second].inputs.push_back(named ? input.substr(equals + 1) : input);
  }
  return sources;
}

// "25" records, or "0.5%" of them to four decimals.
Status SetMaxRejects(const std::string& text, data::IngestOptions* options) {
  if (text.empty()) return OkStatus();
  size_t used = 0;
  const bool percent = text.back() == '%';
  const std::string number = percent ? text.substr(0, text.size() - 1) : text;
  try {
    if (percent) {
      const double share = std::stod(number, &used);
      if (share >= 0 && share <= 100)
        options->max_rejects_ppm = std::llround(share * 10'000);
      else
        used = 0;
    } else {
      options->max_rejects = std::stoll(number, &used);
      if (*options->max_rejects < 0) used = 0;
    }
  } catch (const std::logic_error&) {  // no number, or one out of range
    used = 0;
  }
  if (used > 0 && used == number.size()) return OkStatus();
  return MakeError(
      ExitCode::kUsage, "USAGE",
      "--max-rejects " + Printable(text) + ": expected a number of records, or 0% to 100%");
}

Status Ingest(IngestCommand command) {
  data::IngestOptions& options = command.options;
  options.sources = Sources(command);
  options.progress = true;
  SALA_ASSIGN_OR_RETURN(options.rules, ParseRules(command.rules));
  SALA_RETURN_IF_ERROR(SetMaxRejects(command.max_rejects, &options));
  if (command.blank_lines) options.split = data::TextSplit::kBlankLines;
  if (!command.separator.empty()) {
    options.split = data::TextSplit::kSeparator;
    options.separator = command.separator;
  }
  options.tokenizer_path = command.tokenizer;
  options.add_bos = !command.no_bos;
  options.add_eos = !command.no_eos;
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(command.tokenizer));
  SALA_ASSIGN_OR_RETURN(const data::IngestReport report, data::RunIngest(options, *tokenizer));
  if (!report.passed_over.empty()) SALA_LOG(Warn) << data::NamePassedOver(report.passed_over);
  std::printf("%s: %s of %s records, %s tokens, %s to learn\n", options.output.c_str(),
              WithCommas(report.info.documents).c_str(), WithCommas(report.records).c_str(),
              WithCommas(report.info.tokens).c_str(),
              WithCommas(report.info.target_tokens).c_str());
  PrintCases(report.cases);
  if (!report.cases.empty())
    std::printf("  which they are: %s/ingest.log.jsonl\n", options.output.c_str());
  return OkStatus();
}

void AddIngest(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<IngestCommand>();
  CLI::App* command = AddCommand(
      group, "ingest", "text or chat files to a token store",
      "sala data ingest --tokenizer bytes --input texts/ --name books --to corpora/books");
  command
      ->add_option("--input", options->inputs,
                   ".txt, .jsonl, .ndjson and .json files, also with .gz or .zst, or directories "
                   "of them; NAME=PATH names a source")
      ->required();
  command->add_option("--to", options->options.output, "directory to make")->required();
  command->add_option("--name", options->options.name, "of the dataset")->required();
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "directory, tokenizer.model or the word bytes")
      ->required();
  command->add_option("--license", options->license, "of the sources, recorded");
  command->add_option("--note", options->note, "on the sources, recorded");
  command->add_option("--text-field", options->options.text_field, "of .jsonl records, dotted")
      ->capture_default_str();
  command->add_option("--messages-field", options->options.messages_field, "of chat records")
      ->capture_default_str();
  CLI::Option* blank =
      command->add_flag("--blank-lines", options->blank_lines, "a .txt file is cut at blank lines");
  command
      ->add_option("--separator", options->separator,
                   "a .txt file is cut at lines that are exactly this")
      ->excludes(blank);
  command->add_flag("--dedup", options->options.dedup, "leave out exact copies");
  command->add_option("--rule", options->rules, kRuleHelp);
  command->add_option("--max-rejects", options->max_rejects,
                      "malformed records that may be skipped: a number, or a share such as 0.1% "
                      "(the default)");
  command->add_option("--id-field", options->options.id_field, "names a record in the log")
      ->capture_default_str();
  command->add_option("--workers", options->options.workers, "threads; 0: one for each core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  command->add_flag("--resume", options->options.resume,
                    "go on with what an ingest that was stopped left, or begin");
  command
      ->add_option("--zstd-long", options->options.zstd_window_log,
                   "largest window of .zst files, as a power of two")
      ->check(CLI::Range(10, 31))
      ->capture_default_str();
  command
      ->add_option("--piece-bytes", options->options.piece_bytes,
                   "text that a worker holds, and does again after a kill")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 32))
      ->capture_default_str();
  AddChatOptions(command, &options->options);
  command->add_flag("--no-bos", options->no_bos, "no start token before a document");
  command->add_flag("--no-eos", options->no_eos, "no end token behind a document");
  command->add_option("--shard-tokens", options->options.shard_tokens, "tokens per file")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  line.OnUse(command, [options] { return Ingest(*options); });
}

struct ShowCommand {
  std::string directory, tokenizer, file;
  int64_t document = 0;
  bool decode = false;
};

Status Show(const ShowCommand& command) {
  std::string path = command.tokenizer;
  if (command.decode && path.empty()) {
    SALA_ASSIGN_OR_RETURN(const data::DatasetInfo info, data::ReadDatasetInfo(command.directory));
    if (info.tokenizer_name != "bytes")
      return MakeError(ExitCode::kUsage, "USAGE",
                       "--decode: " + command.directory + " was made with " + info.tokenizer_name +
                           "; say where that is with --tokenizer");
    path = "bytes";
  }
  std::unique_ptr<data::Tokenizer> tokenizer;
  if (!path.empty()) {
    SALA_ASSIGN_OR_RETURN(tokenizer, data::LoadTokenizer(path));
  }
  SALA_ASSIGN_OR_RETURN(
      const std::string text,
      data::ShowDocument(command.directory, command.document, tokenizer.get(), command.file));
  std::printf("%s\n", text.c_str());
  return OkStatus();
}

Status PrintText(const StatusOr<std::string>& text) {
  if (text.ok()) std::printf("%s\n", text->c_str());
  return text.status();
}

void AddViews(CommandLine& line, CLI::App& group) {
  auto directory = std::make_shared<std::string>();
  auto json = std::make_shared<bool>(false);
  CLI::App* info =
      AddCommand(group, "info", "what a token store holds", "sala data info corpora/books");
  info->add_option("dataset", *directory, "directory of a token store")->required();
  info->add_flag("--json", *json, "as one JSON object");
  line.OnUse(info,
             [directory, json] { return PrintText(data::DescribeDataset(*directory, *json)); });

  auto full = std::make_shared<bool>(false);
  CLI::App* verify = AddCommand(group, "verify", "whether a token store is whole",
                                "sala data verify corpora/books --full");
  verify->add_option("dataset", *directory, "directory of a token store")->required();
  verify->add_flag("--full", *full, "also every checksum and every token");
  verify->add_flag("--json", *json, "the result as one JSON object");
  line.OnUse(verify, [directory, full, json] {
    return PrintText(data::VerifyDataset(*directory, *full, *json));
  });

  auto options = std::make_shared<ShowCommand>();
  CLI::App* show = AddCommand(group, "show", "one document: ids, or text with a tokenizer",
                              "sala data show corpora/books --doc 3 --tokenizer bytes");
  show->add_option("dataset", options->directory, "directory of a token store")->required();
  show->add_option("--doc", options->document, "number of the document, from 0")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  show->add_option("--file", options->file, "--doc counts in this file: its name or number");
  show->add_option("--tokenizer", options->tokenizer, "shows text instead of ids");
  show->add_flag("--decode", options->decode,
                 "likewise, of a store made with bytes or with --tokenizer");
  line.OnUse(show, [options] { return Show(*options); });
}

Status PrintMade(const std::string& output, const StatusOr<data::DatasetInfo>& info) {
  SALA_RETURN_IF_ERROR(info.status());
  std::printf("%s: %s documents, %s tokens in %zu files\n", output.c_str(),
              WithCommas(info->documents).c_str(), WithCommas(info->tokens).c_str(),
              info->files.size());
  return OkStatus();
}

void AddShuffle(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<data::ShuffleOptions>();
  auto memory_mb = std::make_shared<int64_t>(1024);
  CLI::App* command =
      AddCommand(group, "shuffle", "the documents of a token store in a random order",
                 "sala data shuffle corpora/books --to corpora/books-shuffled --seed 1");
  command->add_option("dataset", options->input, "directory of a token store")->required();
  command->add_option("--to", options->output, "directory to make")->required();
  command->add_option("--seed", options->seed, "of the order")->capture_default_str();
  command->add_option("--name", options->name, "of the new dataset; default: as the old one");
  command
      ->add_option("--memory-mb", *memory_mb,
                   "about the memory to take; does not change the result")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command->add_option("--shard-tokens", options->shard_tokens, "tokens per file")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  line.OnUse(command, [options, memory_mb] {
    options->memory_bytes = *memory_mb << 20;
    return PrintMade(options->output, data::ShuffleDataset(*options));
  });
}

void AddMerge(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<data::MergeOptions>();
  CLI::App* command =
      AddCommand(group, "merge", "several token stores as one",
                 "sala data merge corpora/books corpora/web --name all --to corpora/all");
  command->add_option("datasets", options->inputs, "directories of token stores")->required();
  command->add_option("--to", options->output, "directory to make")->required();
  command->add_option("--name", options->name, "of the new dataset")->required();
  command->add_option("--shard-tokens", options->shard_tokens, "tokens per file")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  line.OnUse(command,
             [options] { return PrintMade(options->output, data::MergeDatasets(*options)); });
}

void AddImportMegatron(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<data::MegatronOptions>();
  auto path = std::make_shared<std::string>();
  CLI::App* command = AddCommand(
      group, "import-megatron", "Megatron's PREFIX.idx and PREFIX.bin to a token store",
      "sala data import-megatron corpus_text_document --tokenizer tok/ --name c --to corpora/c");
  command->add_option("prefix", options->prefix, "path without .idx and .bin")->required();
  command->add_option("--to", options->output, "directory to make")->required();
  command->add_option("--name", options->name, "of the dataset and its source")->required();
  CLI::Option* tokenizer = command->add_option(
      "--tokenizer", *path, "that the tokens were made with: directory, tokenizer.model or bytes");
  CLI::Option* vocabulary = command
                                ->add_option("--vocab-size", options->vocab_size,
                                             "where nobody has the tokenizer: number of its tokens")
                                ->check(CLI::Range(int64_t{1}, int64_t{1} << 31))
                                ->excludes(tokenizer);
  command->add_option("--license", options->license, "of the source, recorded");
  command->add_option("--note", options->note, "on the source, recorded");
  command->add_option("--shard-tokens", options->shard_tokens, "tokens per file")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40))
      ->capture_default_str();
  line.OnUse(command, [options, path, vocabulary]() -> Status {
    if (path->empty() && vocabulary->count() == 0)
      return MakeError(ExitCode::kUsage, "USAGE", "give --tokenizer or --vocab-size");
    std::unique_ptr<data::Tokenizer> loaded;
    if (!path->empty()) {
      SALA_ASSIGN_OR_RETURN(loaded, data::LoadTokenizer(*path));
    }
    return PrintMade(options->output, data::ImportMegatron(*options, loaded.get()));
  });
}

struct SynthCommand {
  data::SyntheticOptions recall;
  data::ContinuationOptions continuation;
  std::string task;
  std::string tokenizer;
};

Status Synth(SynthCommand command) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(command.tokenizer));
  StatusOr<data::DatasetInfo> info{data::DatasetInfo()};
  if (command.task == "continuation") {
    command.continuation.dataset = command.recall.haystack_dataset;
    command.continuation.documents = command.recall.documents;
    command.continuation.output = command.recall.output;
    command.continuation.name = command.recall.name;
    info = data::MaterialiseContinuation(command.continuation, *tokenizer);
  } else {
    SALA_ASSIGN_OR_RETURN(command.recall.recall.task, data::RecallTaskNamed(command.task));
    command.recall.recall.purpose = "train";  // never the texts of an evaluation
    info = data::MaterialiseSynthetic(command.recall, *tokenizer);
  }
  SALA_RETURN_IF_ERROR(info.status());
  std::printf("%s: %s documents, %s tokens, %s to learn\n", command.recall.output.c_str(),
              WithCommas(info->documents).c_str(), WithCommas(info->tokens).c_str(),
              WithCommas(info->target_tokens).c_str());
  return OkStatus();
}

void AddSynth(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<SynthCommand>();
  data::SyntheticOptions& recall = options->recall;
  CLI::App* command =
      AddCommand(group, "synth", "recall tasks, or chats that continue a text, as a token store",
                 "sala data synth --task passkey --tokenizer bytes --documents 100 --length 512 "
                 "--name pass --to corpora/pass");
  command->add_option("--task", options->task, "passkey, niah_multikey, tracking or continuation")
      ->required()
      ->check(CLI::IsMember({"passkey", "niah_multikey", "tracking", "continuation"}));
  command
      ->add_option("--tokenizer", options->tokenizer,
                   "directory, tokenizer.model or the word bytes")
      ->required();
  command->add_option("--to", recall.output, "directory to make")->required();
  command->add_option("--name", recall.name, "of the dataset")->required();
  command->add_option("--documents", recall.documents, "how many (continuation: at most; 0: all)")
      ->required()
      ->check(CLI::NonNegativeNumber);
  command->add_option("--length", recall.recall.length_tokens, "tokens of a document")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--min-length", recall.min_length_tokens,
                   "lengths from here to --length; 0: all the same")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--keys", recall.recall.keys,
                   "niah_multikey: keys; tracking: length of the chain")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("--chat", recall.recall.chat, "as a chat; only the answer is learned");
  command->add_option("--seed", recall.recall.seed, "of the random draws")->capture_default_str();
  command->add_option(
      "--from", recall.haystack_dataset,
      "token store of text: what needles are hidden in (default: filler), or what is continued");
  command
      ->add_option("--held-out-fraction", recall.held_out_fraction,
                   "--from for recall: leave out the documents that a run with a "
                   "data.validation.fraction up to this one holds out")
      ->check(CLI::Range(0.0, 0.999))
      ->capture_default_str();
  command->add_option("--held-out-seed", recall.held_out_seed, "likewise: the run's data.seed")
      ->capture_default_str();
  command
      ->add_option("--prompt-tokens", options->continuation.prompt_tokens,
                   "continuation: of the first part")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--answer-tokens", options->continuation.answer_tokens,
                   "continuation: of the answer")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  line.OnUse(command, [options] { return Synth(*options); });
}

}  // namespace

void AddDataCommands(CommandLine& line) {
  CLI::App* group =
      AddCommand(line.app, "data", "token stores: ingest, import, shuffle, merge, look into",
                 "sala data info corpora/books");
  group->require_subcommand(1);
  AddIngest(line, *group);
  AddViews(line, *group);
  AddShuffle(line, *group);
  AddMerge(line, *group);
  AddImportMegatron(line, *group);
  AddSynth(line, *group);
  AddDataPlanCommands(line, *group);
}

}  // namespace sala::launch
