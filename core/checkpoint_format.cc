#include "core/checkpoint_format.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "core/check.h"
#include "core/file.h"
#include "core/hash.h"
#include "core/hdf5.h"
#include "core/json.h"

namespace sala {

std::string_view NameOf(TensorKind kind) {
  static constexpr std::array<std::string_view, 5> kNames = {"param", "master", "exp_avg",
                                                             "exp_avg_sq", "buffer"};
  return kNames[static_cast<size_t>(kind)];
}

int64_t StoredTensor::numel() const { return checkpoint::CheckedElements(shape); }

namespace checkpoint {
namespace {

constexpr char kUseAnother[] = "; use another checkpoint";

constexpr uint8_t kKinds = 5;
// Codes of number types in the index. Their order is part of the format.
constexpr std::array<DType, 7> kDTypes = {DType::kF32, DType::kBF16, DType::kF64, DType::kI32,
                                          DType::kI64, DType::kU8,   DType::kU16};

// A column of texts: all of them one after the other, each ended by a newline.
std::vector<uint8_t> JoinTexts(const std::vector<std::string>& texts) {
  std::vector<uint8_t> bytes;
  for (const std::string& text : texts) {
    bytes.insert(bytes.end(), text.begin(), text.end());
    bytes.push_back('\n');
  }
  return bytes;
}

std::vector<std::string> SplitTexts(const std::vector<uint8_t>& bytes) {
  std::vector<std::string> texts(1);
  for (const uint8_t byte : bytes) {
    if (byte == '\n') {
      texts.emplace_back();
    } else {
      texts.back() += static_cast<char>(byte);
    }
  }
  texts.pop_back();
  return texts;
}

void AppendPadded(const std::vector<int64_t>& values, int64_t padding,
                  std::vector<int64_t>* column) {
  for (size_t d = 0; d < kMaxShapeRank; ++d)
    column->push_back(d < values.size() ? values[d] : padding);
}

std::vector<int64_t> RowOf(const std::vector<int64_t>& column, size_t row, size_t rank) {
  const auto begin = column.begin() + static_cast<int64_t>(row * kMaxShapeRank);
  return {begin, begin + static_cast<int64_t>(rank)};
}

// Columns of the slice table as they lie in the file.
struct SliceColumns {
  std::vector<uint32_t> tensor, file, crc;
  std::vector<int64_t> box_offset, box_shape, flat_a, flat_b, byte_offset, bytes;
};

Status WriteSliceColumns(const SliceColumns& c, Hdf5Writer* file) {
  const auto n = static_cast<int64_t>(c.tensor.size());
  const auto write = [&](const char* name, Hdf5Type type, const std::vector<int64_t>& shape,
                         const void* data) {
    return file->WriteDataset(std::string("/slice/") + name, type, shape, data);
  };
  SALA_RETURN_IF_ERROR(write("tensor", Hdf5Type::kU32, {n}, c.tensor.data()));
  SALA_RETURN_IF_ERROR(write("file", Hdf5Type::kU32, {n}, c.file.data()));
  SALA_RETURN_IF_ERROR(
      write("box_offset", Hdf5Type::kI64, {n, kMaxShapeRank}, c.box_offset.data()));
  SALA_RETURN_IF_ERROR(write("box_shape", Hdf5Type::kI64, {n, kMaxShapeRank}, c.box_shape.data()));
  SALA_RETURN_IF_ERROR(write("flat_a", Hdf5Type::kI64, {n}, c.flat_a.data()));
  SALA_RETURN_IF_ERROR(write("flat_b", Hdf5Type::kI64, {n}, c.flat_b.data()));
  SALA_RETURN_IF_ERROR(write("byte_offset", Hdf5Type::kI64, {n}, c.byte_offset.data()));
  SALA_RETURN_IF_ERROR(write("bytes", Hdf5Type::kI64, {n}, c.bytes.data()));
  return write("crc32c", Hdf5Type::kU32, {n}, c.crc.data());
}

Status IndexError(const std::string& path, const std::string& what) {
  return MakeError(ExitCode::kData, "CKPT-MANIFEST",
                   path + ": the index contradicts itself: " + what + "; use another checkpoint");
}

template <typename T>
Status ReadColumn(const Hdf5Reader& file, const std::string& name, Hdf5Type type,
                  const std::vector<int64_t>& shape, std::vector<T>* column) {
  SALA_ASSIGN_OR_RETURN(const auto info, file.Expect(name, type, shape));
  column->resize(static_cast<size_t>(info.bytes) / sizeof(T));
  return file.Read(name, type, column->data(), info.bytes);
}

StatusOr<std::vector<StoredTensor>> ReadTensors(const Hdf5Reader& file, const std::string& path) {
  std::vector<uint8_t> names, kinds, dtypes, ndims;
  std::vector<int64_t> shapes;
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/tensor/name", Hdf5Type::kU8, {-1}, &names));
  const std::vector<std::string> texts = SplitTexts(names);
  const auto n = static_cast<int64_t>(texts.size());
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/tensor/kind", Hdf5Type::kU8, {n}, &kinds));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/tensor/dtype", Hdf5Type::kU8, {n}, &dtypes));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/tensor/ndim", Hdf5Type::kU8, {n}, &ndims));
  SALA_RETURN_IF_ERROR(
      ReadColumn(file, "/tensor/shape", Hdf5Type::kI64, {n, kMaxShapeRank}, &shapes));
  std::vector<StoredTensor> tensors;
  for (size_t t = 0; t < texts.size(); ++t) {
    if (kinds[t] >= kKinds || dtypes[t] >= kDTypes.size() || ndims[t] > kMaxShapeRank) {
      return IndexError(path, "unknown code for tensor `" + Printable(texts[t]) + "`");
    }
    tensors.push_back({texts[t], static_cast<TensorKind>(kinds[t]), kDTypes[dtypes[t]],
                       RowOf(shapes, t, ndims[t])});
    // 2^58 elements keep every byte count below 2^63.
    const int64_t elements = CheckedElements(tensors.back().shape);
    if (elements < 0 || elements > int64_t{1} << 58) {
      return IndexError(path, "impossible shape of tensor `" + Printable(texts[t]) + "`");
    }
  }
  return tensors;
}

// Whether the numbers of one slice fit its tensor and its file.
bool SliceIsSound(const StoredTensor& tensor, const StoredSlice& slice, int64_t file_bytes) {
  for (size_t d = 0; d < tensor.shape.size(); ++d) {
    if (slice.box_offset[d] < 0 || slice.box_shape[d] < 0 || slice.box_shape[d] > tensor.shape[d] ||
        slice.box_offset[d] > tensor.shape[d] - slice.box_shape[d]) {
      return false;
    }
  }
  const int64_t box = CheckedElements(slice.box_shape);
  return slice.flat_begin >= 0 && slice.flat_begin <= slice.flat_end && slice.flat_end <= box &&
         slice.bytes ==
             (slice.flat_end - slice.flat_begin) * static_cast<int64_t>(SizeOf(tensor.dtype)) &&
         slice.bytes <= kMaxSliceBytes && slice.byte_offset >= 0 &&
         slice.byte_offset <= file_bytes - slice.bytes;
}

}  // namespace

std::string StepName(int64_t global_step) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "step-%09lld", static_cast<long long>(global_step));
  return text.data();
}

int64_t CheckedElements(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t d : shape) {
    if (d < 0 || __builtin_mul_overflow(n, d, &n)) return -1;
  }
  return n;
}

Status WriteIndex(const std::string& path, const std::string& save_id, const Index& index) {
  SALA_ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create(path, kAlignDatasetsFrom));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("format", "checkpoint-index"));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("version", kVersion));
  SALA_RETURN_IF_ERROR(file.WriteAttribute("save_id", save_id));

  std::vector<std::string> names;
  std::vector<uint8_t> kinds, dtypes, ndims;
  std::vector<int64_t> shapes;
  for (const StoredTensor& tensor : index.tensors) {
    names.push_back(tensor.name);
    kinds.push_back(static_cast<uint8_t>(tensor.kind));
    dtypes.push_back(static_cast<uint8_t>(std::find(kDTypes.begin(), kDTypes.end(), tensor.dtype) -
                                          kDTypes.begin()));
    ndims.push_back(static_cast<uint8_t>(tensor.shape.size()));
    AppendPadded(tensor.shape, 1, &shapes);
  }
  const auto n = static_cast<int64_t>(names.size());
  const std::vector<uint8_t> name_bytes = JoinTexts(names);
  SALA_RETURN_IF_ERROR(file.WriteDataset(
      "/tensor/name", Hdf5Type::kU8, {static_cast<int64_t>(name_bytes.size())}, name_bytes.data()));
  SALA_RETURN_IF_ERROR(file.WriteDataset("/tensor/kind", Hdf5Type::kU8, {n}, kinds.data()));
  SALA_RETURN_IF_ERROR(file.WriteDataset("/tensor/dtype", Hdf5Type::kU8, {n}, dtypes.data()));
  SALA_RETURN_IF_ERROR(file.WriteDataset("/tensor/ndim", Hdf5Type::kU8, {n}, ndims.data()));
  SALA_RETURN_IF_ERROR(
      file.WriteDataset("/tensor/shape", Hdf5Type::kI64, {n, kMaxShapeRank}, shapes.data()));

  std::map<std::string, uint32_t> file_ids;
  std::vector<std::string> file_names;
  SliceColumns columns;
  for (const StoredSlice& slice : index.slices) {
    const auto [at, is_new] =
        file_ids.try_emplace(slice.file, static_cast<uint32_t>(file_names.size()));
    if (is_new) file_names.push_back(slice.file);
    columns.tensor.push_back(static_cast<uint32_t>(slice.tensor));
    columns.file.push_back(at->second);
    AppendPadded(slice.box_offset, 0, &columns.box_offset);
    AppendPadded(slice.box_shape, 1, &columns.box_shape);
    columns.flat_a.push_back(slice.flat_begin);
    columns.flat_b.push_back(slice.flat_end);
    columns.byte_offset.push_back(slice.byte_offset);
    columns.bytes.push_back(slice.bytes);
    columns.crc.push_back(slice.crc);
  }
  const std::vector<uint8_t> file_bytes = JoinTexts(file_names);
  SALA_RETURN_IF_ERROR(file.WriteDataset(
      "/file/name", Hdf5Type::kU8, {static_cast<int64_t>(file_bytes.size())}, file_bytes.data()));
  SALA_RETURN_IF_ERROR(WriteSliceColumns(columns, &file));
  return file.Close();
}

StatusOr<Index> ReadIndex(const std::string& path,
                          const std::function<int64_t(const std::string&)>& file_bytes) {
  SALA_ASSIGN_OR_RETURN(const Hdf5Reader file, Hdf5Reader::Open(path));
  Index index;
  SALA_ASSIGN_OR_RETURN(index.tensors, ReadTensors(file, path));
  std::vector<uint8_t> name_bytes;
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/file/name", Hdf5Type::kU8, {-1}, &name_bytes));
  const std::vector<std::string> file_names = SplitTexts(name_bytes);
  SliceColumns c;
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/tensor", Hdf5Type::kU32, {-1}, &c.tensor));
  const auto n = static_cast<int64_t>(c.tensor.size());
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/file", Hdf5Type::kU32, {n}, &c.file));
  SALA_RETURN_IF_ERROR(
      ReadColumn(file, "/slice/box_offset", Hdf5Type::kI64, {n, kMaxShapeRank}, &c.box_offset));
  SALA_RETURN_IF_ERROR(
      ReadColumn(file, "/slice/box_shape", Hdf5Type::kI64, {n, kMaxShapeRank}, &c.box_shape));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/flat_a", Hdf5Type::kI64, {n}, &c.flat_a));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/flat_b", Hdf5Type::kI64, {n}, &c.flat_b));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/byte_offset", Hdf5Type::kI64, {n}, &c.byte_offset));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/bytes", Hdf5Type::kI64, {n}, &c.bytes));
  SALA_RETURN_IF_ERROR(ReadColumn(file, "/slice/crc32c", Hdf5Type::kU32, {n}, &c.crc));
  for (size_t i = 0; i < c.tensor.size(); ++i) {
    if (c.tensor[i] >= index.tensors.size() || c.file[i] >= file_names.size()) {
      return IndexError(path, "slice " + std::to_string(i) + " names no tensor or no file");
    }
    const StoredTensor& tensor = index.tensors[c.tensor[i]];
    const size_t rank = tensor.shape.size();
    StoredSlice slice{c.tensor[i],
                      file_names[c.file[i]],
                      RowOf(c.box_offset, i, rank),
                      RowOf(c.box_shape, i, rank),
                      c.flat_a[i],
                      c.flat_b[i],
                      c.byte_offset[i],
                      c.bytes[i],
                      c.crc[i]};
    if (!SliceIsSound(tensor, slice, file_bytes(slice.file))) {
      return IndexError(path, "slice " + std::to_string(i) + " of tensor `" +
                                  Printable(tensor.name) +
                                  "` does not fit the tensor or its file " + Printable(slice.file));
    }
    index.slices.push_back(std::move(slice));
  }
  return index;
}

void ForEachRun(const std::vector<int64_t>& shape, const StoredSlice& slice,
                const std::function<void(const Run&)>& body) {
  // Dimensions after `split` are whole in the box, so box rows of dimension `split` are neighbours
  // in the tensor.
  const size_t rank = shape.size();
  size_t split = rank;
  int64_t whole = 1;  // elements of the dimensions after `split`
  while (split > 0) {
    --split;
    if (slice.box_shape[split] != shape[split]) break;
    if (split > 0) whole *= shape[split];
  }
  const int64_t run = rank == 0 ? 1 : slice.box_shape[split] * whole;
  for (int64_t at = slice.flat_begin; at < slice.flat_end;) {
    const int64_t row = at / run;
    const int64_t count = std::min(slice.flat_end, (row + 1) * run) - at;
    // Position of the run's first element in the tensor, from the box coordinates of the outer
    // dimensions.
    int64_t rest = row;
    int64_t position = at % run + (rank == 0 ? 0 : slice.box_offset[split] * whole);
    int64_t stride = rank == 0 ? 1 : whole * shape[split];
    for (size_t d = split; d-- > 0;) {
      position += (rest % slice.box_shape[d] + slice.box_offset[d]) * stride;
      rest /= slice.box_shape[d];
      stride *= shape[d];
    }
    body({position, at - slice.flat_begin, count});
    at += count;
  }
}

Status CheckCover(const StoredTensor& tensor, const StoredSlice* first, const StoredSlice* last,
                  int64_t begin, int64_t end) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (const StoredSlice* slice = first; slice != last; ++slice) {
    ForEachRun(tensor.shape, *slice, [&](const Run& run) {
      const int64_t a = std::max(begin, run.tensor_begin);
      const int64_t b = std::min(end, run.tensor_begin + run.count);
      if (a < b) ranges.emplace_back(a, b);
    });
  }
  std::sort(ranges.begin(), ranges.end());
  int64_t at = begin;
  for (const auto& [a, b] : ranges) {
    if (a != at) {
      return MakeError(ExitCode::kData, "CKPT-COVER",
                       "tensor `" + Printable(tensor.name) + "` (" +
                           std::string(NameOf(tensor.kind)) + "): elements [" +
                           std::to_string(std::min(a, at)) + ", " +
                           std::to_string(std::max(a, at)) + ") are " +
                           (a < at ? "stored more than once" : "not stored") + kUseAnother);
    }
    at = b;
  }
  if (at < end) {
    return MakeError(ExitCode::kData, "CKPT-COVER",
                     "tensor `" + Printable(tensor.name) + "` (" +
                         std::string(NameOf(tensor.kind)) + "): elements [" + std::to_string(at) +
                         ", " + std::to_string(end) + ") are not stored" + kUseAnother);
  }
  return OkStatus();
}

StatusOr<uint32_t> FileCrc(const std::string& path, int64_t bytes) {
  constexpr int64_t kPiece = int64_t{4} << 20;
  std::vector<char> buffer(static_cast<size_t>(std::min(kPiece, bytes)));
  uint32_t crc = 0;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    const auto n = static_cast<size_t>(std::min(kPiece, bytes - at));
    SALA_RETURN_IF_ERROR(ReadAt(path, at, buffer.data(), n));
    crc = Crc32c(buffer.data(), n, crc);
  }
  return crc;
}

void FaultPoint(const char* point) {
  const char* fault = std::getenv("SALA_FAULT");
  constexpr int kAsIfKilled = 137;  // 128 + SIGKILL, as a shell reports it
  if (fault != nullptr && std::string(fault) == std::string("checkpoint:") + point)
    _exit(kAsIfKilled);
}

namespace {
constexpr char kSelfCrc[] = "\"self_crc32c\": \"";
constexpr char kNoCrc[] = "00000000";
constexpr size_t kCrcDigits = 8;
}  // namespace

std::string SealManifest(nlohmann::ordered_json manifest) {
  manifest["self_crc32c"] = kNoCrc;  // the last key, so the last match below
  std::string text = DumpJson(manifest, 2) + "\n";
  const std::string crc = Hex32(Crc32c(text.data(), text.size()));
  return text.replace(text.rfind(kSelfCrc) + sizeof(kSelfCrc) - 1, kCrcDigits, crc);
}

bool ManifestIsIntact(const std::string& text) {
  const size_t at = text.rfind(kSelfCrc);
  if (at == std::string::npos || text.size() < at + sizeof(kSelfCrc) - 1 + kCrcDigits) return false;
  std::string blank = text;
  const std::string found = text.substr(at + sizeof(kSelfCrc) - 1, kCrcDigits);
  blank.replace(at + sizeof(kSelfCrc) - 1, kCrcDigits, kNoCrc);
  return Hex32(Crc32c(blank.data(), blank.size())) == found;
}

}  // namespace checkpoint
}  // namespace sala
