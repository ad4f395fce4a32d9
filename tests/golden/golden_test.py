"""What golden.py says of runs that differ."""

import copy
import subprocess
import sys
import unittest

import golden

EXPECTED = {"base": {"losses": ["0x1.8p+1", "0x1.4p+1", "0x1.2p+1"], "data": "d", "parameters": "p"},
            "halo.align": {"losses": ["0x1p-3"], "data": "e"}}


class Compare(unittest.TestCase):
    def changed(self, change):
        found = copy.deepcopy(EXPECTED)
        change(found)
        return golden.compare(EXPECTED, found)

    def test_equal_runs(self):
        self.assertEqual(self.changed(lambda found: None), [])

    def test_the_first_step_that_differs_is_named(self):
        def change(found):
            found["base"]["losses"][1:] = ["0x1.4000000000003p+1", "0x1p+1"]
            found["base"]["parameters"] = "q"

        line, = self.changed(change)
        self.assertIn("base: step 2: expected 0x1.4p+1 (2.5), found 0x1.4000000000003p+1 (2.5): 3 units in the last place apart", line)
        self.assertIn("steps 1 to 1 are equal; the same data", line)

    def test_other_data_and_parameters_and_lengths(self):
        self.assertIn("OTHER DATA", self.changed(lambda found: found["base"].update(losses=["0x1p+1"] * 3, data="x"))[0])
        self.assertIn("not the parameters", self.changed(lambda found: found["base"].update(parameters="q"))[0])
        self.assertIn("expected 3 steps, found 2", self.changed(lambda found: found["base"]["losses"].pop())[0])
        self.assertEqual(self.changed(lambda found: found.pop("base")), ["base: missing"])
        self.assertEqual(self.changed(lambda found: found.update(more=found["base"])), ["more: not expected"])

    def test_a_nan_is_a_difference(self):
        self.assertEqual(len(self.changed(lambda found: found["base"]["losses"].__setitem__(0, "nan"))), 1)

    def test_units_in_the_last_place_count_over_zero(self):
        self.assertEqual(golden.ordinal(5e-324) - golden.ordinal(-5e-324), 2)
        self.assertEqual(golden.ordinal(1.0) - golden.ordinal(1 - 2**-53), 1)

    def test_a_program_that_is_not_there(self):
        done = subprocess.run([sys.executable, "-B", golden.__file__, "--sala", "no/such/sala"], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertIn("no/such/sala: no such program", done.stderr)


if __name__ == "__main__":
    unittest.main()
