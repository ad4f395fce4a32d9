"""compare_evaluations.py passes what is near and fails what is not, or not there."""

import json
import pathlib
import subprocess
import sys
import tempfile
import unittest

SCRIPT = pathlib.Path(__file__).with_name("compare_evaluations.py")
RECALL = {"task": "passkey", "length": 512, "right": 1, "count": 2, "mean_log_probability": -0.001}
LOSSES = {"task": "loss_by_position", "length": 512, "buckets": [{"loss": 4.0, "count": 1}, {"loss": 2.0, "count": 3}]}


class CompareEvaluations(unittest.TestCase):
    def compare(self, *evaluations):
        with tempfile.TemporaryDirectory() as root:
            folders = [pathlib.Path(root) / str(i) for i in range(2)]
            for folder, lines in zip(folders, evaluations):
                folder.mkdir()
                (folder / "summary.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            done = subprocess.run([sys.executable, "-B", SCRIPT, *folders], stdout=subprocess.PIPE, text=True, check=False)
            return done.returncode, done.stdout

    def test_what_is_near(self):
        code, out = self.compare([RECALL, LOSSES], [{**RECALL, "mean_log_probability": -0.03, "right": 2}, LOSSES])
        self.assertEqual(code, 0, out)
        self.assertIn("1/2, 2/2", out)
        self.assertIn("2.5000", out)  # the mean over tokens

    def test_what_is_not(self):
        for other in ([{**RECALL, "mean_log_probability": -0.05}, LOSSES], [{**RECALL, "mean_log_probability": float("nan")}, LOSSES],
                      [RECALL, {**LOSSES, "buckets": [{"loss": 2.52, "count": 4}]}]):
            code, out = self.compare([RECALL, LOSSES], other)
            self.assertEqual((code, out.count("too far")), (1, 1), out)

    def test_what_is_missing(self):
        for both in (([RECALL, LOSSES], [LOSSES]), ([LOSSES], [RECALL, LOSSES]), ([], []), ([RECALL],), ()):
            code, out = self.compare(*both)
            self.assertEqual(code, 1, out)


if __name__ == "__main__":
    unittest.main()
