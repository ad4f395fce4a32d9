// The states at the borders of segments, in two steps, the state behind the last of them, and the
// tables that all kernels read. The first step reads y and z once (half of what the march reads)
// and is bound by memory; a head whose decay forgets within a segment reads only the tokens that it
// remembers.
#include "kernels/lightning/cuda_lightning.h"

namespace sala::kernels::lightning {
namespace {

// A token further than kReach / slope away enters a border state with a factor below exp(-40) =
// 4e-18. Beside a token of factor 1 float32 does not see it, unless its product k v is 2^33 times
// larger.
constexpr float kReach = 40.0F;

constexpr int kTableThreads = 256;
constexpr int kScanThreads = 128;
constexpr int kScanBatch = 8;  // independent loads in flight

// lambda^e as the CPU form has it: powers below 1e-30 count as 0.
__device__ __forceinline__ float DecayPower(float slope, int64_t e) {
  const double p = exp(-static_cast<double>(slope) * static_cast<double>(e));
  return p < 1e-30 ? 0.0F : static_cast<float>(p);
}

struct Documents {
  const int32_t* cu_seqlens;
  int64_t count;
  bool carries_in;  // the first document began before token 0

  // The number of the non-empty document that has token t.
  __device__ __forceinline__ int64_t Find(int64_t t) const {
    int64_t low = 0;  // cu_seqlens[low] <= t < cu_seqlens[high]
    int64_t high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (cu_seqlens[middle] <= t) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
  __device__ __forceinline__ int64_t Begin(int64_t document) const {
    const int64_t begin = cu_seqlens[document];
    return begin == 0 && carries_in ? -1 : begin;
  }
};

// Thread i makes element i of each table.
__global__ void __launch_bounds__(kTableThreads)
    LightningTablesKernel(Plan plan, Documents documents, const float* slopes, Tables tables) {
  const int64_t i = int64_t{blockIdx.x} * kTableThreads + threadIdx.x;
  if (i < int64_t{plan.chunks} * kChunk) {
    int64_t begin_code = kChunk + 1;
    int64_t end_code = 0;
    if (i < plan.tokens) {
      const int64_t chunk_begin = i / kChunk * kChunk;
      const int64_t document = documents.Find(i);
      const int64_t begin = documents.Begin(document) - chunk_begin;
      const int64_t end = documents.cu_seqlens[document + 1] - chunk_begin;
      begin_code = begin < 0 ? 0 : begin + 1;
      end_code = end < kChunk ? end : kChunk;
    }
    uint8_t* code = tables.code + i / kChunk * kCodes + i % kChunk;
    code[0] = static_cast<uint8_t>(begin_code);
    code[kChunk] = static_cast<uint8_t>(end_code);
  }
  if (i < int64_t{plan.heads} * (kChunk + 1)) {
    tables.power[i] = DecayPower(slopes[i / (kChunk + 1)], i % (kChunk + 1));
  }
  if (i < int64_t{plan.heads} * plan.segments) {
    const int64_t segment = i % plan.segments;
    const int64_t begin = segment * plan.segment_tokens;
    const int64_t end =
        begin + plan.segment_tokens < plan.tokens ? begin + plan.segment_tokens : plan.tokens;
    const int64_t last_start = documents.Begin(documents.Find(end - 1));
    tables.through[i] =
        last_start < begin ? DecayPower(slopes[i / plan.segments], end - begin) : 0.0F;
    if (i < plan.segments) {
      const int64_t first = documents.Find(begin);
      int64_t carried_end = begin;
      if (documents.Begin(first) < begin) {
        const int64_t document_end = documents.cu_seqlens[first + 1];
        carried_end = document_end < end ? document_end : end;
      }
      tables.last_start[i] = static_cast<int32_t>(last_start);
      tables.carried_end[i] = static_cast<int32_t>(carried_end);
    }
  }
}

// What a segment leaves when nothing enters it: the first step. With `last` what the sweep's last
// segment leaves when that enters it which does: all that a march along it does to the state.
template <int D>
__global__ void __launch_bounds__(kThreads<D>)
    LightningSegmentStateKernel(const __grid_constant__ BorderArguments arguments, bool last) {
  constexpr int kTile = kChunk * D;
  SharedMemory shared;
  Rows* rows = shared.Take<Rows>(2);  // y and z of the block's head
  Bf16* tiles = shared.Take<Bf16>(2 * 2 * kTile);
  uint8_t* codes = shared.Take<uint8_t>(2 * kCodes);
  float* power = shared.Take<float>(kChunk + 1);
  float* write = shared.Take<float>(kChunk);

  const Plan& plan = arguments.plan;
  const Tables& tables = arguments.tables;
  const BorderStates& border = arguments.border[blockIdx.x % arguments.count];
  const int item = static_cast<int>(blockIdx.x) / arguments.count;
  const int head = item % plan.heads;
  const int entry = item / plan.heads;
  const bool falling = border.falling;
  int segment = entry + (falling ? 1 : 0);
  if (last) segment = falling ? 0 : plan.segments - 1;
  const Place start = Place::Now();
  for (int i = start.thread; i <= kChunk; i += kThreads<D>) {
    power[i] = tables.power[head * (kChunk + 1) + i];
  }

  if (start.thread == 0) {
    const int64_t offset = int64_t{head} * D;
    rows[0] = {border.y.data + offset, border.y.stride};
    rows[1] = {border.z.data + offset, border.z.stride};
  }
  __syncthreads();

  // The tokens that reach the border: of the document that crosses it, and near enough.
  const int segment_begin = segment * plan.segment_tokens;
  const int left = plan.tokens - segment_begin;
  const int segment_end =
      left < plan.segment_tokens ? plan.tokens : segment_begin + plan.segment_tokens;
  const float reach = kReach / arguments.slopes[head];  // infinite without decay
  // A march leaves nothing out.
  const int near = !last && reach < static_cast<float>(plan.segment_tokens)
                       ? static_cast<int>(reach) + 1
                       : plan.segment_tokens;
  int begin = segment_begin;
  int end = segment_end;
  if (falling) {
    if (near < end - begin) end = begin + near;
    if (tables.carried_end[segment] < end) end = tables.carried_end[segment];
  } else {
    if (near < end - begin) begin = end - near;
    if (tables.last_start[segment] > begin) begin = tables.last_start[segment];
  }
  const int chunk_begin = begin / kChunk;
  const int chunk_end = (end + kChunk - 1) / kChunk;
  // 0 when nothing reaches the border
  const int count = begin < end ? chunk_end - chunk_begin : 0;

  const auto chunk_at = [&](int step) {
    return falling ? chunk_end - 1 - step : chunk_begin + step;
  };
  const auto load = [&](const Place& at, int step) {
    const int chunk = chunk_at(step);
    const int n = TokensOfChunk(plan, chunk);
    Bf16* stage = tiles + step % 2 * 2 * kTile;
    LoadTile<D>(at, stage, rows[0], chunk, n);
    LoadTile<D>(at, stage + kTile, rows[1], chunk, n);
    LoadCodes(at, codes + step % 2 * kCodes, tables.code, chunk);
    ptx::CpAsyncCommit();
  };
  StateTiles<D> state;
  if (count > 0) load(start, 0);
  // A document that begins or ends in the segment lets nothing through it.
  const bool through = falling ? end == segment_end : begin == segment_begin;
  const float* entering = nullptr;
  if (last && through) {
    entering = border.first == nullptr ? nullptr : border.first + int64_t{head} * D * D;
    if (plan.segments > 1) {
      const int64_t border_entry = falling ? 0 : plan.segments - 2;
      entering = border.states + (int64_t{head} * (plan.segments - 1) + border_entry) * D * D;
    }
  }
  if (entering == nullptr) {
    state.Clear();
  } else {
    state.Load(start, entering, D, 1);
  }
#pragma unroll 1
  for (int step = 0; step < count; ++step) {
    const Place at = Place::Now();
    ptx::CpAsyncWait<0>();
    __syncthreads();  // the chunk is there, and all have left the one before
    if (step + 1 < count) load(at, step + 1);
    const Bf16* y = tiles + step % 2 * 2 * kTile;
    const uint8_t* code = codes + step % 2 * kCodes;
    const int n = TokensOfChunk(plan, chunk_at(step));
    FillFactors<D>(at, code, power, arguments.scale, falling, n, nullptr, write);
    __syncthreads();
    PassChunk<D>(code, power, n, state);
#pragma unroll 1
    for (int i = 0; i < kChunk / 16; ++i) {
      const Place here = Place::Now();
      uint32_t z[4];
      LoadZ<D>(here, y + kTile, i, z);
      AddOuterProducts<D>(here, y, write, i, z, state);
    }
  }
  float* leaves = last ? border.last + int64_t{head} * D * D
                       : border.states + (int64_t{head} * (plan.segments - 1) + entry) * D * D;
  state.Store(Place::Now(), leaves, D, 1);
}

// A factor of 0 is the start of a document: nothing of another one may pass, NaN included.
__device__ __forceinline__ float Through(float factor, float entering, float own) {
  return factor == 0.0F ? own : fmaf(factor, entering, own);
}

// The second step: states[r] += through[r] states[r - 1], in the sweep's order.
__global__ void __launch_bounds__(kScanThreads)
    LightningScanKernel(const __grid_constant__ BorderArguments arguments) {
  const Plan& plan = arguments.plan;
  const BorderStates& border = arguments.border[blockIdx.z];
  const int64_t head = blockIdx.y;
  const int64_t elements = int64_t{plan.d} * plan.d;
  const int64_t element = (int64_t{blockIdx.x} * kScanThreads + threadIdx.x) * 4;
  if (element >= elements) return;
  const int entries = plan.segments - 1;
  float* states = border.states + head * entries * elements + element;
  const float* through = arguments.tables.through + head * plan.segments;

  float4 sum = make_float4(0, 0, 0, 0);
  if (border.first != nullptr) {
    sum = *reinterpret_cast<const float4*>(border.first + head * elements + element);
  }
  for (int begin = 0; begin < entries; begin += kScanBatch) {
    float4 own[kScanBatch];
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      const int64_t entry = border.falling ? entries - 1 - begin - i : begin + i;
      if (begin + i < entries) {
        own[i] = *reinterpret_cast<const float4*>(states + entry * elements);
      }
    }
#pragma unroll
    for (int i = 0; i < kScanBatch; ++i) {
      if (begin + i >= entries) continue;
      const int64_t entry = border.falling ? entries - 1 - begin - i : begin + i;
      const float factor = through[border.falling ? entry + 1 : entry];
      sum = make_float4(Through(factor, sum.x, own[i].x), Through(factor, sum.y, own[i].y),
                        Through(factor, sum.z, own[i].z), Through(factor, sum.w, own[i].w));
      __stcg(reinterpret_cast<float4*>(states + entry * elements), sum);
    }
  }
}

template <int D>
void LaunchSegmentStates(const Op& op, const BorderArguments& arguments, bool last) {
  const Plan& plan = arguments.plan;
  const size_t shared = SharedBytes<Rows>(2) + SharedBytes<Bf16>(2 * 2 * kChunk * D) +
                        SharedBytes<uint8_t>(2 * kCodes) + SharedBytes<float>(kChunk + 1) +
                        SharedBytes<float>(kChunk);
  const int64_t blocks = int64_t{last ? 1 : plan.segments - 1} * plan.heads * arguments.count;
  SALA_CHECK(blocks < int64_t{1} << 31) << blocks << " blocks";
  op.Launch(LightningSegmentStateKernel<D>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads<D>),
            shared, arguments, last);
}

void LaunchSegmentStates(const Op& op, const BorderArguments& arguments, bool last) {
  switch (arguments.plan.d) {
    case 16:
      LaunchSegmentStates<16>(op, arguments, last);
      break;
    case 32:
      LaunchSegmentStates<32>(op, arguments, last);
      break;
    case 64:
      LaunchSegmentStates<64>(op, arguments, last);
      break;
    default:
      LaunchSegmentStates<128>(op, arguments, last);
      break;
  }
}

}  // namespace

void BuildTables(const Op& op, const Plan& plan, const int32_t* cu_seqlens, int64_t documents,
                 bool carries_in, const float* slopes, const Tables& tables) {
  const int64_t elements =
      std::max({int64_t{plan.chunks} * kChunk, int64_t{plan.heads} * (kChunk + 1),
                int64_t{plan.heads} * plan.segments});
  op.Launch(LightningTablesKernel, dim3(static_cast<unsigned>(CeilDiv(elements, kTableThreads))),
            dim3(kTableThreads), 0, plan, Documents{cu_seqlens, documents, carries_in}, slopes,
            tables);
}

void BuildBorderStates(const Op& op, const BorderArguments& arguments) {
  const Plan& plan = arguments.plan;
  if (plan.segments <= 1) return;
  LaunchSegmentStates(op, arguments, /*last=*/false);
  const dim3 grid(static_cast<unsigned>(CeilDiv(plan.d * plan.d, kScanThreads * 4)),
                  static_cast<unsigned>(plan.heads), static_cast<unsigned>(arguments.count));
  op.Launch(LightningScanKernel, grid, dim3(kScanThreads), 0, arguments);
}

void BuildLastStates(const Op& op, const BorderArguments& arguments) {
  LaunchSegmentStates(op, arguments, /*last=*/true);
}

}  // namespace sala::kernels::lightning
