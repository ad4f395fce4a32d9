#!/usr/bin/env python3
"""What compare_twins.py takes for equal and what it does not."""

import math
import os
import struct
import sys
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import compare_twins  # pylint: disable=wrong-import-position


def result(value, tolerance=0.0):
    return "f", struct.unpack("<I", struct.pack("<f", value))[0], tolerance


class CompareTwinsTest(unittest.TestCase):
    def used(self, first, second, tolerance=0.0):
        return compare_twins.difference(result(first, tolerance), result(second))

    def test_bits(self):
        self.assertEqual(compare_twins.difference(("x", 5, 0.0), ("x", 5, 0.0)), 0)
        self.assertEqual(compare_twins.difference(("x", 5, 1.0), ("x", 6, 1.0)), math.inf)
        self.assertEqual(compare_twins.difference(("x", 5, 0.0), ("f", 5, 0.0)), math.inf)

    def test_floats(self):
        self.assertEqual(self.used(1.0, 1.0), 0)
        self.assertEqual(self.used(1.0, 1.5), math.inf)
        self.assertAlmostEqual(self.used(1.0, 1.5, 1.0), 0.5)
        self.assertAlmostEqual(self.used(1.0, 1.5, 0.25), 2)
        self.assertEqual(self.used(0.0, -0.0), 0)
        self.assertEqual(self.used(math.inf, math.inf), 0)
        self.assertEqual(self.used(math.inf, -math.inf, 1.0), math.inf)
        self.assertEqual(self.used(math.inf, 3e38, 1e39), math.inf)
        self.assertEqual(self.used(math.nan, 1.0, 1.0), math.inf)
        self.assertEqual(compare_twins.difference(("f", 0x7FC00000, 0.0), ("f", 0xFFC00001, 0.0)), 0)

    def test_wrappers_are_found(self):
        self.assertLessEqual({"MmaBf16", "LdMatrix2Trans", "CpAsync16", "CpAsyncWait", "Exp2", "Rcp"},
                             compare_twins.wrappers())


if __name__ == "__main__":
    unittest.main()
