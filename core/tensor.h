// A tensor view: pointer, number type, shape, strides, device. It owns nothing.
//
//   Tensor q = qkv.Columns(0, n * d).AsHeads(n, d);   // [T, N, D] view into a [T, (N + 2K) * D]
//   buffer float* row = q.Row<float>(t);                     // first element of token t
//
// Strides count elements. The last dimension of a view is always contiguous. ConstTensor is the
// read-only form; a Tensor converts to it.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <type_traits>

#include "core/check.h"
#include "core/dtype.h"

namespace sala {

enum class DeviceKind : uint8_t { kCpu, kCuda };

constexpr int kMaxRank = 4;

// Number of elements of a shape.
int64_t NumElements(std::initializer_list<int64_t> shape);

template <bool kConst>
class BasicTensor {
 public:
  using VoidPointer = std::conditional_t<kConst, const void*, void*>;
  template <typename T>
  using Element = std::conditional_t<kConst, const T, T>;

  BasicTensor() = default;

  // A contiguous view.
  BasicTensor(VoidPointer data, DType dtype, std::initializer_list<int64_t> shape,
              DeviceKind device = DeviceKind::kCpu)
      : data_(data), dtype_(dtype), device_(device), rank_(static_cast<int>(shape.size())) {
    SALA_CHECK(shape.size() >= 1 && shape.size() <= kMaxRank) << "rank " << shape.size();
    int i = 0;
    for (int64_t n : shape) shape_[i++] = n;
    int64_t stride = 1;
    for (int d = rank_ - 1; d >= 0; --d) {
      stride_[d] = stride;
      stride *= shape_[d];
    }
  }

  template <typename T, typename = std::enable_if_t<kConst || !std::is_const_v<T>>>
  BasicTensor(T* data, std::initializer_list<int64_t> shape)
      : BasicTensor(data, DTypeOf<std::remove_const_t<T>>::value, shape) {}

  // Tensor -> ConstTensor: implicit, as adding const is everywhere.
  template <bool kOther, typename = std::enable_if_t<kConst && !kOther>>
  // NOLINTNEXTLINE(google-explicit-constructor)
  BasicTensor(const BasicTensor<kOther>& other)
      : data_(other.raw()), dtype_(other.dtype()), device_(other.device()), rank_(other.rank()) {
    for (int d = 0; d < rank_; ++d) {
      shape_[d] = other.dim(d);
      stride_[d] = other.stride(d);
    }
  }

  VoidPointer raw() const { return data_; }
  DType dtype() const { return dtype_; }
  DeviceKind device() const { return device_; }
  int rank() const { return rank_; }
  bool empty() const { return data_ == nullptr; }
  int64_t dim(int d) const { return shape_[d]; }
  int64_t stride(int d) const { return stride_[d]; }

  int64_t numel() const {
    int64_t n = rank_ == 0 ? 0 : 1;
    for (int d = 0; d < rank_; ++d) n *= shape_[d];
    return n;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int d = rank_ - 1; d >= 0; --d) {
      if (shape_[d] != 1 && stride_[d] != expected) return false;
      expected *= shape_[d];
    }
    return true;
  }

  // The data as T; the number type must agree.
  template <typename T>
  Element<T>* Data() const {
    SALA_CHECK(dtype_ == DTypeOf<T>::value)
        << "tensor holds " << NameOf(dtype_) << ", asked for " << NameOf(DTypeOf<T>::value);
    return static_cast<Element<T>*>(data_);
  }

  // First element of index i of the first dimension.
  template <typename T>
  Element<T>* Row(int64_t i) const {
    return Data<T>() + i * stride_[0];
  }

  // Rows [begin, end) of the first dimension.
  BasicTensor Rows(int64_t begin, int64_t end) const {
    SALA_CHECK(0 <= begin && begin <= end && end <= shape_[0])
        << "rows [" << begin << ", " << end << ") of " << shape_[0];
    BasicTensor view = *this;
    view.data_ = Offset(begin * stride_[0]);
    view.shape_[0] = end - begin;
    return view;
  }

  // Columns [begin, end) of the last dimension.
  BasicTensor Columns(int64_t begin, int64_t end) const {
    SALA_CHECK(rank_ >= 1 && 0 <= begin && begin <= end && end <= shape_[rank_ - 1])
        << "columns [" << begin << ", " << end << ") of " << shape_[rank_ - 1];
    BasicTensor view = *this;
    view.data_ = Offset(begin);
    view.shape_[rank_ - 1] = end - begin;
    return view;
  }

  // [T, N * D] -> [T, N, D], strides kept.
  BasicTensor AsHeads(int64_t n, int64_t d) const {
    SALA_CHECK(rank_ == 2 && shape_[1] == n * d)
        << "cannot split " << shape_[1] << " columns in " << n << " heads of " << d;
    BasicTensor view = *this;
    view.rank_ = 3;
    view.shape_ = {shape_[0], n, d, 0};
    view.stride_ = {stride_[0], d, 1, 0};
    return view;
  }

  // The same contiguous data with another shape.
  BasicTensor Reshape(std::initializer_list<int64_t> shape) const {
    BasicTensor view(data_, dtype_, shape, device_);
    SALA_CHECK(contiguous() && view.numel() == numel()) << "reshape changes the number of elements";
    return view;
  }

 private:
  VoidPointer Offset(int64_t elements) const {
    using Byte = std::conditional_t<kConst, const char, char>;
    return data_ == nullptr
               ? nullptr
               : static_cast<Byte*>(data_) + elements * static_cast<int64_t>(SizeOf(dtype_));
  }

  VoidPointer data_ = nullptr;
  DType dtype_ = DType::kF32;
  DeviceKind device_ = DeviceKind::kCpu;
  int rank_ = 0;
  std::array<int64_t, kMaxRank> shape_{};
  std::array<int64_t, kMaxRank> stride_{};
};

using Tensor = BasicTensor<false>;
using ConstTensor = BasicTensor<true>;

std::string ShapeText(const ConstTensor& tensor);  // "[128, 8, 16] f32"

}  // namespace sala
