// The emulated PTX instructions against the layouts documented in the PTX ISA, written out here
// once more, element by element.
#include "kernels/common/ptx.h"

#include <cmath>

#include "tests/simt/launch.h"

namespace {

namespace ptx = sala::kernels::ptx;
using simt_test::DeviceArray;
using simt_test::RunKernel;

int Lane() { return static_cast<int>(threadIdx.x) % 32; }

uint32_t Pack(float low, float high) {
  const auto bits = [](float x) {
    return static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16(x)));
  };
  return bits(low) | bits(high) << 16;
}

// ---------------------------------------------------------------------------- mma

// PTX ISA, "Matrix Fragments for mma.m16n8k16": for element i of a lane's fragment,
// groupID = lane >> 2, thread = lane % 4,
//   A (i = 0..7): row = groupID + (i is 2, 3, 6 or 7 ? 8 : 0), column = thread * 2 + (i & 1) + (i
//   >= 4 ? 8 : 0) B (i = 0..3): row = thread * 2 + (i & 1) + (i >= 2 ? 8 : 0), column = groupID C
//   (i = 0..3): row = groupID + (i >= 2 ? 8 : 0), column = thread * 2 + (i & 1)
int RowA(int lane, int i) { return lane / 4 + (i % 4 >= 2 ? 8 : 0); }
int ColumnA(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0); }
int RowB(int lane, int i) { return lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0); }
int ColumnB(int lane, int) { return lane / 4; }
int RowC(int lane, int i) { return lane / 4 + (i >= 2 ? 8 : 0); }
int ColumnC(int lane, int i) { return lane % 4 * 2 + (i & 1); }

__global__ void MmaKernel(const float* a, const float* b, const float* c, float* d) {
  uint32_t fragment_a[4];
  uint32_t fragment_b[2];
  float fragment_c[4];
  for (int i = 0; i < 8; i += 2) {
    fragment_a[i / 2] = Pack(a[RowA(Lane(), i) * 16 + ColumnA(Lane(), i)],
                             a[RowA(Lane(), i + 1) * 16 + ColumnA(Lane(), i + 1)]);
  }
  for (int i = 0; i < 4; i += 2) {
    fragment_b[i / 2] = Pack(b[RowB(Lane(), i) * 8 + ColumnB(Lane(), i)],
                             b[RowB(Lane(), i + 1) * 8 + ColumnB(Lane(), i + 1)]);
  }
  for (int i = 0; i < 4; ++i) fragment_c[i] = c[RowC(Lane(), i) * 8 + ColumnC(Lane(), i)];
  ptx::MmaBf16(fragment_c, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) d[RowC(Lane(), i) * 8 + ColumnC(Lane(), i)] = fragment_c[i];
}

TEST(Ptx, MmaFollowsTheDocumentedFragments) {
  std::vector<float> a(16 * 16);
  std::vector<float> b(16 * 8);
  std::vector<float> c(16 * 8);
  for (size_t i = 0; i < a.size(); ++i)
    a[i] = static_cast<float>(static_cast<int>(i * 7 % 31) - 15);
  for (size_t i = 0; i < b.size(); ++i)
    b[i] = static_cast<float>(static_cast<int>(i * 5 % 23) - 11);
  for (size_t i = 0; i < c.size(); ++i) c[i] = static_cast<float>(i);
  const DeviceArray<float> device_a(a);
  const DeviceArray<float> device_b(b);
  const DeviceArray<float> device_c(c);
  const DeviceArray<float> device_d(16 * 8);
  RunKernel(dim3(1), dim3(32), 0, MmaKernel, device_a.data(), device_b.data(), device_c.data(),
            device_d.data());
  const auto d = device_d.Host();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = c[i * 8 + j];
      for (int k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[k * 8 + j];
      EXPECT_EQ(d[i * 8 + j], sum) << i << " " << j;  // small integers: exact
    }
  }
}

TEST(Ptx, MmaPassesNanAndInfinity) {
  std::vector<float> a(16 * 16, 1.0F);
  a[3 * 16 + 5] = NAN;
  a[9 * 16 + 2] = INFINITY;
  const DeviceArray<float> device_a(a);
  const DeviceArray<float> device_b(std::vector<float>(16 * 8, 1.0F));
  const DeviceArray<float> device_c(std::vector<float>(16 * 8, 0.0F));
  const DeviceArray<float> device_d(16 * 8);
  RunKernel(dim3(1), dim3(32), 0, MmaKernel, device_a.data(), device_b.data(), device_c.data(),
            device_d.data());
  const auto d = device_d.Host();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      EXPECT_EQ(std::isnan(d[i * 8 + j]), i == 3);
      EXPECT_EQ(std::isinf(d[i * 8 + j]), i == 9);
    }
  }
}

// ---------------------------------------------------------------------------- ldmatrix

enum class Form { k4, k4Trans, k2, k2Trans };

// Element (row, column) of matrix m is 1000 m + 10 row + column.
template <Form kForm>
__global__ void LdMatrixKernel(uint32_t* out) {
  constexpr int kMatrices = kForm == Form::k4 || kForm == Form::k4Trans ? 4 : 2;
  sala::kernels::SharedMemory shared;
  auto* rows =
      shared.Take<uint16_t>(kMatrices * 8 * 24);  // rows apart: any 16-byte address will do
  for (int i = Lane(); i < kMatrices * 64; i += 32) {
    rows[i / 8 * 24 + i % 8] = static_cast<uint16_t>(i / 64 * 1000 + i / 8 % 8 * 10 + i % 8);
  }
  __syncthreads();
  const uint16_t* address = rows + Lane() % (8 * kMatrices) * 24;
  uint32_t r[kMatrices];
  if constexpr (kForm == Form::k4) ptx::LdMatrix4(r, address);
  if constexpr (kForm == Form::k4Trans) ptx::LdMatrix4Trans(r, address);
  if constexpr (kForm == Form::k2) ptx::LdMatrix2(r, address);
  if constexpr (kForm == Form::k2Trans) ptx::LdMatrix2Trans(r, address);
  for (int m = 0; m < kMatrices; ++m) out[Lane() * kMatrices + m] = r[m];
}

// PTX ISA, ldmatrix: lane l gets of each matrix row l / 4 the elements 2 (l % 4) and 2 (l % 4) + 1;
// with .trans the matrix is loaded in column-major form.
template <Form kForm>
void TestLdMatrix() {
  constexpr int kMatrices = kForm == Form::k4 || kForm == Form::k4Trans ? 4 : 2;
  constexpr bool kTrans = kForm == Form::k4Trans || kForm == Form::k2Trans;
  const DeviceArray<uint32_t> out(32 * kMatrices);
  RunKernel(dim3(1), dim3(32), kMatrices * 8 * 24 * 2, LdMatrixKernel<kForm>, out.data());
  const auto host = out.Host();
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < kMatrices; ++m) {
      for (int half = 0; half < 2; ++half) {
        const int row = kTrans ? lane % 4 * 2 + half : lane / 4;
        const int column = kTrans ? lane / 4 : lane % 4 * 2 + half;
        EXPECT_EQ(host[lane * kMatrices + m] >> (16 * half) & 0xffffU,
                  static_cast<uint32_t>(1000 * m + 10 * row + column));
      }
    }
  }
}

TEST(Ptx, LdMatrix4) { TestLdMatrix<Form::k4>(); }
TEST(Ptx, LdMatrix4Trans) { TestLdMatrix<Form::k4Trans>(); }
TEST(Ptx, LdMatrix2) { TestLdMatrix<Form::k2>(); }
TEST(Ptx, LdMatrix2Trans) { TestLdMatrix<Form::k2Trans>(); }

// The recipes of ptx.h: C = A B with B stored [N][K] or [K][N].
template <bool kBIsKByN>
__global__ void RecipeKernel(const float* a, const float* b, float* c) {
  sala::kernels::SharedMemory shared;
  auto* sa = shared.Take<__nv_bfloat16>(16 * 16);
  auto* sb = shared.Take<__nv_bfloat16>(16 * 16);
  for (int i = Lane(); i < 256; i += 32) {
    sa[i] = __float2bfloat16(a[i]);
    sb[i] = __float2bfloat16(b[i]);
  }
  __syncwarp();
  uint32_t fa[4];
  uint32_t fb[4];
  const int lane = Lane();
  ptx::LdMatrix4(fa, &sa[lane % 16 * 16 + lane / 16 * 8]);
  if constexpr (kBIsKByN) {
    ptx::LdMatrix4Trans(fb, &sb[lane % 16 * 16 + lane / 16 * 8]);
  } else {
    ptx::LdMatrix4(fb, &sb[(lane % 8 + lane / 16 * 8) * 16 + lane / 8 % 2 * 8]);
  }
  for (int half = 0; half < 2; ++half) {
    float sums[4] = {};
    ptx::MmaBf16(sums, fa, fb[2 * half], fb[2 * half + 1]);
    for (int i = 0; i < 4; ++i) c[RowC(lane, i) * 16 + half * 8 + ColumnC(lane, i)] = sums[i];
  }
}

template <bool kBIsKByN>
void TestRecipe() {
  std::vector<float> a(256);
  std::vector<float> b(256);
  for (int i = 0; i < 256; ++i) {
    a[i] = static_cast<float>(i * 11 % 29 - 14);
    b[i] = static_cast<float>(i * 3 % 19 - 9);
  }
  const DeviceArray<float> device_a(a);
  const DeviceArray<float> device_b(b);
  const DeviceArray<float> device_c(256);
  RunKernel(dim3(1), dim3(32), 2048, RecipeKernel<kBIsKByN>, device_a.data(), device_b.data(),
            device_c.data());
  const auto c = device_c.Host();
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 16; ++j) {
      float sum = 0.0F;
      for (int k = 0; k < 16; ++k)
        sum += a[i * 16 + k] * (kBIsKByN ? b[k * 16 + j] : b[j * 16 + k]);
      EXPECT_EQ(c[i * 16 + j], sum) << i << " " << j;
    }
  }
}

TEST(Ptx, RecipeForBStoredNByK) { TestRecipe<false>(); }
TEST(Ptx, RecipeForBStoredKByN) { TestRecipe<true>(); }

// ---------------------------------------------------------------------------- cp.async

__global__ void CopyKernel(const uint32_t* from, uint32_t* out) {
  sala::kernels::SharedMemory shared;
  auto* wide = shared.Take<uint32_t>(32 * 4);
  auto* narrow = shared.Take<uint32_t>(32);
  const int valid = Lane() % 17;
  ptx::CpAsync16(wide + Lane() * 4, from + Lane() * 4, valid);
  ptx::CpAsyncCommit();
  ptx::CpAsync4(narrow + Lane(), from + Lane(), Lane() % 5);
  ptx::CpAsyncCommit();
  ptx::CpAsyncWait<1>();
  for (int i = 0; i < 4; ++i) out[Lane() * 5 + i] = wide[Lane() * 4 + i];
  ptx::CpAsyncWait<0>();
  out[Lane() * 5 + 4] = narrow[Lane()];
}

TEST(Ptx, CpAsyncFillsWithZerosBehindTheValidBytes) {
  std::vector<uint32_t> from(32 * 4);
  for (size_t i = 0; i < from.size(); ++i)
    from[i] = 0x01020304U * static_cast<uint32_t>(i % 50 + 1);
  const DeviceArray<uint32_t> device_from(from);
  const DeviceArray<uint32_t> out(32 * 5);
  RunKernel(dim3(1), dim3(32), 1024, CopyKernel, device_from.data(), out.data());
  const auto host = out.Host();
  const auto cut = [](uint32_t value, int bytes) {
    return bytes >= 4 ? value : bytes <= 0 ? 0U : value & ((1U << (8 * bytes)) - 1U);
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      EXPECT_EQ(host[lane * 5 + i], cut(from[lane * 4 + i], lane % 17 - 4 * i));
    }
    EXPECT_EQ(host[lane * 5 + 4], cut(from[lane], lane % 5));
  }
}

// With valid_bytes = 0 nothing is read: the address may be anything aligned.
__global__ void NoReadKernel(const uint32_t* end, uint32_t* out) {
  sala::kernels::SharedMemory shared;
  auto* s = shared.Take<uint32_t>(4);
  ptx::CpAsync16(s, end, 0);
  ptx::CpAsyncCommit();
  ptx::CpAsyncWait<0>();
  out[0] = s[0] | s[1] | s[2] | s[3];
}

TEST(Ptx, CpAsyncReadsNothingWhenNothingIsValid) {
  const DeviceArray<uint32_t> from(64);
  const DeviceArray<uint32_t> out(1);
  RunKernel(dim3(1), dim3(1), 128, NoReadKernel, from.data() + 64, out.data());
  EXPECT_EQ(out.Host()[0], 0U);
}

// ---------------------------------------------------------------------------- functions

__global__ void FunctionKernel(const float* x, float* y) {
  const int i = static_cast<int>(threadIdx.x);
  y[3 * i] = ptx::Exp2(x[i]);
  y[3 * i + 1] = ptx::Log2(x[i]);
  y[3 * i + 2] = ptx::Rcp(x[i]);
}

TEST(Ptx, Functions) {
  const std::vector<float> x = {0.0F,     1.0F,   -1.0F,   3.5F,    -INFINITY,
                                INFINITY, 1e-40F, -126.5F, -200.0F, 1e38F};
  const DeviceArray<float> device_x(x);
  const DeviceArray<float> device_y(3 * x.size());
  RunKernel(dim3(1), dim3(static_cast<unsigned>(x.size())), 0, FunctionKernel, device_x.data(),
            device_y.data());
  const auto y = device_y.Host();
  const float infinity = INFINITY;
  const float exp2[] = {1.0F, 2.0F, 0.5F, 11.3137085F, 0.0F, infinity, 1.0F, 0.0F, 0.0F, infinity};
  const float log2[] = {-infinity, 0.0F,      NAN, 1.80735492F, NAN,
                        infinity,  -infinity, NAN, NAN,         126.2332F};
  const float rcp[] = {infinity, 1.0F,     -1.0F,           0.285714298F, -0.0F,
                       0.0F,     infinity, -0.00790513866F, -0.005F,      0.0F};
  const auto same = [](float a, float b) {
    return std::isnan(b) ? std::isnan(a) : a == b || std::fabs(a - b) <= 1e-6F * std::fabs(b);
  };
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_TRUE(same(y[3 * i], exp2[i])) << x[i] << " " << y[3 * i];
    EXPECT_TRUE(same(y[3 * i + 1], log2[i])) << x[i] << " " << y[3 * i + 1];
    EXPECT_TRUE(same(y[3 * i + 2], rcp[i])) << x[i] << " " << y[3 * i + 2];
  }
}

}  // namespace
