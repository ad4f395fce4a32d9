#include "recipes/checkpointing.h"

#include <algorithm>
#include <ctime>
#include <map>
#include <set>

#include "core/file.h"
#include "core/hash.h"
#include "core/log.h"
#include "recipes/hf_folder.h"

namespace sala::recipes {
namespace {

// This rank's part of every parameter of a whole store: a share of each unit, so that all ranks
// write.
std::vector<TensorSlice> ParameterSlices(const model::ParameterStore& params,
                                         const parallel::Mesh& mesh) {
  const parallel::UnitPartition partition(params.unit_borders(), mesh.param_size());
  std::vector<TensorSlice> slices;
  for (const model::ParameterSpec& spec : params.specs()) {
    const int64_t begin = std::max(partition.begin(spec.unit, mesh.param_rank()), spec.offset);
    const int64_t end =
        std::min(partition.end(spec.unit, mesh.param_rank()), spec.offset + spec.stored);
    if (begin >= end || !spec.owner) continue;
    TensorSlice slice;
    slice.name = spec.name;
    slice.shape = spec.global_shape;
    slice.box_offset = spec.box_offset;
    slice.box_shape = spec.box_shape();
    slice.flat_begin = begin - spec.offset;
    slice.flat_end = end - spec.offset;
    slice.data = params.data() + begin;
    slices.push_back(slice);
  }
  return slices;
}

CheckpointInfo MakeInfo(Session& session, const SaveRequest& request,
                        const std::string& model_yaml) {
  const StagePosition& position = request.position;
  CheckpointInfo info;
  info.global_step = session.global_step;
  info.stage = {{"name", position.stage},
                {"index", position.stage_index},
                {"phase", position.phase},
                {"step", position.phase_step},
                {"final", position.stage_final}};
  info.program = {{"name", "sala"}, {"version", SALA_VERSION}};
  const parallel::MeshConfig& mesh = session.mesh().config();
  info.topology = {{"world", session.world().size()},
                   {"dp", mesh.dp},
                   {"tp", mesh.tp},
                   {"cp", mesh.cp},
                   {"pp", 1},
                   {"zero_stage", mesh.zero_stage}};
  info.model = {{"config_sha256", Sha256Hex(model_yaml)},
                {"parameters", request.params->whole_parameters()},
                {"tensors", request.params->specs().size()},
                {"mixer_types", request.model->mixer_types}};
  info.tokenizer_fingerprint = session.tokenizer().fingerprint();
  info.trainer = request.trainer;
  if (request.optimizer != nullptr) info.trainer["updates"] = request.optimizer->updates();
  info.parent = request.parent;
  return info;
}

// The directory and the save's identity, chosen by rank 0: "directory\nsave_id".
StatusOr<std::pair<std::string, std::string>> ShareCommit(Session& session,
                                                          const CheckpointCommit* commit) {
  const std::string mine = commit == nullptr ? "" : commit->directory() + "\n" + commit->save_id();
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, session.world().AllGatherText(mine));
  const size_t line = all[0].find('\n');
  return std::make_pair(all[0].substr(0, line), all[0].substr(line + 1));
}

StatusOr<std::string> TrySave(Session& session, const SaveRequest& request) {
  parallel::Communicator& world = session.world();
  const std::string model_yaml = EmitConfig(*request.model);
  const int64_t bytes = request.params->size() * session.mesh().config().tp * 4 *
                        (request.optimizer == nullptr ? 1 : 3);

  std::optional<CheckpointCommit> commit;
  Status begun = OkStatus();
  if (session.is_root()) {
    auto result = CheckpointCommit::Begin(session.checkpoint_root(), session.global_step, bytes);
    begun = result.status();
    if (result.ok()) commit.emplace(std::move(result).value());
  }
  SALA_RETURN_IF_ERROR(parallel::AgreeOnStatus(world, begun));
  SALA_ASSIGN_OR_RETURN(const auto shared, ShareCommit(session, commit ? &*commit : nullptr));
  const auto& [directory, save_id] = shared;

  std::vector<TensorSlice> slices;
  if (request.optimizer != nullptr) {
    request.optimizer->AppendSlices(&slices);
  } else {
    slices = ParameterSlices(*request.params, session.mesh());
  }
  const auto written = WriteCheckpointSlices(directory, world.rank(), save_id, slices);
  Status status = parallel::AgreeOnStatus(world, written.status());
  std::string final_directory;
  if (status.ok()) {
    SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all,
                          world.AllGatherText(written->json.dump()));
    if (session.is_root()) {
      std::vector<WrittenSlices> parts;
      parts.reserve(all.size());
      for (const std::string& text : all) parts.push_back({nlohmann::json::parse(text)});
      std::vector<std::pair<std::string, std::string>> texts = {{"model.yaml", model_yaml}};
      if (!session.source_record.empty())
        texts.emplace_back(SourceRecord::kFileName, session.source_record);
      auto finished =
          commit->Finish(MakeInfo(session, request, model_yaml), parts, request.config_yaml, texts);
      status = finished.status();
      if (finished.ok()) final_directory = *finished;
    }
    status = parallel::AgreeOnStatus(world, status);
  }
  if (!status.ok()) {
    if (commit) commit->Abandon();
    return status;
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, world.AllGatherText(final_directory));
  return all[0];
}

// Checks the tensor list of a checkpoint against a store; one line naming what differs.
Status CompareTensors(const Checkpoint& checkpoint, const model::ParameterStore& params,
                      const std::function<bool(const std::string&)>& allow_missing) {
  std::vector<std::string> problems;
  for (const model::ParameterSpec& spec : params.specs()) {
    const StoredTensor* stored = checkpoint.Find(spec.name, TensorKind::kParam);
    if (stored == nullptr) {
      if (!allow_missing || !allow_missing(spec.name))
        problems.push_back(spec.name + " is missing");
    } else if (stored->shape != spec.global_shape) {
      const auto text = [](const std::vector<int64_t>& shape) {
        std::string out = "[";
        for (size_t i = 0; i < shape.size(); ++i)
          out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
        return out + "]";
      };
      problems.push_back(spec.name + " has shape " + text(stored->shape) + ", expected " +
                         text(spec.global_shape));
    }
  }
  for (const StoredTensor& stored : checkpoint.tensors()) {
    if (stored.kind == TensorKind::kParam && !params.Has(stored.name))
      problems.push_back(stored.name + " is not in the model");
  }
  if (problems.empty()) return OkStatus();
  constexpr size_t kShown = 4;
  std::string text = checkpoint.directory() + ": this checkpoint is of another model: ";
  for (size_t i = 0; i < std::min(kShown, problems.size()); ++i)
    text += (i > 0 ? "; " : "") + problems[i];
  if (problems.size() > kShown)
    text += "; and " + std::to_string(problems.size() - kShown) + " more";
  return MakeError(ExitCode::kData, "CKPT-TENSOR", text);
}

}  // namespace

StatusOr<std::string> SaveCheckpoint(Session& session, const SaveRequest& request,
                                     bool must_succeed) {
  const parallel::Section section(session.watchdog(), parallel::Phase::kSave, session.global_step);
  session.WriteStatus("saving", request.position.stage, session.global_step);
  auto saved = TrySave(session, request);
  if (saved.ok()) {
    session.failed_saves = 0;
    if (session.is_root()) {
      std::vector<std::string> protect = {*saved};
      if (request.parent.is_object() && request.parent.contains("path"))
        protect.push_back(request.parent["path"]);
      if (const Status pruned =
              PruneCheckpoints(session.checkpoint_root(), request.policy.keep_last, protect);
          !pruned.ok()) {
        SALA_LOG(Warn) << "old checkpoints were not removed: " << MessageOf(pruned);
      }
    }
    SALA_RETURN_IF_ERROR(session.world().Barrier());
    return saved;
  }
  if (ErrorCodeOf(saved.status()) == "COMM-FAILED") return saved.status();
  ++session.failed_saves;
  if (session.is_root())
    SALA_LOG(Error) << "saving step " << session.global_step << " failed (" << session.failed_saves
                    << " in a row): " << MessageOf(saved.status());
  if (must_succeed || request.position.stage_final ||
      session.failed_saves >= request.policy.max_failures) {
    return saved.status();
  }
  return std::string();
}

StagePosition PositionOf(const Checkpoint& checkpoint) {
  const nlohmann::json& stage = checkpoint.info().stage;
  StagePosition position;
  position.stage = stage.value("name", "");
  position.stage_index = stage.value("index", int64_t{0});
  position.phase = stage.value("phase", "train");
  position.phase_step = stage.value("step", int64_t{0});
  position.stage_final = stage.value("final", false);
  return position;
}

StatusOr<model::ModelConfig> ModelConfigOf(const Checkpoint& checkpoint) {
  const std::string path = checkpoint.directory() + "/model.yaml";
  SALA_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const std::string expected = checkpoint.info().model.value("config_sha256", "");
  if (Sha256Hex(text) != expected) {
    return MakeError(ExitCode::kData, "CKPT-CRC",
                     path + ": the file's SHA-256 is " + Sha256Hex(text) + ", the manifest says " +
                         expected + "; restore the file or use another checkpoint");
  }
  SALA_ASSIGN_OR_RETURN(const ConfigDocument document, ConfigDocument::Parse(text, path));
  model::ModelConfig config;
  SALA_RETURN_IF_ERROR(BindConfig(document, &config));
  SALA_RETURN_IF_ERROR(config.Resolve());
  return config;
}

Status LoadParameters(const Checkpoint& checkpoint, model::ParameterStore& params,
                      const std::function<bool(const std::string&)>& allow_missing) {
  SALA_RETURN_IF_ERROR(CompareTensors(checkpoint, params, allow_missing));
  for (const model::ParameterSpec& spec : params.specs()) {
    if (checkpoint.Find(spec.name, TensorKind::kParam) == nullptr) continue;
    Status status;
    params.ForEachPart(spec, [&](int64_t begin, int64_t end) {
      status = checkpoint.ReadBoxF32(
          spec.name, TensorKind::kParam, spec.box_offset, spec.box_shape(), begin, end,
          params.Flat(spec.offset + begin, spec.offset + end).Data<float>());
    });
    SALA_RETURN_IF_ERROR(status);
  }
  return OkStatus();
}

StatusOr<model::ModelConfig> ModelConfigAt(const std::string& path) {
  if (IsHfFolder(path)) return HfFolderConfig(path);
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(path));
  return ModelConfigOf(checkpoint);
}

StatusOr<LoadedModel> LoadModel(const std::string& path, const StoreLayout& layout) {
  LoadedModel loaded;
  if (IsHfFolder(path)) {
    SALA_ASSIGN_OR_RETURN(HfFolder folder, LoadHfFolder(path, layout));
    loaded.config = std::move(folder.config);
    loaded.params = std::move(folder.params);
    loaded.source = std::move(folder.record);
    loaded.tokenizer_fingerprint = folder.tokenizer_fingerprint;
    loaded.origin = {{"path", path}, {"save_id", ""}};
    return loaded;
  }
  SALA_ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(path));
  SALA_ASSIGN_OR_RETURN(loaded.config, ModelConfigOf(checkpoint));
  if (layout) {
    SALA_ASSIGN_OR_RETURN(loaded.params, layout(loaded.config));
  } else {
    loaded.params = model::ParameterStore(model::ParameterSpecs(loaded.config));
  }
  SALA_RETURN_IF_ERROR(LoadParameters(checkpoint, loaded.params));
  loaded.origin = {{"path", path}, {"save_id", checkpoint.info().save_id}};
  loaded.tokenizer_fingerprint = checkpoint.info().tokenizer_fingerprint;
  SALA_ASSIGN_OR_RETURN(loaded.source, SourceRecordAt(path));
  loaded.checkpoint.emplace(std::move(checkpoint));
  return loaded;
}

StoreLayout LayoutOn(const parallel::Mesh& mesh, bool whole) {
  return [&mesh, whole](const model::ModelConfig& config) -> StatusOr<model::ParameterStore> {
    if (const std::string problem = config.TensorParallelProblem(mesh.tp_size()); !problem.empty())
      return MakeError(ExitCode::kConfig, "CFG-MESH", problem);
    const model::TensorShard shard{mesh.tp_rank(), mesh.tp_size()};
    std::vector<model::ParameterSpec> specs = model::ParameterSpecs(config, shard);
    if (whole || mesh.zero_stage() < 3) return model::ParameterStore(std::move(specs));
    const parallel::UnitPartition partition(model::UnitBorders(specs), mesh.param_size());
    return model::ParameterStore(std::move(specs),
                                 model::Placement::Shard(partition, mesh.param_rank()));
  };
}

// Rank 0 looks, so that ranks on other hosts cannot see another state of a shared file system.
StatusOr<std::string> StageResult(Session& session, int64_t stage_index) {
  const std::string& name = session.config().stages[static_cast<size_t>(stage_index)].name;
  std::string found;
  if (session.is_root()) {
    for (const CheckpointListing& listing : ListCheckpoints(session.checkpoint_root())) {
      if (listing.stage == name && listing.stage_final) found = listing.directory;
    }
  }
  SALA_ASSIGN_OR_RETURN(const std::vector<std::string> all, session.world().AllGatherText(found));
  if (!all[0].empty()) return all[0];
  return MakeError(ExitCode::kData, "CKPT-NONE",
                   session.checkpoint_root() + ": no final checkpoint of stage '" + name +
                       "'; run that stage first, or start from a folder with init_from");
}

}  // namespace sala::recipes
