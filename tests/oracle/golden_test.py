#!/usr/bin/env python3
"""oracle_driver against the committed goldens, and tests of the comparison itself. Needs nothing but Python.

    python3 tests/oracle/golden_test.py --driver build/release/bin/oracle_driver
"""

import argparse
import array
import json
import math
import os
import pathlib
import sys
import tempfile
import unittest

import driver

DRIVER = ""
FOLDER = pathlib.Path(__file__).resolve().parent / "golden"


def part(tensors, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


class Goldens(unittest.TestCase):
    def test_all(self):
        files = sorted(FOLDER.glob("*.safetensors"))
        self.assertGreaterEqual(len(files), 5, f"goldens in {FOLDER}")
        lines = []
        for path in files:
            metadata, tensors = driver.read_safetensors(path)
            expected = {name: (shape, values) for name, (_, shape, values) in part(tensors, "expected/").items()}
            with tempfile.TemporaryDirectory(prefix="sala-golden-") as folder:
                teacher = (json.loads(metadata["teacher"]), part(tensors, "teacher/")) if "teacher" in metadata else None
                model = (json.loads(metadata["model"]), part(tensors, "model/"))
                driver.write_case(folder, json.loads(metadata["request"]), model, part(tensors, "batch/"), teacher)
                for arithmetic, bound in driver.BOUNDS.items():
                    errors, faults = driver.compare(driver.run_driver(DRIVER, folder, arithmetic), expected)
                    lines += driver.violations(path.stem, arithmetic, errors, faults, bound)
                    worst, name = errors[0] if errors else (math.inf, "nothing")
                    print(f"{path.stem}: {arithmetic}: {len(errors)} tensors, worst {worst:.1e} ({name})")
        self.assertEqual(lines, [])

    def test_a_refused_case_says_why(self):
        with tempfile.TemporaryDirectory(prefix="sala-golden-") as folder:
            driver.write_case(folder, {"task": "sleep"}, ({}, {}), {})
            with self.assertRaisesRegex(driver.DriverError, "sleep"):
                driver.run_driver(DRIVER, folder, "float64")


class Comparison(unittest.TestCase):
    """That what is wrong is found."""

    def lines(self, found, expected=None, bound=1e-3):
        found = {name: ("F64", [len(values)], array.array("d", values)) for name, values in found.items()}
        expected = expected or {"loss": ([1], [4.0]), "grad/w": ([2], [1.0, -2.0])}
        return driver.violations("case", "float64", *driver.compare(found, expected), bound)

    def test_agreement(self):
        self.assertEqual(self.lines({"loss": [4.0], "grad/w": [1.0, -2.0019]}), [])

    def test_beyond_the_bound(self):
        self.assertEqual(
            self.lines({"loss": [4.0], "grad/w": [1.0, -2.0021]}), ["case: float64: grad/w: relative error 0.001, allowed 0.001"]
        )

    def test_not_a_number(self):
        for value in (math.nan, math.inf):
            (line,) = self.lines({"loss": [value], "grad/w": [1.0, -2.0]})
            self.assertIn("loss: relative error inf", line)
            (line,) = self.lines({"loss": [4.0], "grad/w": [1.0, value]})
            self.assertIn("grad/w: relative error inf", line)

    def test_zero_must_be_zero(self):
        zero = {"grad/w": ([2], [0.0, 0.0])}
        self.assertEqual(self.lines({"grad/w": [0.0, 0.0]}, zero), [])
        self.assertEqual(len(self.lines({"grad/w": [0.0, 1e-300]}, zero)), 1)

    def test_missing_and_unknown(self):
        self.assertEqual(self.lines({"loss": [4.0]}), ["case: float64: grad/w: not written"])
        self.assertEqual(
            self.lines({"loss": [4.0], "grad/w": [1.0, -2.0], "grad/v": [0.0]}), ["case: float64: grad/v: not expected"]
        )

    def test_other_shape(self):
        self.assertEqual(self.lines({"loss": [4.0], "grad/w": [1.0]}), ["case: float64: grad/w: shape [1], expected [2]"])

    def test_nothing_compared(self):
        self.assertEqual(len(self.lines({}, {"loss": ([1], [4.0])})), 2)


class Safetensors(unittest.TestCase):
    def test_back_and_forth(self):
        tensors = {
            "a": ("I32", [3], array.array("i", [1, -2, 3])),
            "b": ("F64", [1, 2], array.array("d", [0.1, -0.0])),
            "c": ("F32", [], array.array("f", [1.5])),
        }
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "x.safetensors")
            driver.write_safetensors(path, tensors, {"k": "v"})
            self.assertEqual(driver.read_safetensors(path), ({"k": "v"}, tensors))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", required=True)
    known, rest = parser.parse_known_args()
    DRIVER = os.path.abspath(known.driver)
    sys.exit(not unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=2).result.wasSuccessful())
