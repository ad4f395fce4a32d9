// What the tests of CUDA kernels share. They run wherever the CUDA module runs: over the emulator
// in every test run (the environment variable SALA_CUDA_MODULE names that module), on hardware in
// launch/gpu-test. Inputs are rounded to bfloat16 first, so that the double reference sees the
// numbers the kernel sees.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "core/cuda_module.h"
#include "tests/kernels/common/kernel_test.h"

namespace sala::kernels {

// Half a unit in the last place of bfloat16, relative: the error of one rounding.
constexpr double kBf16Round = 0x1p-8;

// Fewer and smaller cases: in builds with a sanitizer, which cost a factor of 3 to 70, and where
// the environment asks for it (launch/gpu-test under compute-sanitizer).
#ifdef SALA_SANITIZED
inline const bool kSlowBuild = true;
#else
inline const bool kSlowBuild = std::getenv("SALA_TEST_SMALL") != nullptr;
#endif

// The device of this test program; the program ends when there is none.
inline Device& TestDevice() {
  static const std::unique_ptr<Device> device = [] {
    auto opened = OpenCudaDevice({.host = "test"});
    if (!opened.ok()) {
      std::fprintf(stderr, "%s\n", MessageOf(opened.status()).c_str());
      std::exit(1);
    }
    return std::move(opened).value();
  }();
  return *device;
}

// A matrix on the device, [rows, columns] with rows `columns + gap` apart. Gaps and the element
// behind the last row hold NaN and must stay untouched; a new matrix is all NaN, as an output that
// must be overwritten should be.
class DeviceMatrix {
 public:
  DeviceMatrix(DType dtype, int64_t rows, int64_t columns, int64_t gap = 0)
      : dtype_(dtype), rows_(rows), columns_(columns), stride_(columns + gap) {
    data_.reset(TestDevice().Allocate(bytes()));
    const std::vector<unsigned char> poison(bytes(), 0xff);
    TestDevice().Upload(data_.get(), poison.data(), bytes());
  }
  // The values of `from`, rounded to the number type.
  DeviceMatrix(DType dtype, const Matrix& from, int64_t gap = 0)
      : DeviceMatrix(dtype, from.rows(), from.columns(), gap) {
    Upload(from);
  }

  void Upload(const Matrix& from) {
    std::vector<unsigned char> host = Bytes();
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) {
        const float value = from.at(r, c);
        const BF16 half(value);
        const void* source = dtype_ == DType::kBF16 ? static_cast<const void*>(&half) : &value;
        std::memcpy(host.data() + Offset(r, c), source, SizeOf(dtype_));
      }
    }
    TestDevice().Upload(data_.get(), host.data(), host.size());
  }

  Matrix Download() const {
    const std::vector<unsigned char> host = Bytes();
    Matrix m(rows_, columns_);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) m.at(r, c) = Value(host, r, c);
    }
    return m;
  }

  // Every byte, gaps included: for tests of equal bits.
  std::vector<unsigned char> Bytes() const {
    std::vector<unsigned char> host(bytes());
    TestDevice().Download(host.data(), data_.get(), host.size());
    return host;
  }

  bool GapsUntouched() const {
    const std::vector<unsigned char> host = Bytes();
    for (int64_t r = 0; r <= rows_; ++r) {
      const int64_t end = r == rows_ ? kTail : stride_;
      for (int64_t c = r == rows_ ? 0 : columns_; c < end; ++c) {
        for (size_t b = 0; b < SizeOf(dtype_); ++b) {
          if (host[Offset(r, c) + b] != 0xff) return false;
        }
      }
    }
    return true;
  }

  sala::Tensor tensor() const {
    return sala::Tensor(data_.get(), dtype_, {rows_, stride_}, DeviceKind::kCuda)
        .Columns(0, columns_);
  }
  sala::Tensor heads(int64_t n, int64_t d) const { return tensor().AsHeads(n, d); }
  // One row as a vector.
  sala::Tensor vector() const {
    return sala::Tensor(data_.get(), dtype_, {columns_}, DeviceKind::kCuda);
  }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

 private:
  static constexpr int64_t kTail = 8;  // elements behind the last row
  struct Free {
    void operator()(void* pointer) const { TestDevice().Free(pointer); }
  };

  size_t bytes() const { return static_cast<size_t>(rows_ * stride_ + kTail) * SizeOf(dtype_); }
  size_t Offset(int64_t r, int64_t c) const {
    return static_cast<size_t>(r * stride_ + c) * SizeOf(dtype_);
  }
  float Value(const std::vector<unsigned char>& host, int64_t r, int64_t c) const {
    if (dtype_ == DType::kBF16) {
      BF16 half;
      std::memcpy(&half, host.data() + Offset(r, c), sizeof(half));
      return static_cast<float>(half);
    }
    float value = 0;
    std::memcpy(&value, host.data() + Offset(r, c), sizeof(value));
    return value;
  }

  DType dtype_;
  int64_t rows_, columns_, stride_;
  std::unique_ptr<void, Free> data_;
};

// A matrix whose rows lie more than 2^32 elements apart, for kernels that might count elements in
// 32 bits: those would take row r + 1 for a place behind row r. The address space of a row costs
// nothing where nobody touches it. Only over the emulator, whose device memory is host memory;
// takes the place of a DeviceMatrix, whatever its gap.
class FarMatrix {
 public:
  // Sanitizers keep books on address space, and a device has no such memory.
  static bool Possible() { return TestDevice().info().emulated && !kSlowBuild; }

  FarMatrix(DType dtype, int64_t rows, int64_t columns, int64_t /*gap*/ = 0)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        bytes_(static_cast<size_t>(rows * kStride) * SizeOf(dtype)),
        data_(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {
    SALA_CHECK(data_ != MAP_FAILED) << "no address space for " << bytes_ << " bytes";
    for (int64_t r = 0; r < rows; ++r) {
      std::memset(Element(r, 0), 0xff, static_cast<size_t>(columns) * SizeOf(dtype));
    }
  }
  FarMatrix(DType dtype, const Matrix& from, int64_t gap = 0)
      : FarMatrix(dtype, from.rows(), from.columns(), gap) {
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) {
        if (dtype_ == DType::kBF16) {
          *static_cast<BF16*>(Element(r, c)) = BF16(from.at(r, c));
        } else {
          *static_cast<float*>(Element(r, c)) = from.at(r, c);
        }
      }
    }
  }
  FarMatrix(const FarMatrix&) = delete;
  FarMatrix& operator=(const FarMatrix&) = delete;
  ~FarMatrix() { munmap(data_, bytes_); }

  Matrix Download() const {
    TestDevice().Synchronize();
    Matrix m(rows_, columns_);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t c = 0; c < columns_; ++c) {
        m.at(r, c) = dtype_ == DType::kBF16
                         ? static_cast<float>(*static_cast<const BF16*>(Element(r, c)))
                         : *static_cast<const float*>(Element(r, c));
      }
    }
    return m;
  }
  bool GapsUntouched() const { return true; }  // not looked at

  sala::Tensor tensor() const {
    return sala::Tensor(data_, dtype_, {rows_, kStride}, DeviceKind::kCuda).Columns(0, columns_);
  }
  sala::Tensor heads(int64_t n, int64_t d) const { return tensor().AsHeads(n, d); }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }

 private:
  // 2^32 more than an offset inside of a row: either kind of 32-bit number loses it.
  static constexpr int64_t kStride = (int64_t{1} << 32) + 4096;
  void* Element(int64_t r, int64_t c) const {
    return static_cast<char*>(data_) + static_cast<size_t>(r * kStride + c) * SizeOf(dtype_);
  }

  DType dtype_;
  int64_t rows_, columns_;
  size_t bytes_;
  void* data_;
};

// A vector of integers on the device (tokens, labels, positions).
class DeviceIntegers {
 public:
  explicit DeviceIntegers(const std::vector<int32_t>& values)
      : count_(static_cast<int64_t>(values.size())) {
    const size_t bytes = std::max<size_t>(1, values.size()) * sizeof(int32_t);
    data_.reset(TestDevice().Allocate(bytes));
    if (!values.empty()) TestDevice().Upload(data_.get(), values.data(), values.size() * 4);
  }
  ConstTensor tensor() const {
    return ConstTensor(data_.get(), DType::kI32, {count_}, DeviceKind::kCuda);
  }

 private:
  struct Free {
    void operator()(void* pointer) const { TestDevice().Free(pointer); }
  };
  int64_t count_;
  std::unique_ptr<void, Free> data_;
};

// Random values that bfloat16 holds exactly.
inline Matrix RandomBf16(int64_t rows, int64_t columns, std::mt19937& rng, float scale = 1.0F) {
  Matrix m = Matrix::Random(rows, columns, rng, 0, scale);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) m.at(r, c) = static_cast<float>(BF16(m.at(r, c)));
  }
  return m;
}

// A context on the test device; all scratch must be given back by the end of the test.
class CudaKernelTest : public ::testing::Test {
 protected:
  // A copy of the process cannot use the device, so what must end in an abort runs in a process
  // that starts anew.
  CudaKernelTest() : pool_(1), scratch_(size_t{1} << 20, &TestDevice()) {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
  }
  void TearDown() override {
    TestDevice().Synchronize();
    EXPECT_EQ(scratch_.used_bytes(), 0U) << "a kernel kept work space";
  }
  Context ctx() { return {DeviceKind::kCuda, &pool_, &scratch_, &TestDevice()}; }

 private:
  ThreadPool pool_;
  Arena scratch_;
};

}  // namespace sala::kernels
