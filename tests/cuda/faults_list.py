"""The faults that faults.py plants. One entry each:

    Fault(
        name        plain words, of the operation first
        kind        the sort of mistake; summaries count by it
        file        the file that is changed
        old, new    its exact text, which must stand there once, and what is put in its place
        tests       Suite.Test, ...: one of them must fail; the quickest that finds it
        found_by    plain (default), asan or tsan: the build that finds it
        unit        the .cu that is compiled, when `file` is a header
        environment variables of the emulator, when only another order or device shows it
        quick       planted in every test run
    )

A fault stands for a class of mistakes that somebody could make in that place: it compiles without a warning, and most of
them leave nearly all numbers right. One that no test finds shows a hole in the tests; the test is to be improved then, not
the fault replaced. Found by a sanitizer means that the plain build lets it pass.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple
    found_by: str = "plain"
    unit: str = ""
    environment: dict = dataclasses.field(default_factory=dict)
    quick: bool = False

    def __post_init__(self):
        if not self.unit:
            object.__setattr__(self, "unit", self.file)
        if isinstance(self.tests, str):
            object.__setattr__(self, "tests", (self.tests,))


MATH = "kernels/common/cuda_math.h"
ROWS = "kernels/common/cuda_rows.h"
SOFTMAX = "kernels/common/cuda_softmax_row.h"
PARTIAL_SUMS = "kernels/common/cuda/partial_sums.cu"
TILE = "kernels/attention/cuda_tile.h"
ATTENTION = "kernels/attention/cuda.cu"
ATTENTION_BACKWARD = "kernels/attention/cuda_backward.cu"
KEY_GRADIENT = "kernels/attention/cuda_key_gradient.cu"
BLOCKS = "kernels/sparse_attention/cuda_blocks.h"
SPARSE = "kernels/sparse_attention/cuda_forward.cu"
SPARSE_BACKWARD = "kernels/sparse_attention/cuda_backward.cu"
INDEX = "kernels/sparse_attention/cuda_index.cu"
COMPRESS = "kernels/sparse_attention/cuda_compress.cu"
SELECT = "kernels/sparse_attention/cuda_select.cu"
SCORES = "kernels/sparse_attention/cuda_select_scores.h"
LIGHTNING = "kernels/lightning/cuda_lightning.h"
MARCH = "kernels/lightning/cuda_march.cu"
STATES = "kernels/lightning/cuda_states.cu"

SMALL_CARD = {"SALA_SIMT_SHARED": "101376"}

# ---- token-wise operations ----

TOKEN_WISE = [
    Fault(
        name="rms_norm_without_epsilon",
        kind="wrong factor",
        file="kernels/rms_norm/cuda.cu",
        old="const float r = 1.0F / sqrtf(square / static_cast<float>(f.width) + f.eps);",
        new="const float r = 1.0F / sqrtf(square / static_cast<float>(f.width));",
        tests="RmsNormCuda.ForwardAgreesWithReference",
        quick=True),
    Fault(
        name="rms_norm_of_the_unrounded_sum",
        kind="wrong rounding",
        file="kernels/rms_norm/cuda.cu",
        old="      Unpack(rounded, x[p]);\n",
        new="",
        tests="RmsNormCuda.ResidualFormIsAnAdditionThenTheNormOfItsRoundedSum"),
    Fault(
        name="rms_norm_gradient_overwrites",
        kind="accumulate or overwrite",
        file="kernels/rms_norm/cuda.cu",
        old="dx[j] += r * weight[j] * dy[j] - slope * x[j];",
        new="dx[j] = r * weight[j] * dy[j] - slope * x[j];",
        tests="RmsNormCuda.BackwardAgreesWithReferenceAndObeysWrite"),
    Fault(
        name="rms_norm_rows_past_the_first_of_a_block",
        kind="unset output",
        file="kernels/rms_norm/cuda.cu",
        old="for (int64_t row = blockIdx.x; row < b.rows; row += gridDim.x) {",
        new="for (int64_t row = blockIdx.x; row < min(b.rows, int64_t{16} * gridDim.x); row += gridDim.x) {",
        tests="RmsNormCuda.BackwardAgreesWithReferenceAndObeysWrite"),
    Fault(
        name="rms_norm_row_offset_in_32_bits",
        kind="32-bit overflow",
        file="kernels/rms_norm/cuda.cu",
        old="Store8(f.y + row * f.y_stride + column, x[p]);",
        new="Store8(f.y + static_cast<int>(row * f.y_stride) + column, x[p]);",
        tests="TokenWiseCuda.RowsMayLieFarApart"),
    Fault(
        name="block_sum_reads_before_the_write",
        kind="missing barrier",
        file=MATH,
        old="  if (threadIdx.x % kWarp == 0) slots[warp] = value;\n  __syncthreads();\n",
        new="  if (threadIdx.x % kWarp == 0) slots[warp] = value;\n",
        unit="kernels/global_norm/cuda.cu",
        tests="SumOfSquaresCuda.AgreesWithReferenceWhereverTheBufferBegins",
        quick=True),
    Fault(
        name="block_sum_writes_before_the_last_read",
        kind="missing barrier",
        file=MATH,
        old="  __syncthreads();  // slots may still be read from the call before\n",
        new="",
        unit="kernels/rms_norm/cuda.cu",
        tests="RmsNormCuda.BackwardAgreesWithReferenceAndObeysWrite"),
    Fault(
        name="block_sums_of_one_reader_race",
        kind="race",
        file=MATH,
        old="  __syncthreads();  // slots may still be read from the call before\n",
        new="",
        unit="kernels/mse/cuda.cu",
        tests="MseCuda.AgreesWithReference",
        found_by="tsan"),
    Fault(
        name="column_sums_overwrite",
        kind="accumulate or overwrite",
        file=PARTIAL_SUMS,
        old="  out[column] += sum;",
        new="  out[column] = sum;",
        tests="RmsNormCuda.BackwardAgreesWithReferenceAndObeysWrite"),
    Fault(
        name="column_sums_without_their_last_group",
        kind="dropped partial",
        file=PARTIAL_SUMS,
        old="for (int g = 1; g < kGroups; ++g)",
        new="for (int g = 1; g < kGroups - 1; ++g)",
        tests="RmsNormCuda.BackwardAgreesWithReferenceAndObeysWrite"),
    Fault(
        name="sum_of_the_first_512_parts_only",
        kind="dropped partial",
        file=PARTIAL_SUMS,
        old="for (int64_t i = threadIdx.x; i < count; i += kSumThreads) sum += mine[i];",
        new="for (int64_t i = threadIdx.x; i < min(count, int64_t{512}); i += kSumThreads) sum += mine[i];",
        tests="SumOfSquaresCuda.ManyPieces"),
    Fault(
        name="pack_loop_carries_no_row",
        kind="off by one",
        file=ROWS,
        old="      pack_ -= packs_;\n      ++row;\n",
        new="      pack_ -= packs_;\n",
        unit="kernels/swiglu/cuda.cu",
        tests="SwiGluCuda.AgreesWithReference"),
    Fault(
        name="swiglu_wrong_derivative",
        kind="wrong factor",
        file="kernels/swiglu/cuda.cu",
        old="d[j] = grad * u[j] * s * (1.0F + g[j] * (1.0F - s));",
        new="d[j] = grad * u[j] * s * (1.0F + g[j] - s);",
        tests="SwiGluCuda.AgreesWithReference"),
    Fault(
        name="swiglu_output_with_the_stride_of_its_input",
        kind="global overrun",
        file="kernels/swiglu/cuda.cu",
        old="    Store8(dup + i.row * dup_stride + i.column(), u);",
        new="    Store8(dup + i.row * rows.up_stride + i.column(), u);",
        tests="SwiGluCuda.AgreesWithReference"),
    Fault(
        name="output_gate_without_epsilon",
        kind="wrong factor",
        file="kernels/output_gate/cuda.cu",
        old="const float r = 1.0F / sqrtf(square / static_cast<float>(f.width) + f.eps);",
        new="const float r = 1.0F / sqrtf(square / static_cast<float>(f.width));",
        tests="OutputGateCuda.AgreesWithReference"),
    Fault(
        name="output_gate_wide_rows_read_the_wrong_input",
        kind="wrong operand",
        file="kernels/output_gate/cuda.cu",
        old="        Load8(b.o + row * b.o_stride + column, o);\n      }\n",
        new="        Load8(b.dy + row * b.o_stride + column, o);\n      }\n",
        tests="OutputGateCuda.AgreesWithReference"),
    Fault(
        name="output_gate_keeps_no_rstd",
        kind="unset output",
        file="kernels/output_gate/cuda.cu",
        old="  if (threadIdx.x == 0) f.rstd[row] = r;\n#pragma unroll\n",
        new="#pragma unroll\n",
        tests="OutputGateCuda.AgreesWithReference"),
    Fault(
        name="output_gate_mean_of_a_part_over_its_own_columns",
        kind="wrong factor",
        file="kernels/output_gate/cuda.cu",
        old="const float slope = dot / static_cast<float>(b.norm_width) * r * r * r;",
        new="const float slope = dot / static_cast<float>(b.width) * r * r * r;",
        tests="OutputGateCuda.RanksWithPartsOfTheWidth"),
    Fault(
        name="qk_norm_without_epsilon",
        kind="wrong factor",
        file="kernels/qk_norm_rope/cuda.cu",
        old="static_cast<float>(2 * shape.half) + eps);",
        new="static_cast<float>(2 * shape.half));",
        tests="QkNormRopeCuda.AgreesWithReference"),
    Fault(
        name="rope_backward_turns_forward",
        kind="wrong factor",
        file="kernels/qk_norm_rope/cuda.cu",
        old="const float s = kBack ? -r.sin[j] : r.sin[j];",
        new="const float s = r.sin[j];",
        tests="QkNormRopeCuda.AgreesWithReference"),
    Fault(
        name="qk_norm_weight_gradient_of_every_second_head",
        kind="dropped partial",
        file="kernels/qk_norm_rope/cuda.cu",
        old="for (int offset = b.shape.lanes; offset < kWarp; offset *= 2) {",
        new="for (int offset = 2 * b.shape.lanes; offset < kWarp; offset *= 2) {",
        tests="QkNormRopeCuda.AgreesWithReference"),
    Fault(
        name="qk_norm_weight_gradient_without_barrier",
        kind="missing barrier",
        file="kernels/qk_norm_rope/cuda.cu",
        old="  __syncthreads();\n  const int column = static_cast<int>(threadIdx.x);\n",
        new="  const int column = static_cast<int>(threadIdx.x);\n",
        tests="QkNormRopeCuda.AgreesWithReference"),
    Fault(
        name="qk_norm_reads_heads_that_are_not_there",
        kind="global over-read",
        file="kernels/qk_norm_rope/cuda.cu",
        old="    if (head < shape.heads) {\n      packed[step] = LoadChannels(",
        new="    {\n      packed[step] = LoadChannels(",
        tests="QkNormRopeCuda.AgreesWithReference",
        found_by="asan"),
    Fault(
        name="embedding_gradient_overwrites",
        kind="accumulate or overwrite",
        file="kernels/embedding/cuda.cu",
        old="  if (inside) Load8(to, sum);\n",
        new="",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm",
        quick=True),
    Fault(
        name="embedding_gradient_of_the_first_32_of_an_id",
        kind="dropped partial",
        file="kernels/embedding/cuda.cu",
        old="  for (; run == kWarp; at += kWarp) {",
        new="  for (int once = 0; once < 1; ++once) {",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm"),
    Fault(
        name="embedding_gradient_reads_columns_past_the_width",
        kind="global over-read",
        file="kernels/embedding/cuda.cu",
        old="        if (inside && first + k < run) {\n          rows[k]",
        new="        if (first + k < run) {\n          rows[k]",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm",
        found_by="asan"),
    Fault(
        name="embedding_gradient_of_other_ranks_behind_the_last_row",
        kind="global overrun",
        file="kernels/embedding/cuda.cu",
        old="  if (id == b.rows) return;  ",
        new="  if (id > b.rows) return;  ",
        tests="EmbeddingCuda.PartsOfTheTableGiveTheWhole"),
    Fault(
        name="token_sort_without_its_last_digit",
        kind="off by one",
        file="kernels/embedding/group_tokens.cu",
        old="table.count >= int64_t{1} << shift; shift += 8)",
        new="table.count >= int64_t{1} << (shift + 8); shift += 8)",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm"),
    Fault(
        name="token_sort_counts_are_read_and_raised_at_once",
        kind="missing barrier",
        file="kernels/embedding/group_tokens.cu",
        old="mine[digit] + before : 0;\n    __syncwarp();\n",
        new="mine[digit] + before : 0;\n",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm"),
    Fault(
        name="token_sort_in_the_order_of_the_lanes",
        kind="order dependence",
        file="kernels/embedding/group_tokens.cu",
        old="    rank[round] = digit >= 0 ? mine[digit] + before : 0;\n    __syncwarp();\n"
            "    if (digit >= 0 && before == 0) mine[digit] += __popc(same);\n",
        new="    rank[round] = digit >= 0 && before >= 0 ? atomicAdd(&mine[digit], 1) : 0;\n",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm",
        environment={"SALA_SIMT_SEED": "1"}),
    Fault(
        name="token_sort_counts_without_a_fence_for_the_next_round",
        kind="race",
        file="kernels/embedding/group_tokens.cu",
        old="mine[digit] += __popc(same);\n    __syncwarp();\n",
        new="mine[digit] += __popc(same);\n",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm",
        found_by="tsan"),
    Fault(
        name="token_histogram_without_atomics",
        kind="race",
        file="kernels/embedding/group_tokens.cu",
        old="    atomicAdd(&bins[DigitOf(table.RowOf(ids[i]), shift)], 1);\n",
        new="    ++bins[DigitOf(table.RowOf(ids[i]), shift)];\n",
        tests="EmbeddingCuda.BackwardHasTheBitsOfTheCpuForm",
        found_by="tsan"),
    Fault(
        name="adamw_leaves_out_the_first_of_the_rest",
        kind="unset output",
        file="kernels/adamw/cuda.cu",
        old="for (int64_t i = 4 * packs + first; i < count; i += step) {",
        new="for (int64_t i = 4 * packs + 1 + first; i < count; i += step) {",
        tests="AdamWCuda.HasTheBitsOfTheCpuForm",
        quick=True),
    Fault(
        name="adamw_decays_the_updated_parameter",
        kind="wrong factor",
        file="kernels/adamw/cuda.cu",
        old="param = __fsub_rn(param, __fadd_rn(step, __fmul_rn(f.decay, param)));",
        new="param = __fsub_rn(param, step);\n  param = __fsub_rn(param, __fmul_rn(f.decay, param));",
        tests="AdamWCuda.HasTheBitsOfTheCpuForm"),
    Fault(
        name="adamw_takes_unaligned_copies_for_aligned",
        kind="misaligned access",
        file="kernels/adamw/cuda.cu",
        old="bool aligned = reinterpret_cast<uintptr_t>(rounded.raw()) % 8 == 0;",
        new="bool aligned = true;",
        tests="AdamWCuda.HasTheBitsOfTheCpuForm",
        found_by="asan"),
    Fault(
        name="global_norm_reads_past_the_end",
        kind="global over-read",
        file="kernels/global_norm/cuda.cu",
        old="if (aligned && i + 4 <= end) {",
        new="if (aligned) {",
        tests="SumOfSquaresCuda.AgreesWithReferenceWhereverTheBufferBegins"),
    Fault(
        name="global_norm_in_float32",
        kind="wrong rounding",
        file="kernels/global_norm/cuda.cu",
        old="sum += static_cast<double>(v[j]) * static_cast<double>(v[j]);",
        new="sum += static_cast<double>(v[j] * v[j]);",
        tests="SumOfSquaresCuda.AgreesWithReferenceWhereverTheBufferBegins"),
    Fault(
        name="mse_parts_lie_the_other_way",
        kind="wrong operand",
        file="kernels/mse/cuda.cu",
        old="parts[int64_t{s} * gridDim.x + blockIdx.x] = sum;",
        new="parts[int64_t{blockIdx.x} * kSums + s] = sum;",
        tests="MseCuda.AgreesWithReference"),
    Fault(
        name="mse_gradient_of_half_the_error",
        kind="wrong factor",
        file="kernels/mse/cuda.cu",
        old=".factor = 2.0F * grad_scale,",
        new=".factor = grad_scale,",
        tests="MseCuda.AgreesWithReference"),
    Fault(
        name="add_forgets_the_rest",
        kind="accumulate or overwrite",
        file="kernels/tensor_ops/cuda.cu",
        old="Store1(to + i, kAdd ? ToFloat(to[i]) + v : v);",
        new="Store1(to + i, v);",
        tests="TensorOpsCuda.AddRoundsOnce"),
    Fault(
        name="columns_lose_the_last_unit_of_a_row",
        kind="off by one",
        file="kernels/tensor_ops/cuda.cu",
        old="to[i / width * to_stride + i % width] =",
        new="to[i / width * to_stride + i % (width - 1)] =",
        tests="TensorOpsCuda.CopyColumnsCopiesStridedRowsAndNothingElse"),
    Fault(
        name="cast_looks_at_one_address_only",
        kind="misaligned access",
        file="kernels/tensor_ops/cuda.cu",
        old="Aligned16(from.raw()) && Aligned16(to.raw()) ? count / 8 : 0;",
        new="Aligned16(from.raw()) ? count / 8 : 0;",
        tests="TensorOpsCuda.CastRoundsToNearestEvenAndTouchesNothingElse",
        found_by="asan"),
]

# ---- output heads ----

OUTPUT_HEADS = [
    Fault(
        name="logits_of_one_column_too_many",
        kind="off by one",
        file=SOFTMAX,
        old="if (column + j >= n) values[j] = kMinusInfinity;",
        new="if (column + j > n) values[j] = kMinusInfinity;",
        unit="kernels/cross_entropy/cuda.cu",
        tests="CrossEntropyCuda.AnyVocabulary"),
    Fault(
        name="largest_logit_is_the_last_of_equals",
        kind="tie rule",
        file=SOFTMAX,
        old="      if (values[j] > largest) {",
        new="      if (values[j] >= largest) {",
        unit="kernels/cross_entropy/cuda.cu",
        tests="CrossEntropyCuda.TiesGoToTheLowestId",
        quick=True),
    Fault(
        name="ties_between_warps_go_to_the_first_warp",
        kind="tie rule",
        file=SOFTMAX,
        old="""    const int column = slots.columns[w];
    if (value > row.largest || (value == row.largest && column < row.column)) {""",
        new="""    const int column = slots.columns[w];
    if (value > row.largest) {""",
        unit="kernels/cross_entropy/cuda.cu",
        tests="CrossEntropyCuda.TiesGoToTheLowestId"),
    Fault(
        name="cross_entropy_gradient_over_unread_logits",
        kind="race",
        file="kernels/cross_entropy/cuda.cu",
        old="    // in the steps before.\n    __syncthreads();\n",
        new="    // in the steps before.\n",
        tests="CrossEntropyCuda.RepeatsToTheBit",
        found_by="tsan"),
    Fault(
        name="cross_entropy_gradient_over_unread_logits_in_another_order",
        kind="order dependence",
        file="kernels/cross_entropy/cuda.cu",
        old="    // in the steps before.\n    __syncthreads();\n",
        new="    // in the steps before.\n",
        tests="CrossEntropyCuda.AnyVocabulary",
        environment={"SALA_SIMT_SEED": "1"}),
    Fault(
        name="cross_entropy_logits_stay_where_there_is_no_label",
        kind="stale scratch",
        file="kernels/cross_entropy/cuda.cu",
        old="    if (threadIdx.x == 0) PutFields(chunk, r, 0.0, label, n, false);\n"
            "    if (chunk.gradient) WriteZeros(chunk, row);\n",
        new="    if (threadIdx.x == 0) PutFields(chunk, r, 0.0, label, n, false);\n"
            "    if (label >= n) WriteZeros(chunk, row);\n",
        tests="CrossEntropyCuda.TokensWithoutTarget"),
    Fault(
        name="cross_entropy_losses_of_later_chunks_over_the_first",
        kind="unset output",
        file="kernels/cross_entropy/cuda.cu",
        old="    if (chunk.token_loss != nullptr) chunk.token_loss += count;\n",
        new="",
        tests="CrossEntropyCuda.AgreesWithReference"),
    Fault(
        name="cross_entropy_weight_gradient_of_the_last_chunk",
        kind="accumulate or overwrite",
        file="kernels/cross_entropy/cuda.cu",
        old="cuda::GemmTN(ctx, gradient, hidden.Rows(begin, end), dweight, {.write = Write::kAccumulate});",
        new="cuda::GemmTN(ctx, gradient, hidden.Rows(begin, end), dweight, {.write = Write::kOverwrite});",
        tests="CrossEntropyCuda.AgreesWithReference"),
    Fault(
        name="softmax_of_ranks_added_without_their_maxima",
        kind="wrong factor",
        file=SOFTMAX,
        old="exp(double{share[kLargestLogit]} - double{row.largest});",
        new="exp(double{row.largest} - double{row.largest});",
        unit="kernels/cross_entropy/cuda.cu",
        tests="CrossEntropyCuda.RanksWithPartsOfTheVocabulary"),
    Fault(
        name="ties_between_ranks_go_to_the_last_rank",
        kind="tie rule",
        file=SOFTMAX,
        old="if (largest > row.largest || (largest == row.largest && id < row.column)) {",
        new="if (largest >= row.largest) {",
        unit="kernels/cross_entropy/cuda.cu",
        tests="CrossEntropyCuda.TiesGoToTheLowestIdOfAllRanks"),
    Fault(
        name="kl_sums_of_the_first_rank_alone",
        kind="dropped partial",
        file="kernels/kl_divergence/cuda.cu",
        old="  for (int k = 0; k < shard.ranks; ++k) {\n    const float* part",
        new="  for (int k = 0; k < 1; ++k) {\n    const float* part",
        tests="KlDivergenceCuda.RanksWithPartsOfTheVocabulary"),
    Fault(
        name="kl_without_the_square_of_the_temperature",
        kind="wrong factor",
        file="kernels/kl_divergence/cuda.cu",
        old="result.loss_sum = tau * tau * found[kDivergence];",
        new="result.loss_sum = tau * found[kDivergence];",
        tests="KlDivergenceCuda.AnyVocabulary"),
    Fault(
        name="kl_infinity_less_infinity",
        kind="off by one",
        file="kernels/kl_divergence/cuda.cu",
        old="if (column + j < n) {  // not infinity less infinity",
        new="if (column + j <= n) {  // not infinity less infinity",
        tests="KlDivergenceCuda.AnyVocabulary"),
    Fault(
        name="kl_gradient_over_unread_logits",
        kind="race",
        file="kernels/kl_divergence/cuda.cu",
        old="    // in the steps before.\n    __syncthreads();\n",
        new="    // in the steps before.\n",
        tests="KlDivergenceCuda.RepeatsToTheBit",
        found_by="tsan"),
    Fault(
        name="token_sums_of_the_first_1024",
        kind="dropped partial",
        file="kernels/common/token_sums.cu",
        old="for (int64_t t = threadIdx.x; t < tokens; t += kThreads)",
        new="for (int64_t t = threadIdx.x; t < min(tokens, int64_t{kThreads}); t += kThreads)",
        tests="CrossEntropyCuda.ManyTokens"),
]

# ---- attention ----

ATTENTION_FAULTS = [
    Fault(
        name="attention_hides_the_own_key",
        kind="off-by-one mask",
        file=TILE,
        old="if (column > rows.position[i / 2]) s[j][i] = -kInfinity;",
        new="if (column >= rows.position[i / 2]) s[j][i] = -kInfinity;",
        unit=ATTENTION,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="attention_without_its_last_tile",
        kind="off-by-one mask",
        file=ATTENTION,
        old="return key < first + kRows && first < tile.n;",
        new="return key + kDenseKeys <= first + kRows && first < tile.n;",
        tests="AttentionCuda.LongerDocuments"),
    Fault(
        name="attention_waits_for_too_few_copies",
        kind="wrong wait count",
        file=TILE,
        old="    ptx::CpAsyncWait<2>();\n",
        new="    ptx::CpAsyncWait<3>();\n",
        unit=ATTENTION,
        tests="AttentionCuda.ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens"),
    Fault(
        name="attention_waits_for_too_few_copies_in_three_stages",
        kind="wrong wait count",
        file=TILE,
        old="    ptx::CpAsyncWait<1>();\n",
        new="    ptx::CpAsyncWait<2>();\n",
        unit=ATTENTION,
        tests="AttentionCuda.HeadsOfTheReleasedModel",
        environment=SMALL_CARD),
    Fault(
        name="attention_waits_for_too_few_copies_in_two_stages",
        kind="wrong wait count",
        file=TILE,
        old="    ptx::CpAsyncWait<0>();\n  } else if (stages == 3) {",
        new="    ptx::CpAsyncWait<1>();\n  } else if (stages == 3) {",
        unit=ATTENTION,
        tests="AttentionCuda.HeadsOfTheReleasedModel",
        environment={"SALA_SIMT_SHARED": "73728"}),
    Fault(
        name="attention_copies_over_keys_in_use",
        kind="missing barrier",
        file=TILE,
        old="      __syncthreads();  // tile i is there; tile i - 1 is no longer read\n",
        new="",
        unit=ATTENTION,
        tests="AttentionCuda.LongerDocuments"),
    Fault(
        name="attention_b_operand_by_the_addresses_of_an_a_operand",
        kind="wrong fragment index",
        file=TILE,
        old="const int place = Place<D>(Lane() % 8 + Lane() / 16 * 8, Lane() / 8 % 2 * 8);",
        new="const int place = Place<D>(Lane() % 16, Lane() / 16 * 8);",
        unit=ATTENTION,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="attention_values_not_transposed",
        kind="wrong fragment index",
        file=TILE,
        old="    ptx::LdMatrix4Trans(b, tile + (place ^ 16 * x));",
        new="    ptx::LdMatrix4(b, tile + (place ^ 16 * x));",
        unit=ATTENTION,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths",
        quick=True),
    Fault(
        name="attention_weights_in_the_wrong_registers",
        kind="wrong fragment index",
        file=TILE,
        old="  a[1] = PackBf16(left[2], left[3]);\n  a[2] = PackBf16(right[0], right[1]);\n",
        new="  a[2] = PackBf16(left[2], left[3]);\n  a[1] = PackBf16(right[0], right[1]);\n",
        unit=ATTENTION,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="attention_sum_is_not_rescaled",
        kind="wrong factor",
        file=TILE,
        old="        o[j][2 * h + 1] *= rescale;\n",
        new="",
        unit=ATTENTION,
        tests="AttentionCuda.LongerDocuments"),
    Fault(
        name="attention_lse_in_base_two",
        kind="wrong factor",
        file=TILE,
        old="top[h] * p.scale + logf(sum[h]);",
        new="top[h] * p.scale_log2 + logf(sum[h]);",
        unit=ATTENTION,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="attention_writes_rows_past_the_document",
        kind="global overrun",
        file=TILE,
        old="    if (!rows.valid[h]) continue;\n    Bf16* to =",
        new="    Bf16* to =",
        unit=ATTENTION,
        tests="AttentionCuda.TokensOutsideTheDocumentsAreNeitherReadNorWritten"),
    Fault(
        name="attention_reads_keys_past_the_document",
        kind="document border",
        file=TILE,
        old="      const bool inside = key + row < n_;\n",
        new="      const bool inside = key + row < n_ + kKeys;\n",
        unit=ATTENTION,
        tests="AttentionCuda.TokensOutsideTheDocumentsAreNeitherReadNorWritten"),
    Fault(
        name="attention_token_offset_in_32_bits",
        kind="32-bit overflow",
        file=TILE,
        old="rows.valid[h] ? x.data + rows.token[h] * x.stride + int64_t{rows.head[h]} * D : nullptr;",
        new="rows.valid[h] ? x.data + static_cast<int>(rows.token[h] * x.stride) + int64_t{rows.head[h]} * D : nullptr;",
        unit=ATTENTION,
        tests="AttentionCuda.TokensMayLieFarApart"),
    Fault(
        name="delta_twice_by_two_blocks",
        kind="race",
        file=ATTENTION_BACKWARD,
        old="device_tiles, count, kDenseQueries);",
        new="device_tiles, count, 2 * kDenseQueries);",
        tests="AttentionCuda.LongerDocuments",
        found_by="tsan"),
    Fault(
        name="dense_keys_lose_the_queries_behind_a_border",
        kind="border of a range",
        file=ATTENTION_BACKWARD,
        old="const int64_t begin = std::clamp<int64_t>(queries.begin - key, 0, tile.run);",
        new="const int64_t begin = std::min<int64_t>(queries.begin, tile.run);",
        tests="AttentionRangesCuda.BordersOfTiles"),
    Fault(
        name="delta_without_a_step_of_the_butterfly",
        kind="dropped partial",
        file=ATTENTION_BACKWARD,
        old="for (int offset = kLanes / 2; offset > 0; offset /= 2) {",
        new="for (int offset = kLanes / 4; offset > 0; offset /= 2) {",
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="query_gradient_without_scale",
        kind="wrong factor",
        file=TILE,
        old="const float factor[2] = {p.scale, p.scale};",
        new="const float factor[2] = {1.0F, 1.0F};",
        unit=ATTENTION_BACKWARD,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="query_gradient_takes_the_keys_of_the_first_slice",
        kind="wrong operand",
        file=TILE,
        old="MultiplyAdd<D>(sum, a, keys, first + 16 * x);",
        new="MultiplyAdd<D>(sum, a, keys, 16 * x);",
        unit=ATTENTION_BACKWARD,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="query_gradient_sees_the_next_key",
        kind="off-by-one mask",
        file=TILE,
        old="const bool hidden = masked && column > rows.position[h];",
        new="const bool hidden = masked && column > rows.position[h] + 1;",
        unit=ATTENTION_BACKWARD,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="key_gradient_mask_ends_a_row_early",
        kind="off-by-one mask",
        file=KEY_GRADIENT,
        old="first_index < part_key + kKeys - 1;",
        new="first_index < part_key + kKeys - 17;",
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="value_gradient_by_the_wrong_operand",
        kind="wrong operand",
        file=KEY_GRADIENT,
        old="MultiplyAdd<D>(dv_sum, a, gradients, slice * 16);",
        new="MultiplyAdd<D>(dv_sum, a, queries, slice * 16);",
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="key_gradient_of_the_first_group_of_warps",
        kind="dropped partial",
        file=KEY_GRADIENT,
        old="dk_sum[j][i] += buffer[(4 * j + i) * kWarp];",
        new="dk_sum[j][i] += 0.0F * buffer[(4 * j + i) * kWarp];",
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths"),
    Fault(
        name="key_gradient_names_in_one_buffer",
        kind="race",
        file=KEY_GRADIENT,
        old="      names[(next + 1) % 2 * kStepRows + thread] = {later_token, later_row % p.group};",
        new="      names[thread] = names[kStepRows + thread] = {later_token, later_row % p.group};",
        tests="AttentionCuda.LongerDocuments",
        found_by="tsan"),
    Fault(
        name="key_gradient_sums_over_rows_in_use",
        kind="race",
        file=KEY_GRADIENT,
        old="  for (int group = 1; group < kRowGroups; ++group) {\n    __syncthreads();\n",
        new="  for (int group = 1; group < kRowGroups; ++group) {\n",
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths",
        found_by="tsan"),
    Fault(
        name="key_gradient_without_its_last_piece",
        kind="dropped partial",
        file=KEY_GRADIENT,
        old="for (int s = 0; s < sum.count; ++s) {",
        new="for (int s = 0; s < sum.count - 1; ++s) {",
        tests="AttentionCuda.SumsOfKeysInPieces"),
    Fault(
        name="key_gradient_waits_for_too_few_copies",
        kind="wrong wait count",
        file=TILE,
        old="    ptx::CpAsyncWait<1>();\n",
        new="    ptx::CpAsyncWait<2>();\n",
        unit=KEY_GRADIENT,
        tests="AttentionCuda.MatchesReferenceAtTheEdgeLengths",
        quick=True),
]

# ---- sparse attention ----

SPARSE_FAULTS = [
    Fault(
        name="sparse_mask_leaves_out_one_position",
        kind="off-by-one mask",
        file=TILE,
        old="    if (key + kKeys - 1 > rows.lowest) {",
        new="    if (key + kKeys - 2 > rows.lowest) {",
        unit=SPARSE,
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks",
        quick=True),
    Fault(
        name="walk_own_block_has_one_tile",
        kind="block border",
        file=BLOCKS,
        old="const int own_tiles = (tile.first + tokens - 1 - own * z.block) / kKeys + 1;",
        new="const int own_tiles = 1;",
        unit=SPARSE,
        tests="SparseAttentionCuda.OtherBlockNumbers"),
    Fault(
        name="walk_masks_are_set_before_they_are_cleared",
        kind="missing barrier",
        file=BLOCKS,
        old="masks[i] = 0;\n  __syncthreads();\n",
        new="masks[i] = 0;\n",
        unit=SPARSE,
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="walk_is_read_before_it_is_complete",
        kind="race",
        file=BLOCKS,
        old="    place += __popc(taken) * parts;\n  }\n  __syncthreads();\n",
        new="    place += __popc(taken) * parts;\n  }\n",
        unit=SPARSE,
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks",
        found_by="tsan"),
    Fault(
        name="sparse_row_takes_the_blocks_of_its_neighbour",
        kind="wrong operand",
        file=SPARSE,
        old="return (walk[i] >> WarpIndex() & 1) != 0",
        new="return (walk[i] >> (WarpIndex() ^ 1) & 1) != 0",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="sparse_group_of_heads_padded_with_the_next",
        kind="global overrun",
        file=TILE,
        old="rows.valid[h] = position < tile.n && head < group;",
        new="rows.valid[h] = position < tile.n && head <= group;",
        unit=SPARSE,
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="sparse_query_gradient_for_every_block_of_the_walk",
        kind="off-by-one mask",
        file=SPARSE_BACKWARD,
        old="return (walk[i] >> WarpIndex() & 1) != 0 && key <= position",
        new="return walk[i] != 0 && key <= position",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="key_gradient_token_offset_in_32_bits",
        kind="32-bit overflow",
        file=KEY_GRADIENT,
        old="dout.data + token * dout.stride + channel, bytes);",
        new="dout.data + static_cast<int>(token * dout.stride) + channel, bytes);",
        tests="SparseAttentionCuda.TokensMayLieFarApart"),
    Fault(
        name="index_local_tokens_end_a_block_early",
        kind="block border",
        file=INDEX,
        old="end = min(end, (int64_t{block} + x.shape.local) * x.shape.block);",
        new="end = min(end, (int64_t{block} + x.shape.local - 1) * x.shape.block);",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="index_without_the_segments_before",
        kind="dropped partial",
        file=INDEX,
        old="    *count = sum;\n",
        new="    *count = 0;\n",
        tests="SparseAttentionCuda.LongListsInPieces"),
    Fault(
        name="index_lists_past_256_blocks_start_anew",
        kind="dropped partial",
        file=INDEX,
        old="    start += total;\n",
        new="",
        tests="SparseAttentionCuda.LongListsInPieces"),
    Fault(
        name="index_counts_are_not_cleared",
        kind="stale scratch",
        file=INDEX,
        old="  ctx.gpu->Zero(x.counts, static_cast<size_t>(counts) * sizeof(int32_t));\n",
        new="",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="index_counts_without_atomics",
        kind="race",
        file=INDEX,
        old="if (b >= 0) atomicAdd(&counts[b], 1);",
        new="if (b >= 0) ++counts[b];",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks",
        found_by="tsan"),
    Fault(
        name="index_lists_without_a_fence_between_tokens",
        kind="race",
        file=INDEX,
        old="= token;\n    }\n    __syncwarp();\n",
        new="= token;\n    }\n",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks",
        found_by="tsan"),
    Fault(
        name="index_takes_any_number_for_a_block",
        kind="global overrun",
        file=INDEX,
        old="return candidates.first <= b && b < candidates.last ? b : -1;",
        new="return candidates.first <= b ? b : -1;",
        tests="SparseAttentionCuda.BlocksThatCannotBeFreeArePassedOver"),
    Fault(
        name="index_last_piece_is_whole",
        kind="off by one",
        file=INDEX,
        old="tile.last = min(tile.first + kPiece, last);",
        new="tile.last = max(tile.first + kPiece, last);",
        tests="SparseAttentionCuda.MatchesReferenceWithTheSameBlocks"),
    Fault(
        name="index_without_the_pieces_of_empty_sequences",
        kind="unset output",
        file=INDEX,
        old="return max(1, (sequence.length + kPiece - 1) / kPiece);",
        new="return (sequence.length + kPiece - 1) / kPiece;",
        tests="SparseRangesCuda.NoQueriesGiveZeros"),
    Fault(
        name="compress_a_window_past_the_document",
        kind="document border",
        file=COMPRESS,
        old="    if (j + 2 <= document.groups) {",
        new="    if (j + 1 <= document.groups) {",
        tests="CompressKeysCuda.WindowsRestartAtEachDocument",
        quick=True),
    Fault(
        name="compress_coarse_keys_by_the_fine_divisor",
        kind="wrong factor",
        file=COMPRESS,
        old="8, static_cast<float>(8 * p.stride),",
        new="8, static_cast<float>(2 * p.stride),",
        tests="CompressKeysCuda.WindowsRestartAtEachDocument"),
    Fault(
        name="compress_reads_groups_before_they_are_summed",
        kind="missing barrier",
        file=COMPRESS,
        old="  __syncthreads();\n  if (!inside) return;\n",
        new="  if (!inside) return;\n",
        tests="CompressKeysCuda.WindowsRestartAtEachDocument"),
    Fault(
        name="compress_token_offset_in_32_bits",
        kind="32-bit overflow",
        file=COMPRESS,
        old="      Load8(from + t * p.k_stride, x);",
        new="      Load8(from + static_cast<int>(t * p.k_stride), x);",
        tests="CompressKeysCuda.TokensMayLieFarApart"),
    Fault(
        name="compress_reads_groups_past_the_document",
        kind="global over-read",
        file=COMPRESS,
        old="if (inside && row < kGroups && first + row < document.groups) {",
        new="if (inside && row < kGroups) {",
        tests="CompressKeysCuda.MeansOfEveryEdgeLength",
        found_by="asan"),
    Fault(
        name="select_begins_with_the_document",
        kind="border of a range",
        file=SCORES,
        old="static_cast<int>(tile.document->first_query + (tiles - 1 - past / among) * kTokens);",
        new="static_cast<int>(tile.document->first_query / kTokens * kTokens + (tiles - 1 - past / among) * kTokens);",
        unit=SELECT,
        tests="SparseRangesCuda.RandomRangesGiveTheWhole"),
    Fault(
        name="select_sees_a_window_too_many",
        kind="off-by-one mask",
        file=SCORES,
        old="return max(0, (t + 1) / stride - 1);",
        new="return max(0, (t + 2) / stride - 1);",
        unit=SELECT,
        tests="SelectBlocksCuda.EveryEdgeLength"),
    Fault(
        name="select_candidates_reach_into_the_window",
        kind="block border",
        file=SCORES,
        old="return max(0, t / p.block_size - p.window_blocks);",
        new="return max(0, t / p.block_size - p.window_blocks + 1);",
        unit=SELECT,
        tests="SelectBlocksCuda.EveryEdgeLength"),
    Fault(
        name="select_ties_beyond_a_warp",
        kind="tie rule",
        file=SELECT,
        old="(equal && equals + __popc(equal_lanes & below) < ties));",
        new="(equal && __popc(equal_lanes & below) < ties));",
        tests="SelectBlocksCuda.EqualKeysTieEverywhere"),
    Fault(
        name="select_ties_go_to_the_higher_block",
        kind="tie rule",
        file=SELECT,
        old="(equal && equals + __popc(equal_lanes & below) < ties));",
        new="(equal && ties - 1 - equals - __popc(equal_lanes & below) < static_cast<int>(begin == 0 ? 0 : ties)));",
        tests="SelectBlocksCuda.TiesGoToTheLowerBlock"),
    Fault(
        name="select_forgets_the_key_before_a_tile",
        kind="block border",
        file=SELECT,
        old="    if (lane < 2) strip[lane * kStrip] = carry;\n",
        new="    if (lane < 2 && carry < 0.0F) strip[lane * kStrip] = carry;\n",
        tests="SelectBlocksCuda.EqualsTheRuleOnRandomInput"),
    Fault(
        name="select_waits_for_too_few_copies",
        kind="wrong wait count",
        file=SCORES,
        old="    ptx::CpAsyncWait<kStages - 2>();",
        new="    ptx::CpAsyncWait<kStages - 1>();",
        unit=SELECT,
        tests="SelectBlocksCuda.HandComputedScores",
        quick=True),
    Fault(
        name="select_strips_without_room_for_their_last_key",
        kind="shared overrun",
        file=SCORES,
        old="constexpr int kStrip = kKeys + 16;",
        new="constexpr int kStrip = kKeys;",
        unit=SELECT,
        tests="SelectBlocksCuda.EveryEdgeLength"),
    Fault(
        name="select_reads_queries_past_the_tile",
        kind="global over-read",
        file=SCORES,
        old="tile.first + (used ? token + i : 0);",
        new="tile.first + token + i;",
        unit=SELECT,
        tests="SelectBlocksCuda.EveryEdgeLength",
        found_by="asan"),
    Fault(
        name="select_query_offset_in_32_bits",
        kind="32-bit overflow",
        file=SCORES,
        old="reinterpret_cast<const uint32_t*>(p.q + t * p.q_stride + from_row * kD) + lane % 4;",
        new="reinterpret_cast<const uint32_t*>(p.q + static_cast<int>(t * p.q_stride) + from_row * kD) + lane % 4;",
        unit=SELECT,
        tests="SelectBlocksCuda.TokensMayLieFarApart"),
    Fault(
        name="select_rows_of_two_tokens_exchanged",
        kind="wrong fragment index",
        file=SCORES,
        old="const float give = token ? x[0][v] : x[1][v];\n    y[v] = (token ? x[1][v] : x[0][v])",
        new="const float give = token ? x[1][v] : x[0][v];\n    y[v] = (token ? x[0][v] : x[1][v])",
        unit=SELECT,
        tests="SelectBlocksCuda.EveryEdgeLength"),
    Fault(
        name="select_keeps_the_best_without_a_fence",
        kind="race",
        file=SELECT,
        old="    written += __popc(taken);\n  }\n  __syncwarp();\n",
        new="    written += __popc(taken);\n  }\n",
        tests="SelectBlocksCuda.EveryEdgeLength",
        found_by="tsan"),
]

# ---- Lightning attention ----

LIGHTNING_FAULTS = [
    Fault(
        name="lightning_state_read_a_step_too_early",
        kind="wrong decay exponent",
        file=LIGHTNING,
        old="scale * power[i + 1] : 0.0F;",
        new="scale * power[i] : 0.0F;",
        unit=MARCH,
        tests="LightningCuda.MatchesTheRecurrenceAtAllEdgeLengths"),
    Fault(
        name="lightning_state_written_a_step_too_far",
        kind="wrong decay exponent",
        file=LIGHTNING,
        old="power[n - 1 - i] : 0.0F;",
        new="power[n - i] : 0.0F;",
        unit=STATES,
        tests="LightningCuda.SplitWithCarriedStateMatchesOnePass"),
    Fault(
        name="lightning_state_passes_into_the_next_document",
        kind="document border",
        file=LIGHTNING,
        old="state.Scale(code[n - 1] == 0 ? power[n] : 0.0F);",
        new="state.Scale(code[0] == 0 ? power[n] : 0.0F);",
        unit=MARCH,
        tests="LightningCuda.PackedDocumentsMatchSeparateRecurrences"),
    Fault(
        name="last_state_lets_what_enters_pass_a_document",
        kind="document border",
        file=STATES,
        old="const bool through = falling ? end == segment_end : begin == segment_begin;",
        new="const bool through = true;",
        tests="LightningCuda.StatesAloneHaveTheBitsOfTheFullCalls"),
    Fault(
        name="last_state_of_the_first_segment",
        kind="wrong operand",
        file=STATES,
        old="if (last) segment = falling ? 0 : plan.segments - 1;",
        new="if (last) segment = falling ? 0 : entry;",
        tests="LightningCuda.StatesAloneHaveTheBitsOfTheFullCalls"),
    Fault(
        name="lightning_last_segment_decays_like_a_whole_one",
        kind="wrong decay exponent",
        file=STATES,
        old="DecayPower(slopes[i / plan.segments], end - begin) : 0.0F;",
        new="DecayPower(slopes[i / plan.segments], plan.segment_tokens) : 0.0F;",
        tests="LightningCuda.SplitWithCarriedStateMatchesOnePass"),
    Fault(
        name="lightning_scan_of_its_first_batch",
        kind="dropped partial",
        file=STATES,
        old="for (int begin = 0; begin < entries; begin += kScanBatch) {",
        new="for (int begin = 0; begin < min(entries, kScanBatch); begin += kScanBatch) {",
        tests="LightningCuda.ManySegments"),
    Fault(
        name="lightning_scan_multiplies_what_it_must_not_see",
        kind="document border",
        file=STATES,
        old="return factor == 0.0F ? own : fmaf(factor, entering, own);",
        new="return fmaf(factor, entering, own);",
        tests="LightningCuda.NotANumberPassesNoBorderOfChunks"),
    Fault(
        name="lightning_march_multiplies_what_it_must_not_see",
        kind="document border",
        file=LIGHTNING,
        old="tile[i][c] = factor == 0.0F ? 0.0F : tile[i][c] * factor;",
        new="tile[i][c] = tile[i][c] * factor;",
        unit=MARCH,
        tests="LightningCuda.NotANumberPassesNoBorderOfChunks"),
    Fault(
        name="lightning_remembers_too_few_tokens",
        kind="dropped partial",
        file=STATES,
        old="constexpr float kReach = 40.0F;",
        new="constexpr float kReach = 2.0F;",
        tests="LightningCuda.SeveralSegments"),
    Fault(
        name="lightning_reads_scores_before_they_are_there",
        kind="missing barrier",
        file=MARCH,
        old="    __syncthreads();  // z, scores and factors are there\n",
        new="",
        tests="LightningCuda.ManyDocumentsOfOneToken",
        quick=True),
    Fault(
        name="lightning_loads_over_a_chunk_in_use",
        kind="missing barrier",
        file=MARCH,
        old="    __syncthreads();  // x and y are there, and all have left the chunk before\n",
        new="",
        tests="LightningCuda.SplitWithCarriedStateMatchesOnePass"),
    Fault(
        name="lightning_waits_for_too_few_copies",
        kind="wrong wait count",
        file=MARCH,
        old="        ptx::CpAsyncWait<1>();\n",
        new="        ptx::CpAsyncWait<2>();\n",
        tests="LightningCuda.ManyDocumentsOfOneToken"),
    Fault(
        name="lightning_waits_for_too_few_copies_on_a_small_card",
        kind="wrong wait count",
        file=MARCH,
        old="      D == 128 && MarchSharedBytes<D>(true) <= op.device().info().shared_bytes_per_block;",
        new="      D == 128;",
        tests="LightningCuda.PackedDocumentsOfTheWidestHead",
        environment=SMALL_CARD),
    Fault(
        name="lightning_falling_sweep_does_not_see_its_own_tile",
        kind="off-by-one mask",
        file=MARCH,
        old="return falling ? column >= row : column <= row;",
        new="return falling ? column > row : column <= row;",
        tests="LightningCuda.ManyDocumentsOfOneToken"),
    Fault(
        name="lightning_rows_of_the_wrong_lane",
        kind="wrong fragment index",
        file=MARCH,
        old="const bool upper = at.lane % 4 >= 2;",
        new="const bool upper = at.lane % 8 >= 4;",
        tests="LightningCuda.ManyDocumentsOfOneToken"),
    Fault(
        name="lightning_state_operand_exchanged",
        kind="wrong fragment index",
        file=MARCH,
        old="PackBf16(low[0], low[1]), PackBf16(high[0], high[1]),",
        new="PackBf16(high[0], high[1]), PackBf16(low[0], low[1]),",
        tests="LightningCuda.StatesReachOnlyTheFirstAndTheLastDocument"),
    Fault(
        name="lightning_writes_past_the_last_token",
        kind="global overrun",
        file=MARCH,
        old="    if (m * 16 + lane_row < n) __stcg(",
        new="    if (m * 16 + lane_row <= n) __stcg(",
        tests="LightningCuda.TokensPastTheDocumentsAreNeitherReadNorWritten"),
    Fault(
        name="lightning_reads_past_the_last_token",
        kind="document border",
        file=LIGHTNING,
        old="    const bool valid = row < n;",
        new="    const bool valid = row <= n;",
        unit=MARCH,
        tests="LightningCuda.TokensPastTheDocumentsAreNeitherReadNorWritten"),
    Fault(
        name="lightning_token_offset_in_32_bits",
        kind="32-bit overflow",
        file=LIGHTNING,
        old="const Bf16* from = rows.data + int64_t{chunk} * kChunk * rows.stride;",
        new="const Bf16* from = rows.data + static_cast<int>(int64_t{chunk} * kChunk * rows.stride);",
        unit=MARCH,
        tests="LightningCuda.TokensMayLieFarApart"),
    Fault(
        name="lightning_leaves_no_state",
        kind="unset output",
        file=MARCH,
        old="const bool advances = more || block->last != nullptr;",
        new="const bool advances = more;",
        tests="LightningCuda.MatchesTheRecurrenceAtAllEdgeLengths"),
    Fault(
        name="lightning_state_given_over_the_one_taken",
        kind="race",
        file="kernels/lightning/cuda.cu",
        old="if (from.empty() || from.raw() != to.raw()) return op.Data<float>(from);",
        new="if (from.empty() || from.raw() != nullptr) return op.Data<float>(from);",
        tests="LightningCuda.StatesMayBeTakenAndGivenInTheSameMemory"),
    Fault(
        name="lightning_power_table_of_one_too_many",
        kind="shared overrun",
        file=MARCH,
        old="for (int i = start.thread; i <= kChunk; i += kThreads<D>) {",
        new="for (int i = start.thread; i <= kChunk + 1; i += kThreads<D>) {",
        tests="LightningCuda.ManyDocumentsOfOneToken"),
]

FAULTS = [*TOKEN_WISE, *OUTPUT_HEADS, *ATTENTION_FAULTS, *SPARSE_FAULTS, *LIGHTNING_FAULTS]
