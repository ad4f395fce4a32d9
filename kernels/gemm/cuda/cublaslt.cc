// The matrix products on a GPU, through cuBLASLt. Part of the CUDA module.
//
// cuBLASLt thinks in columns: a row-major matrix [r, c] is the column-major matrix [c, r] over the
// same memory. So C = op(A) op(B) in rows is C^T = op(B)^T op(A)^T in columns: our B is the
// library's first operand, our A its second, and M and N change places:
//   NT: B stored [N, K] is K x N in columns, transposed;  A stored [M, K] is K x M, as it is
//   NN: B stored [K, N] is N x K, as it is;               A as above
//   TN: B as in NN;                                       A stored [K, M] is M x K, transposed
//
// A plan (descriptors and algorithm) is made once for each form, shape, strides and type of C.
//   deterministic (the default): the library's first suggestion that adds each element's K products
//     in one sequence. Suggestions are a function of the shape, the device and the library's
//     version; pointers do not enter, since every operand is declared to be aligned to 16 bytes,
//     which is required, whatever more it may be.
//   otherwise: the fastest of 8 suggestions, timed when the plan is made. Those that cut K are
//     allowed where their parts are kept in float32 and added in a step of their own.
// Either way a plan stays for the device's life and gives the same bits each time it runs, so that
// a layer that is recomputed repeats its forward pass exactly.
//
// The library's work space is taken from the scratch arena, in full size for every product: a dry
// run, which never calls the library, counts it, and other operations use the same bytes in turn.
#include <cublasLt.h>

#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/common/cuda.h"
#include "kernels/cuda_kernels.h"

namespace sala::kernels {
namespace {

constexpr int64_t kAlignment = 16;    // bytes, of pointers and of rows
constexpr int kSuggestions = 8;       // asked of the library
constexpr int kTimedRuns = 3;         // of each suggestion, behind one that warms up
constexpr int kTimedTokens = 4;       // token counts for which the products of a weight are timed
constexpr size_t kMostPlans = 16384;  // more shapes than that are planned at each call

size_t WorkspaceBytes(const DeviceInfo& info) {
  return size_t{info.compute_capability == 90 ? 64U : 32U} << 20;
}

template <auto kDestroy>
struct Destroy {
  template <typename T>
  void operator()(T* object) const {
    kDestroy(object);
  }
};
template <typename Pointer, auto kDestroy>
using Owned = std::unique_ptr<std::remove_pointer_t<Pointer>, Destroy<kDestroy>>;
using Handle = Owned<cublasLtHandle_t, cublasLtDestroy>;
using Description = Owned<cublasLtMatmulDesc_t, cublasLtMatmulDescDestroy>;
using Layout = Owned<cublasLtMatrixLayout_t, cublasLtMatrixLayoutDestroy>;
using Preference = Owned<cublasLtMatmulPreference_t, cublasLtMatmulPreferenceDestroy>;
using Event = Owned<cudaEvent_t, cudaEventDestroy>;

// What a plan depends on, in the project's words.
struct Product {
  bool a_transposed = false;  // A stored [K, M]
  bool b_transposed = false;  // B stored [N, K]
  int64_t m = 0, n = 0, k = 0;
  int64_t a_stride = 0, b_stride = 0, c_stride = 0;  // elements between rows
  DType c_dtype = DType::kF32;

  auto operator<=>(const Product&) const = default;  // NOLINT(modernize-use-nullptr): clang-tidy 14
};

struct Plan {
  Description description;
  Layout first, second, result;  // B, A and C
  cublasLtMatmulAlgo_t algorithm{};
};

// One call: its operands and the words for its errors.
struct Call {
  const Op& op;
  CudaDevice& device;
  const char* name;
  const ConstTensor &a, &b;
  const Tensor& c;
  GemmOptions options;
  void* workspace;
  size_t workspace_bytes;

  float beta() const { return options.write == Write::kAccumulate ? 1.0F : 0.0F; }

  void Check(cublasStatus_t status, const char* function) const {
    if (status == CUBLAS_STATUS_SUCCESS) return;
    const DeviceOptions& where = device.options();
    const bool memory = status == CUBLAS_STATUS_ALLOC_FAILED;
    throw DeviceError(memory ? "CUDA-MEMORY" : "CUDA-FAILED",
                      std::string(name) + " " + ShapeText(a) + ", " + ShapeText(b) + " -> " +
                          ShapeText(c) + ": " + function + ": " + cublasLtGetStatusString(status) +
                          " (" + cublasLtGetStatusName(status) + "), rank " +
                          std::to_string(where.rank) + " on " + where.host);
  }
};

// The library's handle and the plans, kept with the device.
class CublasLt {
 public:
  // Runs the product as planned; plans it when it is new.
  void Run(const Call& call, const Product& product) {
    if (handle_ == nullptr) {
      cublasLtHandle_t handle = nullptr;
      call.Check(cublasLtCreate(&handle), "cublasLtCreate");
      handle_.reset(handle);
    }
    const auto found = plans_.find(product);
    if (found != plans_.end()) {
      Multiply(call, found->second, found->second.algorithm, call.c.raw());
      return;
    }
    // By rule where the plan is not kept: the next call must come to the same choice.
    const bool keep = plans_.size() < kMostPlans;
    // Batches that differ in length each step must not time every product of every step.
    const bool timed = keep && !call.device.options().deterministic &&
                       timed_[WithoutTokens(product)]++ < kTimedTokens;
    Plan plan = MakePlan(call, product, timed);
    Multiply(call, plan, plan.algorithm, call.c.raw());
    if (keep) plans_.emplace(product, std::move(plan));
  }

 private:
  // The product of the same weight for any number of tokens, which is the side of A that C has (the
  // gradient of a weight: the side that A and B share).
  static Product WithoutTokens(Product p) {
    (p.a_transposed ? p.k : p.m) = 0;
    return p;
  }

  void Multiply(const Call& call, const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                void* result) const {
    const float alpha = call.options.alpha;
    const float beta = call.beta();
    call.Check(cublasLtMatmul(handle_.get(), plan.description.get(), &alpha, call.b.raw(),
                              plan.first.get(), call.a.raw(), plan.second.get(), &beta,
                              call.c.raw(), plan.result.get(), result, plan.result.get(),
                              &algorithm, call.workspace, call.workspace_bytes, call.op.stream()),
               "cublasLtMatmul");
  }

  static Layout MakeLayout(const Call& call, cudaDataType_t type, int64_t rows, int64_t columns,
                           int64_t stride) {
    cublasLtMatrixLayout_t layout = nullptr;
    call.Check(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(columns),
                                          static_cast<uint64_t>(rows), stride),
               "cublasLtMatrixLayoutCreate");
    return Layout(layout);
  }

  Plan MakePlan(const Call& call, const Product& p, bool timed) const {
    Plan plan;
    cublasLtMatmulDesc_t description = nullptr;
    call.Check(cublasLtMatmulDescCreate(&description, CUBLAS_COMPUTE_32F, CUDA_R_32F),
               "cublasLtMatmulDescCreate");
    plan.description.reset(description);
    const auto set_transpose = [&](cublasLtMatmulDescAttributes_t attribute, bool transposed) {
      const cublasOperation_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
      call.Check(
          cublasLtMatmulDescSetAttribute(description, attribute, &operation, sizeof(operation)),
          "cublasLtMatmulDescSetAttribute");
    };
    set_transpose(CUBLASLT_MATMUL_DESC_TRANSA, p.b_transposed);
    set_transpose(CUBLASLT_MATMUL_DESC_TRANSB, p.a_transposed);
    plan.first = MakeLayout(call, CUDA_R_16BF, p.b_transposed ? p.n : p.k,
                            p.b_transposed ? p.k : p.n, p.b_stride);
    plan.second = MakeLayout(call, CUDA_R_16BF, p.a_transposed ? p.k : p.m,
                             p.a_transposed ? p.m : p.k, p.a_stride);
    plan.result = MakeLayout(call, p.c_dtype == DType::kBF16 ? CUDA_R_16BF : CUDA_R_32F, p.m, p.n,
                             p.c_stride);
    const std::vector<cublasLtMatmulAlgo_t> algorithms = Suggestions(call, plan, timed);
    // Nothing usable: the library's own word for it.
    if (algorithms.empty()) {
      call.Check(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmulAlgoGetHeuristic");
    }
    plan.algorithm = timed ? Fastest(call, plan, p, algorithms) : algorithms.front();
    return plan;
  }

  // What the library suggests, best guess first, and what may be used of it.
  std::vector<cublasLtMatmulAlgo_t> Suggestions(const Call& call, const Plan& plan,
                                                bool split) const {
    cublasLtMatmulPreference_t preference = nullptr;
    call.Check(cublasLtMatmulPreferenceCreate(&preference), "cublasLtMatmulPreferenceCreate");
    const Preference owner(preference);
    const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      call.Check(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
                 "cublasLtMatmulPreferenceSetAttribute");
    };
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{call.workspace_bytes});
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        uint32_t{split ? CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE : CUBLASLT_REDUCTION_SCHEME_NONE});
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      set(attribute, uint32_t{kAlignment});
    }
    std::vector<cublasLtMatmulHeuristicResult_t> results(kSuggestions);
    int count = 0;
    call.Check(
        cublasLtMatmulAlgoGetHeuristic(handle_.get(), plan.description.get(), plan.first.get(),
                                       plan.second.get(), plan.result.get(), plan.result.get(),
                                       preference, kSuggestions, results.data(), &count),
        "cublasLtMatmulAlgoGetHeuristic");
    results.resize(static_cast<size_t>(count));
    std::vector<cublasLtMatmulAlgo_t> usable;
    for (const cublasLtMatmulHeuristicResult_t& result : results) {
      if (result.state != CUBLAS_STATUS_SUCCESS || result.workspaceSize > call.workspace_bytes) {
        continue;
      }
      // The mask asks for it; the algorithm itself is asked too.
      if (!split && Splits(call, result.algo) > 1) continue;
      usable.push_back(result.algo);
    }
    return usable;
  }

  // Parts into which the algorithm cuts K.
  static int32_t Splits(const Call& call, const cublasLtMatmulAlgo_t& algorithm) {
    int32_t splits = 1;
    size_t written = 0;
    call.Check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM,
                                                    &splits, sizeof(splits), &written),
               "cublasLtMatmulAlgoConfigGetAttribute");
    return splits;
  }

  cublasLtMatmulAlgo_t Fastest(const Call& call, const Plan& plan, const Product& p,
                               const std::vector<cublasLtMatmulAlgo_t>& algorithms) const {
    // Sums must not be added to C several times: they go elsewhere, where memory allows.
    void* result = call.c.raw();
    const auto free = [&call](void* memory) { call.device.Free(memory); };
    std::unique_ptr<void, decltype(free)> elsewhere(nullptr, free);
    if (call.beta() != 0) {
      const size_t bytes = static_cast<size_t>(p.m * p.c_stride) * SizeOf(p.c_dtype);
      if (call.device.free_bytes() < 2 * bytes) return algorithms.front();
      elsewhere.reset(call.device.Allocate(bytes));
      result = elsewhere.get();
    }
    const Event start = MakeEvent(call);
    const Event end = MakeEvent(call);
    size_t best = 0;
    float best_time = 0;
    for (size_t i = 0; i < algorithms.size(); ++i) {
      Multiply(call, plan, algorithms[i], result);
      call.op.Check(cudaEventRecord(start.get(), call.op.stream()));
      for (int run = 0; run < kTimedRuns; ++run) Multiply(call, plan, algorithms[i], result);
      call.op.Check(cudaEventRecord(end.get(), call.op.stream()));
      call.op.Check(cudaEventSynchronize(end.get()));
      float time = 0;
      call.op.Check(cudaEventElapsedTime(&time, start.get(), end.get()));
      if (i == 0 || time < best_time) {
        best = i;
        best_time = time;
      }
    }
    return algorithms[best];
  }

  static Event MakeEvent(const Call& call) {
    cudaEvent_t event = nullptr;
    call.op.Check(cudaEventCreate(&event));
    return Event(event);
  }

  Handle handle_;
  std::map<Product, Plan> plans_;
  std::map<Product, int> timed_;
};

void CheckMatrix(const char* name, const ConstTensor& x, int64_t rows, int64_t columns, bool is_c) {
  const bool dtype = x.dtype() == DType::kBF16 || (is_c && x.dtype() == DType::kF32);
  SALA_CHECK(x.rank() == 2 && x.dim(0) == rows && x.dim(1) == columns && dtype &&
             x.device() == DeviceKind::kCuda)
      << name << ": found " << ShapeText(x)
      << (x.device() == DeviceKind::kCuda ? "" : " in host memory") << ", expected [" << rows
      << ", " << columns << "] bf16 " << (is_c ? "or f32 " : "") << "on the device";
  SALA_CHECK(rows <= 1 || x.stride(0) >= columns)
      << name << ": rows overlap: stride " << x.stride(0) << " of " << ShapeText(x);
  const auto size = static_cast<int64_t>(SizeOf(x.dtype()));
  SALA_CHECK(reinterpret_cast<uintptr_t>(x.raw()) % kAlignment == 0 &&
             (rows <= 1 || x.stride(0) * size % kAlignment == 0))
      << name << ": " << ShapeText(x) << " with stride " << x.stride(0)
      << ": rows must start at multiples of " << kAlignment << " bytes on a GPU";
}

// The distance of rows that the library is told; a single row has none of its own.
int64_t Stride(const ConstTensor& x) {
  return x.dim(0) > 1 ? x.stride(0) : CeilDiv(x.dim(1), kAlignment) * kAlignment;
}

void Gemm(const char* name, bool a_transposed, bool b_transposed, const Context& ctx,
          const ConstTensor& a, const ConstTensor& b, const Tensor& c, const GemmOptions& options) {
  const Op op(ctx, name, c);
  SALA_CHECK(a.rank() == 2 && b.rank() == 2 && c.rank() == 2)
      << name << ": " << ShapeText(a) << ", " << ShapeText(b) << ", " << ShapeText(c);
  const int64_t m = c.dim(0);
  const int64_t n = c.dim(1);
  const int64_t k = a.dim(a_transposed ? 0 : 1);
  CheckMatrix(name, a, a_transposed ? k : m, a_transposed ? m : k, false);
  CheckMatrix(name, b, b_transposed ? n : k, b_transposed ? k : n, false);
  CheckMatrix(name, c, m, n, true);
  if (m == 0 || n == 0) return;
  if (k == 0) {
    if (options.write == Write::kAccumulate) return;
    for (int64_t row = 0; row < m; ++row) {
      ctx.gpu->Zero(c.Rows(row, row + 1).raw(), static_cast<size_t>(n) * SizeOf(c.dtype()));
    }
    return;
  }
  const ArenaScope scope(*ctx.scratch);
  const size_t workspace_bytes = WorkspaceBytes(op.device().info());
  void* workspace = ctx.scratch->Allocate(workspace_bytes);
  if (op.dry()) return;
  auto& device = *static_cast<CudaDevice*>(ctx.gpu);
  auto& library = device.Keep<CublasLt>([] { return std::make_unique<CublasLt>(); });
  library.Run({op, device, name, a, b, c, options, workspace, workspace_bytes},
              {a_transposed, b_transposed, m, n, k, Stride(a), Stride(b), Stride(c), c.dtype()});
}

}  // namespace

void cuda::GemmNT(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
                  const GemmOptions& options) {
  Gemm("GemmNT", false, true, ctx, a, b, c, options);
}

void cuda::GemmNN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
                  const GemmOptions& options) {
  Gemm("GemmNN", false, false, ctx, a, b, c, options);
}

void cuda::GemmTN(const Context& ctx, const ConstTensor& a, const ConstTensor& b, const Tensor& c,
                  const GemmOptions& options) {
  Gemm("GemmTN", true, false, ctx, a, b, c, options);
}

}  // namespace sala::kernels
