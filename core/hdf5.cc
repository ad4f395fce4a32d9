#include "core/hdf5.h"

#include <hdf5.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <mutex>
#include <utility>

#include "core/check.h"
#include "core/file.h"

namespace sala {
namespace {

constexpr int64_t kAlignment = 4096;
constexpr int64_t kMaxStringAttribute = 1 << 20;

struct TypeRow {
  Hdf5Type type;
  std::string_view name;
  size_t size;
};
constexpr std::array<TypeRow, 9> kTypes = {{{Hdf5Type::kU8, "u8", 1},
                                            {Hdf5Type::kU16, "u16", 2},
                                            {Hdf5Type::kU32, "u32", 4},
                                            {Hdf5Type::kU64, "u64", 8},
                                            {Hdf5Type::kI32, "i32", 4},
                                            {Hdf5Type::kI64, "i64", 8},
                                            {Hdf5Type::kF32, "f32", 4},
                                            {Hdf5Type::kF64, "f64", 8},
                                            {Hdf5Type::kBF16, "bf16", 2}}};

// Owns an identifier of the library.
class Handle {
 public:
  using Closer = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Closer closer) : id_(id), closer_(closer) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), closer_(other.closer_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(closer_, other.closer_);
    return *this;
  }
  ~Handle() {
    if (id_ >= 0) closer_(id_);
  }
  bool ok() const { return id_ >= 0; }
  hid_t get() const { return id_; }
  herr_t Close() { return id_ < 0 ? 0 : closer_(std::exchange(id_, -1)); }

 private:
  hid_t id_ = -1;
  Closer closer_ = nullptr;
};

// Before any call of the library on this thread: no file locks (they fail on NFS and Lustre, and
// nothing is shared for writing), and no error texts on stderr; the error stack is per thread, so
// this is too.
void Prepare() {
  static std::once_flag once;
  std::call_once(once, [] {
    ::setenv("HDF5_USE_FILE_LOCKING", "FALSE", 1);
    // At the end of the process the library would flush what it holds, and crash over a file whose
    // closing failed on a full disk. Everything is closed here.
    H5dont_atexit();
    H5open();
  });
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
}

// The library's own account of the last failure: the innermost entry of its stack, of which only
// the system's words where it quotes them among addresses and sizes.
std::string LibraryError() {
  std::string text;
  H5Ewalk2(
      H5E_DEFAULT, H5E_WALK_UPWARD,
      [](unsigned n, const H5E_error2_t* error, void* out) -> herr_t {
        if (n == 0 && error->desc != nullptr) *static_cast<std::string*>(out) = error->desc;
        return 0;
      },
      &text);
  constexpr std::string_view kQuote = "error message = '";
  if (const size_t quote = text.find(kQuote); quote != std::string::npos) {
    text = text.substr(quote + kQuote.size());
    text = text.substr(0, text.find('\''));
  }
  return text.empty() ? "" : " (" + Printable(text) + ")";
}

Status WriteError(const std::string& path, const std::string& what) {
  return MakeError(ExitCode::kIo, "FILE-WRITE", path + ": cannot " + what + LibraryError());
}

Status FormatError(const std::string& path, const std::string& what) {
  return MakeError(ExitCode::kData, "HDF5-FORMAT", path + ": " + what);
}

Handle MakeType(Hdf5Type type) {
  const auto copy = [](hid_t id) { return Handle(H5Tcopy(id), H5Tclose); };
  switch (type) {
    case Hdf5Type::kU8:
      return copy(H5T_STD_U8LE);
    case Hdf5Type::kU16:
      return copy(H5T_STD_U16LE);
    case Hdf5Type::kU32:
      return copy(H5T_STD_U32LE);
    case Hdf5Type::kU64:
      return copy(H5T_STD_U64LE);
    case Hdf5Type::kI32:
      return copy(H5T_STD_I32LE);
    case Hdf5Type::kI64:
      return copy(H5T_STD_I64LE);
    case Hdf5Type::kF32:
      return copy(H5T_IEEE_F32LE);
    case Hdf5Type::kF64:
      return copy(H5T_IEEE_F64LE);
    case Hdf5Type::kBF16: {
      Handle bf16 = copy(H5T_IEEE_F32LE);
      // Fields first: the library refuses a size in which the old fields do not fit.
      H5Tset_fields(bf16.get(), 15, 7, 8, 0, 7);
      H5Tset_size(bf16.get(), 2);
      H5Tset_ebias(bf16.get(), 127);
      return bf16;
    }
    case Hdf5Type::kOther:
      break;
  }
  SALA_CHECK(false) << "no HDF5 type for kOther";
  return {};
}

Hdf5Type Classify(hid_t id) {
  for (const TypeRow& row : kTypes) {
    const Handle known = MakeType(row.type);
    if (H5Tequal(id, known.get()) > 0) return row.type;
  }
  return Hdf5Type::kOther;
}

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i > 0 ? ", " : "") + (shape[i] < 0 ? std::string("any") : std::to_string(shape[i]));
  }
  return text + "]";
}

// elements * size, or -1 when it does not fit.
int64_t CheckedBytes(const std::vector<int64_t>& shape, int64_t size) {
  int64_t bytes = size;
  for (int64_t n : shape) {
    if (n < 0 || __builtin_mul_overflow(bytes, n, &bytes)) return -1;
  }
  return bytes;
}

}  // namespace

std::string Hdf5LibraryVersion() {
  unsigned major = 0;
  unsigned minor = 0;
  unsigned release = 0;
  hbool_t thread_safe = 0;
  if (H5get_libversion(&major, &minor, &release) < 0 || H5is_library_threadsafe(&thread_safe) < 0)
    return "unknown version";
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(release) +
         (thread_safe ? ", thread-safe" : ", not thread-safe");
}

size_t SizeOf(Hdf5Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.size;
  }
  SALA_CHECK(false) << "kOther has no size";
  return 0;
}

std::string_view NameOf(Hdf5Type type) {
  for (const TypeRow& row : kTypes) {
    if (row.type == type) return row.name;
  }
  return "another type";
}

Hdf5Type Hdf5TypeOf(DType dtype) {
  for (const TypeRow& row : kTypes) {
    if (row.name == NameOf(dtype)) return row.type;
  }
  SALA_CHECK(false) << "no HDF5 type for " << NameOf(dtype);
  return Hdf5Type::kOther;
}

struct Hdf5Writer::State {
  std::string path;
  Handle file;

  Status WriteAttribute(const std::string& name, const Handle& type, const void* value) {
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle attribute(
        H5Acreate2(file.get(), name.c_str(), type.get(), space.get(), H5P_DEFAULT, H5P_DEFAULT),
        H5Aclose);
    if (!attribute.ok() || H5Awrite(attribute.get(), type.get(), value) < 0) {
      return WriteError(path, "write attribute `" + name + "`");
    }
    return OkStatus();
  }

  // The groups in front of the last part of a dataset's name. Made here, as the library would stamp
  // those it makes by itself with the time of day: equal content has to be equal bytes.
  Status MakeGroups(const std::string& name) {
    const Handle create(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
    H5Pset_obj_track_times(create.get(), false);
    for (size_t at = name.find('/', 1); at != std::string::npos; at = name.find('/', at + 1)) {
      const std::string group = name.substr(0, at);
      if (H5Lexists(file.get(), group.c_str(), H5P_DEFAULT) > 0) continue;
      if (!Handle(H5Gcreate2(file.get(), group.c_str(), H5P_DEFAULT, create.get(), H5P_DEFAULT),
                  H5Gclose)
               .ok()) {
        return WriteError(path, "create group `" + group + "`");
      }
    }
    return OkStatus();
  }
};

Hdf5Writer::Hdf5Writer(std::unique_ptr<State> state) : state_(std::move(state)) {}
Hdf5Writer::Hdf5Writer(Hdf5Writer&& other) noexcept = default;
Hdf5Writer& Hdf5Writer::operator=(Hdf5Writer&& other) noexcept = default;
Hdf5Writer::~Hdf5Writer() = default;

StatusOr<Hdf5Writer> Hdf5Writer::Create(const std::string& path, int64_t align_threshold) {
  Prepare();
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_libver_bounds(access.get(), H5F_LIBVER_V18, H5F_LIBVER_V110);
  H5Pset_alignment(access.get(), static_cast<hsize_t>(align_threshold), kAlignment);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  const Handle create(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_obj_track_times(create.get(), false);
  auto state = std::make_unique<State>();
  state->path = path;
  state->file =
      Handle(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, create.get(), access.get()), H5Fclose);
  if (!state->file.ok()) return WriteError(path, "create");
  return Hdf5Writer(std::move(state));
}

Status Hdf5Writer::WriteAttribute(const std::string& name, const std::string& value) {
  Prepare();
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  // A string type cannot have size 0; an empty string is one NUL.
  H5Tset_size(type.get(), std::max<size_t>(1, value.size()));
  H5Tset_strpad(type.get(), H5T_STR_NULLPAD);
  H5Tset_cset(type.get(), H5T_CSET_UTF8);
  return state_->WriteAttribute(name, type, value.c_str());
}

Status Hdf5Writer::WriteAttribute(const std::string& name, const char* value) {
  return WriteAttribute(name, std::string(value));
}

Status Hdf5Writer::WriteAttribute(const std::string& name, int64_t value) {
  Prepare();
  return state_->WriteAttribute(name, MakeType(Hdf5Type::kI64), &value);
}

Status Hdf5Writer::WriteDataset(const std::string& name, Hdf5Type type,
                                const std::vector<int64_t>& shape, const void* data) {
  Prepare();
  SALA_CHECK(CheckedBytes(shape, static_cast<int64_t>(SizeOf(type))) >= 0) << "shape of " << name;
  const Handle element = MakeType(type);
  const std::vector<hsize_t> dims(shape.begin(), shape.end());
  const Handle space(H5Screate_simple(static_cast<int>(dims.size()), dims.data(), nullptr),
                     H5Sclose);
  const Handle create(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_layout(create.get(), H5D_CONTIGUOUS);
  H5Pset_alloc_time(create.get(), H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(create.get(), H5D_FILL_TIME_NEVER);
  H5Pset_obj_track_times(create.get(), false);
  SALA_RETURN_IF_ERROR(state_->MakeGroups(name));
  const Handle dataset(H5Dcreate2(state_->file.get(), name.c_str(), element.get(), space.get(),
                                  H5P_DEFAULT, create.get(), H5P_DEFAULT),
                       H5Dclose);
  if (!dataset.ok()) return WriteError(state_->path, "make dataset `" + name + "`");
  const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
  if (!empty && H5Dwrite(dataset.get(), element.get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, data) < 0) {
    return WriteError(state_->path, "write dataset `" + name + "`");
  }
  return OkStatus();
}

StatusOr<int64_t> Hdf5Writer::Offset(const std::string& name) const {
  Prepare();
  const Handle dataset(H5Dopen2(state_->file.get(), name.c_str(), H5P_DEFAULT), H5Dclose);
  if (!dataset.ok()) return WriteError(state_->path, "find dataset `" + name + "`");
  const haddr_t offset = H5Dget_offset(dataset.get());
  return offset == HADDR_UNDEF ? 0 : static_cast<int64_t>(offset);
}

Status Hdf5Writer::Close() {
  Prepare();
  if (state_->file.Close() < 0) return WriteError(state_->path, "close");
  return FsyncFile(state_->path);
}

struct Hdf5Reader::State {
  std::string path;
  Handle file;

  StatusOr<Handle> Dataset(const std::string& name) const {
    Handle dataset(H5Dopen2(file.get(), name.c_str(), H5P_DEFAULT), H5Dclose);
    if (!dataset.ok())
      return FormatError(path, "no dataset `" + Printable(name) + "`" + LibraryError());
    return dataset;
  }

  StatusOr<Handle> Attribute(const std::string& name) const {
    Handle attribute(H5Aopen(file.get(), name.c_str(), H5P_DEFAULT), H5Aclose);
    if (!attribute.ok()) return FormatError(path, "no attribute `" + Printable(name) + "`");
    const Handle space(H5Aget_space(attribute.get()), H5Sclose);
    if (H5Sget_simple_extent_npoints(space.get()) != 1) {
      return FormatError(path, "attribute `" + Printable(name) + "` does not hold one value");
    }
    return attribute;
  }
};

Hdf5Reader::Hdf5Reader(std::unique_ptr<State> state) : state_(std::move(state)) {}
Hdf5Reader::Hdf5Reader(Hdf5Reader&& other) noexcept = default;
Hdf5Reader& Hdf5Reader::operator=(Hdf5Reader&& other) noexcept = default;
Hdf5Reader::~Hdf5Reader() = default;

StatusOr<Hdf5Reader> Hdf5Reader::Open(const std::string& path) {
  SALA_RETURN_IF_ERROR(
      FileSize(path).status());  // missing and unreadable files get their own errors
  Prepare();
  const Handle access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_fclose_degree(access.get(), H5F_CLOSE_STRONG);
  auto state = std::make_unique<State>();
  state->path = path;
  state->file = Handle(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access.get()), H5Fclose);
  if (!state->file.ok()) return FormatError(path, "HDF5 cannot open the file" + LibraryError());
  return Hdf5Reader(std::move(state));
}

bool Hdf5Reader::HasAttribute(const std::string& name) const {
  Prepare();
  return H5Aexists(state_->file.get(), name.c_str()) > 0;
}

StatusOr<std::string> Hdf5Reader::StringAttribute(const std::string& name) const {
  Prepare();
  SALA_ASSIGN_OR_RETURN(const Handle attribute, state_->Attribute(name));
  const Handle type(H5Aget_type(attribute.get()), H5Tclose);
  if (H5Tget_class(type.get()) != H5T_STRING) {
    return FormatError(state_->path, "attribute `" + Printable(name) + "` is not a string");
  }
  if (H5Tis_variable_str(type.get()) > 0) {
    char* text = nullptr;
    if (H5Aread(attribute.get(), type.get(), static_cast<void*>(&text)) < 0 || text == nullptr) {
      return FormatError(state_->path,
                         "cannot read attribute `" + Printable(name) + "`" + LibraryError());
    }
    std::string value(text);
    H5free_memory(text);
    return value;
  }
  const size_t size = H5Tget_size(type.get());
  if (size > static_cast<size_t>(kMaxStringAttribute)) {
    return FormatError(state_->path, "attribute `" + Printable(name) +
                                         "` is too long: " + std::to_string(size) + " bytes");
  }
  std::string value(size, '\0');
  if (H5Aread(attribute.get(), type.get(), value.data()) < 0) {
    return FormatError(state_->path,
                       "cannot read attribute `" + Printable(name) + "`" + LibraryError());
  }
  value.resize(value.find_last_not_of('\0') + 1);
  return value;
}

StatusOr<int64_t> Hdf5Reader::IntAttribute(const std::string& name) const {
  Prepare();
  SALA_ASSIGN_OR_RETURN(const Handle attribute, state_->Attribute(name));
  const Handle type(H5Aget_type(attribute.get()), H5Tclose);
  int64_t value = 0;
  if (H5Tget_class(type.get()) != H5T_INTEGER ||
      H5Aread(attribute.get(), H5T_NATIVE_INT64, &value) < 0) {
    return FormatError(state_->path, "attribute `" + Printable(name) + "` is not an integer");
  }
  return value;
}

StatusOr<std::vector<std::string>> Hdf5Reader::Datasets() const {
  Prepare();
  std::vector<std::string> names;
  const herr_t result = H5Ovisit2(
      state_->file.get(), H5_INDEX_NAME, H5_ITER_INC,
      [](hid_t, const char* name, const H5O_info_t* info, void* out) -> herr_t {
        if (info->type == H5O_TYPE_DATASET)
          static_cast<std::vector<std::string>*>(out)->emplace_back(name);
        return 0;
      },
      &names, H5O_INFO_BASIC);
  if (result < 0) return FormatError(state_->path, "cannot list the datasets" + LibraryError());
  std::sort(names.begin(), names.end());
  return names;
}

bool Hdf5Reader::HasDataset(const std::string& name) const {
  Prepare();
  return state_->Dataset(name).ok();
}

StatusOr<Hdf5Reader::DatasetInfo> Hdf5Reader::Info(const std::string& name) const {
  Prepare();
  SALA_ASSIGN_OR_RETURN(const Handle dataset, state_->Dataset(name));
  const Handle type(H5Dget_type(dataset.get()), H5Tclose);
  const Handle space(H5Dget_space(dataset.get()), H5Sclose);
  const Handle create(H5Dget_create_plist(dataset.get()), H5Pclose);
  DatasetInfo info;
  const int rank = H5Sget_simple_extent_ndims(space.get());
  if (rank < 0) return FormatError(state_->path, "dataset `" + Printable(name) + "` has no shape");
  std::vector<hsize_t> dims(static_cast<size_t>(rank));
  H5Sget_simple_extent_dims(space.get(), dims.data(), nullptr);
  info.shape.assign(dims.begin(), dims.end());
  info.type = Classify(type.get());
  if (info.type != Hdf5Type::kOther) {
    info.bytes = CheckedBytes(info.shape, static_cast<int64_t>(SizeOf(info.type)));
    if (info.bytes < 0) {
      return FormatError(state_->path, "dataset `" + Printable(name) +
                                           "` has an impossible shape " + ShapeText(info.shape));
    }
  }
  // Data in other files ("external") is not a run of bytes of this one.
  info.contiguous =
      H5Pget_layout(create.get()) == H5D_CONTIGUOUS && H5Pget_external_count(create.get()) == 0;
  const haddr_t offset = info.contiguous ? H5Dget_offset(dataset.get()) : HADDR_UNDEF;
  if (offset != HADDR_UNDEF) {
    info.byte_offset = static_cast<int64_t>(offset);
  } else if (info.bytes > 0) {
    info.contiguous = false;  // never written: there is nothing to map
  }
  return info;
}

StatusOr<Hdf5Reader::DatasetInfo> Hdf5Reader::Expect(const std::string& name, Hdf5Type type,
                                                     const std::vector<int64_t>& shape) const {
  SALA_ASSIGN_OR_RETURN(DatasetInfo info, Info(name));
  bool same = info.type == type && info.shape.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i)
    same = shape[i] < 0 || shape[i] == info.shape[i];
  if (!same) {
    return FormatError(state_->path, "dataset `" + Printable(name) + "`: found " +
                                         std::string(NameOf(info.type)) + " " +
                                         ShapeText(info.shape) + ", expected " +
                                         std::string(NameOf(type)) + " " + ShapeText(shape));
  }
  return info;
}

Status Hdf5Reader::Read(const std::string& name, Hdf5Type type, void* out, int64_t bytes) const {
  SALA_ASSIGN_OR_RETURN(const DatasetInfo info, Info(name));
  if (info.type != type || info.bytes != bytes) {
    return FormatError(
        state_->path, "dataset `" + Printable(name) + "`: found " + std::string(NameOf(info.type)) +
                          " of " + std::to_string(info.bytes) + " bytes, expected " +
                          std::string(NameOf(type)) + " of " + std::to_string(bytes));
  }
  if (bytes == 0) return OkStatus();
  SALA_ASSIGN_OR_RETURN(const Handle dataset, state_->Dataset(name));
  if (H5Dread(dataset.get(), MakeType(type).get(), H5S_ALL, H5S_ALL, H5P_DEFAULT, out) < 0) {
    return FormatError(state_->path,
                       "cannot read dataset `" + Printable(name) + "`" + LibraryError());
  }
  return OkStatus();
}

}  // namespace sala
