// Stand-in for cuBLASLt, defined against its genuine header: column-major products of bf16 or
// float32 matrices with float32 sums, computed by the project's CPU product when the stream runs.
//
// What the trainer has no use for (batches, epilogues, scaling, other orders and types) is refused
// as not supported; sizes that do not fit are refused as invalid. The heuristic offers kAlgorithms
// opaque algorithms with different work space and the same result. Work space is overwritten, so
// that two streams sharing one show up.
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/gemm/serial.h"
#include "tests/simt/device.h"

struct cublasLtContext {
  int unused = 0;
};

namespace {

using sala::kernels::Write;

constexpr int kAlgorithms = 3;
constexpr size_t kWorkspace[kAlgorithms] = {0, 4096, 1 << 20};
constexpr uint64_t kAlgorithmMark = 0x53494d54414c474fULL;

// The library's opaque types are arrays; these lie in them.
struct Description {
  int32_t compute_type;
  int32_t scale_type;
  int32_t pointer_mode;
  int32_t trans_a;
  int32_t trans_b;
  int32_t trans_c;
  uint32_t epilogue;
  int8_t fast_accumulation;
  int32_t sm_count_target;
};
struct Layout {
  uint32_t type;
  int32_t order;
  uint64_t rows;
  uint64_t columns;
  int64_t ld;
  int32_t batch_count;
};
struct Preference {
  uint64_t max_workspace;
  uint32_t search_mode;
};
static_assert(sizeof(Description) <= sizeof(cublasLtMatmulDescOpaque_t));
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t));

template <typename T>
T Get(const void* opaque) {
  T value;
  std::memcpy(&value, opaque, sizeof value);
  return value;
}
template <typename T>
void Put(void* opaque, const T& value) {
  std::memcpy(opaque, &value, sizeof value);
}
// An attribute must have exactly the size of its type.
template <typename T>
cublasStatus_t Assign(T* field, const void* buffer, size_t bytes) {
  if (buffer == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(field, buffer, bytes);
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
cublasStatus_t Read(const T& field, void* buffer, size_t bytes, size_t* written) {
  if (written != nullptr) *written = sizeof(T);
  if (buffer == nullptr || bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(buffer, &field, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

bool IsFloat(uint32_t type) { return type == CUDA_R_32F; }
bool IsKnown(uint32_t type) { return type == CUDA_R_32F || type == CUDA_R_16BF; }
size_t ElementBytes(uint32_t type) { return IsFloat(type) ? 4 : 2; }

struct Product {
  Description description;
  Layout a, b, c, d;
  int64_t m, n, k;
};

cublasStatus_t MakeProduct(const void* description, const void* a, const void* b, const void* c,
                           const void* d, Product* product) {
  if (description == nullptr || a == nullptr || b == nullptr || c == nullptr || d == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  product->description = Get<Description>(description);
  product->a = Get<Layout>(a);
  product->b = Get<Layout>(b);
  product->c = Get<Layout>(c);
  product->d = Get<Layout>(d);
  const Description& x = product->description;
  for (const Layout* layout : {&product->a, &product->b, &product->c, &product->d}) {
    if (layout->rows == 0 || layout->columns == 0) return CUBLAS_STATUS_INVALID_VALUE;
    if (layout->ld < static_cast<int64_t>(layout->rows)) return CUBLAS_STATUS_INVALID_VALUE;
    if (layout->order != CUBLASLT_ORDER_COL || layout->batch_count != 1 || !IsKnown(layout->type)) {
      return CUBLAS_STATUS_NOT_SUPPORTED;
    }
  }
  const bool compute_known = x.compute_type == CUBLAS_COMPUTE_32F ||
                             x.compute_type == CUBLAS_COMPUTE_32F_PEDANTIC ||
                             x.compute_type == CUBLAS_COMPUTE_32F_FAST_TF32;
  if (!compute_known || x.scale_type != CUDA_R_32F || x.epilogue != CUBLASLT_EPILOGUE_DEFAULT ||
      x.pointer_mode != CUBLASLT_POINTER_MODE_HOST || x.trans_c != CUBLAS_OP_N) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (product->a.type != product->b.type || product->c.type != product->d.type ||
      (IsFloat(product->a.type) && !IsFloat(product->d.type))) {
    return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  const bool ta = x.trans_a != CUBLAS_OP_N;
  const bool tb = x.trans_b != CUBLAS_OP_N;
  product->m = static_cast<int64_t>(ta ? product->a.columns : product->a.rows);
  product->k = static_cast<int64_t>(ta ? product->a.rows : product->a.columns);
  product->n = static_cast<int64_t>(tb ? product->b.rows : product->b.columns);
  const auto b_k = static_cast<int64_t>(tb ? product->b.columns : product->b.rows);
  const bool fits = b_k == product->k && static_cast<int64_t>(product->d.rows) == product->m &&
                    static_cast<int64_t>(product->d.columns) == product->n &&
                    product->c.rows == product->d.rows && product->c.columns == product->d.columns;
  return fits ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

float Load(const void* base, uint32_t type, int64_t index) {
  if (IsFloat(type)) return static_cast<const float*>(base)[index];
  return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
}

// The matrix as stored, columns one after the other, in float32 without gaps.
std::vector<float> Widen(const void* base, const Layout& layout) {
  const auto rows = static_cast<int64_t>(layout.rows);
  const auto columns = static_cast<int64_t>(layout.columns);
  std::vector<float> wide(static_cast<size_t>(rows * columns));
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = 0; row < rows; ++row) {
      wide[column * rows + row] = Load(base, layout.type, column * layout.ld + row);
    }
  }
  return wide;
}

std::vector<float> Transpose(const std::vector<float>& from, int64_t rows, int64_t columns) {
  std::vector<float> to(from.size());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      to[column * rows + row] = from[row * columns + column];
    }
  }
  return to;
}

struct FreeDeleter {
  void operator()(float* memory) const { std::free(memory); }
};

// A column-major matrix is the transpose of a row-major one: D^T [n, m] = op(B)^T op(A)^T.
void Run(const Product& product, float alpha, const void* a, const void* b, float beta,
         const void* c, void* d) {
  const int64_t m = product.m;
  const int64_t n = product.n;
  const int64_t k = product.k;
  const std::vector<float> wide_a = Widen(a, product.a);  // row-major [k, m], transposed [m, k]
  std::vector<float> wide_b = Widen(b, product.b);        // row-major [n, k], transposed [k, n]
  const bool ta = product.description.trans_a != CUBLAS_OP_N;
  bool tb = product.description.trans_b != CUBLAS_OP_N;
  if (ta && tb) {
    wide_b = Transpose(wide_b, k, n);
    tb = false;
  }
  std::vector<float> sums(static_cast<size_t>(n * m));
  const auto workspace_bytes =
      static_cast<size_t>(sala::kernels::GemmSerialWorkspace(n, m, k)) * sizeof(float);
  const std::unique_ptr<float, FreeDeleter> workspace(
      static_cast<float*>(std::aligned_alloc(64, (workspace_bytes + 63) / 64 * 64 + 64)));
  const auto multiply = ta   ? &sala::kernels::GemmSerialNT
                        : tb ? &sala::kernels::GemmSerialTN
                             : &sala::kernels::GemmSerialNN;
  multiply(n, m, k, 1.0F, wide_b.data(), tb ? n : k, wide_a.data(), ta ? k : m, sums.data(), m,
           Write::kOverwrite, workspace.get());
  for (int64_t column = 0; column < n; ++column) {
    for (int64_t row = 0; row < m; ++row) {
      float value = alpha * sums[column * m + row];
      if (beta != 0.0F) {
        // As measured on an H100: a product for a bf16 result is rounded before C is added.
        if (!IsFloat(product.d.type)) value = __bfloat162float(__float2bfloat16(value));
        value += beta * Load(c, product.c.type, column * product.c.ld + row);
      }
      const int64_t to = column * product.d.ld + row;
      if (IsFloat(product.d.type)) {
        static_cast<float*>(d)[to] = value;
      } else {
        static_cast<__nv_bfloat16*>(d)[to] = __float2bfloat16(value);
      }
    }
  }
}

bool Aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new cublasLtContext);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete reinterpret_cast<cublasLtContext*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
size_t cublasLtGetCudartVersion() { return 13000; }
const char* cublasLtGetStatusName(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    case CUBLAS_STATUS_EXECUTION_FAILED:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    default:
      return "CUBLAS_STATUS_UNKNOWN";
  }
}
const char* cublasLtGetStatusString(cublasStatus_t status) { return cublasLtGetStatusName(status); }

cublasStatus_t cublasLtMatmulDescInit_internal(cublasLtMatmulDesc_t description, size_t size,
                                               cublasComputeType_t compute_type,
                                               cudaDataType_t scale_type) {
  if (description == nullptr || size < sizeof(Description)) return CUBLAS_STATUS_INVALID_VALUE;
  Description fresh{};
  fresh.compute_type = compute_type;
  fresh.scale_type = scale_type;
  fresh.pointer_mode = CUBLASLT_POINTER_MODE_HOST;
  fresh.trans_a = fresh.trans_b = fresh.trans_c = CUBLAS_OP_N;
  fresh.epilogue = CUBLASLT_EPILOGUE_DEFAULT;
  Put(description, fresh);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* description,
                                        cublasComputeType_t compute_type,
                                        cudaDataType_t scale_type) {
  *description = new cublasLtMatmulDescOpaque_t{};
  return cublasLtMatmulDescInit_internal(*description, sizeof **description, compute_type,
                                         scale_type);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) {
  delete description;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* buffer, size_t bytes) {
  if (description == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  auto x = Get<Description>(description);
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_COMPUTE_TYPE:
      status = Assign(&x.compute_type, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_SCALE_TYPE:
      status = Assign(&x.scale_type, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_POINTER_MODE:
      status = Assign(&x.pointer_mode, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_TRANSA:
      status = Assign(&x.trans_a, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_TRANSB:
      status = Assign(&x.trans_b, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_TRANSC:
      status = Assign(&x.trans_c, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE:
      status = Assign(&x.epilogue, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_FAST_ACCUM:
      status = Assign(&x.fast_accumulation, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET:
      status = Assign(&x.sm_count_target, buffer, bytes);
      break;
    default:
      break;
  }
  Put(description, x);
  return status;
}

cublasStatus_t cublasLtMatrixLayoutInit_internal(cublasLtMatrixLayout_t layout, size_t size,
                                                 cudaDataType type, uint64_t rows, uint64_t columns,
                                                 int64_t ld) {
  if (layout == nullptr || size < sizeof(Layout)) return CUBLAS_STATUS_INVALID_VALUE;
  Put(layout, Layout{static_cast<uint32_t>(type), CUBLASLT_ORDER_COL, rows, columns, ld, 1});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t ld) {
  *layout = new cublasLtMatrixLayoutOpaque_t{};
  return cublasLtMatrixLayoutInit_internal(*layout, sizeof **layout, type, rows, columns, ld);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete layout;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute,
                                                const void* buffer, size_t bytes) {
  if (layout == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  auto x = Get<Layout>(layout);
  cublasStatus_t status = CUBLAS_STATUS_NOT_SUPPORTED;
  switch (attribute) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE:
      status = Assign(&x.type, buffer, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_ORDER:
      status = Assign(&x.order, buffer, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_ROWS:
      status = Assign(&x.rows, buffer, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_COLS:
      status = Assign(&x.columns, buffer, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_LD:
      status = Assign(&x.ld, buffer, bytes);
      break;
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT:
      status = Assign(&x.batch_count, buffer, bytes);
      break;
    default:
      break;
  }
  Put(layout, x);
  return status;
}

cublasStatus_t cublasLtMatmulPreferenceInit_internal(cublasLtMatmulPreference_t preference,
                                                     size_t size) {
  if (preference == nullptr || size < sizeof(Preference)) return CUBLAS_STATUS_INVALID_VALUE;
  Put(preference, Preference{0, CUBLASLT_SEARCH_BEST_FIT});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = new cublasLtMatmulPreferenceOpaque_t{};
  return cublasLtMatmulPreferenceInit_internal(*preference, sizeof **preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete preference;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* buffer, size_t bytes) {
  if (preference == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  auto x = Get<Preference>(preference);
  cublasStatus_t status = CUBLAS_STATUS_SUCCESS;
  switch (attribute) {
    case CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES:
      status = Assign(&x.max_workspace, buffer, bytes);
      break;
    case CUBLASLT_MATMUL_PREF_SEARCH_MODE:
      status = Assign(&x.search_mode, buffer, bytes);
      break;
    default:  // alignments and masks narrow the choice, which is free here
      break;
  }
  Put(preference, x);
  return status;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle,
                                              cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int wanted,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* found) {
  if (handle == nullptr || wanted < 1 || results == nullptr || found == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  *found = 0;
  Product product;
  const cublasStatus_t status = MakeProduct(description, a, b, c, d, &product);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const uint64_t limit = preference != nullptr ? Get<Preference>(preference).max_workspace : 0;
  for (int i = kAlgorithms - 1; i >= 0 && *found < wanted; --i) {  // the greediest first
    if (kWorkspace[i] > limit) continue;
    cublasLtMatmulHeuristicResult_t result{};
    result.algo.data[0] = kAlgorithmMark;
    result.algo.data[1] = static_cast<uint64_t>(i);
    result.workspaceSize = kWorkspace[i];
    result.state = CUBLAS_STATUS_SUCCESS;
    result.wavesCount = 1.0F;
    results[(*found)++] = result;
  }
  return *found > 0 ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

cublasStatus_t cublasLtMatmulAlgoConfigGetAttribute(const cublasLtMatmulAlgo_t* algorithm,
                                                    cublasLtMatmulAlgoConfigAttributes_t attribute,
                                                    void* buffer, size_t bytes, size_t* written) {
  if (algorithm == nullptr || algorithm->data[0] != kAlgorithmMark) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const auto value =
      attribute == CUBLASLT_ALGO_CONFIG_ID ? static_cast<int32_t>(algorithm->data[1]) : int32_t{0};
  return Read(value, buffer, bytes, written);
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                              const void* alpha, const void* a, cublasLtMatrixLayout_t a_layout,
                              const void* b, cublasLtMatrixLayout_t b_layout, const void* beta,
                              const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              size_t workspace_bytes, cudaStream_t stream) {
  if (handle == nullptr || alpha == nullptr || beta == nullptr || a == nullptr || b == nullptr ||
      d == nullptr) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  Product product;
  const cublasStatus_t status =
      MakeProduct(description, a_layout, b_layout, c_layout, d_layout, &product);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const auto scale_product = Get<float>(alpha);
  const auto scale_c = Get<float>(beta);
  if (scale_c != 0.0F && c == nullptr) return CUBLAS_STATUS_INVALID_VALUE;
  if (c == d && product.c.ld != product.d.ld) return CUBLAS_STATUS_INVALID_VALUE;
  if (!Aligned(a, ElementBytes(product.a.type)) || !Aligned(b, ElementBytes(product.b.type)) ||
      !Aligned(d, ElementBytes(product.d.type)) || !Aligned(workspace, 16)) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  size_t needed = 0;
  if (algorithm != nullptr) {
    if (algorithm->data[0] != kAlgorithmMark || algorithm->data[1] >= kAlgorithms) {
      return CUBLAS_STATUS_INVALID_VALUE;
    }
    needed = kWorkspace[algorithm->data[1]];
    if (needed > workspace_bytes || (needed > 0 && workspace == nullptr)) {
      return CUBLAS_STATUS_INVALID_VALUE;
    }
  }
  if (!simt::device::StreamExists(stream)) return CUBLAS_STATUS_INVALID_VALUE;
  if (simt::device::FailsNow("matmul") || simt::device::StickyError() != cudaSuccess) {
    return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  simt::device::Enqueue(stream, [=] {
    if (needed > 0) std::memset(workspace, 0xff, needed);
    Run(product, scale_product, a, b, scale_c, c, d);
  });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
