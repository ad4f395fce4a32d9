// HDF5 files through the serial C library: one writer, contiguous little-endian datasets at known
// byte offsets, so that the data can later be read with pread or mmap alone. Knows nothing of
// models.
//
//   SALA_ASSIGN_OR_RETURN(Hdf5Writer file, Hdf5Writer::Create("tokens-00000.h5.tmp"));
//   SALA_RETURN_IF_ERROR(file.WriteAttribute("format", "token-shard"));
//   SALA_RETURN_IF_ERROR(file.WriteDataset("/crc/tokens", Hdf5Type::kU32, {n}, crcs.data()));  //
//   makes the group SALA_ASSIGN_OR_RETURN(int64_t offset, file.Offset("/crc/tokens"));
//   SALA_RETURN_IF_ERROR(file.Close());  // closes and fsyncs; the destructor only closes
//
// Library bounds V18..V110 (superblock and object headers carry checksums), alignment 4096, early
// allocation, no fill, no time stamps: the same content gives the same bytes. The library finds no
// flipped bit in contiguous data; callers keep CRCs. Errors: FILE-WRITE (74), FILE-MISSING (66),
// HDF5-FORMAT (65: not HDF5, or not what was expected), each with path and name. Thread-safe as far
// as the library is built so; one object belongs to one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "core/dtype.h"
#include "core/status.h"

namespace sala {

// "1.10.8, thread-safe": of the library in use.
std::string Hdf5LibraryVersion();

// kBF16: a 2-byte float (sign bit 15, exponent at 7 size 8, mantissa at 0 size 7, bias 127), which
// HDF5 tools show as numbers.
enum class Hdf5Type : uint8_t { kU8, kU16, kU32, kU64, kI32, kI64, kF32, kF64, kBF16, kOther };

size_t SizeOf(Hdf5Type type);  // bytes of one element; not for kOther
std::string_view NameOf(Hdf5Type type);
Hdf5Type Hdf5TypeOf(DType dtype);

class Hdf5Writer {
 public:
  // Datasets and HDF5's own blocks of at least `align_threshold` bytes start at multiples of 4096.
  // With 1 every dataset can be used in place when the file is mapped; files of thousands of small
  // datasets that are only read with pread give 4096.
  static StatusOr<Hdf5Writer> Create(const std::string& path, int64_t align_threshold = 1);
  Hdf5Writer(Hdf5Writer&& other) noexcept;
  Hdf5Writer& operator=(Hdf5Writer&& other) noexcept;
  ~Hdf5Writer();

  // Attributes of the root group.
  Status WriteAttribute(const std::string& name, const std::string& value);
  Status WriteAttribute(const std::string& name, const char* value);
  Status WriteAttribute(const std::string& name, int64_t value);

  // `name` may hold groups ("/crc/tokens"), which are made. `data`: the elements in row-major
  // order.
  Status WriteDataset(const std::string& name, Hdf5Type type, const std::vector<int64_t>& shape,
                      const void* data);
  StatusOr<int64_t> Offset(const std::string& name) const;  // in the file; 0 for an empty dataset
  Status Close();

 private:
  struct State;
  explicit Hdf5Writer(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

class Hdf5Reader {
 public:
  struct DatasetInfo {
    Hdf5Type type = Hdf5Type::kOther;
    std::vector<int64_t> shape;
    bool contiguous = false;  // stored as one run of bytes
    int64_t byte_offset = 0;  // of that run; 0 for an empty dataset
    int64_t bytes = 0;        // of all elements; 0 for kOther
  };

  static StatusOr<Hdf5Reader> Open(const std::string& path);  // read-only, without a lock
  Hdf5Reader(Hdf5Reader&& other) noexcept;
  Hdf5Reader& operator=(Hdf5Reader&& other) noexcept;
  ~Hdf5Reader();

  bool HasAttribute(const std::string& name) const;
  StatusOr<std::string> StringAttribute(const std::string& name) const;
  StatusOr<int64_t> IntAttribute(const std::string& name) const;

  StatusOr<std::vector<std::string>> Datasets()
      const;  // full names without the first slash, sorted
  bool HasDataset(const std::string& name) const;
  StatusOr<DatasetInfo> Info(const std::string& name) const;
  // Info, and an error when type or shape differ (a -1 in `shape` stands for any length).
  // Contiguous or not.
  StatusOr<DatasetInfo> Expect(const std::string& name, Hdf5Type type,
                               const std::vector<int64_t>& shape) const;
  // The whole dataset, whatever its layout; `type` and `bytes` must be the dataset's.
  Status Read(const std::string& name, Hdf5Type type, void* out, int64_t bytes) const;
  // A one-dimensional dataset.
  template <typename T>
  StatusOr<std::vector<T>> ReadVector(const std::string& name, Hdf5Type type) const {
    SALA_ASSIGN_OR_RETURN(const DatasetInfo info, Expect(name, type, {-1}));
    std::vector<T> values(static_cast<size_t>(info.shape[0]));
    SALA_RETURN_IF_ERROR(
        Read(name, type, values.data(), static_cast<int64_t>(values.size() * sizeof(T))));
    return values;
  }

 private:
  struct State;
  explicit Hdf5Reader(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace sala
