"""The peak of resident memory that `sala train --dry-run` and `sala plan` say, beside that of the processes of a run (VmHWM).

Models of 0.1, 1.8 and 14.2 million parameters, so that in some the program itself is most of it and in others the weights are.

Two terms of the plan are fitted (recipes/resident_plan.cc): what code of steps and saves takes, to the models `tiny`, `long` and `weights`
here, and what MPI takes, to `tiny` and `ranks`. For those models the sum of the two is no prediction, so that the test of each asks for
more than 5 percent of the whole: the rest without the fitted terms must be at least ten times the fitted ones, or the error is held against
an absolute number. `halo` and its selectors are fitted to nothing.
"""

import json
import unittest

import harness as h

TOLERANCE = 0.05  # asked of the plan, where the fitted terms are a small part of it
# Bytes for the tiny model, of which most is the program and what is fitted: 5 percent of the whole would hide an error as large as all of
# its own memory. Pages of code that happen to be read differ by some hundred KB from run to run.
TINY_TOLERANCE = 2e6


def said(command):
    return json.loads(h.succeed(command).out)["stages"]


class ResidentMemory(unittest.TestCase):
    TINY = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_hidden_layers": 2}
    SMALL = {"hidden_size": 192, "intermediate_size": 480, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}
    LARGE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
             "head_dim": 64}
    MIXERS = ["minicpm4", "lightning-attn"]

    def stage(self, shape, seq_len=512, **changes):
        """Samples of one document each, as the plan assumes; held-out data and checkpoints as in any run."""
        layers = shape.get("num_hidden_layers", 4)
        return {"kind": "pretrain", "name": "only", "model": h.model(**shape, mixer_types=self.MIXERS * (layers // 2)),
                "batch": h.batch(2, sequences=2, micro=1, seq_len=seq_len), "schedule": h.schedule(2), "optimizer": {"clip_norm": 1.0},
                "data": h.data(h.ingest("long", documents=60, most_sentences=400)), "checkpoint": {"every_steps": 1}, **changes}

    def run_stage(self, name, content, ranks=None):
        """By phase: what the dry run says of the largest rank, what the plan says of each, and what each had."""
        folder = h.ROOT / "memory" / name
        config = h.write_stage(folder / "stage.yaml", content)
        dry = said(["train", config, "--dry-run", "--json", "--ranks", ranks or 1])
        planned = said(["plan", config, "--json", "--ranks", ranks or 1])
        done = h.succeed(h.train(config, folder / "run"), ranks=ranks)
        self.assertRegex(done.err, r"memory of rank \d: [\d.]+ MB resident at most, planned [\d.]+ MB \([+-][\d.]+ %\)")
        found = {}
        for text in (folder / "run" / "metrics" / "ranks.jsonl").read_text().splitlines():
            line = json.loads(text)
            found[line["phase"]] = [rank["memory"] for rank in line["ranks"]]
        dry = {phase["phase"]: phase["resident"]["total"] for phase in dry[0]["phases"]}
        planned = {phase["phase"]: [rank["resident"]["total"] for rank in phase["ranks"]] for phase in planned[0]["phases"]}
        return dry, planned, found

    def compare(self, name, content, ranks=None):
        dry, planned, found = self.run_stage(name, content, ranks)
        so_far = {"dry run": 0, "plan": [0] * (ranks or 1)}  # a process's peak is that of its phases up to now
        for phase, memory in found.items():
            so_far["dry run"] = max(so_far["dry run"], dry[phase])
            so_far["plan"] = [max(pair) for pair in zip(so_far["plan"], planned[phase], strict=True)]
            measured = [rank["resident"] for rank in memory]
            print(f"{name}, {phase}: resident {[round(m / 1e6, 1) for m in measured]} MB, dry run {so_far['dry run'] / max(measured) - 1:+.1%}, "
                  f"plan {[f'{p / m - 1:+.1%}' for p, m in zip(so_far['plan'], measured)]}")
            self.assertAlmostEqual(so_far["dry run"] / max(measured), 1, delta=TOLERANCE, msg=f"{name}, {phase}")
            for rank, (expected, actual) in enumerate(zip(so_far["plan"], memory)):
                self.assertAlmostEqual(expected / actual["resident"], 1, delta=TOLERANCE, msg=f"{name}, {phase}, rank {rank}")
                self.assertAlmostEqual(actual["resident_planned"] / actual["resident"], 1, delta=TOLERANCE, msg=f"{name}, {phase}, rank {rank}")
        return found

    def test_a_tiny_model(self):
        self.compare("tiny", self.stage(self.TINY))

    def test_long_samples_without_recompute(self):
        """Activations of many blocks of the arena."""
        self.compare("long", self.stage(self.SMALL, seq_len=4096, recompute=False))

    def test_weights(self):
        """Of which a checkpoint is written and read back for its checksums."""
        self.compare("weights", self.stage(self.LARGE))

    def test_two_ranks(self):
        self.compare("ranks", self.stage(self.LARGE, parallel={"zero_stage": 1}), ranks=2)

    def test_halo(self):
        content = self.stage({**self.SMALL, "num_hidden_layers": 4})
        content["model"]["mixer_types"] = ["minicpm4"] * 4
        base = h.ROOT / "memory" / "halo_base"
        h.succeed(h.train(h.write_stage(base / "stage.yaml", content), base / "run"))
        halo = h.halo("only", 2, 2, halo={"selector": "uniform"}, data=content["data"],
                      init_from={"path": str(h.checkpoints(base / "run")[-1])})
        for phase in ("align", "distil"):
            halo["halo"][phase]["batch"] = content["batch"]
            halo["halo"][phase]["schedule"] = content["schedule"]
        self.compare("halo", halo)


class Lines(unittest.TestCase):
    def test_tables_have_every_part(self):
        config = h.write_stage(h.ROOT / "memory" / "lines" / "stage.yaml", ResidentMemory().stage(ResidentMemory.TINY))
        for command in (["train", config, "--dry-run"], ["plan", config]):
            text = h.succeed([*command, "--ranks", "2"]).out
            for line in ("peak of its process", "program, measured here", "code of steps and saves", "MPI", "documents and samples",
                         "memory, as above", "resident at most"):
                self.assertIn(line, text)
            self.assertNotRegex(h.succeed(command).out, r"\n +MPI ")


if __name__ == "__main__":
    h.main()
