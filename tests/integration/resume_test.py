"""A run that is interrupted and started again computes the same bits as one that is not."""

import json
import random
import time
import unittest

import harness as h

KILLS = 20
SEED = 20240607  # of the choice of ranks and moments

STAGES = ["base", "halo", "stable", "sft"]


def pipeline():
    path = h.ROOT / "resume" / "pipeline.yaml"
    if path.exists():
        return path
    return h.write_pipeline(path.parent, [
        h.pretrain("base", 10, first=True),
        h.halo("halo", 8, 8),
        h.pretrain("stable", 8),
        h.sft("sft", 6),
    ])


def oracle():
    """The uninterrupted run, made once."""
    run = h.ROOT / "runs" / "oracle"
    if not run.exists():
        h.succeed(h.train(pipeline(), run), ranks=2)
    return run


class Killer:
    """Starts a run and kills a random rank of it at a random moment, until the run is complete."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.kills = {}  # by kind of moment

    def total(self):
        return sum(self.kills.values())

    def moment(self, job, run):
        """Waits for a random moment and names its kind; None when the job ended before."""
        kind = self.random.choice(["start", "step", "step", "save", "save", "save"])
        train = run / "metrics" / "train.jsonl"

        def steps():
            return train.read_bytes().count(b"\n") if train.exists() else 0

        def saving():
            return any((run / "checkpoints").glob(".tmp-step-*"))

        before = steps()
        if kind == "start":
            waited = job.wait_for(lambda: job.pid_of(0) is not None and job.pid_of(1) is not None, "two ranks")
            delay = self.random.uniform(0, 0.8)
        else:
            least = before + self.random.randint(1, 4)
            waited = job.wait_for(lambda: steps() >= least, "steps")
            delay = self.random.uniform(0, 0.015)
            if waited and kind == "save":
                waited = job.wait_for(saving, "a save")
                delay = self.random.uniform(0, 0.01)
        if not waited:
            return None
        time.sleep(delay)
        return kind

    def run_to_the_end(self, config, run):
        while True:
            if self.total() >= KILLS:
                h.succeed(h.train(config, run), ranks=2)
                return
            # After the death of a rank mpirun kills the others; without this it gives them a second first.
            job = h.Job(h.train(config, run), ranks=2, env={"OMPI_MCA_odls_base_sigkill_timeout": "0"})
            kind = self.moment(job, run)
            if kind is not None and job.running() and job.signal_rank(self.random.randrange(2), h.SIGKILL):
                self.kills[kind] = self.kills.get(kind, 0) + 1
            result = job.result()
            if result.code == 0:
                return
            if kind is None or result.error_lines:
                raise AssertionError(f"ended by itself: {result}")


class KilledRuns(unittest.TestCase):
    def test_kills_at_random_moments_change_no_bit(self):
        killer = Killer(SEED)
        number = 0
        while killer.total() < KILLS:
            number += 1
            run = h.ROOT / "runs" / f"killed-{number}"
            killer.run_to_the_end(pipeline(), run)
            self.assertEqual(h.differences(oracle(), run), [])
            self.assertEqual(sorted(h.final_checkpoints(run)), sorted(STAGES))
        print(f"{killer.total()} kills in {number} runs: {killer.kills}")


class BrokenRestore(unittest.TestCase):
    """The comparison above finds a state that is valid but not the right one."""

    @classmethod
    def setUpClass(cls):
        cls.config = h.write_stage(h.ROOT / "broken" / "stage.yaml", h.pretrain("only", 8, first=True))
        cls.whole = h.ROOT / "runs" / "broken-oracle"
        h.succeed(h.train(cls.config, cls.whole, "checkpoint.keep_last=9"))

    def interrupted(self, name):
        """A copy of the run as it was after step 4."""
        run = h.copy_run(self.whole, h.ROOT / "runs" / name)
        for checkpoint in h.checkpoints(run):
            if h.manifest(checkpoint)["global_step"] > 4:
                h.shutil.rmtree(checkpoint)
        lines = (run / "metrics" / "train.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics" / "train.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 4))
        return run, run / "checkpoints" / "step-000000004"

    def resume(self, run, checkpoint):
        h.succeed(["ckpt", "verify", checkpoint, "--full"])
        result = h.succeed(h.train(self.config, run))
        self.assertIn("resumed after step 4", result.err)
        return h.differences(self.whole, run)

    def test_untouched_state_gives_equal_runs(self):
        run, checkpoint = self.interrupted("untouched")
        self.assertEqual(self.resume(run, checkpoint), [])

    def test_wrong_moments_are_found(self):
        run, checkpoint = self.interrupted("wrong-moments")
        # One moment of one tensor loses its values, and every checksum on the way is made right again: that of the slice in
        # the index, then those of the files in the manifest.
        listing = h.succeed(["ckpt", "info", checkpoint, "--tensors"]).out
        self.assertIn("model.norm.weight", listing)
        moments, index = checkpoint / "optim-00000.h5", checkpoint / "index.h5"
        content, table = bytearray(moments.read_bytes()), bytearray(index.read_bytes())
        width = h.model()["hidden_size"] * 4
        places = [at for at in range(0, len(content) - width + 1, 4)
                  if table.count(h.crc32c(content[at:at + width]).to_bytes(4, "little")) == 1]
        self.assertTrue(places, "no slice of the width of a norm was found")
        at = places[0]
        old = h.crc32c(content[at:at + width]).to_bytes(4, "little")
        content[at:at + width] = bytes(width)
        table = table.replace(old, h.crc32c(bytes(width)).to_bytes(4, "little"))
        moments.write_bytes(content)
        index.write_bytes(table)

        def change(manifest):
            for file in manifest["files"]:
                if file["name"] in (moments.name, index.name):
                    file["crc32c"] = f"{h.crc32c((checkpoint / file['name']).read_bytes()):08x}"

        h.seal_manifest(checkpoint, change)
        found = self.resume(run, checkpoint)
        self.assertTrue(any("loss_hex" in line for line in found), found)
        self.assertTrue(any("final checkpoint" in line for line in found), found)

    def test_a_wrong_update_counter_is_found(self):
        run, checkpoint = self.interrupted("wrong-counter")

        def change(manifest):
            manifest["trainer"]["updates"] += 1  # only the bias correction of Adam reads it

        h.seal_manifest(checkpoint, change)
        self.assertTrue(any("loss_hex" in line for line in self.resume(run, checkpoint)))

    def test_two_resumes_of_one_checkpoint_are_equal(self):
        runs = []
        for name in ("twice-1", "twice-2"):
            run, checkpoint = self.interrupted(name)
            self.assertEqual(self.resume(run, checkpoint), [])
            runs.append(run)
        self.assertEqual(h.differences(*runs), [])

    def test_a_changed_value_is_refused_and_loses_nothing(self):
        run, checkpoint = self.interrupted("changed-value")
        before = (run / "metrics" / "train.jsonl").read_text()
        for change, saved, now in (("schedule.peak_lr=0.02", "peak_lr: 0.01", "peak_lr: 0.02"),
                                   ("optimizer.clip_norm=2", "clip_norm: 1", "clip_norm: 2"),
                                   ("seed=5", "seed: 1234", "seed: 5")):
            result = h.run(h.train(self.config, run, change))
            self.assertEqual(result.code, 78, result)
            self.assertEqual(len(result.error_lines), 1, result)
            for text in ("CFG-RESUME", str(checkpoint), saved, now, "restore the value"):
                self.assertIn(text, result.error_lines[0])
        self.assertEqual((run / "metrics" / "train.jsonl").read_text(), before)
        self.assertEqual(self.resume(run, checkpoint), [])

    def test_values_that_do_not_change_results_may_change(self):
        run, _ = self.interrupted("allowed-value")
        h.succeed(h.train(self.config, run, "checkpoint.every_steps=3", "checkpoint.keep_last=1", "batch.micro_batch_sequences=2",
                          "recompute=false", "run.threads=2"))
        self.assertEqual(h.differences(self.whole, run), [])


class Saves(unittest.TestCase):
    def test_saving_every_step_changes_no_bit(self):
        runs = []
        for every in (0, 1):
            run = h.ROOT / "runs" / f"every-{every}"
            h.succeed(h.train(pipeline(), run, f"all.checkpoint.every_steps={every}"), ranks=2)
            runs.append(run)
        self.assertEqual(h.differences(*runs), [])
        self.assertEqual(h.differences(oracle(), runs[1]), [])

    def test_only_the_newest_and_the_final_checkpoints_stay(self):
        kept = [(h.manifest(c)["stage"]["name"], h.manifest(c)["stage"]["final"]) for c in h.checkpoints(oracle())]
        self.assertEqual([stage for stage, final in kept if final], STAGES)
        self.assertLessEqual(len(kept), len(STAGES) + 2)  # keep_last is 2
        self.assertEqual([p.name for p in (oracle() / "checkpoints").iterdir() if p.name.startswith(".")], [])

    def test_a_finished_run_has_nothing_to_do(self):
        before = h.metrics(oracle())
        h.succeed(h.train(pipeline(), oracle()), ranks=2)
        self.assertEqual(h.metrics(oracle()), before)


if __name__ == "__main__":
    h.main()
