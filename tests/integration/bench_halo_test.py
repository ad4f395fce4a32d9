"""`sala bench halo --quick`: the report has every number and verdict, what is finished is taken up, bad input is refused in one line.

Whether the claims hold is what the command measures at its full size; nothing here asks for a verdict."""

import json
import unittest

import harness as h

CLAIMS = [9, 10, 11, 12, 13]
VERDICTS = {"holds", "does not hold", "not measured"}
HYBRIDS = {"selected", "not_aligned", "all_linear", "rope_everywhere", *(f"random_{i}" for i in range(1, 9))}


def bench(*more):
    return h.run(["bench", "halo", "--quick", *more])


class BenchHaloTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = h.ROOT / "claims"
        cls.first = bench("--seeds", 2, "--to", cls.folder, "--json", h.ROOT / "first.json")
        if cls.first.code != 0:
            raise AssertionError(str(cls.first))
        cls.report = json.loads((h.ROOT / "first.json").read_text())

    def test_the_report_has_every_number_and_verdict(self):
        self.assertEqual([seed["seed"] for seed in self.report["seeds"]], [1, 2])
        for key in ("hardware", "commit", "command", "settings"):
            self.assertTrue(self.report[key], key)
        for seed in self.report["seeds"]:
            self.assertEqual(set(seed["numbers"]["conversions"]), HYBRIDS)
            self.assertEqual([claim["number"] for claim in seed["claims"]], CLAIMS)
            for claim in seed["claims"]:
                self.assertIn(claim["verdict"], VERDICTS)
                self.assertTrue(claim["margin"] and claim["found"])
        self.assertNotEqual(self.report["seeds"][0]["numbers"]["conversions"], self.report["seeds"][1]["numbers"]["conversions"])

    def test_the_verdict_on_alignment_follows_from_the_numbers(self):
        for seed in self.report["seeds"]:
            found = seed["numbers"]["conversions"]
            holds = found["not_aligned"]["kl"] >= 2 * found["selected"]["kl"]
            self.assertEqual(seed["claims"][0]["verdict"], "holds" if holds else "does not hold")

    def test_a_teacher_that_recalls_nothing_gives_no_verdict_on_recall(self):
        for seed in self.report["seeds"]:  # four steps of training
            self.assertEqual([seed["claims"][i]["verdict"] for i in (1, 3, 4)], ["not measured"] * 3)
            self.assertIn("the teacher recalls only", seed["claims"][1]["found"])

    def test_the_text_says_how_it_was_measured(self):
        for word in ("hardware ", "commit ", "command     sala bench halo --quick --seeds 2", "seed 2", "verdicts"):
            self.assertIn(word, self.first.out)

    def test_what_is_finished_is_taken_up(self):
        again = bench("--seeds", 2, "--to", self.folder, "--json", h.ROOT / "again.json")
        self.assertEqual(again.code, 0, again)
        self.assertEqual(json.loads((h.ROOT / "again.json").read_text())["seeds"], self.report["seeds"])
        self.assertNotIn("teacher:", again.err)  # no piece was made

    def test_the_first_seed_can_be_named(self):
        """Here one that is finished, so that nothing is measured."""
        second = bench("--seeds", 1, "--first-seed", 2, "--to", self.folder, "--json", h.ROOT / "second.json")
        self.assertEqual(second.code, 0, second)
        self.assertEqual(json.loads((h.ROOT / "second.json").read_text())["seeds"], self.report["seeds"][1:])
        self.assertNotIn("teacher:", second.err)
        verdicts = second.out[second.out.rindex("verdicts"):].splitlines()[0]
        self.assertIn("seed 2", verdicts)
        self.assertNotIn("seed 1", verdicts)

    def test_bad_input_is_refused_in_one_line(self):
        blocked = h.ROOT / "file"
        blocked.write_text("")
        for arguments, code, name in (
                ((), 64, "USAGE"),
                (("--to", self.folder, "--seeds", 0), 64, "USAGE"),
                (("--to", self.folder, "--first-seed", 0), 64, "USAGE"),
                (("--to", self.folder, "--threads", "two"), 64, "USAGE"),
                (("--to", self.folder, "--selector", "uniform"), 64, "USAGE"),
                (("--to", self.folder, "--selector", "kl_swap"), 78, "BENCH-DIR"),
                (("--to", blocked), 74, "FILE-WRITE"),
                (("--to", self.folder, "--json", h.ROOT / "none" / "claims.json"), 74, "FILE-WRITE")):
            with self.subTest(arguments=arguments):
                result = bench(*arguments)
                self.assertEqual(result.code, code, result)
                self.assertEqual(len(result.error_lines), 1, result)
                self.assertIn(name, result.err)

    def test_results_of_another_size_are_refused(self):
        result = h.run(["bench", "halo", "--seeds", 1, "--to", self.folder])
        self.assertEqual(result.code, 78, result)
        self.assertIn("BENCH-DIR", result.err)
        self.assertIn("--to", result.err)


if __name__ == "__main__":
    h.main()
