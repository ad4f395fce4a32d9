#include "launch/tokenizer_check.h"

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "data/tokenizer.h"

namespace sala::launch {
namespace {

struct VerifyOptions {
  std::string tokenizer;
  std::string against;
};

std::string ShownToken(const data::Tokenizer& tokenizer, const std::vector<int32_t>& ids,
                       size_t at) {
  if (at >= ids.size()) return "the end";
  return std::to_string(ids[at]) + " '" + Printable(tokenizer.TokenBytes(ids[at])) + "'";
}

// Where two lists first differ; npos: nowhere.
size_t FirstDifference(const std::vector<int32_t>& a, const std::vector<int32_t>& b) {
  const auto [in_a, in_b] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  return in_a == a.end() && in_b == b.end() ? std::string::npos
                                            : static_cast<size_t>(in_a - a.begin());
}

Status Verify(const VerifyOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  if (!PathExists(options.against)) {
    return MakeError(ExitCode::kNoInput, "FILE-MISSING",
                     options.against + ": no such file; give JSON lines {\"text\", \"ids\"}");
  }
  std::ifstream file(options.against, std::ios::binary);
  int64_t lines = 0, tokens = 0;
  for (std::string text; std::getline(file, text);) {
    const std::string place = options.against + ":" + std::to_string(++lines);
    const nlohmann::json record = ParseJson(text);
    const bool is_record =
        record.is_object() && record.contains("text") && record["text"].is_string() &&
        record.contains("ids") && record["ids"].is_array() &&
        std::all_of(record["ids"].begin(), record["ids"].end(),
                    [](auto& id) { return id.is_number_unsigned() && id <= INT32_MAX; });
    if (!is_record) {
      return MakeError(ExitCode::kData, "TOK-LIST",
                       place + ": expected a record {\"text\": \"...\", \"ids\": [1, 2]}");
    }
    const auto expected = record["ids"].get<std::vector<int32_t>>();
    const std::string& given = record["text"].get_ref<const std::string&>();
    const std::vector<int32_t> ids = tokenizer->Encode(given);
    tokens += static_cast<int64_t>(expected.size());
    const size_t at = FirstDifference(ids, expected);
    if (at != std::string::npos) {
      return MakeError(ExitCode::kData, "TOK-MISMATCH",
                       place + ": token " + std::to_string(at) + " is " +
                           ShownToken(*tokenizer, ids, at) + ", the file says " +
                           ShownToken(*tokenizer, expected, at) +
                           "; the records were made with another tokenizer, or report it");
    }
    // The same ids must come with their places, which chat masks go by.
    std::vector<int32_t> placed;
    int64_t last = 0;
    for (const auto& piece : tokenizer->EncodeWithOffsets(given)) {
      placed.push_back(piece.id);
      const bool inside = piece.begin >= last && piece.begin <= static_cast<int64_t>(given.size());
      if (!inside) {
        return MakeError(ExitCode::kInternal, "INTERNAL",
                         place + ": token " + std::to_string(placed.size() - 1) + " starts at " +
                             std::to_string(piece.begin) + " after " + std::to_string(last));
      }
      last = piece.begin;
    }
    if (placed != ids) {
      return MakeError(ExitCode::kInternal, "INTERNAL",
                       place + ": with places the ids are others, from token " +
                           std::to_string(FirstDifference(placed, ids)) + " on");
    }
  }
  std::printf("%s lines, %s tokens: the same ids\n", WithCommas(lines).c_str(),
              WithCommas(tokens).c_str());
  return OkStatus();
}

struct StatsOptions {
  std::string tokenizer;
  std::vector<std::string> inputs;
  bool json = false;
};

// White space between words, as far as ASCII has it.
int64_t Words(const std::string& text) {
  int64_t words = 0;
  bool inside = false;
  for (const char c : text) {
    const bool space = c == ' ' || (c >= '\t' && c <= '\r');
    if (!space && !inside) ++words;
    inside = !space;
  }
  return words;
}

// "<0x0A>": a byte of a character that is no piece.
bool IsFallback(const data::Tokenizer& tokenizer, int32_t id, const std::vector<bool>& fallback) {
  return id != tokenizer.unk_id() && fallback[static_cast<size_t>(id)];
}

std::vector<bool> FallbackTokens(const data::Tokenizer& tokenizer) {
  std::vector<bool> fallback(static_cast<size_t>(tokenizer.vocab_size()), false);
  for (int b = 0; b < 256; ++b) {
    if (const auto id = tokenizer.FindToken(Format("<0x%02X>", static_cast<unsigned>(b))))
      fallback[static_cast<size_t>(*id)] = true;
  }
  return fallback;
}

std::string ProcessorName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string text; std::getline(file, text);) {
    if (text.starts_with("model name")) return text.substr(text.find(": ") + 2);
  }
  return "an unknown processor";
}

Status Stats(const StatsOptions& options) {
  SALA_ASSIGN_OR_RETURN(const std::unique_ptr<data::Tokenizer> tokenizer,
                        data::LoadTokenizer(options.tokenizer));
  const std::vector<bool> fallback = FallbackTokens(*tokenizer);
  nlohmann::json rows = nlohmann::json::array();
  if (!options.json)
    std::printf("%12s %12s %9s %10s %9s %8s %8s  file\n", "bytes", "tokens", "byte/tok", "tok/word",
                "fallback", "unk", "MB/s");
  for (const std::string& input : options.inputs) {
    SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(input));
    const std::clock_t begin = std::clock();
    const std::vector<int32_t> ids = tokenizer->Encode(text);
    const double seconds = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    int64_t bytes = 0, unknown = 0;
    for (const int32_t id : ids) {
      bytes += IsFallback(*tokenizer, id, fallback) ? 1 : 0;
      unknown += id == tokenizer->unk_id() ? 1 : 0;
    }
    const auto share = [](auto part, auto whole) {
      return whole == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(whole);
    };
    const double rate = seconds > 0 ? static_cast<double>(text.size()) / seconds * 1e-6 : 0.0;
    const int64_t words = Words(text);
    if (options.json) {
      rows.push_back({{"file", input},
                      {"bytes", text.size()},
                      {"tokens", ids.size()},
                      {"words", words},
                      {"bytes_per_token", share(text.size(), ids.size())},
                      {"tokens_per_word", share(ids.size(), words)},
                      {"fallback_share", share(bytes, ids.size())},
                      {"unk_share", share(unknown, ids.size())},
                      {"megabytes_per_s", rate}});
      continue;
    }
    std::printf("%12s %12s %9.3f %10.3f %8.3f%% %7.3f%% %8.1f  %s\n",
                WithCommas(static_cast<int64_t>(text.size())).c_str(),
                WithCommas(static_cast<int64_t>(ids.size())).c_str(),
                share(text.size(), ids.size()), share(ids.size(), words),
                100 * share(bytes, ids.size()), 100 * share(unknown, ids.size()), rate,
                input.c_str());
  }
  if (options.json) {
    std::printf("%s\n", rows.dump(2).c_str());
  } else {
    std::printf("rates: by processor time of one thread of %u on %s, each file once as one text\n",
                std::thread::hardware_concurrency(), ProcessorName().c_str());
  }
  return OkStatus();
}

}  // namespace

void AddTokenizerChecks(CLI::App& group, CommandLine& line) {
  auto verify = std::make_shared<VerifyOptions>();
  CLI::App* verify_command =
      AddCommand(group, "verify", "compares ids with those another program gave",
                 "echo '{\"text\": \"hi\", \"ids\": [104, 105]}' > ids.jsonl; sala tokenizer "
                 "verify bytes --against ids.jsonl");
  verify_command->add_option("tokenizer", verify->tokenizer, kTokenizerHelp)->required();
  verify_command
      ->add_option("--against", verify->against,
                   "JSON lines {\"text\": ..., \"ids\": [...]}, without what --special adds")
      ->required();
  line.OnUse(verify_command, [verify] { return Verify(*verify); });

  auto stats = std::make_shared<StatsOptions>();
  CLI::App* stats_command = AddCommand(
      group, "stats", "bytes per token, tokens per word, shares of fallback and unk, speed",
      "sala tokenizer stats bytes README.md docs/training.md");
  stats_command->add_option("tokenizer", stats->tokenizer, kTokenizerHelp)->required();
  stats_command->add_option("files", stats->inputs, "UTF-8 text files")->required();
  stats_command->add_flag("--json", stats->json, "for scripts");
  line.OnUse(stats_command, [stats] { return Stats(*stats); });
}

}  // namespace sala::launch
