// sala ckpt: what checkpoints hold, whether they are whole, how two differ.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/file.h"
#include "launch/command.h"

namespace sala::launch {
namespace {

std::string Text(const nlohmann::json& object, const char* key) {
  if (!object.is_object() || !object.contains(key)) return "-";
  const nlohmann::json& value = object[key];
  return value.is_string() ? value.get<std::string>() : value.dump();
}

// A run directory, its checkpoints/ or one checkpoint's parent.
Status List(const std::string& path) {
  if (!IsDirectory(path))
    return MakeError(ExitCode::kNoInput, "CKPT-NONE",
                     path + ": no such directory; name that of a run");
  const std::string root = IsDirectory(path + "/checkpoints") ? path + "/checkpoints" : path;
  const std::vector<CheckpointListing> list = ListCheckpoints(root);
  if (list.empty())
    return MakeError(ExitCode::kData, "CKPT-NONE",
                     root +
                         ": no complete checkpoint; name the directory of a run, or wait for its "
                         "first save");
  std::printf("%12s  %-20s %-6s %s\n", "step", "stage", "final", "directory");
  for (const CheckpointListing& entry : list) {
    std::printf("%12s  %-20s %-6s %s\n", WithCommas(entry.global_step).c_str(), entry.stage.c_str(),
                entry.stage_final ? "yes" : "", entry.directory.c_str());
  }
  return OkStatus();
}

Status Info(const std::string& path, bool tensors) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(path));
  const CheckpointInfo& info = checkpoint.info();
  std::printf("step        %s\n", WithCommas(info.global_step).c_str());
  std::printf("stage       %s\n", info.stage.dump().c_str());
  std::printf("save id     %s\n", info.save_id.c_str());
  std::printf("program     %s\n", info.program.dump().c_str());
  std::printf("topology    %s\n", info.topology.dump().c_str());
  std::printf("parameters  %s\n", Text(info.model, "parameters").c_str());
  std::printf("mixers      %s\n", Text(info.model, "mixer_types").c_str());
  std::printf("tokenizer   %s\n", info.tokenizer_fingerprint.c_str());
  std::printf("parent      %s\n", info.parent.dump().c_str());
  std::printf("trainer     %s\n", info.trainer.dump().c_str());
  for (const TensorKind kind : {TensorKind::kParam, TensorKind::kMaster, TensorKind::kExpAvg,
                                TensorKind::kExpAvgSq, TensorKind::kBuffer}) {
    int64_t count = 0;
    int64_t elements = 0;
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      if (tensor.kind != kind) continue;
      ++count;
      elements += tensor.numel();
    }
    if (count == 0) continue;
    std::printf("%-11s %s tensors, %s elements\n", std::string(NameOf(kind)).c_str(),
                WithCommas(count).c_str(), WithCommas(elements).c_str());
  }
  if (!tensors) return OkStatus();
  for (const StoredTensor& tensor : checkpoint.tensors()) {
    std::printf("  %-10s %-4s %-20s %s\n", std::string(NameOf(tensor.kind)).c_str(),
                std::string(NameOf(tensor.dtype)).c_str(),
                nlohmann::json(tensor.shape).dump().c_str(), tensor.name.c_str());
  }
  return OkStatus();
}

Status Verify(const std::string& path, VerifyLevel level) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(path));
  SALA_RETURN_IF_ERROR(checkpoint.Verify(level));
  std::printf("%s: good (step %s, %s tensors)\n", path.c_str(),
              WithCommas(checkpoint.info().global_step).c_str(),
              WithCommas(static_cast<int64_t>(checkpoint.tensors().size())).c_str());
  return OkStatus();
}

Status Diff(const std::string& a, const std::string& b) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint first, Checkpoint::Open(a));
  SALA_ASSIGN_OR_RETURN(const Checkpoint second, Checkpoint::Open(b));
  SALA_ASSIGN_OR_RETURN(const std::vector<TensorDifference> differences,
                        DiffCheckpoints(first, second));
  int64_t equal = 0;
  for (const TensorDifference& tensor : differences) {
    if (tensor.equal) {
      ++equal;
      continue;
    }
    std::printf("%-10s %-60s %s\n", std::string(NameOf(tensor.kind)).c_str(), tensor.name.c_str(),
                tensor.note.empty() ? Format("max |a - b| %.6g, rms %.6g, relative %.3g",
                                             tensor.max_abs, tensor.rms, tensor.relative)
                                          .c_str()
                                    : tensor.note.c_str());
  }
  const auto total = static_cast<int64_t>(differences.size());
  std::printf("%s of %s tensors have the same bits\n", WithCommas(equal).c_str(),
              WithCommas(total).c_str());
  if (equal == total) return OkStatus();
  return MakeError(ExitCode::kData, "CKPT-DIFFERENT",
                   a + " and " + b + ": " + std::to_string(total - equal) + " of " +
                       std::to_string(total) + " tensors differ; the lines above name them");
}

}  // namespace

void AddCheckpointCommands(CommandLine& line) {
  CLI::App* group = AddCommand(line.app, "ckpt", "checkpoints: list, info, verify, diff",
                               "sala ckpt list runs/tiny");
  group->require_subcommand(1);

  auto list_path = std::make_shared<std::string>();
  CLI::App* list =
      AddCommand(*group, "list", "complete checkpoints, oldest first", "sala ckpt list runs/tiny");
  list->add_option("path", *list_path, "run directory, or a directory of checkpoints")->required();
  line.OnUse(list, [list_path] { return List(*list_path); });

  auto info_path = std::make_shared<std::string>();
  auto tensors = std::make_shared<bool>(false);
  CLI::App* info = AddCommand(*group, "info", "what one checkpoint holds",
                              "sala ckpt info runs/tiny/checkpoints/step-000000380");
  info->add_option("checkpoint", *info_path, "checkpoint directory")->required();
  info->add_flag("--tensors", *tensors, "list every tensor");
  line.OnUse(info, [info_path, tensors] { return Info(*info_path, *tensors); });

  auto verify_path = std::make_shared<std::string>();
  auto level = std::make_shared<VerifyLevel>(VerifyLevel::kFull);
  CLI::App* verify = AddCommand(*group, "verify", "whether a checkpoint is whole",
                                "sala ckpt verify runs/tiny/checkpoints/step-000000380 --deep");
  verify->add_option("checkpoint", *verify_path, "checkpoint directory")->required();
  CLI::Option* quick = verify->add_flag_callback(
      "--quick", [level] { *level = VerifyLevel::kQuick; }, "manifest and file sizes");
  CLI::Option* full = verify->add_flag_callback(
      "--full", [level] { *level = VerifyLevel::kFull; }, "every checksum (default)");
  CLI::Option* deep = verify->add_flag_callback(
      "--deep", [level] { *level = VerifyLevel::kDeep; },
      "checksums, each element stored once, all numbers finite");
  quick->excludes(full);
  quick->excludes(deep);
  full->excludes(deep);
  line.OnUse(verify, [verify_path, level] { return Verify(*verify_path, *level); });

  auto pair = std::make_shared<std::pair<std::string, std::string>>();
  CLI::App* diff = AddCommand(
      *group, "diff", "tensors that differ; exit 65 when there are any",
      "sala ckpt diff runs/a/checkpoints/step-000000380 runs/b/checkpoints/step-000000380");
  diff->add_option("a", pair->first, "checkpoint directory")->required();
  diff->add_option("b", pair->second, "checkpoint directory")->required();
  line.OnUse(diff, [pair] { return Diff(pair->first, pair->second); });
}

}  // namespace sala::launch
