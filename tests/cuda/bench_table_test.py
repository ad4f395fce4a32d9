#!/usr/bin/env python3
"""The tables of bench_table.py from a few made-up rows."""

import os
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import bench_table  # pylint: disable=wrong-import-position

DEVICE = {"section": "device", "name": "device", "shape": "NVIDIA H200", "tokens": 0, "skipped": "132 multiprocessors", "module": "m"}


def timed(section, name, tokens, seconds, **more):
    return {"section": section, "name": name, "shape": "s", "tokens": tokens, "seconds": seconds, "low": seconds / 2,
            "high": seconds * 2, "samples": 5, "host_seconds": 1e-6, "flops": 0, "bytes": 0, "note": "", **more}


LIMITS = [timed("limits", "limit_product", 8192, 1e-3, flops=8e11), timed("limits", "limit_copy", 0, 1e-3, bytes=4e9)]


def step(name, tokens, seconds, **more):
    return timed("steps", name, tokens, seconds, flops=2e14 * seconds, plan_bytes=2**30, used_bytes=2**31, loss=11.2, layers=4, **more)


class BenchTableTest(unittest.TestCase):
    def report(self, rows, peers=()):
        return bench_table.Report([DEVICE, *LIMITS, *rows], list(peers)).text("T", [["GPU", "x"]], "c")

    def test_rates_are_read_against_the_limits_of_the_run(self):
        text = self.report([timed("rows", "a", 4096, 1e-4, bytes=2e8), timed("mixers", "b", 4096, 2e-3, flops=4e11)])
        self.assertIn("| a | s | 100 µs | 50 µs to 200 µs | 1 µs | 2000 GB/s | 50% |", text)
        self.assertIn("| b | s | 2 ms | 1 ms to 4 ms | 1 µs | 200.0 TFLOP/s | 25% |", text)
        self.assertNotIn("rehearsal", text)

    def test_a_kernel_that_waits_for_the_cpu_is_marked(self):
        self.assertIn("9.5 µs (!)", self.report([timed("rows", "a", 1, 1e-5, bytes=1, host_seconds=9.5e-6)]))

    def test_peers_stand_beside_the_case_of_their_name_and_length(self):
        peers = [{"name": "a", "tokens": 1, "peer": "P", "seconds": 3e-5}, {"name": "a", "tokens": 2, "peer": "Q", "seconds": 1},
                 {"name": "a", "tokens": 1, "peer": "R", "skipped": "skipped: absent"}]
        text = self.report([timed("rows", "a", 1, 1e-5, bytes=1)], peers)
        self.assertIn("30 µs (3.00x) P<br>R: skipped: absent", text)
        self.assertNotIn("Q", text.replace("Query", ""))

    def test_skipped_rows_say_why(self):
        self.assertIn("skipped: no memory", self.report([{"section": "rows", "name": "a", "shape": "s", "tokens": 1,
                                                         "skipped": "skipped: no memory"}]))

    def test_utilisation_against_data_sheet_and_measured_product(self):
        text = self.report([step("hybrid_step", 4096, 0.5)])
        self.assertIn("| 8192 | 200.0 | 0.202 | 0.250 | 1.0 GiB | 2.0 GiB | 11.200 |", text)
        self.assertIn("989 TFLOP/s of the H200's data sheet", text)

    def test_prefill_against_the_hybrid_of_the_same_depth(self):
        def prefill(name, seconds, layers):
            return timed("prefill", name, 100, seconds, flops=1.0, plan_bytes=0, used_bytes=0, layers=layers)

        text = self.report([prefill("hybrid_prefill", 1.0, 4), prefill("teacher_prefill", 3.0, 4)])
        self.assertIn("| 3.00 |", text)
        text = self.report([prefill("hybrid_prefill", 1.0, 2), prefill("teacher_prefill", 3.0, 4)])
        self.assertNotIn("| 3.00 |", text)

    def test_a_rehearsal_says_so(self):
        text = bench_table.Report([{**DEVICE, "emulated": True, "smoke": True}], []).text("T", [], "")
        self.assertIn("None of its times says anything about a GPU", text)

    def test_data_sheet_names(self):
        for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Unknown", 0)):
            report = bench_table.Report([{**DEVICE, "shape": name}], [])
            self.assertEqual(report.datasheet()[1], peak)


if __name__ == "__main__":
    unittest.main()
