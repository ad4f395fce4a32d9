// sala bench halo: the conversion's claims that compare whole conversions, measured on small models
// that are trained for it, several seeds, margins fixed beforehand.
#include <algorithm>
#include <cstdio>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "core/clock.h"
#include "core/file.h"
#include "core/log.h"
#include "core/terminal.h"
#include "launch/bench.h"
#include "launch/build_info.h"
#include "launch/command.h"
#include "nlohmann/json.hpp"
#include "recipes/halo/claim_trial.h"
#include "recipes/halo/select.h"

namespace sala::launch {
namespace {

using nlohmann::json;
using recipes::ClaimNumbers;
using recipes::ClaimResult;
using recipes::ClaimSettings;
using recipes::ConversionNumbers;
using recipes::RecallByLength;

struct BenchHaloOptions {
  int64_t seeds = 3;
  int64_t first_seed = 1;
  int threads = 1;
  std::string to;
  std::string json;
  bool quick = false;
  std::string selector = recipes::NameOf(recipes::Selector::kHalo);
};

std::string Row(const RecallByLength& recall) {
  std::string text;
  for (const auto& [length, share] : recall) text += Format(" %6.3f", share);
  return text;
}

std::string Lengths(const RecallByLength& recall) {
  std::string text;
  for (const auto& [length, share] : recall) text += Format(" %6ld", static_cast<long>(length));
  return text;
}

std::string Text(const std::vector<int64_t>& layers) {
  std::string text;
  for (int64_t layer : layers) text += (text.empty() ? "" : ",") + std::to_string(layer);
  return text.empty() ? "none" : text;
}

std::string Steps(const recipes::BatchConfig& batch) {
  return std::to_string(batch.steps) + " x " + WithCommas(batch.global_batch_tokens) + " tokens";
}

void PrintHead(const ClaimSettings& settings, const BenchHaloOptions& options,
               const std::string& command) {
  const model::ModelConfig& model = *settings.lessons.front().model;
  PrintOrigin(command);
  std::printf(
      "model       %ld layers, %ld stay softmax, hidden %ld, MLP %ld, %ld query and %ld key/value "
      "heads of %ld\n",
      static_cast<long>(model.num_hidden_layers),
      static_cast<long>(settings.halo.halo->softmax_layers), static_cast<long>(model.hidden_size),
      static_cast<long>(model.intermediate_size), static_cast<long>(model.num_attention_heads),
      static_cast<long>(model.num_key_value_heads), static_cast<long>(model.head_dim));
  std::string teacher;
  for (const recipes::StageConfig& lesson : settings.lessons)
    teacher += (teacher.empty() ? "" : " + ") + Steps(lesson.batch);
  const recipes::HaloConfig& halo = *settings.halo.halo;
  std::printf("steps       teacher %s; alignment %s; distillation %s; documents of %ld tokens\n",
              teacher.c_str(), Steps(halo.align.batch).c_str(), Steps(halo.distil.batch).c_str(),
              static_cast<long>(settings.stream.length));
  std::printf("selector    %s\n", NameOf(halo.selector));
  std::printf(
      "seeds       %ld, %d thread%s%s\n", static_cast<long>(options.seeds), options.threads,
      options.threads == 1 ? "" : "s",
      options.quick ? "; --quick: too little training for the verdicts to mean anything" : "");
}

void PrintSeed(int64_t seed, const ClaimNumbers& numbers, const std::vector<ClaimResult>& results) {
  std::printf("\nseed %ld     %.0f s\n", static_cast<long>(seed), numbers.seconds);
  std::printf("  alignment error / variance of the target, per layer:");
  for (double error : numbers.alignment_errors) std::printf(" %.3f", error);
  std::printf("\n  keep score per layer:");
  for (double score : numbers.keep_scores) std::printf(" %.3g", score);
  std::printf("\n  kept:");
  for (const auto& [selector, layers] : numbers.choices)
    std::printf(" by %s %s;", selector.c_str(), Text(layers).c_str());
  std::printf("\n  %-16s %-8s %8s %8s  stream%s  needle%s\n", "", "softmax", "KL", "loss",
              Lengths(*numbers.teacher_stream).c_str(), Lengths(*numbers.teacher_needle).c_str());
  const auto row = [](const std::string& name, const std::string& layers, const std::string& kl,
                      double loss, const RecallByLength& stream, const RecallByLength& needle) {
    std::printf("  %-16s %-8s %8s %8.4f        %s        %s\n", name.c_str(), layers.c_str(),
                kl.c_str(), loss, Row(stream).c_str(), Row(needle).c_str());
  };
  const ConversionNumbers& selected = numbers.conversions.at(recipes::kSelectedHybrid);
  row("teacher", "all", "", selected.teacher_loss, *numbers.teacher_stream,
      *numbers.teacher_needle);
  std::vector<std::string> names = {recipes::kSelectedHybrid, recipes::kNotAligned,
                                    recipes::kAllLinear, recipes::kRopeEverywhere};
  for (const auto& [name, conversion] : numbers.conversions) {
    if (name.rfind(recipes::kRandomSet, 0) == 0) names.push_back(name);
  }
  for (const std::string& name : names) {
    const ConversionNumbers& conversion = numbers.conversions.at(name);
    row(name, Text(conversion.softmax_layers), Format("%.4f", conversion.kl),
        conversion.student_loss, conversion.stream, conversion.needle);
  }
  std::printf(
      "  logit scale: a = %s, loss on other documents %.4f, without %.4f; needle with it%s\n",
      numbers.scale->base > 0 ? Format("%g", numbers.scale->base).c_str() : "none",
      *std::min_element(numbers.scale->losses.begin(), numbers.scale->losses.end()),
      numbers.scale->losses.front(), Row(numbers.scale->needle).c_str());
  for (const ClaimResult& result : results) {
    std::printf("  %2d %-28s %s\n     margin: %s\n     found:  %s\n", result.number,
                result.claim.c_str(), NameOf(result.verdict), result.margin.c_str(),
                result.found.c_str());
  }
}

void PrintVerdicts(int64_t first_seed, const std::vector<std::vector<ClaimResult>>& seeds) {
  std::printf("\n%-34s", "verdicts");
  for (size_t i = 0; i < seeds.size(); ++i)
    std::printf(" seed %-10ld", static_cast<long>(first_seed + static_cast<int64_t>(i)));
  std::printf("\n");
  for (size_t claim = 0; claim < seeds.front().size(); ++claim) {
    std::printf("%2d %-31s", seeds.front()[claim].number, seeds.front()[claim].claim.c_str());
    for (const std::vector<ClaimResult>& seed : seeds)
      std::printf(" %-15s", NameOf(seed[claim].verdict));
    std::printf("\n");
  }
}

json ToJson(int64_t seed, const ClaimNumbers& numbers, const std::vector<ClaimResult>& results) {
  json claims = json::array();
  for (const ClaimResult& result : results) {
    claims.push_back({{"number", result.number},
                      {"claim", result.claim},
                      {"margin", result.margin},
                      {"found", result.found},
                      {"verdict", NameOf(result.verdict)}});
  }
  return {{"seed", seed}, {"numbers", numbers.ToJson()}, {"claims", claims}};
}

Status BenchHalo(const BenchHaloOptions& options, const std::string& command) {
  ClaimSettings settings =
      options.quick ? recipes::QuickClaimSettings() : recipes::FullClaimSettings();
  for (const recipes::Selector selector : recipes::kClaimSelectors) {
    if (options.selector == recipes::NameOf(selector)) settings.halo.halo->selector = selector;
  }
  PrintHead(settings, options, command);
  std::fflush(stdout);
  // The logs of the runs are in their directories; on the terminal a line a piece is enough.
  const bool quiet = Quiet();
  SetQuiet(true);
  std::vector<std::vector<ClaimResult>> verdicts;
  json report = OriginJson(command);
  report["quick"] = options.quick;
  report["settings"] = settings.ToJson();
  report["seeds"] = json::array();
  const auto write = [&] {
    return options.json.empty() ? OkStatus()
                                : WriteFileAtomically(options.json, DumpJson(report, 1) + "\n");
  };
  SALA_RETURN_IF_ERROR(TryReport(options.json));
  for (int64_t seed = options.first_seed; seed < options.first_seed + options.seeds; ++seed) {
    const double started = ClockSeconds();
    const auto say = [&](const std::string& line) {
      if (!quiet) {
        PrintPlainLine(
            Format("seed %ld, %4.0f s: ", static_cast<long>(seed), ClockSeconds() - started) +
            line);
      }
    };
    recipes::ClaimTrial trial(settings, seed, options.to + "/seed-" + std::to_string(seed),
                              options.threads, "sala " + Version() + " (" + Commit() + ")", say);
    SALA_ASSIGN_OR_RETURN(const ClaimNumbers numbers, trial.Run());
    verdicts.push_back(JudgeClaims(numbers));
    PrintSeed(seed, numbers, verdicts.back());
    std::fflush(stdout);
    report["seeds"].push_back(ToJson(seed, numbers, verdicts.back()));
    SALA_RETURN_IF_ERROR(write());
  }
  PrintVerdicts(options.first_seed, verdicts);
  return OkStatus();
}

}  // namespace

void AddBenchHaloCommand(CommandLine& line, CLI::App& group) {
  auto options = std::make_shared<BenchHaloOptions>();
  CLI::App* command = AddCommand(
      group, "halo",
      "what the conversion's steps are worth: small teachers, converted with and without",
      "sala bench halo --to runs/claims --threads 2 --json claims.json");
  command
      ->add_option("--to", options->to,
                   "directory of the runs; what is finished there is taken up again")
      ->required();
  command->add_option("--seeds", options->seeds, "teachers, one a seed")
      ->check(CLI::Range(int64_t{1}, int64_t{1000}))
      ->capture_default_str();
  command->add_option("--first-seed", options->first_seed, "the others follow it")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000}))
      ->capture_default_str();
  command
      ->add_option("--threads", options->threads, "compute threads; results do not depend on them")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  std::vector<std::string> selectors;
  selectors.reserve(std::size(recipes::kClaimSelectors));
  for (const recipes::Selector selector : recipes::kClaimSelectors)
    selectors.emplace_back(NameOf(selector));
  command
      ->add_option("--selector", options->selector,
                   "rule that chooses the softmax layers (docs/math/halo.md 4)")
      ->check(CLI::IsMember(selectors))
      ->capture_default_str();
  command->add_option("--json", options->json, "file for all numbers");
  command->add_flag("--quick", options->quick,
                    "a few steps of everything: whether it runs, not what is true");
  line.OnUse(command, [options, &line] { return BenchHalo(*options, CommandText(line)); });
}

}  // namespace sala::launch
