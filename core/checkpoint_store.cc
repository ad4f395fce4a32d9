// Folders of checkpoints: listing, choosing, pruning, comparing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>

#include "core/checkpoint.h"
#include "core/checkpoint_format.h"
#include "core/config.h"
#include "core/file.h"
#include "core/log.h"

namespace sala {
namespace {

bool StartsWith(const std::string& text, const std::string& prefix) {
  return text.rfind(prefix, 0) == 0;
}

// The step of a folder name "step-000000012", or -1 for any other name.
int64_t StepOf(const std::string& name) {
  constexpr size_t kPrefix = 5;
  if (!StartsWith(name, "step-")) return -1;
  const std::string digits = name.substr(kPrefix);
  if (digits.find_first_not_of("0123456789") != std::string::npos) return -1;
  const int64_t step = ParseInteger(digits).value_or(-1);
  return step >= 0 && checkpoint::StepName(step) == name ? step : -1;
}

// Folders named like checkpoints, by rising step.
std::vector<std::pair<int64_t, std::string>> StepDirectories(const std::string& root) {
  std::vector<std::pair<int64_t, std::string>> found;
  const StatusOr<std::vector<std::string>> names = ListDirectory(root);
  if (!names.ok()) return found;
  for (const std::string& name : *names) {
    const int64_t step = StepOf(name);
    if (step >= 0 && IsDirectory(root + "/" + name)) found.emplace_back(step, root + "/" + name);
  }
  std::sort(found.begin(), found.end());
  return found;
}

bool SamePath(const std::string& a, const std::string& b) {
  std::error_code ignored;
  return std::filesystem::weakly_canonical(a, ignored) ==
         std::filesystem::weakly_canonical(b, ignored);
}

Status Remove(const std::string& root, const std::string& directory) {
  // Renamed first: a removal that dies half way must not leave something that looks like a
  // checkpoint.
  const std::string deleted =
      root + "/.del-" + std::filesystem::path(directory).filename().string();
  SALA_RETURN_IF_ERROR(RemoveTree(deleted));
  SALA_RETURN_IF_ERROR(RenamePath(directory, deleted));
  SALA_RETURN_IF_ERROR(FsyncDirectory(root));
  return RemoveTree(deleted);
}

std::string ShapeText(const StoredTensor& tensor) {
  std::string text = std::string(NameOf(tensor.dtype)) + " [";
  for (size_t d = 0; d < tensor.shape.size(); ++d)
    text += (d > 0 ? ", " : "") + std::to_string(tensor.shape[d]);
  return text + "]";
}

// Fills equal, max_abs, rms and relative for two tensors of one shape and dtype, piece by piece.
Status CompareTensors(const Checkpoint& a, const Checkpoint& b, const StoredTensor& tensor,
                      TensorDifference* result) {
  constexpr int64_t kPiece = int64_t{16} << 20;
  const int64_t n = checkpoint::CheckedElements(tensor.shape);
  const auto size = static_cast<int64_t>(SizeOf(tensor.dtype));
  result->equal = true;
  double sum_of_squares = 0;
  double squares_of_a = 0;
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t end = std::min(n, at + kPiece);
    std::vector<char> raw_a(static_cast<size_t>((end - at) * size));
    std::vector<char> raw_b(raw_a.size());
    SALA_RETURN_IF_ERROR(a.ReadRaw(tensor, at, end, raw_a.data()));
    SALA_RETURN_IF_ERROR(b.ReadRaw(tensor, at, end, raw_b.data()));
    const bool same = raw_a == raw_b;
    result->equal = result->equal && same;
    std::vector<float> x(static_cast<size_t>(end - at));
    std::vector<float> y(x.size());
    SALA_RETURN_IF_ERROR(a.ReadF32(tensor.name, tensor.kind, at, end, x.data()));
    SALA_RETURN_IF_ERROR(b.ReadF32(tensor.name, tensor.kind, at, end, y.data()));
    for (size_t i = 0; i < x.size(); ++i) {
      const double difference = std::abs(static_cast<double>(x[i]) - static_cast<double>(y[i]));
      // max() would lose a NaN.
      if (!(difference <= result->max_abs)) result->max_abs = difference;
      sum_of_squares += difference * difference;
      squares_of_a += static_cast<double>(x[i]) * static_cast<double>(x[i]);
    }
  }
  if (result->equal) return OkStatus();
  result->rms = std::sqrt(sum_of_squares / static_cast<double>(n));
  result->relative = std::sqrt(sum_of_squares / squares_of_a);
  return OkStatus();
}

}  // namespace

std::vector<CheckpointListing> ListCheckpoints(const std::string& root) {
  std::vector<CheckpointListing> listings;
  for (const auto& [step, directory] : StepDirectories(root)) {
    const StatusOr<std::string> text = ReadFile(directory + "/" + checkpoint::kManifestName);
    if (!text.ok() || !checkpoint::ManifestIsIntact(*text)) continue;
    const auto manifest = nlohmann::json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (!manifest.is_object()) continue;
    CheckpointListing listing{directory, step, false, ""};
    const auto stage = manifest.find("stage");
    if (stage != manifest.end() && stage->is_object()) {
      const auto final_flag = stage->find("final");
      const auto name = stage->find("name");
      listing.stage_final =
          final_flag != stage->end() && final_flag->is_boolean() && final_flag->get<bool>();
      if (name != stage->end() && name->is_string()) listing.stage = name->get<std::string>();
    }
    listings.push_back(std::move(listing));
  }
  return listings;
}

StatusOr<std::optional<Checkpoint>> NewestValidCheckpoint(const std::string& root,
                                                          VerifyLevel level) {
  auto directories = StepDirectories(root);
  if (directories.empty()) return std::optional<Checkpoint>();
  std::reverse(directories.begin(), directories.end());
  for (const auto& [step, directory] : directories) {
    StatusOr<Checkpoint> checkpoint = Checkpoint::Open(directory);
    const Status status = checkpoint.ok() ? checkpoint->Verify(level) : checkpoint.status();
    if (status.ok()) return std::optional<Checkpoint>(std::move(checkpoint).value());
    // Only damage is a reason to go back: a file system that cannot be read just now, or a newer
    // version of the format, would otherwise cost a good checkpoint.
    if (ExitCodeOf(status) == ExitCode::kIo || ErrorCodeOf(status) == "CKPT-VERSION") return status;
    SALA_LOG(Warn) << MessageOf(status) << "; trying the checkpoint before it";
  }
  return MakeError(ExitCode::kData, "CKPT-NONE",
                   root + ": none of " + std::to_string(directories.size()) +
                       " checkpoints is valid; see the warnings above, restore one or start anew "
                       "in another folder");
}

Status PruneCheckpoints(const std::string& root, int64_t keep_last,
                        const std::vector<std::string>& protect) {
  const std::vector<CheckpointListing> listings = ListCheckpoints(root);
  const auto count = static_cast<int64_t>(listings.size());
  for (int64_t i = 0; i < count - keep_last; ++i) {
    const CheckpointListing& listing = listings[static_cast<size_t>(i)];
    const bool is_protected =
        std::any_of(protect.begin(), protect.end(),
                    [&](const std::string& path) { return SamePath(path, listing.directory); });
    if (listing.stage_final || is_protected || PathExists(listing.directory + "/KEEP")) continue;
    SALA_RETURN_IF_ERROR(Remove(root, listing.directory));
  }
  return RemoveLeftovers(root);
}

Status RemoveLeftovers(const std::string& root) {
  if (!PathExists(root)) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(root));
  for (const std::string& name : names) {
    if (StartsWith(name, checkpoint::kTemporaryPrefix) ||
        StartsWith(name, checkpoint::kDeletedPrefix)) {
      SALA_RETURN_IF_ERROR(RemoveTree(root + "/" + name));
    }
  }
  return OkStatus();
}

StatusOr<std::vector<TensorDifference>> DiffCheckpoints(const Checkpoint& a, const Checkpoint& b) {
  std::vector<TensorDifference> differences;
  for (const StoredTensor& tensor : a.tensors()) {
    TensorDifference difference{tensor.name, tensor.kind, false, "", 0, 0, 0};
    const StoredTensor* other = b.Find(tensor.name, tensor.kind);
    if (other == nullptr) {
      difference.note = "only in A";
    } else if (other->shape != tensor.shape || other->dtype != tensor.dtype) {
      difference.note = "differs: " + ShapeText(tensor) + " in A, " + ShapeText(*other) + " in B";
    } else {
      SALA_RETURN_IF_ERROR(CompareTensors(a, b, tensor, &difference));
    }
    differences.push_back(std::move(difference));
  }
  for (const StoredTensor& tensor : b.tensors()) {
    if (a.Find(tensor.name, tensor.kind) != nullptr) continue;
    differences.push_back({tensor.name, tensor.kind, false, "only in B", 0, 0, 0});
  }
  return differences;
}

}  // namespace sala
