"""`sala bench step` and `sala bench scaling` at sizes of a second: what they print follows from what they measured, bad input is refused.

How fast anything is, is what the commands are for; nothing here asks for a speed."""

import json
import statistics
import unittest

import harness as h

MODEL = """\
model:
  vocab_size: 64
  hidden_size: 32
  intermediate_size: 48
  num_hidden_layers: 2
  num_attention_heads: 2
  num_key_value_heads: 1
  head_dim: 16
  mixer_types: [minicpm4, lightning-attn]
  sparse_config: {kernel_size: 32, kernel_stride: 16, init_blocks: 1, block_size: 64, window_size: 64, topk: 2, dense_len: 256}
"""


def model():
    path = h.ROOT / "bench.yaml"
    path.write_text(MODEL)
    return path


def bench(*words):
    return h.run(["bench", *words])


class StepTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.result = bench("step", "--config", model(), "--seq-len", 320, "--steps", 2, "--sparse", "--json", h.ROOT / "step.json")
        if cls.result.code != 0:
            raise AssertionError(str(cls.result))
        cls.json = json.loads((h.ROOT / "step.json").read_text())

    def test_the_head_says_how_it_was_measured(self):
        for word in ("hardware ", "commit ", "command     sala bench step --config", "320 tokens", "sparse attention on"):
            self.assertIn(word, self.result.out)

    def test_the_ratio_is_of_the_work_and_the_times(self):
        report = self.json
        # Query, key, value and output of both layers without their gates, MLPs and head: 6 operations an element and token.
        least = 6 * 320 * (32 * (32 + 16 + 16 + 32) + 32 * (32 + 32 + 32 + 32) + 2 * 3 * 32 * 48 + 64 * 32)
        self.assertGreaterEqual(report["gemm_flops"], least)
        self.assertGreater(report["step_flops"], report["gemm_flops"])
        self.assertEqual(len(report["step_seconds"]), 2)
        for step, gemm, ratio in zip(report["step_seconds"], report["gemm_seconds"], report["step_over_gemm"]):
            self.assertAlmostEqual(ratio, (report["step_flops"] / step) / (report["gemm_flops"] / gemm), places=9)
        self.assertIn(f"{statistics.median(report['step_over_gemm']):.3f} of the GEMM rate", self.result.out)

    def test_each_library_is_measured_or_said_to_be_missing(self):
        for name in ("OpenBLAS", "oneDNN"):
            found = [seconds for library, seconds in self.json["library_gemm_seconds"].items() if library.startswith(name)]
            if found:
                self.assertEqual(len(found[0]), 2)
            else:
                self.assertIn(f"not measured: {name}: ", self.result.out)

    def test_our_products_are_held_against_the_faster_library(self):
        libraries = list(self.json["library_gemm_seconds"].values())
        if not libraries:
            self.skipTest("neither OpenBLAS nor oneDNN is installed")
        for i, ratio in enumerate(self.json["gemm_over_best_library"]):
            self.assertAlmostEqual(ratio, min(times[i] for times in libraries) / self.json["gemm_seconds"][i], places=9)

    def test_without_peers_none_is_loaded(self):
        done = bench("step", "--config", model(), "--seq-len", 64, "--steps", 1, "--no-peers", "--json", h.ROOT / "alone.json")
        self.assertEqual(done.code, 0, done)
        self.assertEqual(json.loads((h.ROOT / "alone.json").read_text())["library_gemm_seconds"], {})
        self.assertNotIn("OpenBLAS", done.out)


class ScalingTest(unittest.TestCase):
    def test_the_table_and_the_cost_of_added_tokens(self):
        to = h.ROOT / "scaling.json"
        done = bench("scaling", "--config", model(), "--lengths", 256, 512, 1024, 2048, "--longest-dense", 512, "--rounds", 1, "--json", to)
        self.assertEqual(done.code, 0, done)
        report = json.loads(to.read_text())
        self.assertEqual(report["lengths"], [256, 512, 1024, 2048])
        for kind in ("sparse_shared", "sparse_own", "lightning"):
            for point in report[kind]:
                self.assertEqual(len(point["forward_seconds"]), 1)
                self.assertGreater(point["backward_seconds"][0], 0)
        self.assertEqual([len(point["forward_seconds"]) for point in report["dense"]], [1, 1, 0, 0])
        # Selection is a part of the forward time of sparse attention, and nothing of the others.
        point = report["sparse_own"][3]
        self.assertTrue(0 < point["selection_seconds"][0] < point["forward_seconds"][0])
        self.assertEqual(report["lightning"][3]["selection_seconds"], [0])
        total = [point["forward_seconds"][0] + point["backward_seconds"][0] for point in report["lightning"]]
        added = [1e6 * (after - before) / tokens for before, after, tokens in zip(total, total[1:], (256, 512, 1024))]
        self.assertIn(f"{min(added):.2f} to {max(added):.2f}", done.out)

    def test_too_few_lengths_give_no_verdict(self):
        done = bench("scaling", "--config", model(), "--lengths", 64, 128, "--rounds", 1)
        self.assertEqual(done.code, 0, done)
        self.assertIn("not measured: it needs three lengths from 192 tokens on", done.out)


class BadInputTest(unittest.TestCase):
    def refused(self, code, exit_code, text, *words):
        done = bench(*words)
        self.assertEqual(done.code, exit_code, done)
        self.assertIn(f"sala: error: {code}: ", done.err)
        self.assertIn(text, done.err)

    def test_bad_input(self):
        self.refused("USAGE", 64, "found 256 after 512", "scaling", "--lengths", 512, 256)
        self.refused("FILE-MISSING", 66, "no.yaml", "step", "--config", h.ROOT / "no.yaml")
        wrong = h.ROOT / "wrong.yaml"
        wrong.write_text("model: {hiden_size: 32}\n")
        self.refused("CFG-KEY", 78, "hiden_size", "step", "--config", wrong)
        # Before anything is measured.
        for command in ("step", "scaling"):
            self.refused("FILE-WRITE", 74, "none/out.json", command, "--json", h.ROOT / "none" / "out.json")


if __name__ == "__main__":
    h.main()
