#include "core/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "core/checkpoint_format.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "tests/core/temp_dir.h"

namespace sala {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kWeight[] = "model.layers.0.q_proj.weight";

std::vector<float> Numbers(int64_t n, float first) {
  std::vector<float> values(static_cast<size_t>(n));
  std::iota(values.begin(), values.end(), first);
  return values;
}

// A [4, 6] f32 weight in two column halves by two writers, its moment cut on flat order, a bf16
// vector, an i64 scalar.
struct SampleSave {
  std::vector<float> weight = Numbers(24, 1);
  std::vector<float> moment = Numbers(24, 100);
  std::vector<BF16> norm{BF16(0.5F), BF16(-2.0F), BF16(3.0F)};
  int64_t counter = 77;
  std::function<void(std::vector<TensorSlice>&, int writer)> change = [](auto&, int) {};

  std::vector<float> ColumnHalf(int half) const {
    std::vector<float> values;
    for (size_t row = 0; row < 4; ++row) {
      for (size_t column = 0; column < 3; ++column) {
        values.push_back(weight[row * 6 + static_cast<size_t>(half) * 3 + column]);
      }
    }
    return values;
  }

  StatusOr<WrittenSlices> Write(const CheckpointCommit& commit, int writer) const {
    const std::vector<float> half = ColumnHalf(writer);
    std::vector<TensorSlice> slices = {{.name = kWeight,
                                        .kind = TensorKind::kParam,
                                        .shape = {4, 6},
                                        .box_offset = {0, 3 * writer},
                                        .box_shape = {4, 3},
                                        .data = half.data()},
                                       {.name = kWeight,
                                        .kind = TensorKind::kExpAvg,
                                        .shape = {4, 6},
                                        .flat_begin = writer == 0 ? 0 : 10,
                                        .flat_end = writer == 0 ? 10 : 24,
                                        .data = moment.data() + (writer == 0 ? 0 : 10)}};
    if (writer == 0) {
      slices.push_back(
          {.name = "norm.weight", .dtype = DType::kBF16, .shape = {3}, .data = norm.data()});
      slices.push_back(
          {.name = "counter", .kind = TensorKind::kBuffer, .dtype = DType::kI64, .data = &counter});
    }
    change(slices, writer);
    return WriteCheckpointSlices(commit.directory(), writer, commit.save_id(), slices);
  }

  StatusOr<std::string> Save(const std::string& root, int64_t step, bool final_step = false) const {
    SALA_ASSIGN_OR_RETURN(CheckpointCommit commit, CheckpointCommit::Begin(root, step, 1000));
    std::vector<WrittenSlices> written;
    for (int writer : {0, 1}) {
      SALA_ASSIGN_OR_RETURN(const WrittenSlices part, Write(commit, writer));
      written.push_back({nlohmann::json::parse(part.json.dump())});  // as it travels to rank 0
    }
    CheckpointInfo info;
    info.stage = {{"name", "stable"}, {"index", 1}, {"step", step}, {"final", final_step}};
    info.trainer = {{"text", "\"self_crc32c\": \"11111111\""}};
    return commit.Finish(info, written, "seed: 1\n", {{"tokenizer.json", "{}"}});
  }
};

void FlipBit(const std::string& path, int64_t at) {
  std::string bytes = ReadFile(path).value();
  bytes[static_cast<size_t>(at)] = static_cast<char>(bytes[static_cast<size_t>(at)] ^ 4);
  ASSERT_TRUE(WriteFileAtomically(path, bytes).ok());
}

// The first error of opening and checking.
Status Checked(const std::string& directory, VerifyLevel level) {
  SALA_ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  return checkpoint.Verify(level);
}

TEST(Checkpoint, RoundTripOfBoxesFlatRangesAndScalars) {
  const TempDir root;
  const SampleSave sample;
  const std::string directory = sample.Save(root.path(), 12).value();
  EXPECT_EQ(directory, root / "step-000000012");
  EXPECT_THAT(ListDirectory(directory).value(),
              ElementsAre("config.yaml", "index.h5", "manifest.json", "model-00000.h5",
                          "model-00001.h5", "optim-00000.h5", "optim-00001.h5", "tokenizer.json"));
  const Checkpoint checkpoint = Checkpoint::Open(directory).value();
  EXPECT_TRUE(checkpoint.Verify(VerifyLevel::kDeep).ok());
  EXPECT_EQ(checkpoint.info().global_step, 12);
  EXPECT_EQ(checkpoint.info().stage["name"], "stable");
  EXPECT_EQ(checkpoint.ReadConfig().value(), "seed: 1\n");
  EXPECT_EQ(checkpoint.ReadExtra("tokenizer.json").value(), "{}");
  EXPECT_EQ(checkpoint.tensors().size(), 4U);
  ASSERT_NE(checkpoint.Find(kWeight, TensorKind::kExpAvg), nullptr);
  EXPECT_EQ(checkpoint.Find(kWeight, TensorKind::kMaster), nullptr);
  // Every range, across slices and boxes.
  for (int64_t begin = 0; begin <= 24; ++begin) {
    for (int64_t end = begin; end <= 24; ++end) {
      std::vector<float> values(static_cast<size_t>(end - begin));
      ASSERT_TRUE(checkpoint.ReadF32(kWeight, TensorKind::kParam, begin, end, values.data()).ok());
      EXPECT_EQ(values,
                std::vector<float>(sample.weight.begin() + begin, sample.weight.begin() + end));
      ASSERT_TRUE(checkpoint.ReadF32(kWeight, TensorKind::kExpAvg, begin, end, values.data()).ok());
      EXPECT_EQ(values,
                std::vector<float>(sample.moment.begin() + begin, sample.moment.begin() + end));
    }
  }
  std::vector<float> values(3);
  ASSERT_TRUE(checkpoint.ReadF32("norm.weight", TensorKind::kParam, 0, 3, values.data()).ok());
  EXPECT_THAT(values, ElementsAre(0.5F, -2, 3));
  int64_t counter = 0;
  ASSERT_TRUE(
      checkpoint.ReadRaw(*checkpoint.Find("counter", TensorKind::kBuffer), 0, 1, &counter).ok());
  EXPECT_EQ(counter, 77);
}

// Every range of every box of a matrix that is stored in column halves and, its moment, in pieces
// that end in the middle of a row.
TEST(Checkpoint, BoxesAreReadAcrossSlices) {
  const TempDir root;
  const SampleSave sample;
  const Checkpoint checkpoint = Checkpoint::Open(sample.Save(root.path(), 1).value()).value();
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t column = 0; column < 6; ++column) {
      for (int64_t rows = 1; row + rows <= 4; ++rows) {
        for (int64_t columns = 1; column + columns <= 6; ++columns) {
          for (const TensorKind kind : {TensorKind::kParam, TensorKind::kExpAvg}) {
            const std::vector<float>& whole =
                kind == TensorKind::kParam ? sample.weight : sample.moment;
            std::vector<float> box;
            for (int64_t i = 0; i < rows * columns; ++i) {
              const int64_t at = (row + i / columns) * 6 + column + i % columns;
              box.push_back(whole[static_cast<size_t>(at)]);
            }
            for (int64_t begin = 0; begin <= rows * columns; begin += 2) {
              for (int64_t end = begin; end <= rows * columns; ++end) {
                std::vector<float> values(static_cast<size_t>(end - begin));
                ASSERT_TRUE(checkpoint
                                .ReadBoxF32(kWeight, kind, {row, column}, {rows, columns}, begin,
                                            end, values.data())
                                .ok());
                ASSERT_EQ(values, std::vector<float>(box.begin() + begin, box.begin() + end))
                    << "[" << row << ", " << column << "] of " << rows << " x " << columns;
              }
            }
          }
        }
      }
    }
  }
  std::vector<float> values(2);
  ASSERT_TRUE(
      checkpoint.ReadBoxF32("norm.weight", TensorKind::kParam, {1}, {2}, 0, 2, values.data()).ok());
  EXPECT_THAT(values, ElementsAre(-2, 3));
}

TEST(Checkpoint, ADamagedSliceIsNoticedByTheBoxesThatTouchIt) {
  const TempDir root;
  const SampleSave sample;
  const std::string directory = sample.Save(root.path(), 1).value();
  const Hdf5Reader file = Hdf5Reader::Open(directory + "/model-00001.h5").value();
  FlipBit(directory + "/model-00001.h5",
          file.Info(std::string("param/") + kWeight + "#0").value().byte_offset + 5);
  const Checkpoint checkpoint = Checkpoint::Open(directory).value();
  std::vector<float> values(12);
  const auto read = [&](int64_t first_column, int64_t columns, int64_t begin, int64_t end) {
    return checkpoint.ReadBoxF32(kWeight, TensorKind::kParam, {0, first_column}, {4, columns},
                                 begin, end, values.data());
  };
  EXPECT_TRUE(read(0, 3, 0, 12).ok()) << "the other half is whole";
  EXPECT_EQ(values, sample.ColumnHalf(0));
  EXPECT_EQ(ErrorCodeOf(read(3, 3, 11, 12)), "CKPT-CRC") << "any element checks its whole slice";
  EXPECT_EQ(ErrorCodeOf(read(2, 2, 0, 8)), "CKPT-CRC");
  EXPECT_TRUE(read(2, 2, 6, 7).ok()) << "the range ends before the damaged half";
}

TEST(Checkpoint, RunsOfBoxesOfEveryRank) {
  // Against the definition: walk the box element by element.
  const std::vector<int64_t> shape = {3, 4, 2, 5};
  for (size_t rank = 1; rank <= shape.size(); ++rank) {
    const std::vector<int64_t> dims(shape.begin(), shape.begin() + static_cast<int64_t>(rank));
    for (int mask = 0; mask < (1 << rank); ++mask) {  // which dimensions are cut
      StoredSlice slice;
      for (size_t d = 0; d < rank; ++d) {
        const bool cut = (mask >> d & 1) != 0;
        slice.box_offset.push_back(cut ? 1 : 0);
        slice.box_shape.push_back(cut ? dims[d] - 1 : dims[d]);
      }
      slice.flat_begin = 1;
      slice.flat_end = checkpoint::CheckedElements(slice.box_shape);
      std::vector<int64_t> expected;
      for (int64_t flat = slice.flat_begin; flat < slice.flat_end; ++flat) {
        int64_t rest = flat, position = 0, stride = 1;
        for (size_t d = rank; d-- > 0;) {
          position += (rest % slice.box_shape[d] + slice.box_offset[d]) * stride;
          rest /= slice.box_shape[d];
          stride *= dims[d];
        }
        expected.push_back(position);
      }
      std::vector<int64_t> found;
      checkpoint::ForEachRun(dims, slice, [&](const checkpoint::Run& run) {
        EXPECT_EQ(run.slice_begin, static_cast<int64_t>(found.size()));
        for (int64_t i = 0; i < run.count; ++i) found.push_back(run.tensor_begin + i);
      });
      EXPECT_EQ(found, expected) << "rank " << rank << " mask " << mask;
    }
  }
}

TEST(Checkpoint, LargeSlicesAreSplit) {
  const TempDir root;
  const int64_t n = (int64_t{65} << 20) / 4;  // 65 MiB of f32
  std::vector<float> large(static_cast<size_t>(n), 1.0F);
  large.back() = 2;
  CheckpointCommit commit = CheckpointCommit::Begin(root.path(), 1, 0).value();
  const WrittenSlices written =
      WriteCheckpointSlices(commit.directory(), 0, commit.save_id(),
                            {{.name = "w", .shape = {n}, .data = large.data()}})
          .value();
  EXPECT_EQ(written.json["slices"].size(), 2U);
  const Checkpoint checkpoint = Checkpoint::Open(commit.Finish({}, {written}, "").value()).value();
  std::vector<float> end(2);
  ASSERT_TRUE(checkpoint.ReadF32("w", TensorKind::kParam, n - 2, n, end.data()).ok());
  EXPECT_THAT(end, ElementsAre(1, 2));
}

TEST(Checkpoint, AFlippedBitInDataNamesFileTensorAndSlice) {
  const TempDir root;
  const std::string directory = SampleSave().Save(root.path(), 1).value();
  const Hdf5Reader file = Hdf5Reader::Open(directory + "/model-00001.h5").value();
  const int64_t offset = file.Info(std::string("param/") + kWeight + "#0").value().byte_offset;
  FlipBit(directory + "/model-00001.h5", offset + 5);
  EXPECT_TRUE(Checked(directory, VerifyLevel::kQuick).ok()) << "quick looks at no data";
  const Status full = Checked(directory, VerifyLevel::kFull);
  EXPECT_EQ(ErrorCodeOf(full), "CKPT-CRC");
  EXPECT_EQ(ExitCodeOf(full), ExitCode::kData);
  EXPECT_THAT(MessageOf(full),
              AllOf(HasSubstr("model-00001.h5"), HasSubstr(kWeight), HasSubstr("(param)"),
                    HasSubstr("slice [0, 12) of box [0:4, 3:6]")));
  const Checkpoint checkpoint = Checkpoint::Open(directory).value();
  float value = 0;
  EXPECT_EQ(ErrorCodeOf(checkpoint.ReadF32(kWeight, TensorKind::kParam, 23, 24, &value)),
            "CKPT-CRC")
      << "the whole slice is checked, not only the part that is read";
}

TEST(Checkpoint, AFlippedBitAnywhereIsFound) {
  const TempDir root;
  const std::string directory = SampleSave().Save(root.path(), 1).value();
  for (const char* name : {"manifest.json", "index.h5", "model-00000.h5", "optim-00001.h5",
                           "config.yaml", "tokenizer.json"}) {
    const std::string path = directory + "/" + name;
    const int64_t size = FileSize(path).value();
    // The manifest byte by byte; the others at a spread of places, the header included.
    const int64_t stride =
        std::string(name) == "manifest.json" ? 7 : std::max<int64_t>(1, size / 23);
    for (int64_t at = 0; at < size; at += stride) {
      FlipBit(path, at);
      const Status status = Checked(directory, VerifyLevel::kFull);
      EXPECT_FALSE(status.ok()) << name << " byte " << at;
      EXPECT_THAT(MessageOf(status), HasSubstr(name)) << at;
      if (std::string(name) == "manifest.json") {
        EXPECT_EQ(ErrorCodeOf(status), "CKPT-MANIFEST");
      }
      FlipBit(path, at);
    }
  }
  EXPECT_TRUE(Checked(directory, VerifyLevel::kDeep).ok()) << "all flips were taken back";
}

TEST(Checkpoint, CutAndMissingFilesAreFoundByQuick) {
  const TempDir root;
  for (const char* name : {"model-00000.h5", "index.h5", "config.yaml"}) {
    const std::string directory = SampleSave().Save(root.path(), 1).value();
    const std::string path = directory + "/" + name;
    const std::string bytes = ReadFile(path).value();
    ASSERT_TRUE(WriteFileAtomically(path, bytes.substr(0, bytes.size() - 1)).ok());
    EXPECT_EQ(ErrorCodeOf(Checked(directory, VerifyLevel::kQuick)), "CKPT-SIZE");
    ASSERT_TRUE(RemoveTree(path).ok());
    EXPECT_EQ(ErrorCodeOf(Checked(directory, VerifyLevel::kQuick)), "CKPT-SIZE");
    EXPECT_THAT(MessageOf(Checked(directory, VerifyLevel::kQuick)), HasSubstr(name));
  }
  const Status none = Checkpoint::Open(root / "none").status();
  EXPECT_EQ(ErrorCodeOf(none), "CKPT-NONE");
  EXPECT_THAT(MessageOf(none), HasSubstr("none: does not exist"));
  const std::string directory = SampleSave().Save(root.path(), 2).value();
  ASSERT_TRUE(RemoveTree(directory + "/manifest.json").ok());
  EXPECT_EQ(ErrorCodeOf(Checkpoint::Open(directory).status()), "CKPT-NONE");
}

TEST(Checkpoint, FilesOfTwoSavesMixed) {
  const TempDir root;
  const std::string a = SampleSave().Save(root.path(), 1).value();
  const std::string b = SampleSave().Save(root.path(), 2).value();
  for (const char* name : {"model-00000.h5", "optim-00001.h5", "index.h5"}) {
    const std::string own = ReadFile(a + "/" + name).value();
    ASSERT_TRUE(WriteFileAtomically(a + "/" + name, ReadFile(b + "/" + name).value()).ok());
    const Status status = Checked(a, VerifyLevel::kQuick);
    EXPECT_EQ(ErrorCodeOf(status), "CKPT-MIXED") << name;
    EXPECT_THAT(MessageOf(status), HasSubstr(name));
    ASSERT_TRUE(WriteFileAtomically(a + "/" + name, own).ok());
  }
}

TEST(Checkpoint, NewerVersionsAndForeignManifests) {
  const TempDir root;
  const std::string directory = SampleSave().Save(root.path(), 1).value();
  const std::string path = directory + "/manifest.json";
  auto manifest = nlohmann::ordered_json::parse(ReadFile(path).value());
  manifest.erase("self_crc32c");
  manifest["version"] = 2;
  ASSERT_TRUE(WriteFileAtomically(path, checkpoint::SealManifest(manifest)).ok());
  Status status = Checkpoint::Open(directory).status();
  EXPECT_EQ(ErrorCodeOf(status), "CKPT-VERSION");
  EXPECT_THAT(MessageOf(status), HasSubstr("version 2, this program reads up to 1"));
  manifest["version"] = 1;
  for (const char* name : {"../x", "/etc/passwd", ""}) {
    auto changed = manifest;
    changed["files"][0]["name"] = name;
    ASSERT_TRUE(WriteFileAtomically(path, checkpoint::SealManifest(changed)).ok());
    EXPECT_EQ(ErrorCodeOf(Checkpoint::Open(directory).status()), "CKPT-MANIFEST") << name;
  }
  for (const char* key : {"save_id", "files", "global_step", "trainer"}) {
    auto changed = manifest;
    changed.erase(key);
    ASSERT_TRUE(WriteFileAtomically(path, checkpoint::SealManifest(changed)).ok());
    EXPECT_EQ(ErrorCodeOf(Checkpoint::Open(directory).status()), "CKPT-MANIFEST") << key;
  }
}

TEST(Checkpoint, GapsAndOverlapsAreNeverCommitted) {
  const TempDir root;
  SampleSave gap;
  gap.change = [](std::vector<TensorSlice>& slices, int writer) {
    if (writer == 1) slices[1].flat_begin = 11;
  };
  const Status missing = gap.Save(root.path(), 1).status();
  EXPECT_EQ(ErrorCodeOf(missing), "CKPT-COVER");
  EXPECT_THAT(MessageOf(missing), AllOf(HasSubstr(kWeight), HasSubstr("(exp_avg)"),
                                        HasSubstr("[10, 11) are not stored")));
  SampleSave overlap;
  overlap.change = [](std::vector<TensorSlice>& slices, int writer) {
    if (writer == 0) slices[1].flat_end = 11;
  };
  EXPECT_THAT(MessageOf(overlap.Save(root.path(), 1).status()),
              HasSubstr("[10, 11) are stored more than once"));
  EXPECT_THAT(ListCheckpoints(root.path()), IsEmpty());
}

TEST(Checkpoint, DeepFindsGapsOfAnIndexAndReadsRefuseThem) {
  const TempDir root;
  const std::string directory = SampleSave().Save(root.path(), 1).value();
  // An index that lost one slice, with CRCs made right again: only the cover check can see it.
  const auto sizes = [&](const std::string& name) {
    return FileSize(directory + "/" + name).value_or(-1);
  };
  checkpoint::Index index = checkpoint::ReadIndex(directory + "/index.h5", sizes).value();
  const auto lost = std::find_if(index.slices.begin(), index.slices.end(),
                                 [](const StoredSlice& s) { return s.flat_begin == 10; });
  ASSERT_NE(lost, index.slices.end());
  index.slices.erase(lost);
  const std::string save_id = Checkpoint::Open(directory).value().info().save_id;
  ASSERT_TRUE(checkpoint::WriteIndex(directory + "/index.h5", save_id, index).ok());
  auto manifest = nlohmann::ordered_json::parse(ReadFile(directory + "/manifest.json").value());
  manifest.erase("self_crc32c");
  const std::string bytes = ReadFile(directory + "/index.h5").value();
  for (auto& file : manifest["files"]) {
    if (file["name"] != "index.h5") continue;
    file["bytes"] = bytes.size();
    file["crc32c"] = Hex32(Crc32c(bytes.data(), bytes.size()));
  }
  ASSERT_TRUE(
      WriteFileAtomically(directory + "/manifest.json", checkpoint::SealManifest(manifest)).ok());
  EXPECT_TRUE(Checked(directory, VerifyLevel::kFull).ok());
  EXPECT_EQ(ErrorCodeOf(Checked(directory, VerifyLevel::kDeep)), "CKPT-COVER");
  std::vector<float> values(24);
  const Checkpoint checkpoint = Checkpoint::Open(directory).value();
  EXPECT_EQ(ErrorCodeOf(checkpoint.ReadF32(kWeight, TensorKind::kExpAvg, 0, 24, values.data())),
            "CKPT-COVER");
  EXPECT_TRUE(checkpoint.ReadF32(kWeight, TensorKind::kExpAvg, 0, 10, values.data()).ok());
}

TEST(Checkpoint, DeepFindsNumbersThatAreNotFinite) {
  const TempDir root;
  SampleSave sample;
  sample.moment[13] = std::numeric_limits<float>::quiet_NaN();
  const std::string directory = sample.Save(root.path(), 1).value();
  EXPECT_TRUE(Checked(directory, VerifyLevel::kFull).ok());
  const Status deep = Checked(directory, VerifyLevel::kDeep);
  EXPECT_EQ(ErrorCodeOf(deep), "CKPT-TENSOR");
  EXPECT_THAT(MessageOf(deep), AllOf(HasSubstr("optim-00001.h5"), HasSubstr(kWeight),
                                     HasSubstr("element 13 is not finite")));
  SampleSave infinite;
  infinite.norm[1] = BF16(std::numeric_limits<float>::infinity());
  EXPECT_EQ(ErrorCodeOf(Checked(infinite.Save(root.path(), 2).value(), VerifyLevel::kDeep)),
            "CKPT-TENSOR");
}

TEST(Checkpoint, ReadingWhatIsNotThere) {
  const TempDir root;
  const Checkpoint checkpoint = Checkpoint::Open(SampleSave().Save(root.path(), 1).value()).value();
  float value = 0;
  EXPECT_EQ(ErrorCodeOf(checkpoint.ReadF32("nope", TensorKind::kParam, 0, 1, &value)),
            "CKPT-TENSOR");
  EXPECT_EQ(ErrorCodeOf(checkpoint.ReadF32(kWeight, TensorKind::kParam, 0, 25, nullptr)),
            "CKPT-TENSOR");
  EXPECT_EQ(ErrorCodeOf(checkpoint.ReadF32(kWeight, TensorKind::kParam, -1, 1, nullptr)),
            "CKPT-TENSOR");
}

TEST(CheckpointCommit, AProcessKilledAtAnyPointLeavesThePreviousOne) {
  for (const char* point : {"after-slices", "before-manifest", "after-manifest", "before-rename"}) {
    const TempDir root;
    ASSERT_TRUE(SampleSave().Save(root.path(), 1).ok());
    const pid_t child = ::fork();
    if (child == 0) {
      ::setenv("SALA_FAULT", (std::string("checkpoint:") + point).c_str(), 1);
      const bool saved = SampleSave().Save(root.path(), 2).ok();
      ::_exit(saved ? 0 : 1);
    }
    int status = 0;
    ASSERT_EQ(::waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status));
    EXPECT_EQ(WEXITSTATUS(status), 137) << point;
    EXPECT_TRUE(PathExists(root / ".tmp-step-000000002-1")) << point;
    const auto newest = NewestValidCheckpoint(root.path(), VerifyLevel::kDeep).value();
    ASSERT_TRUE(newest.has_value());
    EXPECT_EQ(newest->info().global_step, 1) << point;
    // The next attempt goes beside the remains, which the next start removes.
    ASSERT_TRUE(SampleSave().Save(root.path(), 2).ok());
    EXPECT_EQ(NewestValidCheckpoint(root.path(), VerifyLevel::kFull).value()->info().global_step,
              2);
    ASSERT_TRUE(RemoveLeftovers(root.path()).ok());
    EXPECT_FALSE(PathExists(root / ".tmp-step-000000002-1"));
  }
}

TEST(CheckpointCommit, UnwritablePlacesAndFullDisks) {
  const TempDir root;
  ASSERT_TRUE(WriteFileAtomically(root / "file", "x").ok());
  for (const std::string& place : {root / "file/below", std::string("/proc/nowhere")}) {
    const Status status = CheckpointCommit::Begin(place, 1, 0).status();
    EXPECT_EQ(ErrorCodeOf(status), "CKPT-SAVE") << place;
    EXPECT_EQ(ExitCodeOf(status), ExitCode::kIo);
    EXPECT_THAT(MessageOf(status), HasSubstr(place));
  }
  const Status space = CheckpointCommit::Begin(root.path(), 1, int64_t{1} << 60).status();
  EXPECT_EQ(ErrorCodeOf(space), "CKPT-SPACE");
  EXPECT_THAT(ListDirectory(root.path()).value(), ElementsAre("file")) << "nothing was written";
  CheckpointCommit commit = CheckpointCommit::Begin(root.path(), 1, 0).value();
  ASSERT_TRUE(RemoveTree(commit.directory()).ok());  // the directory vanishes
  EXPECT_EQ(ErrorCodeOf(SampleSave().Write(commit, 0).status()), "CKPT-SAVE");
}

TEST(CheckpointCommit, AbandonLeavesNothing) {
  const TempDir root;
  CheckpointCommit commit = CheckpointCommit::Begin(root.path(), 1, 0).value();
  ASSERT_TRUE(SampleSave().Write(commit, 0).ok());
  commit.Abandon();
  EXPECT_THAT(ListDirectory(root.path()).value(), IsEmpty());
}

TEST(CheckpointCommit, TheSameStepCanBeSavedAgain) {
  const TempDir root;
  SampleSave sample;
  ASSERT_TRUE(sample.Save(root.path(), 1).ok());
  sample.weight[0] = 42;
  const Checkpoint checkpoint = Checkpoint::Open(sample.Save(root.path(), 1).value()).value();
  float value = 0;
  ASSERT_TRUE(checkpoint.ReadF32(kWeight, TensorKind::kParam, 0, 1, &value).ok());
  EXPECT_EQ(value, 42);
  EXPECT_THAT(ListDirectory(root.path()).value(), ElementsAre("step-000000001"));
}

TEST(CheckpointStore, TheNewestValidOneIsTakenAndJunkIgnored) {
  const TempDir root;
  EXPECT_FALSE(NewestValidCheckpoint(root.path(), VerifyLevel::kQuick).value().has_value());
  EXPECT_FALSE(NewestValidCheckpoint(root / "none", VerifyLevel::kQuick).value().has_value());
  for (const char* junk :
       {"step-", "step-1", "step-00000001x", "step--00000001", "latest", ".tmp-step-000000009-1"}) {
    ASSERT_TRUE(MakeDirectories(root / junk).ok());
  }
  ASSERT_TRUE(WriteFileAtomically(root / "step-000000099", "a file").ok());
  EXPECT_FALSE(NewestValidCheckpoint(root.path(), VerifyLevel::kQuick).value().has_value());
  for (int64_t step : {1, 2, 10}) ASSERT_TRUE(SampleSave().Save(root.path(), step).ok());
  EXPECT_EQ(NewestValidCheckpoint(root.path(), VerifyLevel::kFull).value()->info().global_step, 10);
  FlipBit(root / "step-000000010/manifest.json", 30);
  FlipBit(root / "step-000000002/model-00000.h5",
          FileSize(root / "step-000000002/model-00000.h5").value() - 1);
  ::testing::internal::CaptureStderr();
  const auto newest = NewestValidCheckpoint(root.path(), VerifyLevel::kFull).value();
  const std::string log = ::testing::internal::GetCapturedStderr();
  EXPECT_EQ(newest->info().global_step, 1);
  EXPECT_THAT(
      log, AllOf(HasSubstr("CKPT-MANIFEST"), HasSubstr("CKPT-CRC"), HasSubstr("step-000000002")));
  ASSERT_TRUE(RemoveTree(root / "step-000000001/index.h5").ok());
  EXPECT_EQ(ErrorCodeOf(NewestValidCheckpoint(root.path(), VerifyLevel::kFull).status()),
            "CKPT-NONE");
}

TEST(CheckpointStore, Retention) {
  const TempDir root;
  for (int64_t step = 1; step <= 6; ++step)
    ASSERT_TRUE(SampleSave().Save(root.path(), step, step == 2).ok());
  ASSERT_TRUE(WriteFileAtomically(root / "step-000000003/KEEP", "").ok());
  ASSERT_TRUE(MakeDirectories(root / ".del-step-000000000").ok());
  ASSERT_TRUE(PruneCheckpoints(root.path(), 2, {root / "./step-000000001/"}).ok());
  std::vector<int64_t> steps;
  for (const auto& listing : ListCheckpoints(root.path())) steps.push_back(listing.global_step);
  EXPECT_THAT(steps, ElementsAre(1, 2, 3, 5, 6));
  EXPECT_TRUE(ListCheckpoints(root.path())[1].stage_final);
  EXPECT_EQ(ListCheckpoints(root.path())[1].stage, "stable");
  EXPECT_FALSE(PathExists(root / ".del-step-000000000"));
}

TEST(CheckpointStore, Diff) {
  const TempDir root;
  SampleSave sample;
  const Checkpoint a = Checkpoint::Open(sample.Save(root.path(), 1).value()).value();
  sample.weight[3] += 2;
  sample.change = [](std::vector<TensorSlice>& slices, int writer) {
    if (writer == 0) slices.pop_back();  // the counter
  };
  const Checkpoint b = Checkpoint::Open(sample.Save(root.path(), 2).value()).value();
  const auto differences = DiffCheckpoints(a, b).value();
  ASSERT_EQ(differences.size(), 4U);
  EXPECT_EQ(differences[0].note, "only in A");
  EXPECT_FALSE(differences[1].equal);
  EXPECT_EQ(differences[1].max_abs, 2);
  EXPECT_EQ(differences[1].rms, std::sqrt(4.0 / 24));
  EXPECT_TRUE(differences[2].equal);
  EXPECT_TRUE(differences[3].equal);
  EXPECT_EQ(DiffCheckpoints(b, a).value().back().note, "only in B");
}

}  // namespace
}  // namespace sala
