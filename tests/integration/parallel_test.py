"""Runs on 1, 2 and 3 ranks learn the same, and with batch.rank_independent_sums runs on 1, 2 and 4 ranks to the same bits.

Gradients are compared through the first moments of a checkpoint after one update without clipping: from moments of zero,
exp_avg = (1 - beta1) * gradient, so relative differences are those of the gradients.
"""

import json
import unittest

import harness as h

# Gradients are float32 sums over some hundred tokens, whose order depends on the ranks. Each partial sum is rounded with a
# relative error of at most 2^-24 = 6e-8; errors of n additions add up like sqrt(n) * 6e-8 at worst for sums without much
# cancellation, about 1e-6 for n = 300. Compared as ||a - b|| / ||a|| over a tensor.
GRADIENT_TOLERANCE = 1e-6


class RanksCase(unittest.TestCase):
    def assert_same_gradients(self, checkpoint_a, checkpoint_b):
        names = h.succeed(["ckpt", "info", checkpoint_a, "--tensors"]).out
        self.assertIn("exp_avg ", names)
        for tensor, relative in h.relative_differences(checkpoint_a, checkpoint_b, "exp_avg").items():
            self.assertLess(relative, GRADIENT_TOLERANCE, tensor)

    def assert_same_data(self, run_a, run_b):
        a, b = h.metrics(run_a), h.metrics(run_b)
        self.assertEqual(list(a), list(b))
        for key in a:
            for field in ("data_crc", "tokens", "target_tokens"):
                self.assertEqual(a[key][field], b[key][field], key)

    def assert_same_first_step(self, run_a, run_b, phase):
        first = [next(line for line in h.metrics(run).values() if line["phase"] == phase and line["stage_step"] == 1)
                 for run in (run_a, run_b)]
        self.assertAlmostEqual(first[1]["grad_norm"] / first[0]["grad_norm"], 1, delta=GRADIENT_TOLERANCE)


class Pretrain(RanksCase):
    @classmethod
    def setUpClass(cls):
        stage = h.pretrain("only", 3, first=True, batch=h.batch(3, sequences=19, micro=4), optimizer={"clip_norm": 0},
                           data=h.data(h.ingest("prose"), packing="best_fit"),
                           checkpoint={"every_steps": 1, "keep_last": 9})
        cls.config = h.write_stage(h.ROOT / "ranks" / "stage.yaml", stage)
        cls.runs = {}
        for ranks in (1, 2, 3):
            cls.runs[ranks] = cls.start(f"ranks-{ranks}", ranks)

    @classmethod
    def start(cls, name, ranks, *sets):
        run = h.ROOT / "runs" / name
        h.succeed(h.train(cls.config, run, *sets), ranks=ranks)
        return run

    def test_each_step_has_the_same_data(self):
        for ranks in (2, 3):
            self.assert_same_data(self.runs[1], self.runs[ranks])

    def test_first_gradients_are_equal(self):
        # 19 samples: no number of ranks here divides them.
        for ranks in (2, 3):
            self.assert_same_first_step(self.runs[1], self.runs[ranks], "train")
            self.assert_same_gradients(h.checkpoints(self.runs[1])[0], h.checkpoints(self.runs[ranks])[0])

    def test_gradients_of_other_data_are_not_equal(self):
        other = self.start("ranks-other-data", 1, "data.seed=2")
        first = [h.checkpoints(run)[0] for run in (self.runs[1], other)]
        self.assertGreater(max(h.relative_differences(*first, "exp_avg").values()), 1000 * GRADIENT_TOLERANCE)

    def test_without_mpirun_is_one_rank(self):
        self.assertEqual(h.differences(self.runs[1], self.start("ranks-none", None)), [])

    def test_repetition_gives_the_same_bits(self):
        self.assertEqual(h.differences(self.runs[3], self.start("ranks-again", 3)), [])

    def test_splitting_the_optimizer_changes_no_bit(self):
        for ranks in (2, 3):
            self.assertEqual(h.differences(self.runs[ranks], self.start(f"zero-0-{ranks}", ranks, "parallel.zero_stage=0")), [])

    def test_threads_and_recomputation_change_no_bit(self):
        self.assertEqual(h.differences(self.runs[2], self.start("ranks-threads", 2, "run.threads=2", "recompute=false")), [])

    def test_a_run_goes_on_with_another_number_of_ranks(self):
        run = h.copy_run(self.runs[1], h.ROOT / "runs" / "ranks-change")
        for checkpoint in h.checkpoints(run)[1:]:
            h.shutil.rmtree(checkpoint)
        h.succeed(h.train(self.config, run), ranks=3)
        self.assert_same_data(self.runs[1], run)
        # The second step has the same parameters to the bit; its gradient differs by the order of sums only.
        second = [h.metrics(r)[2, "only", "train"]["grad_norm"] for r in (self.runs[1], run)]
        self.assertAlmostEqual(second[1] / second[0], 1, delta=GRADIENT_TOLERANCE)


class Halo(RanksCase):
    @classmethod
    def setUpClass(cls):
        halo = h.halo("halo", 1, 1, checkpoint={"every_steps": 1, "keep_last": 9})
        for phase in ("align", "distil"):
            halo["halo"][phase]["optimizer"]["clip_norm"] = 0
            halo["halo"][phase]["batch"] = h.batch(1, sequences=5, micro=2)
        # The choice of layers is fixed, and the rate of the alignment zero: the hybrid that is distilled is the same to the bit.
        halo["halo"].update({"selector": "explicit", "explicit_layers": [2]})
        halo["halo"]["align"]["schedule"]["peak_lr"] = 0
        config = h.write_pipeline(h.ROOT / "ranks-halo", [h.pretrain("base", 4, first=True), halo])
        cls.runs = {1: h.ROOT / "runs" / "halo-ranks-1", 2: h.ROOT / "runs" / "halo-ranks-2"}
        h.succeed(h.train(config, cls.runs[1], "halo.checkpoint.keep_last=99"), ranks=1)
        # The same teacher for both: the second run goes on from the first one's.
        h.copy_run(cls.runs[1], cls.runs[2])
        for checkpoint in h.checkpoints(cls.runs[2]):
            if h.manifest(checkpoint)["stage"]["name"] == "halo":
                h.shutil.rmtree(checkpoint)
        h.succeed(h.train(config, cls.runs[2], "halo.checkpoint.keep_last=99"), ranks=2)

    def phase_checkpoint(self, ranks, phase):
        return next(c for c in h.checkpoints(self.runs[ranks]) if h.manifest(c)["stage"]["phase"] == phase)

    def test_topology(self):
        for ranks in (1, 2):
            self.assertEqual(h.manifest(self.phase_checkpoint(ranks, "align"))["topology"]["world"], ranks)

    def test_first_gradients_of_both_phases_are_equal(self):
        self.assert_same_data(self.runs[1], self.runs[2])
        for phase in ("align", "distil"):
            self.assert_same_first_step(self.runs[1], self.runs[2], phase)
            self.assert_same_gradients(self.phase_checkpoint(1, phase), self.phase_checkpoint(2, phase))


class RankIndependentSums(unittest.TestCase):
    @staticmethod
    def batch(steps, sequences, micro):
        return {**h.batch(steps, sequences=sequences, micro=micro), "rank_independent_sums": True}

    @staticmethod
    def start(config, name, ranks, *sets):
        run = h.ROOT / "runs" / name
        h.succeed(h.train(config, run, *sets), ranks=ranks)
        return run

    def test_pretraining_has_the_same_bits_on_1_2_and_4_ranks(self):
        # 12 micro-batches, the last one half: 3 for each of 4 ranks. Every update is clipped, so the norm enters.
        stage = h.pretrain("only", 4, first=True, batch=self.batch(4, sequences=23, micro=2), optimizer={"clip_norm": 0.1},
                           data=h.data(h.ingest("prose"), packing="best_fit"))
        config = h.write_stage(h.ROOT / "rank-independent" / "stage.yaml", stage)
        one = self.start(config, "independent-1", 1)
        self.assertTrue(all(line["clipped"] for line in h.metrics(one).values()))
        self.assertEqual(h.differences(one, self.start(config, "independent-2", 2)), [])
        four = self.start(config, "independent-4", 4)
        self.assertEqual(h.differences(one, four), [])
        self.assertEqual(h.differences(one, self.start(config, "independent-zero-0", 2, "parallel.zero_stage=0")), [])
        with self.subTest("from 1 rank to 4 in the middle"):
            changed = h.copy_run(one, h.ROOT / "runs" / "independent-changed")
            h.shutil.rmtree(h.checkpoints(changed)[-1])
            h.succeed(h.train(config, changed), ranks=4)
            self.assertEqual(h.differences(one, changed), [])
        with self.subTest("without the key the bits depend on the ranks"):
            plain = [self.start(config, f"dependent-{ranks}", ranks, "batch.rank_independent_sums=false") for ranks in (1, 2)]
            self.assertNotEqual(h.differences(*plain), [])

    def test_halo_has_the_same_bits_on_1_and_2_ranks(self):
        halo = h.halo("halo", 4, 4)
        for phase in ("align", "distil"):
            halo["halo"][phase]["batch"] = self.batch(4, sequences=12, micro=2)
        halo["halo"]["finetune"] = {**halo["halo"]["distil"], "batch": self.batch(4, sequences=4, micro=1)}
        # Softmax layers lose a query/key norm on the way, by factors that are measured on the text of all ranks.
        stages = [h.pretrain("base", 6, first=True, model=h.model(attn_qk_norm=True), batch=self.batch(6, sequences=4, micro=2)), halo]
        config = h.write_pipeline(h.ROOT / "rank-independent-halo", stages)
        one, two = (self.start(config, f"independent-halo-{ranks}", ranks) for ranks in (1, 2))
        self.assertEqual({line["phase"] for line in h.metrics(one).values()}, {"train", "align", "distil", "finetune"})
        self.assertEqual(h.differences(one, two), [])
        for name in ("selection.json", "scores.json"):
            self.assertEqual((one / "halo" / name).read_text(), (two / "halo" / name).read_text())

    def test_an_impossible_split_is_one_configuration_error(self):
        stage = h.pretrain("only", 1, first=True, batch=self.batch(1, sequences=6, micro=1))
        config = h.write_stage(h.ROOT / "rank-independent-3" / "stage.yaml", stage)
        result = h.run(h.train(config, h.ROOT / "runs" / "independent-3"), ranks=3)
        self.assertEqual(result.code, 78, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn("CFG-MESH: stage only: batch.rank_independent_sums", result.err)


class SlowNetwork(unittest.TestCase):
    def test_waiting_beside_the_computation_is_no_computing(self):
        # With stage 3 a step begins with fetching, of which nothing is hidden behind computing for long: six units and more,
        # one after the other.
        stage = h.pretrain("only", 4, first=True, parallel={"zero_stage": 3}, checkpoint={"every_steps": 0},
                           data=h.data(h.ingest("prose"), validation={"fraction": 0}))
        config = h.write_stage(h.ROOT / "slow-network" / "stage.yaml", stage)
        run = h.ROOT / "runs" / "slow-network"
        h.succeed(h.train(config, run, "run.log_every_steps=1"), ranks=2, env=h.slow_gathers(0.2))
        waits = 6 * 0.2 * 1e3  # ms; a step of this model computes for some ms
        for text in (run / "metrics" / "stragglers.jsonl").read_text().splitlines():
            line = json.loads(text)
            self.assertLess(max(line["max_ms"]), waits / 2, line)
            self.assertGreater(min(line["comm_ms"]), waits, line)


if __name__ == "__main__":
    h.main()
