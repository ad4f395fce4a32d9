"""The faults of the CPU path: kernels, model, recipes, data and core; fault.py says what an entry holds."""

import functools

from fault import Fault

KERNELS = functools.partial(Fault, program="kernels_tests")
MODEL = functools.partial(Fault, program="model_tests")
RECIPES = functools.partial(Fault, program="recipes_tests")
DATA = functools.partial(Fault, program="data_tests")
CORE = functools.partial(Fault, program="core_tests")
TWO_RANKS = functools.partial(Fault, program="sharding_tests", ranks=2)

NORM_ROW = "kernels/rms_norm/row.h"
NORM = "kernels/rms_norm/cpu.cc"
ADAMW = "kernels/adamw/cpu.cc"
CROSS_ENTROPY = "kernels/cross_entropy/cpu.cc"
KL = "kernels/kl_divergence/cpu.cc"
TILE = "kernels/attention/tile_math.cc"
ATTENTION = "kernels/attention/block_attention.cc"
LIGHTNING = "kernels/lightning/cpu.cc"
CHUNK = "kernels/lightning/chunk_math.cc"
COMPRESS = "kernels/sparse_attention/compress.cc"
SELECTOR = "kernels/sparse_attention/selector.cc"
SCORES = "kernels/sparse_attention/scores_math.cc"
ROPE = "kernels/qk_norm_rope/cpu.cc"
LAYERS = "model/model.cc"
MIXER = "model/mixer.cc"
OPTIMIZER = "recipes/optimizer.cc"
REDUCER = "recipes/gradient_reducer.cc"
SCHEDULE = "recipes/schedule.cc"
STREAM = "data/stream.cc"
PACKING = "data/packing.cc"

# ---- token-wise kernels ----

TOKEN_WISE = [
    KERNELS("row_norm_without_epsilon", "missing term", NORM_ROW, unit=NORM,
            old="square / static_cast<double>(width) + static_cast<double>(eps)", new="square / static_cast<double>(width)",
            tests="RmsNorm.ForwardAgreesWithReference"),
    KERNELS("rms_norm_mean_with_one_factor_too_few", "wrong factor", NORM_ROW, unit=NORM,
            old="dot * static_cast<double>(rstd) /", new="dot /", tests="RmsNorm.BackwardAgreesWithReferenceAndObeysWrite", quick=True),
    KERNELS("rms_norm_weight_gradient_of_the_last_row_only", "accumulate or overwrite", NORM_ROW, unit=NORM,
            old="weight_sums[i] += dn[i]", new="weight_sums[i] = dn[i]", tests="RmsNorm.BackwardAgreesWithReferenceAndObeysWrite"),
    KERNELS("rms_norm_residual_without_branch_scale", "missing factor", NORM,
            old="residual[i] + scale * branch[i]", new="residual[i] + branch[i]",
            tests="RmsNorm.ResidualFormIsAnAdditionThenTheNorm"),
    KERNELS("adamw_decay_upwards", "sign", ADAMW,
            old="(m / root) + f.decay * param[i]", new="(m / root) - f.decay * param[i]",
            tests="AdamW.DecaysWithoutGradientAndIgnoresThreads"),
    KERNELS("adamw_second_moment_corrected_as_the_first", "bias correction", "kernels/adamw/factors.h", unit=ADAMW,
            old="1 / std::sqrt(c2)", new="1 / std::sqrt(c1 + 0 * c2)", tests="AdamW.FollowsTheDoubleReferenceOverManySteps"),
    KERNELS("adamw_epsilon_under_the_root", "wrong place", ADAMW,
            old="__builtin_sqrtf(v) * f.root_factor + f.eps", new="__builtin_sqrtf(v + f.eps) * f.root_factor",
            tests="AdamW.FollowsTheDoubleReferenceOverManySteps"),
    KERNELS("adamw_square_of_the_unclipped_gradient", "clip factor", ADAMW,
            old="f.one_minus_beta2 * (g * g)", new="f.one_minus_beta2 * (grad[i] * grad[i])",
            tests="AdamW.FollowsTheDoubleReferenceOverManySteps"),
    KERNELS("swiglu_derivative_without_its_argument", "missing factor", "kernels/swiglu/cpu.cc",
            old="1.0F + g * (1.0F - s)", new="1.0F + (1.0F - s)", tests="SwiGlu.AgreesWithReference"),
    KERNELS("output_gate_gradient_without_norm_weight", "missing factor", "kernels/output_gate/cpu.cc",
            old="(o[i] * rstd * weight[i]) * (s * (1.0F - s))", new="(o[i] * rstd) * (s * (1.0F - s))",
            tests="Parts/OutputGate.AgreesWithReference/NormGate"),
    KERNELS("embedding_gradient_without_scale", "missing factor", "kernels/embedding/cpu.cc",
            old="dout.Row<float>(t) + begin, scale, dweight", new="dout.Row<float>(t) + begin, 1.0F, dweight",
            tests="Embedding.ForwardAndBackwardAgreeWithReference"),
    KERNELS("rotation_turned_back", "sign", ROPE,
            old="from[i + half] * cos[i] + from[i] * sin[i]", new="from[i + half] * cos[i] - from[i] * sin[i]",
            tests="Parts/QkNormRope.AgreesWithReference/Rope"),
    KERNELS("rotary_frequencies_halved", "missing factor", "kernels/qk_norm_rope/frequencies.h", unit=ROPE,
            old="-2.0 * static_cast<double>(i)", new="-1.0 * static_cast<double>(i)",
            tests="RopeTable.HoldsCosineAndSineOfTheFloat32Product"),
    KERNELS("global_norm_without_squares", "wrong operation", "kernels/global_norm/cpu.cc",
            old="return value * value;", new="return value;", tests="GlobalNorm.AgreesWithReferenceAndIgnoresThreads"),
    KERNELS("logit_scale_of_the_next_position", "off by one", "kernels/logit_scale/cpu.cc",
            old="PortableLog(position[t] + a)", new="PortableLog(position[t] + 1 + a)", tests="LogitScale.GoldenValues"),
    KERNELS("part_of_a_document_without_its_last_token", "off by one", "kernels/common/documents.cc",
            old="inside(first + count)};", new="inside(first + count - 1)};", tests="Documents.PartOfARangeOfTokens"),
    KERNELS("product_forgets_earlier_pieces_of_k", "forgotten accumulation", "kernels/gemm/serial.cc",
            old="k0 == 0 ? nullptr : sums", new="nullptr", tests="Gemm.EveryFormAndInstructionSetFollowsTheOneChainOrder"),
]

# ---- losses ----

LOSSES = [
    KERNELS("cross_entropy_forgets_label_0", "off by one", CROSS_ENTROPY,
            old="if (column >= 0) logits[column] -= grad_scale;", new="if (column > 0) logits[column] -= grad_scale;",
            tests="CrossEntropy.AgreesWithReference"),
    KERNELS("cross_entropy_share_relative_to_its_own_maximum", "missing factor", CROSS_ENTROPY,
            old="PortableExp(mine - static_cast<double>(row.largest)) / row.sum", new="(mine > -1e300 ? 1.0 : 0.0) / row.sum",
            tests="CrossEntropyShards.AgreeWithReference"),
    KERNELS("kl_normalisers_swapped", "sign", KL,
            old="sums.teacher - PortableLog(sums.teacher) + PortableLog(sums.student)",
            new="sums.teacher + PortableLog(sums.teacher) - PortableLog(sums.student)",
            tests="KlDivergence.AgreesWithADirectComputationOverAllPositions"),
    KERNELS("kl_gradient_normalises_the_teacher_by_the_student", "wrong operand", KL,
            old="static_cast<float>(slope / teacher_sum)", new="static_cast<float>(slope / (0 * teacher_sum + student_sum))",
            tests="KlDivergence.AgreesWithADirectComputationOverAllPositions"),
    KERNELS("mse_gradient_without_two", "missing factor", "kernels/mse/cpu.cc",
            old="2.0F * grad_scale", new="grad_scale", tests="MeanSquaredError.AgreesWithReference"),
]

# ---- attention ----

ATTENTION_FAULTS = [
    KERNELS("attention_heads_of_a_group_see_further", "mask", TILE,
            old="tile.first_visible + row / tile.group", new="tile.first_visible + row + 0 * tile.group",
            tests="Attention.ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens"),
    KERNELS("attention_sees_one_token_of_the_future", "mask", ATTENTION,
            old="tile.begin + first - own * z.block + 1", new="tile.begin + first - own * z.block + 2",
            tests="Attention.ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens", quick=True),
    KERNELS("attention_sum_not_rescaled", "forgotten rescale", TILE,
            old="      sum[r] *= rescale;\n", new="", tests="Attention.HeadsOfTheReleasedModelMatchReference"),
    KERNELS("attention_softmax_gradient_without_delta", "missing term", TILE,
            old="g[j] = p * (g[j] - row_delta);", new="g[j] = p * (g[j] - 0 * row_delta);",
            tests="Attention.HeadsOfTheReleasedModelMatchReference"),
    KERNELS("attention_log_sum_exp_subtracted", "sign", ATTENTION,
            old="work.max[r] += static_cast<float>(PortableLog", new="work.max[r] -= static_cast<float>(PortableLog",
            tests="Attention.HeadsOfTheReleasedModelMatchReference"),
    KERNELS("attention_key_gradient_without_scale", "missing factor", ATTENTION,
            old="GemmSerialTN(s.keys, z.d, s.rows, problem.scale, dp", new="GemmSerialTN(s.keys, z.d, s.rows, 1.0F, dp",
            tests="Attention.HeadsOfTheReleasedModelMatchReference"),
    KERNELS("attention_keys_of_the_first_head_for_all", "wrong head", ATTENTION,
            old="tile.document.begin + block * z.block) + tile.head * z.d;", new="tile.document.begin + block * z.block) + 0 * z.d;",
            tests="Edges/AttentionLength.MatchesReference/3"),
    KERNELS("attention_key_gradient_not_zeroed_for_later_heads", "uninitialised", ATTENTION,
            old="    ZeroRows(dk, document, head, z.d);\n", new="    if (head == 0) ZeroRows(dk, document, head, z.d);\n",
            tests="Edges/AttentionLength.MatchesReference/3"),
]

# ---- linear attention ----

LINEAR = [
    KERNELS("lightning_carried_state_decays_one_token_less", "off by one", LIGHTNING,
            old="scale_ * decay_.power[static_cast<size_t>(i + 1)]", new="scale_ * decay_.power[static_cast<size_t>(i)]",
            tests="Lightning.SplitWithCarriedStateMatchesOnePass"),
    KERNELS("lightning_outgoing_state_decays_one_token_more", "off by one", LIGHTNING,
            old="decay_.power[static_cast<size_t>(c.n - 1 - j)]", new="decay_.power[static_cast<size_t>(c.n - j)]",
            tests="Lightning.SplitWithCarriedStateMatchesOnePass"),
    KERNELS("lightning_state_passes_a_border_between_chunks", "document border", LIGHTNING,
            old="if (start < 0 ||", new="if (start <= 0 ||", tests="Lightning.PackedDocumentsMatchSeparateRecurrences"),
    KERNELS("lightning_decay_of_another_head", "wrong head", LIGHTNING,
            old="body(HeadChunks(d_, slopes_[static_cast<size_t>(h)], scale_,",
            new="body(HeadChunks(d_, slopes_[static_cast<size_t>(heads_ - 1 - h)], scale_,",
            tests="Lightning.PackedDocumentsMatchSeparateRecurrences"),
    KERNELS("lightning_slopes_of_other_head_counts", "off by one", LIGHTNING,
            old="slope(2 * h, 2 * p)", new="slope(2 * h + 1, 2 * p)", tests="LightningSlopes.HeadCountsThatAreNoPowerOfTwo", quick=True),
    KERNELS("lightning_scores_decay_one_token_more", "off by one", CHUNK,
            old="s[j] *= power[i - j];", new="s[j] *= power[i - j + 1];", tests="Edges/LightningLength.MatchesRecurrence/1"),
    KERNELS("lightning_sees_the_document_before", "document border", CHUNK,
            old="    for (int64_t j = 0; j < first[i]; ++j) s[j] = 0.0F;\n", new="",
            tests="Lightning.ChangingOneTokenReachesOnlyItsDocumentAndLaterTokens"),
    KERNELS("lightning_decoding_reads_before_it_writes", "wrong order", CHUNK,
            old="      row[b] = decay * row[b] + key * v[b];\n      out[b] += query * row[b];\n",
            new="      out[b] += query * row[b];\n      row[b] = decay * row[b] + key * v[b];\n",
            tests="Edges/LightningLength.DecodeFollowsTheRecurrence/1"),
    KERNELS("lightning_returns_the_state_by_the_keys", "wrong operand", LIGHTNING,
            old="head.ReturnState(c, x.q, dout);\n  }", new="head.ReturnState(c, x.k, dout);\n  }",
            tests="Lightning.LongDocumentsMatchRecurrence"),
]

# ---- block-sparse attention ----

SPARSE = [
    KERNELS("compressed_keys_divided_by_the_stride", "wrong factor", COMPRESS,
            old="/ static_cast<double>(windows.size)", new="/ static_cast<double>(windows.stride)",
            tests="CompressKeys.MatchesMeansOfEachDocument"),
    KERNELS("compressed_keys_without_the_last_window", "off by one", COMPRESS,
            old="(n - size) / stride + 1", new="(n - size) / stride", tests="CompressKeys.CountsOnlyFullWindows"),
    KERNELS("selection_among_one_block_less", "off by one", SELECTOR,
            old="own - config.local_blocks() + 1", new="own - config.local_blocks()", tests="SelectBlocks.EqualsTheRuleOnRandomInput"),
    KERNELS("selection_forgets_the_window_that_reaches_in", "off by one", SELECTOR,
            old="b * windows_per_block_ - 1)", new="b * windows_per_block_)", tests="SelectBlocks.EqualsTheRuleOnRandomInput"),
    KERNELS("selection_ties_to_the_higher_block", "tie", SELECTOR,
            old="(x == y && a < b)", new="(x == y && a > b)", tests="SelectBlocks.TiesGoToTheLowerBlock"),
    KERNELS("selection_adds_heads_without_normalising", "missing term", SCORES,
            old="const float x = scores[j] - lse;", new="const float x = scores[j] - 0 * lse;",
            tests="SelectBlocks.HeadsAreNormalisedBeforeTheyAreAdded"),
    KERNELS("selection_overflows", "missing limit", SCORES,
            old="Exp(x < kLimit ? x : kLimit)", new="Exp(x < kLimit ? x : x)", tests="SelectBlocks.ScoresBeyondTheFloatRangeKeepTheirForm"),
    KERNELS("selection_by_the_last_head_of_a_group", "wrong head", SELECTOR,
            old="          if (work_.sum_[row] == 0.0F) return;\n",
            new="          if (work_.sum_[row] == 0.0F || row % group_ != group_ - 1) return;\n",
            tests="SelectBlocks.EqualsTheRuleOnRandomInput"),
]

# ---- the model ----

LAYER_FAULTS = [
    MODEL("mixer_without_residual_scale", "missing residual scale", LAYERS,
          old="{.y = s.mid, .alpha = r, .write", new="{.y = s.mid, .alpha = 1.0F + 0 * r, .write",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("mlp_gradient_without_residual_scale", "missing residual scale", LAYERS,
          old="kernels::GemmNN(ctx, dy, w.down_proj, dh, {.alpha = r});", new="kernels::GemmNN(ctx, dy, w.down_proj, dh, {});",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("mlp_gate_and_up_gradients_swapped", "swapped", LAYERS,
          old="kernels::SwiGluBackward(ctx, dh, s.gate, s.up, inputs.Piece(dgate_up, 0),\n"
              "                            inputs.Piece(dgate_up, 1));",
          new="kernels::SwiGluBackward(ctx, dh, s.gate, s.up, inputs.Piece(dgate_up, 1),\n"
              "                            inputs.Piece(dgate_up, 0));",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("embedding_gradient_without_scale_emb", "missing factor", LAYERS,
          old="static_cast<float>(config_.scale_emb), gradients.embedding, first_row",
          new="1.0F, gradients.embedding, first_row", tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("recomputing_starts_from_another_layer", "swapped layer", LAYERS,
          old="again.x = kept.x;", new="again.x = state.layers[0].x;", tests="ModelTest.KeepingActivationsGivesTheBitsOfRecomputing"),
    MODEL("gradients_of_a_layer_go_to_the_first", "swapped layer", LAYERS,
          old="gradients.layers[static_cast<size_t>(l)];", new="gradients.layers[static_cast<size_t>(l % 1)];",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("both_norms_of_a_layer_are_one", "wrong tensor", LAYERS,
          old='get(prefix + "post_attention_layernorm.weight")', new='get(prefix + "input_layernorm.weight")',
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("sparse_attention_from_one_token_later", "off by one", LAYERS,
          old="document.length() >= config.sparse.dense_len", new="document.length() > config.sparse.dense_len",
          tests="ModelTest.GenerationTurnsSparseAtTheLengthOfTheForwardPass"),
    MODEL("decoding_is_sparse_one_token_later", "off by one", MIXER,
          old="n >= config.sparse.dense_len", new="n > config.sparse.dense_len", tests="ModelTest.GenerationTurnsSparseAtTheLengthOfTheForwardPass"),
    MODEL("key_norm_gradient_goes_to_the_query_norm", "wrong tensor", MIXER,
          old="inputs.Piece(dprojected, kKey), gradients.k_norm);", new="inputs.Piece(dprojected, kKey), gradients.q_norm);",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("output_projection_gradient_without_residual_scale", "missing residual scale", MIXER,
          old="{.alpha = alpha, .write = Write::kAccumulate}", new="{.write = Write::kAccumulate}",
          tests="ModelTest.HybridGradientsMatchComplexStep"),
    MODEL("residual_scale_without_root", "wrong factor", "model/config.cc",
          old="scale_depth / std::sqrt(static_cast<double>(num_hidden_layers))", new="scale_depth / static_cast<double>(num_hidden_layers)",
          tests="ModelConfigTest.PublishedModelHasThePublishedParameters"),
    MODEL("sampling_multiplies_by_the_temperature", "wrong operation", "model/generate.cc",
          old="*best) /\n                            temperature", new="*best) *\n                            temperature",
          tests="SampleTokenTest.TemperatureSharpens"),
    MODEL("pieces_of_a_rank_overlap", "ZeRO piece", "parallel/partition.cc",
          old="next[r] += pieces_.back().counts[r];", new="next[r] += pieces_.back().counts[0];",
          tests="ParameterStoreTest.ShardsHoldEveryElementOnceAndNoMore"),
    MODEL("cut_depends_on_the_rank_before", "ZeRO piece", "parallel/partition.cc",
          old="units * r / ranks * alignment", new="units / ranks * r * alignment",
          tests="ParameterStoreTest.ShardsHoldEveryElementOnceAndNoMore"),
]

# ---- recipes ----

TRAINING = [
    RECIPES("distillation_forgets_the_cross_entropy", "forgotten accumulation", "model/loss.cc",
            old="    kernels::Add(ctx, dce, dhidden.terms);\n", new="", tests="DistilTest.CrossEntropyIsAddedWithItsWeight"),
    RECIPES("distillation_scaled_by_targets", "wrong factor", "recipes/halo/distil.cc",
            old="1.0 / static_cast<double>(counts.tokens)", new="1.0 / static_cast<double>(counts.targets)",
            tests="DistilTest.GradientIsThatOfTheLoss"),
    RECIPES("distillation_trains_the_softmax_layers", "wrong tensor", "recipes/halo/distil.cc",
            old="         model::MixerType::kLightning;\n}", new="         model::MixerType::kSoftmax;\n}",
            tests="DistilTest.FrozenTensorsKeepTheirBits"),
    RECIPES("alignment_summed_over_layers", "missing factor", "recipes/halo/align.cc",
            old="1.0 / (layers * tokens * width))", new="1.0 / (0 * layers + tokens * width))", tests="AlignTest.GradientOfTheSquaredError"),
    RECIPES("alignment_norm_without_root_of_width", "missing factor", "recipes/halo/align.cc",
            old="1.0 / (layers * tokens * std::sqrt(width))", new="1.0 / (layers * tokens)", tests="AlignTest.GradientOfTheNorm"),
    RECIPES("transfer_deals_heads_round_robin", "wrong head", "recipes/halo/transfer.cc",
            old="head / group;", new="head % (heads / group);", tests="TransferTest.CopiesAndExpandsTheTeachersTensors"),
    RECIPES("hybrid_takes_softmax_from_the_mixers", "swapped", "recipes/halo/assemble.cc",
            old="CopyTensor(type == MixerType::kSoftmax ? teacher : mixers,", new="CopyTensor(type == MixerType::kSoftmax ? teacher : teacher,",
            tests="AssembleTest.TakesEachTensorFromItsPlace"),
    RECIPES("identity_gate_halves_the_layer", "missing factor", "recipes/halo/assemble.cc",
            old="weight[i] *= 2.0F;", new="weight[i] *= 1.0F;", tests="AssembleTest.IdentityGateKeepsTheBits"),
    RECIPES("folded_norm_without_its_gain", "missing factor", "recipes/halo/fold_qk_norm.cc",
            old="scales[head] * gain.Data<float>()[row % head_dim]", new="scales[head] + 0 * gain.Data<float>()[row % head_dim]",
            tests="FoldQkNormTest.IsExactWhereEveryTokensRmsIsTheSame"),
    RECIPES("folded_norm_by_the_mean_alone", "wrong factor", "recipes/halo/fold_qk_norm.cc",
            old="head[kRmsSquare] += rms * rms", new="head[kRmsSquare] += rms",
            tests="FoldQkNormTest.GivesTheLeastSquaresFactorOfTheModelItself"),
    RECIPES("selection_rule_divides_by_the_teacher", "wrong operand", "recipes/halo/select.cc",
            old="best_recall - scores.recall[i];", new="scores.teacher_recall - 0 * best_recall - scores.recall[i];",
            tests=("SelectionRule.GivesThePublishedLayers", "SelectionRule.RatioIsCappedAndZeroForTheBestRecall")),
    RECIPES("selection_rule_without_cap", "missing limit", "recipes/halo/select.cc",
            old="std::min(kRatioCap, recall_loss", new="std::max(0 * kRatioCap, recall_loss",
            tests="SelectionRule.RatioIsCappedAndZeroForTheBestRecall"),
    RECIPES("score_of_text_per_item", "wrong factor", "recipes/halo/score.cc",
            old="PortableExp(-loss / targets);", new="PortableExp(-loss / static_cast<double>(items.text.size()));",
            tests="ScoreTest.SummaryOfKnownNumbers"),
    RECIPES("clip_to_one", "clip factor", OPTIMIZER,
            old="config_.clip_norm / result.grad_norm", new="1.0 / result.grad_norm", tests="OptimizerTest.ClipsToTheNorm"),
    RECIPES("norms_are_decayed", "weight decay", OPTIMIZER,
            old="spec.kind == model::ParameterKind::kMatrix || spec.kind == model::ParameterKind::kHead;",
            new="spec.kind != model::ParameterKind::kEmbedding;", tests="OptimizerTest.DecaysMatricesAndTheHeadOnly"),
    RECIPES("matrices_have_the_full_rate", "missing factor", OPTIMIZER,
            old=": 1.0 / model.width_multiplier();", new=": 1.0 + 0 * model.width_multiplier();",
            tests="OptimizerTest.RatesFollowTheKindOfTensor"),
    RECIPES("updates_with_an_infinite_loss", "missing check", OPTIMIZER,
            old="if (!loss_finite || !std::isfinite(result.grad_norm)) {", new="if (!std::isfinite(result.grad_norm)) {",
            tests="OptimizerTest.SkipsWhatIsNotFinite"),
    RECIPES("skipped_updates_are_counted", "bias correction", OPTIMIZER,
            old="    result.skipped = true;\n", new="    result.skipped = true;\n    ++updates_;\n",
            tests="OptimizerTest.SkipsWhatIsNotFinite"),
    RECIPES("frozen_tensors_are_updated", "wrong tensor", OPTIMIZER,
            old="      if (!segment->trained) continue;\n", new="", tests="OptimizerTest.FrozenTensorsKeepTheirBits"),
    RECIPES("second_moment_is_saved_as_the_first", "checkpoint slice", OPTIMIZER,
            old="slice.data = avg_sq + place;", new="slice.data = (avg_sq == nullptr ? avg_sq : avg) + place;",
            tests="OptimizerTest.SavesWhatItGoesOnWith"),
    RECIPES("moments_are_saved_from_the_beginning", "checkpoint slice", OPTIMIZER,
            old="slice.data = avg + place;", new="slice.data = avg + 0 * place;", tests="OptimizerTest.SavesWhatItGoesOnWith"),
    RECIPES("gradients_of_the_step_before_stay", "forgotten accumulation", REDUCER,
            old="    store_.Zero();\n", new="", tests="OptimizerTest.EveryStepStartsWithoutGradients"),
    RECIPES("warm_up_starts_one_step_late", "off by one", SCHEDULE,
            old="schedule.peak_lr * static_cast<double>(step) / static_cast<double>(warmup)",
            new="schedule.peak_lr * static_cast<double>(step - 1) / static_cast<double>(warmup)",
            tests="Schedule.KnownRates"),
    RECIPES("decay_counts_the_warm_up", "off by one", SCHEDULE,
            old="static_cast<double>(step - warmup) /", new="static_cast<double>(step) /", tests="Schedule.KnownRates"),
    RECIPES("cosine_without_half", "missing factor", SCHEDULE,
            old="(1 + PortableSinCos(std::numbers::pi * x).cos) / 2", new="(1 + PortableSinCos(std::numbers::pi * x).cos)",
            tests="Schedule.KnownRates"),
    TWO_RANKS("sums_of_micro_batches_overwrite", "forgotten accumulation", REDUCER,
              old="kernels::Add(beside, term, shard_.Flat(begin, end));",
              new="kernels::CopyColumns(beside, term.Reshape({1, end - begin}), shard_.Flat(begin, end).Reshape({1, end - begin}));",
              tests="Zero/ShardingTest.UnitsAreSummedWhileTheBackwardPassGoesOn/2"),
    TWO_RANKS("zero_0_keeps_its_own_gradient", "ZeRO piece", REDUCER,
              old="if (mesh_.zero_stage() >= 1) return OkStatus();", new="if (mesh_.zero_stage() >= 0) return OkStatus();",
              tests="Zero/ShardingTest.UnitsAreSummedWhileTheBackwardPassGoesOn/0"),
]

# ---- data and core ----

DATA_FAULTS = [
    DATA("labels_are_the_tokens_themselves", "label shift", STREAM,
         old="std::copy(next.begin() + 1, next.end(),", new="std::copy(next.begin(), next.end() - 1,",
         tests="SampleStream.WithoutDocumentMaskTheSampleIsOneSegment", quick=True),
    DATA("loss_mask_inverted", "mask", STREAM,
         old="if (mask[i] == 0) next[i] = -1;", new="if (mask[i] != 0) next[i] = -1;", tests="AllPackings/SampleOrder.EveryTargetExactlyOncePerEpochAndEpochsAreOtherPermutations/1"),
    DATA("last_label_of_a_cut_document_is_lost", "off by one", STREAM,
         old="file.CopyTokens(begin, run.length + (more ? 1 : 0), next.data())", new="file.CopyTokens(begin, run.length + (more ? 0 : 0), next.data())",
         tests="AllPackings/SampleOrder.EveryTargetExactlyOncePerEpochAndEpochsAreOtherPermutations/0"),
    DATA("positions_go_on_in_the_next_document", "document border", STREAM,
         old="sample->positions.begin() + at + run.length, 0);", new="sample->positions.begin() + at + run.length, static_cast<int32_t>(at));",
         tests="AllPackings/SampleOrder.EveryTargetExactlyOncePerEpochAndEpochsAreOtherPermutations/3"),
    DATA("documents_end_one_token_early", "document border", STREAM,
         old="if (document_mask) sample.cu_seqlens.push_back(static_cast<int32_t>(at));",
         new="if (document_mask) sample.cu_seqlens.push_back(static_cast<int32_t>(at - 1));", tests="AllPackings/SampleOrder.EveryTargetExactlyOncePerEpochAndEpochsAreOtherPermutations/4"),
    DATA("bins_hold_one_segment_more", "off by one", PACKING,
         old="static_cast<int64_t>(bins[bin].size()) < rule.max_segments", new="static_cast<int64_t>(bins[bin].size()) <= rule.max_segments",
         tests="Packing.BinsCloseAtMaxSegments"),
    DATA("bins_need_one_free_slot_more", "off by one", PACKING,
         old="open.lower_bound({piece.length, 0})", new="open.lower_bound({piece.length + 1, 0})", tests="Packing.BestFitExample"),
    DATA("pieces_of_a_long_document_overlap", "off by one", PACKING,
         old="start += rule.seq_len)", new="start += rule.seq_len - 1)", tests="Packing.CoversEveryTokenOnceForAnyLengthsAndOrder"),
    DATA("mixture_counts_from_zero", "off by one", "data/mixture.cc",
         old="(g_ + 1)", new="(g_ + 0)", tests="Mixture.KnownSequences"),
    DATA("held_out_by_the_low_bits", "wrong operand", "data/view.cc",
         old="(Xxh3(bytes) >> 32) < threshold", new="(Xxh3(bytes) & 0xffffffffU) < threshold", tests="Validation.SplitFollowsTheHashRule"),
    CORE("boxes_are_read_without_their_column", "checkpoint slice", "core/checkpoint_read.cc",
         old="tensor->shape[1] + offset[1] + (at - row * width)", new="tensor->shape[1] + 0 * offset[1] + (at - row * width)",
         tests="Checkpoint.BoxesAreReadAcrossSlices"),
    CORE("boxes_are_read_from_the_first_row", "checkpoint slice", "core/checkpoint_read.cc",
         old="box.size() == 1 ? offset[0] : offset[0] * width", new="box.size() == 1 ? offset[0] : 0 * offset[0] * width",
         tests="Checkpoint.BoxesAreReadAcrossSlices"),
    CORE("normal_numbers_of_half_the_circle", "missing factor", "core/rng.cc",
         old="2.0 * std::numbers::pi", new="1.0 * std::numbers::pi", tests="PhiloxStream.NormalsAreThoseOfTheFormula"),
    CORE("coefficient_of_the_exponential", "wrong constant", "core/elementary.cc",
         old="1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,\n",
         new="1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40230,\n",
         tests="Elementary.ExpAndLogAreOneUnitOffAtMost"),
]

FAULTS = [*TOKEN_WISE, *LOSSES, *ATTENTION_FAULTS, *LINEAR, *SPARSE, *LAYER_FAULTS, *TRAINING, *DATA_FAULTS]
