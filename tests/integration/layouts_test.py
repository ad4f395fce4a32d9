"""Any layout of dp, cp and tp ranks and ZeRO stages learns what one rank learns, in every kind of stage: the first step has the
same samples, loss, gradient norm and gradient of every tensor."""

import unittest

import harness as h
import layouts as l

# Blocks of 16 tokens in documents of up to a few hundred: a token chooses one or two of a dozen blocks.
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3, "dense_len": 48}
HYBRID = ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"]

# tp 8 has 4 tensor ranks for each key/value head.
EIGHT_HEADS = h.model(num_attention_heads=8, num_key_value_heads=2, lightning_nh=8, mixer_types=HYBRID, sparse_config=SPARSE,
                      attn_use_rope=False, attn_use_output_gate=True, attn_qk_norm=True)
# Six heads and one key/value head: tp 3 is above the latter. 264 tokens of vocabulary on three ranks: 88 rows each; 100 more
# are no multiple of 8 and leave the last rank padding.
SIX_HEADS = h.model(num_attention_heads=6, num_key_value_heads=1, lightning_nh=6, mixer_types=HYBRID, sparse_config=SPARSE,
                    vocab_size=364, tie_word_embeddings=True, intermediate_size=96)
PLAIN = h.model(num_attention_heads=4, num_key_value_heads=4, lightning_nh=4, mixer_types=HYBRID, sparse_config=SPARSE,
                attn_use_rope=True, lightning_use_rope=False, qk_norm=False, use_output_norm=False, use_output_gate=False)

SAVE = {"every_steps": 1, "keep_last": 99}
VALIDATION = {"fraction": 0.1, "max_tokens": 256}


def once(sequences, seq_len=h.SEQ, micro=2):
    """A phase of one step whose gradient can be compared."""
    return {"batch": h.batch(1, sequences, seq_len, micro), "optimizer": {"clip_norm": 0}}


def long_documents():
    """Packed without cuts: of samples of 256 tokens, with borders of documents anywhere."""
    return h.data(h.ingest("long", documents=150, seed=5, most_sentences=8), packing="best_fit", validation=VALIDATION)


class LayoutCase(unittest.TestCase):
    used = set()  # of all tests

    def assert_same(self, case, layouts, *sets):
        for drawn in layouts:
            layout = l.Layout(*drawn)
            LayoutCase.used.add(layout)
            with self.subTest(f"{case.name} on {layout}"):
                self.assertEqual(case.problems(layout, *sets), [])


class Pretrain(LayoutCase):
    @classmethod
    def setUpClass(cls):
        # 7 samples of 256 tokens with two or three documents each; sparse attention in most of them.
        stage = h.pretrain("only", 1, first=True, model=EIGHT_HEADS, data=long_documents(), checkpoint=SAVE, sparse_attention=True,
                           **once(sequences=7, seq_len=256))
        cls.case = l.Case("pretrain", [stage])

    def test_one_kind_of_rank(self):
        self.assert_same(self.case, [(2, 1, 1, 0), (3, 1, 1, 1), (4, 1, 1, 3), (8, 1, 1, 2), (1, 2, 1, 1), (1, 3, 1, 3), (1, 8, 1, 2),
                                     (1, 1, 2, 1), (1, 1, 4, 0), (1, 1, 8, 3)])

    def test_two_kinds_of_ranks(self):
        self.assert_same(self.case, [(2, 2, 1, 2), (2, 1, 2, 3), (1, 2, 2, 3), (1, 4, 2, 0), (1, 2, 4, 1)])

    def test_all_kinds_of_ranks_in_every_zero_stage(self):
        self.assert_same(self.case, [(2, 2, 2, zero) for zero in range(4)])

    def test_keeping_activations(self):
        self.assert_same(self.case, [(1, 2, 2, 3), (2, 1, 2, 2)], "only.recompute=false")

    def test_another_order_of_sums_is_within_the_tolerance_too(self):
        # One rank with other micro-batches: what the tolerance is for, without any layout.
        self.assert_same(self.case, [(1, 1, 1, 1)], "only.batch.micro_batch_sequences=7")

    def test_other_runs_are_far_from_the_tolerance(self):
        # Other samples; and the same samples with a model that looks at other blocks.
        other = self.case.run(l.Layout(1, 2, 2, 1), "only.data.seed=2")
        with self.assertRaisesRegex(AssertionError, "data_crc"):
            l.largest_differences(self.case.one, other, "only")
        other = self.case.run(l.Layout(1, 2, 2, 1), "only.model.sparse_config.topk=4")
        found = l.largest_differences(self.case.one, other, "only")
        tensors = {name: value for name, value in found.items() if name.startswith("model.")}
        self.assertGreater(min(value for name, value in tensors.items() if ".layers.0.self_attn.q_proj" in name), 1000 * l.TOLERANCE)
        self.assertGreater(found["loss"], 10 * l.TOLERANCE)
        self.assertTrue(l.too_different(self.case.one, other, "only"))


class HeadsAndVocabulary(LayoutCase):
    def test_three_tensor_ranks_on_one_key_value_head(self):
        stage = h.pretrain("only", 1, first=True, model=SIX_HEADS, data=long_documents(), checkpoint=SAVE, sparse_attention=True,
                           **once(sequences=3, seq_len=256, micro=3))
        self.assert_same(l.Case("six-heads", [stage]), [(1, 1, 3, 1), (2, 1, 3, 3), (1, 2, 3, 0)])

    def test_softmax_layers_only_with_cut_documents(self):
        # Full attention with rotary embedding, as a teacher; samples are cut anywhere.
        stage = h.pretrain("only", 1, first=True, model=h.model(), data=h.data(h.ingest("prose"), validation=VALIDATION),
                           checkpoint=SAVE, **once(sequences=5))
        self.assert_same(l.Case("teacher", [stage]), [(4, 1, 2, 2), (1, 4, 1, 0), (1, 2, 4, 2)])

    def test_plain_linear_layers(self):
        stage = h.pretrain("only", 1, first=True, model=PLAIN, data=h.data(h.ingest("prose"), validation=VALIDATION),
                           checkpoint=SAVE, **once(sequences=5))
        self.assert_same(l.Case("plain", [stage]), [(1, 8, 1, 0), (2, 1, 4, 1), (1, 3, 2, 1)])


class Sft(LayoutCase):
    def test_masked_labels(self):
        # 5 samples of which only the answers count: no dp divides them, and a shard may have no target at all.
        stages = [h.pretrain("base", 2, first=True, model=EIGHT_HEADS),
                  h.sft("tuned", 1, data=h.data(h.chat(), packing="best_fit", validation=VALIDATION), checkpoint=SAVE, **once(sequences=5))]
        case = l.Case("sft", stages)
        line = l.first_line(case.one, "tuned")
        self.assertLess(line["target_tokens"], 0.8 * line["tokens"])
        self.assert_same(case, [(3, 1, 1, 3), (4, 1, 2, 1), (1, 8, 1, 1), (1, 4, 2, 3), (2, 1, 4, 0)])


class LongDecay(LayoutCase):
    def test_carried_moments_and_sparse_attention(self):
        # First moments are read in another layout than they were saved in. They are a part of what is compared here, equal in all
        # runs; the gradient alone is seen by its norm.
        stages = [h.pretrain("stable", 2, first=True, model=EIGHT_HEADS),
                  h.pretrain("long", 1, sparse_attention=True, carry_optimizer=True, data=long_documents(), checkpoint=SAVE,
                             **once(sequences=2, seq_len=512, micro=1))]
        self.assert_same(l.Case("long-decay", stages), [(1, 4, 2, 1), (1, 8, 1, 3), (2, 2, 1, 3)])


class Halo(LayoutCase):
    @classmethod
    def setUpClass(cls):
        halo = h.halo("halo", 1, 1, data=h.data(h.ingest("prose"), validation=VALIDATION), checkpoint=SAVE,
                      halo={"score": {"text_tokens": 256, "recall_items": 2, "recall_length_tokens": 384, "bootstrap": 10}})
        # Rates of zero: what is aligned, chosen, distilled and finetuned is the same to the bit for all layouts.
        for phase in ("align", "distil"):
            halo["halo"][phase]["batch"] = h.batch(1, sequences=5, micro=2)
            halo["halo"][phase]["optimizer"]["clip_norm"] = 0
            halo["halo"][phase]["schedule"] = {"shape": "constant", "peak_lr": 0}
        halo["halo"]["finetune"] = halo["halo"]["distil"]
        halo["halo"]["ce_weight"] = 0.5
        cls.case = l.Case("halo", [h.pretrain("base", 4, first=True, model=h.model(num_attention_heads=8, lightning_nh=8)), halo],
                          phases=("align", "distil", "finetune"))

    def test_all_phases(self):
        # Layers are scored and chosen in between; distillation of other layers would have other tensors.
        self.assert_same(self.case, [(2, 1, 1, 2), (1, 2, 1, 3), (1, 1, 4, 1), (1, 2, 2, 0), (2, 1, 2, 3), (2, 2, 2, 1)])

    def test_scores_and_selection(self):
        # Items are dealt out over dp, and cut over cp and tp. Probabilities are exp(-loss) of losses of some nats whose sums have
        # an error of 1e-6 of their size.
        for layout in (l.Layout(1, 2, 2, 1), l.Layout(3, 1, 1, 3), l.Layout(1, 3, 1, 0)):
            run = self.case.run(layout)
            one, other = (h.manifest(l.measured_checkpoint(r, "halo", "distil"))["trainer"]["halo"] for r in (self.case.one, run))
            self.assertEqual(one["softmax_layers"], other["softmax_layers"])
            one, other = one["scores"], other["scores"]
            self.assertEqual(one["order"], other["order"])
            for a, b in zip([one["teacher"], *one["layers"]], [other["teacher"], *other["layers"]], strict=True):
                for value in ("recall", "text", "kl"):
                    self.assertLess(l.relative(a[value], b[value]), 1e-5, (layout, value, a, b))


class Coverage(unittest.TestCase):
    def test_enough_layouts_were_drawn(self):
        self.assertGreaterEqual(len(LayoutCase.used), 25)
        for name, values in (("dp", {1, 2, 3, 4, 8}), ("cp", {1, 2, 3, 4, 8}), ("tp", {1, 2, 3, 4, 8}), ("zero", set(range(4)))):
            self.assertEqual({getattr(layout, name) for layout in LayoutCase.used}, values, name)
        self.assertLessEqual(max(layout.ranks for layout in LayoutCase.used), 8)


def load_tests(loader, tests, pattern):
    """Coverage last: it counts what the others have used."""
    return unittest.TestSuite(loader.loadTestsFromTestCase(case)
                              for case in (Pretrain, HeadsAndVocabulary, Sft, LongDecay, Halo, Coverage))


if __name__ == "__main__":
    h.main()
