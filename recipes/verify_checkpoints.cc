// The check of `sala verify` that damage is found, and that there is none (recipes/verify.h).
#include <string_view>

#include "core/checkpoint.h"
#include "core/file.h"
#include "recipes/verify_run.h"

namespace sala::recipes {
namespace {

// One bit of a stored tensor turned over in its file. Returns the tensor.
StatusOr<std::string> DamageOneBit(const std::string& directory, const std::string& file) {
  std::string wanted;
  std::vector<char> bytes;
  {
    SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
    for (const StoredTensor& tensor : checkpoint.tensors()) {
      const int64_t elements = tensor.numel();
      if (tensor.kind != TensorKind::kParam || tensor.shape.size() < 2) continue;
      wanted = tensor.name;
      bytes.resize(static_cast<size_t>(elements) * SizeOf(tensor.dtype));
      SALA_RETURN_IF_ERROR(checkpoint.ReadRaw(tensor, 0, elements, bytes.data()));
      break;
    }
  }
  SALA_ASSIGN_OR_RETURN(std::string content, ReadFile(directory + "/" + file));
  const size_t at = content.find(std::string_view(bytes.data(), bytes.size()));
  if (wanted.empty() || at == std::string::npos) {
    return MakeError(ExitCode::kData, "CKPT-TENSOR",
                     directory + "/" + file + ": no tensor found to damage");
  }
  content[at + bytes.size() / 2] = static_cast<char>(content[at + bytes.size() / 2] ^ 4);
  SALA_RETURN_IF_ERROR(WriteFileAtomically(directory + "/" + file, content));
  return wanted;
}

Status OpenAndVerify(const std::string& directory) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  return checkpoint.Verify(VerifyLevel::kDeep);
}

// That a flipped bit in a copy is found, and named by file and tensor.
Status DamageIsFound(const VerifyContext& context, VerifyRow* row) {
  SALA_ASSIGN_OR_RETURN(const std::string run, StraightRun(context, false));
  SALA_ASSIGN_OR_RETURN(const SavedStep last,
                        FinalOf(run, context.scaled->config.stages.back().name));
  const std::string& good = last.directory;
  SALA_RETURN_IF_ERROR(OpenAndVerify(good));
  const std::string copy = context.directory + "/damaged/" + BaseName(good);
  SALA_RETURN_IF_ERROR(CopyTree(good, copy));
  const std::string file = "model-00000.h5";
  SALA_ASSIGN_OR_RETURN(const std::string tensor, DamageOneBit(copy, file));
  const Status found = OpenAndVerify(copy);
  const std::string text = MessageOf(found);
  if (found.ok() || text.find(file) == std::string::npos ||
      text.find(tensor) == std::string::npos) {
    row->Fail("control: one bit of " + tensor + " in " + file + " was turned over, and the check " +
              (found.ok() ? "found nothing" : "said only: " + text));
  }
  return OkStatus();
}

}  // namespace

StatusOr<VerifyRow> VerifyCheckpoints(const VerifyContext& context) {
  VerifyRow row;
  SALA_RETURN_IF_ERROR(DamageIsFound(context, &row));
  const std::string root = context.user_run + "/checkpoints";
  int64_t verified = 0;
  int64_t whole = 0;
  if (IsDirectory(root)) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> names, ListDirectory(root));
    for (const std::string& name : names) {
      if (context.interrupted()) return row;
      if (name.rfind("step-", 0) != 0) continue;
      context.progress("checkpoints: " + root + "/" + name);
      const Status status = OpenAndVerify(root + "/" + name);
      // A run that goes on may have pruned it meanwhile.
      if (!status.ok() && !PathExists(root + "/" + name)) continue;
      ++verified;
      if (status.ok()) {
        ++whole;
      } else {
        row.Fail(MessageOf(status));
      }
    }
  }
  row.compared = "checksums, cover and finiteness of " + std::to_string(verified) +
                 " checkpoints in " + context.user_run + ", and of a copy with one bit changed";
  if (verified == 0) row.notes.push_back(root + " holds no checkpoint yet");
  row.measured = std::to_string(whole) + " of " + std::to_string(verified) + " are whole";
  row.bound = "all whole; the copy is found out";
  return row;
}

}  // namespace sala::recipes
