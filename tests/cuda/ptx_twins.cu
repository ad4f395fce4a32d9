// What the instructions of kernels/common/ptx.h, the warp primitives and the intrinsics give, lane
// by lane, for the comparison of the device with its emulation.
//
//   ptx_twins FILE             built by nvcc: results of the hardware
//   ptx_twins_emulated FILE    the same source over tests/simt: results of the twins
//   compare_twins.py A B       compares the two files
//
// Inputs are the same random numbers in both. Each line of the file is one 32-bit result:
//   NAME CASE LANE ELEMENT KIND BITS TOLERANCE
// KIND x: an integer or a pattern of bits, equal or wrong; f: a float, off by at most TOLERANCE (0:
// to the bit; NaN equals NaN). Tolerances follow from the documented error of the instruction and
// are worked out here, on the host, from the inputs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/common/cuda.h"
#include "kernels/common/ptx.h"

namespace {

namespace ptx = sala::kernels::ptx;
using sala::kernels::SharedMemory;

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffU;

// ---- running

void Check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}

template <typename... Parameters, typename... Arguments>
void Run(void (*kernel)(Parameters...), int blocks, int threads, size_t shared_bytes,
         Arguments... arguments) {
  const dim3 grid(static_cast<unsigned>(blocks));
  const dim3 block(static_cast<unsigned>(threads));
#ifdef SALA_EMULATED
  Check(simt::Launch("twin", grid, block, shared_bytes, nullptr, kernel, arguments...), "launch");
#else
  // clang-format off
  kernel<<<grid, block, shared_bytes>>>(arguments...);
  // clang-format on
  Check(cudaGetLastError(), "launch");
#endif
  Check(cudaDeviceSynchronize(), "kernel");
}

// An array on the device, lives until the program ends.
template <typename T>
T* Upload(const std::vector<T>& host) {
  void* device = nullptr;
  Check(cudaMalloc(&device, host.size() * sizeof(T)), "cudaMalloc");
  Check(cudaMemcpy(device, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice),
        "cudaMemcpy");
  return static_cast<T*>(device);
}

template <typename T>
std::vector<T> Download(const T* device, size_t count) {
  std::vector<T> host(count);
  Check(cudaMemcpy(host.data(), device, count * sizeof(T), cudaMemcpyDeviceToHost), "cudaMemcpy");
  return host;
}

// Results start as a pattern that none of them has.
template <typename T>
T* NewResults(size_t count) {
  std::vector<T> poison(count);
  std::memset(static_cast<void*>(poison.data()), 0xa5, count * sizeof(T));
  return Upload(poison);
}

std::FILE* output = nullptr;

void Write(const std::string& name, int number, int lane, int element, char kind, uint32_t bits,
           double tolerance) {
  std::fprintf(output, "%s %d %d %d %c %08x %.9g\n", name.c_str(), number, lane, element, kind,
               bits, tolerance);
}
void WriteBits(const std::string& name, int number, int lane, int element, uint32_t bits) {
  Write(name, number, lane, element, 'x', bits, 0);
}
void WriteFloat(const std::string& name, int number, int lane, int element, float value,
                double tolerance) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  Write(name, number, lane, element, 'f', bits, tolerance);
}

// The same numbers on every machine.
class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  uint32_t Bits() { return static_cast<uint32_t>(engine_()); }
  int Below(int n) { return static_cast<int>(Bits() % static_cast<uint32_t>(n)); }
  // In [-1, 1).
  float Uniform() { return static_cast<float>(static_cast<int32_t>(Bits())) * 0x1p-31F; }

 private:
  std::mt19937 engine_;
};

uint16_t ToBf16(float x) {
  const __nv_bfloat16 half = __float2bfloat16(x);
  uint16_t bits = 0;
  std::memcpy(&bits, &half, sizeof(bits));
  return bits;
}
double FromBf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float x = 0;
  std::memcpy(&x, &wide, sizeof(x));
  return x;
}

__device__ __forceinline__ int Lane() { return static_cast<int>(threadIdx.x) % kWarp; }

// ---- MmaBf16

// Per lane: a[4] and b[2] in `fragments`, c[4] in `sums`.
__global__ void MmaKernel(const uint32_t* fragments, const float* sums, float* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + Lane();
  uint32_t a[4];
  float c[4];
  for (int i = 0; i < 4; ++i) a[i] = fragments[at * 6 + i];
  for (int i = 0; i < 4; ++i) c[i] = sums[at * 4 + i];
  ptx::MmaBf16(c, a, fragments[at * 6 + 4], fragments[at * 6 + 5]);
  for (int i = 0; i < 4; ++i) out[at * 4 + i] = c[i];
}

// The sum of the magnitudes of what is added for element i of lane l, from the fragments of the
// whole warp by the layout in ptx.h: what the error of a sum in any order is measured against.
double MmaScale(const uint32_t* fragments, const float* sums, int lane, int i) {
  const int row = lane / 4 + i / 2 * 8;
  const int column = lane % 4 * 2 + i % 2;
  double scale = std::fabs(double{sums[lane * 4 + i]});
  for (int k = 0; k < 16; ++k) {
    const int a_lane = row % 8 * 4 + k % 8 / 2;
    const uint32_t a = fragments[a_lane * 6 + row / 8 + k / 8 * 2] >> (k % 2 * 16) & 0xffffU;
    const int b_lane = column * 4 + k % 8 / 2;
    const uint32_t b = fragments[b_lane * 6 + 4 + k / 8] >> (k % 2 * 16) & 0xffffU;
    scale += std::fabs(FromBf16(a) * FromBf16(b));
  }
  return scale;
}

void Mma() {
  constexpr int kCases = 64;
  Random random(11);
  std::vector<uint32_t> fragments(size_t{kCases} * kWarp * 6);
  std::vector<float> sums(size_t{kCases} * kWarp * 4);
  // Even cases hold small integers, whose sums are exact in any order: equal to the bit. Odd ones
  // hold numbers of many magnitudes; a tensor core adds in an order of its own and cuts bits off
  // the smaller terms, so that the result may be off by some units of 2^-24 of the largest partial
  // sum.
  for (int n = 0; n < kCases; ++n) {
    const bool exact = n % 2 == 0;
    const auto value = [&] {
      return exact ? static_cast<float>(random.Below(61) - 30)
                   : random.Uniform() * std::exp2(static_cast<float>(random.Below(9) - 4));
    };
    for (int i = 0; i < kWarp * 6; ++i) {
      const uint32_t low = ToBf16(value());
      fragments[static_cast<size_t>(n) * kWarp * 6 + static_cast<size_t>(i)] =
          low | static_cast<uint32_t>(ToBf16(value())) << 16;
    }
    for (int i = 0; i < kWarp * 4; ++i)
      sums[static_cast<size_t>(n) * kWarp * 4 + static_cast<size_t>(i)] = value();
  }
  // Infinity and NaN in one row of the last exact case.
  const size_t last = size_t{kCases - 2} * kWarp * 6;
  fragments[last + 5 * 6] = 0x00007f80U;      // lane 5, a[0]: row 1, k = 2: infinity
  fragments[last + 9 * 6 + 1] = 0x7fc00000U;  // lane 9, a[1]: row 10, k = 3: NaN
  auto* out = NewResults<float>(sums.size());
  Run(MmaKernel, kCases, kWarp, 0, Upload(fragments), Upload(sums), out);
  const std::vector<float> found = Download(out, sums.size());
  for (int n = 0; n < kCases; ++n) {
    const uint32_t* f = fragments.data() + static_cast<size_t>(n) * kWarp * 6;
    const float* c = sums.data() + static_cast<size_t>(n) * kWarp * 4;
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const double scale = MmaScale(f, c, lane, i);
        const double tolerance = n % 2 == 0 || !std::isfinite(scale) ? 0 : 0x1p-20 * scale;
        WriteFloat("MmaBf16", n, lane, i,
                   found[(static_cast<size_t>(n) * kWarp + static_cast<size_t>(lane)) * 4 +
                         static_cast<size_t>(i)],
                   tolerance);
      }
    }
  }
}

// ---- LdMatrix

enum class Form { k4, k4Trans, k2, k2Trans };
constexpr int kShared = 2048;  // elements

// `offsets`: where each lane's row lies in shared memory, in elements, a multiple of 8.
template <Form kForm>
__global__ void LdMatrixKernel(const uint16_t* values, const int* offsets, uint32_t* out) {
  constexpr int kMatrices = kForm == Form::k4 || kForm == Form::k4Trans ? 4 : 2;
  SharedMemory shared;
  auto* s = shared.Take<uint16_t>(kShared);
  for (int i = Lane(); i < kShared; i += kWarp) s[i] = values[blockIdx.x * kShared + i];
  __syncwarp();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + Lane();
  uint32_t r[kMatrices];
  const uint16_t* row = s + offsets[at];
  if constexpr (kForm == Form::k4) ptx::LdMatrix4(r, row);
  if constexpr (kForm == Form::k4Trans) ptx::LdMatrix4Trans(r, row);
  if constexpr (kForm == Form::k2) ptx::LdMatrix2(r, row);
  if constexpr (kForm == Form::k2Trans) ptx::LdMatrix2Trans(r, row);
  for (int m = 0; m < kMatrices; ++m) out[at * kMatrices + m] = r[m];
}

template <Form kForm>
void LdMatrix(const char* name) {
  constexpr int kCases = 16;
  constexpr int kMatrices = kForm == Form::k4 || kForm == Form::k4Trans ? 4 : 2;
  Random random(21 + static_cast<uint32_t>(kForm));
  std::vector<uint16_t> values(size_t{kCases} * kShared);
  for (uint16_t& value : values) value = static_cast<uint16_t>(random.Bits());
  // Any aligned row will do; the same row may be asked for by several lanes.
  std::vector<int> offsets(size_t{kCases} * kWarp);
  for (int& offset : offsets) offset = random.Below(kShared / 8) * 8;
  auto* out = NewResults<uint32_t>(offsets.size() * kMatrices);
  Run(LdMatrixKernel<kForm>, kCases, kWarp, sala::kernels::SharedBytes<uint16_t>(kShared),
      Upload(values), Upload(offsets), out);
  const std::vector<uint32_t> found = Download(out, offsets.size() * kMatrices);
  for (size_t i = 0; i < found.size(); ++i) {
    const auto thread = static_cast<int>(i) / kMatrices;
    WriteBits(name, thread / kWarp, thread % kWarp, static_cast<int>(i) % kMatrices, found[i]);
  }
}

// ---- CpAsync

// Each lane copies 16, 16 and 4 bytes in three groups, with `valid` bytes each, and reads its own
// copies as soon as they may be read, and its neighbour's after a barrier.
__global__ void CpAsyncKernel(const uint32_t* from, const int* valid, uint32_t* out) {
  SharedMemory shared;
  auto* first = shared.Take<uint32_t>(kWarp * 4);
  auto* second = shared.Take<uint32_t>(kWarp * 4);
  auto* third = shared.Take<uint32_t>(kWarp);
  const int lane = Lane();
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  ptx::CpAsync16(first + lane * 4, from + at * 12, valid[at * 3]);
  ptx::CpAsyncCommit();
  ptx::CpAsync16(second + lane * 4, from + at * 12 + 4, valid[at * 3 + 1]);
  ptx::CpAsyncCommit();
  ptx::CpAsync4(third + lane, from + at * 12 + 8, valid[at * 3 + 2]);
  ptx::CpAsyncCommit();
  uint32_t* results = out + at * 13;
  ptx::CpAsyncWait<2>();
  for (int i = 0; i < 4; ++i) results[i] = first[lane * 4 + i];
  ptx::CpAsyncWait<1>();
  for (int i = 0; i < 4; ++i) results[4 + i] = second[lane * 4 + i];
  ptx::CpAsyncWait<0>();
  results[8] = third[lane];
  __syncthreads();
  const int other = (lane + 5) % kWarp;
  for (int i = 0; i < 3; ++i) results[9 + i] = first[other * 4 + i];
  results[12] = third[other];
}

void CpAsync() {
  constexpr int kCases = 16;
  Random random(31);
  // 12 words for each lane, of which 9 are copied: 16-byte copies need 16-byte addresses.
  std::vector<uint32_t> from(size_t{kCases} * kWarp * 12);
  for (uint32_t& word : from) word = random.Bits();
  std::vector<int> valid(size_t{kCases} * kWarp * 3);
  for (size_t i = 0; i < valid.size(); ++i) {
    const int most = i % 3 == 2 ? 4 : 16;
    valid[i] = random.Below(4) == 0 ? most : random.Below(most + 1);
  }
  auto* out = NewResults<uint32_t>(size_t{kCases} * kWarp * 13);
  Run(CpAsyncKernel, kCases, kWarp, 3 * sala::kernels::SharedBytes<uint32_t>(kWarp * 4),
      Upload(from), Upload(valid), out);
  const std::vector<uint32_t> found = Download(out, size_t{kCases} * kWarp * 13);
  for (size_t i = 0; i < found.size(); ++i) {
    const auto thread = static_cast<int>(i / 13);
    const auto element = static_cast<int>(i % 13);
    WriteBits(element == 8 || element == 12 ? "CpAsync4" : "CpAsync16", thread / kWarp,
              thread % kWarp, element, found[i]);
  }
}

// ---- functions

// One result per thread and function. Special values first, then random ones.
std::vector<float> FunctionInputs(Random& random, bool positive) {
  std::vector<float> x = {0.0F,      -0.0F,  1.0F,    -1.0F,   0.5F,    2.0F,   INFINITY, -INFINITY,
                          NAN,       1e-40F, -1e-40F, 1e38F,   -1e38F,  1e-38F, 126.0F,   -125.0F,
                          -1024.25F, 3e38F,  1e-45F,  128.25F, -200.0F, 0.99F,  1.01F,    -126.5F};
  while (x.size() < 1024) {
    // Small, large, and near 1, where a logarithm is near 0.
    const float u = random.Uniform();
    const int kind = random.Below(3);
    float value = kind == 0   ? u * 100.0F
                  : kind == 1 ? u * std::exp2(static_cast<float>(random.Below(200) - 100))
                              : 1.0F + u * 0.01F;
    x.push_back(positive ? std::fabs(value) : value);
  }
  return x;
}

struct Function {
  const char* name;
  // The error the device's documentation allows, for input x and exact result y, absolute.
  double (*tolerance)(double x, double y);
};
constexpr double kUlp = 0x1p-23;
// Where the exact result is no normal number the flush to zero may or may not have taken place.
constexpr double kTiny = 0x1p-125;
double TwoUlp(double, double y) { return 3 * kUlp * std::fabs(y) + kTiny; }
double Exact(double, double) { return 0; }
double OfLog2(double, double y) { return std::fmax(3 * kUlp, 3 * kUlp * std::fabs(y)); }
double OfLog(double, double y) { return std::fmax(4 * kUlp, 3 * kUlp * std::fabs(y)); }
double OfExp(double x, double y) { return (4 + 1.2 * std::fabs(x)) * kUlp * std::fabs(y) + kTiny; }

constexpr int kFunctions = 15;
constexpr Function kTable[kFunctions] = {
    {"Exp2", TwoUlp},      {"Log2", OfLog2},     {"Rcp", TwoUlp},        {"__expf", OfExp},
    {"__logf", OfLog},     {"rsqrtf", TwoUlp},   {"__fdividef", TwoUlp}, {"__frcp_rn", Exact},
    {"__fsqrt_rn", Exact}, {"__fmaf_rn", Exact}, {"__fdiv_rn", Exact},   {"fminf", Exact},
    {"fmaxf", Exact},      {"expf", TwoUlp},     {"logf", OfLog},
};

__global__ void FunctionKernel(const float* x, const float* y, float* out, int count) {
  const auto i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  float* results = out + static_cast<int64_t>(i) * kFunctions;
  results[0] = ptx::Exp2(x[i]);
  results[1] = ptx::Log2(x[i]);
  results[2] = ptx::Rcp(x[i]);
  results[3] = __expf(x[i]);
  results[4] = __logf(x[i]);
  results[5] = rsqrtf(x[i]);
  results[6] = __fdividef(x[i], y[i]);
  results[7] = __frcp_rn(x[i]);
  results[8] = __fsqrt_rn(x[i]);
  results[9] = __fmaf_rn(x[i], y[i], x[i]);
  results[10] = __fdiv_rn(x[i], y[i]);
  results[11] = fminf(x[i], y[i]);
  results[12] = fmaxf(x[i], y[i]);
  results[13] = expf(x[i]);
  results[14] = logf(x[i]);
}

void Functions() {
  Random random(41);
  for (int part = 0; part < 2; ++part) {
    const std::vector<float> x = FunctionInputs(random, part == 1);
    std::vector<float> y = x;
    for (size_t i = y.size() - 1; i > 0; --i)
      std::swap(y[i], y[static_cast<size_t>(random.Below(static_cast<int>(i) + 1))]);
    const auto count = static_cast<int>(x.size());
    auto* out = NewResults<float>(x.size() * kFunctions);
    Run(FunctionKernel, (count + 127) / 128, 128, 0, Upload(x), Upload(y), out, count);
    const std::vector<float> found = Download(out, x.size() * kFunctions);
    for (int i = 0; i < count; ++i) {
      for (int f = 0; f < kFunctions; ++f) {
        const float value = found[static_cast<size_t>(i) * kFunctions + static_cast<size_t>(f)];
        const double input = x[static_cast<size_t>(i)];
        const double divisor = std::fabs(double{y[static_cast<size_t>(i)]});
        // Numbers that are read as zero, or a divisor outside of what __fdividef promises.
        const bool tiny = input != 0 && std::fabs(input) < 0x1p-125;
        const bool outside = f == 6 && (!(divisor < 0x1p126) || !(divisor > 0x1p-126));
        if ((f < 7 && tiny) || outside) continue;
        WriteFloat(kTable[f].name, part, i % kWarp, i, value,
                   std::isfinite(value) ? kTable[f].tolerance(input, value) : 0);
      }
    }
  }
}

// ---- the warp's own instructions

constexpr int kWarpResults = 22;
constexpr const char* kWarpNames[kWarpResults] = {"__shfl_sync",
                                                  "__shfl_sync.8",
                                                  "__shfl_xor_sync",
                                                  "__shfl_up_sync",
                                                  "__shfl_down_sync",
                                                  "__shfl_up_sync.16",
                                                  "__ballot_sync",
                                                  "__any_sync",
                                                  "__all_sync",
                                                  "__match_any_sync",
                                                  "__reduce_add_sync",
                                                  "__reduce_min_sync",
                                                  "__reduce_max_sync",
                                                  "__reduce_and_sync",
                                                  "__reduce_or_sync",
                                                  "__reduce_xor_sync",
                                                  "__clz",
                                                  "__popc",
                                                  "__ffs",
                                                  "__brev",
                                                  "__byte_perm",
                                                  "__umulhi"};

__global__ void WarpKernel(const uint32_t* in, uint32_t* out) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarp + Lane();
  const uint32_t x = in[at];
  const int sx = static_cast<int>(x);
  uint32_t* r = out + at * kWarpResults;
  r[0] = __shfl_sync(kAll, x, static_cast<int>(x % 32));
  r[1] = __shfl_sync(kAll, x, static_cast<int>(x % 8), 8);
  r[2] = __shfl_xor_sync(kAll, x, 5);
  r[3] = __shfl_up_sync(kAll, x, 3U);
  r[4] = __shfl_down_sync(kAll, x, 7U);
  r[5] = __shfl_up_sync(kAll, x, 2U, 16);
  r[6] = __ballot_sync(kAll, static_cast<int>(x & 1U));
  r[7] = static_cast<uint32_t>(__any_sync(kAll, static_cast<int>(x % 37 == 0)));
  r[8] = static_cast<uint32_t>(__all_sync(kAll, static_cast<int>(x % 37 != 0)));
  r[9] = __match_any_sync(kAll, x % 5);
  r[10] = __reduce_add_sync(kAll, x);
  r[11] = static_cast<uint32_t>(__reduce_min_sync(kAll, sx));
  r[12] = __reduce_max_sync(kAll, x);
  r[13] = __reduce_and_sync(kAll, x | 0x00ffff00U);
  r[14] = __reduce_or_sync(kAll, x & 0x00ffff00U);
  r[15] = __reduce_xor_sync(kAll, x);
  r[16] = static_cast<uint32_t>(__clz(sx));
  r[17] = static_cast<uint32_t>(__popc(x));
  r[18] = static_cast<uint32_t>(__ffs(sx));
  r[19] = __brev(x);
  r[20] = __byte_perm(x, ~x, 0x5173U);
  r[21] = __umulhi(x, 0x9e3779b9U);
}

// bf16 as the kernels round it: two floats to one word.
__global__ void RoundKernel(const float* x, uint32_t* out, int count) {
  const auto i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  const __nv_bfloat162 pair = __floats2bfloat162_rn(x[i], -x[i]);
  memcpy(out + i, &pair, sizeof(uint32_t));
}

void WarpAndRounding() {
  constexpr int kCases = 16;
  Random random(51);
  std::vector<uint32_t> in(size_t{kCases} * kWarp);
  for (uint32_t& word : in) word = random.Bits() >> random.Below(8);
  auto* out = NewResults<uint32_t>(in.size() * kWarpResults);
  Run(WarpKernel, kCases, kWarp, 0, Upload(in), out);
  const std::vector<uint32_t> found = Download(out, in.size() * kWarpResults);
  for (size_t i = 0; i < found.size(); ++i) {
    const auto thread = static_cast<int>(i / kWarpResults);
    WriteBits(kWarpNames[i % kWarpResults], thread / kWarp, thread % kWarp, 0, found[i]);
  }

  std::vector<float> x = FunctionInputs(random, false);
  for (int i = 0; i < 256; ++i) {  // halfway between two bf16: to even
    const uint32_t bits = random.Bits() << 16 | 0x8000U;
    float value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (std::isfinite(value)) x.push_back(value);
  }
  const auto count = static_cast<int>(x.size());
  auto* rounded = NewResults<uint32_t>(x.size());
  Run(RoundKernel, (count + 127) / 128, 128, 0, Upload(x), rounded, count);
  const std::vector<uint32_t> words = Download(rounded, x.size());
  for (int i = 0; i < count; ++i) {
    if (std::isnan(x[static_cast<size_t>(i)])) continue;  // any NaN is as good as another
    WriteBits("__floats2bfloat162_rn", 0, i % kWarp, i, words[static_cast<size_t>(i)]);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "no CUDA device\n");
    return 1;
  }
  output = std::fopen(argv[1], "w");
  if (output == nullptr) {
    std::perror(argv[1]);
    return 1;
  }
  Mma();
  LdMatrix<Form::k4>("LdMatrix4");
  LdMatrix<Form::k4Trans>("LdMatrix4Trans");
  LdMatrix<Form::k2>("LdMatrix2");
  LdMatrix<Form::k2Trans>("LdMatrix2Trans");
  CpAsync();
  Functions();
  WarpAndRounding();
  std::fclose(output);
  return 0;
}
