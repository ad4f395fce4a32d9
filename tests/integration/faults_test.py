"""Damaged checkpoints, processes that die while saving, disks that do not take what is written: nothing wrong is read, nothing
whole is lost."""

import os
import shutil
import subprocess
import unittest

import harness as h


def config():
    path = h.ROOT / "faults" / "stage.yaml"
    if not path.exists():
        h.write_stage(path, h.pretrain("only", 6, first=True, checkpoint={"every_steps": 2, "keep_last": 9}))
    return path


def oracle():
    """Two ranks, so that a checkpoint has files of two writers."""
    run = h.ROOT / "runs" / "oracle"
    if not run.exists():
        h.succeed(h.train(config(), run), ranks=2)
    return run


class FaultCase(unittest.TestCase):
    def run_directory(self):
        return h.ROOT / "runs" / self.id().rsplit(".", 1)[1]

    def assert_one_error(self, result, code, *texts):
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in texts:
            self.assertIn(text, result.error_lines[0])


# Name of a kind of damage -> (what is done to the newest checkpoint, file that must be named).
DAMAGE = {
    "bit_in_parameters": (lambda c: h.flip_bit(c / "model-00001.h5"), "model-00001.h5"),
    "bit_in_moments": (lambda c: h.flip_bit(c / "optim-00000.h5"), "optim-00000.h5"),
    "bit_in_the_head_of_a_data_file": (lambda c: h.flip_bit(c / "model-00000.h5", 9), "model-00000.h5"),
    "bit_in_the_index": (lambda c: h.flip_bit(c / "index.h5"), "index.h5"),
    "bit_in_the_manifest": (lambda c: h.flip_bit(c / "manifest.json"), "manifest.json"),
    "bit_in_the_model": (lambda c: h.flip_bit(c / "model.yaml"), "model.yaml"),
    "bit_in_the_configuration": (lambda c: h.flip_bit(c / "config.yaml"), "config.yaml"),
    "data_cut_short": (lambda c: h.cut(c / "model-00000.h5"), "model-00000.h5"),
    "index_cut_short": (lambda c: h.cut(c / "index.h5"), "index.h5"),
    "manifest_cut_short": (lambda c: h.cut(c / "manifest.json"), "manifest.json"),
    "data_empty": (lambda c: (c / "optim-00001.h5").write_bytes(b""), "optim-00001.h5"),
    "data_missing": (lambda c: (c / "optim-00001.h5").unlink(), "optim-00001.h5"),
    "index_missing": (lambda c: (c / "index.h5").unlink(), "index.h5"),
    "manifest_missing": (lambda c: (c / "manifest.json").unlink(), "manifest.json"),
    "model_missing": (lambda c: (c / "model.yaml").unlink(), "model.yaml"),
    "configuration_missing": (lambda c: (c / "config.yaml").unlink(), "config.yaml"),
    "file_of_another_save": (lambda c: shutil.copy(c.parent / "step-000000002" / "optim-00001.h5", c), "optim-00001.h5"),
}

# What one whole cycle of start, warning and equal end is shown for; verification is tested with all of them.
RESUMED = ("bit_in_parameters", "bit_in_the_index", "bit_in_the_manifest", "bit_in_the_model", "data_cut_short", "manifest_missing")


class Damage(FaultCase):
    def damaged(self, kind):
        run = h.copy_run(oracle(), h.ROOT / "runs" / f"{self.id().rsplit('.', 1)[1]}-{kind}")
        newest = h.checkpoints(run)[-1]
        change, file = DAMAGE[kind]
        change(newest)
        return run, newest, file

    def test_verification_names_the_file(self):
        for kind in DAMAGE:
            with self.subTest(kind):
                _, newest, file = self.damaged(kind)
                self.assert_one_error(h.run(["ckpt", "verify", newest, "--full"]), 65, "CKPT-", str(newest / file))

    def test_a_damaged_checkpoint_falls_back_to_the_one_before(self):
        for kind in RESUMED:
            with self.subTest(kind):
                run, newest, file = self.damaged(kind)
                result = h.succeed(h.train(config(), run), ranks=2)
                warnings = [line for line in result.err.splitlines() if " warn " in line]
                self.assertTrue(any(str(newest / file) in line and "trying the checkpoint before it" in line
                                    for line in warnings), result)
                self.assertIn("resumed after step 4", result.err)
                self.assertEqual(h.differences(oracle(), run), [])
                h.succeed(["ckpt", "verify", newest, "--deep"])

    def test_strict_resume_ends_instead(self):
        # Not the kinds without an intact manifest: such a directory is no checkpoint but what an interrupted save leaves.
        for kind in ("bit_in_moments", "index_missing", "bit_in_the_configuration"):
            with self.subTest(kind):
                run, newest, file = self.damaged(kind)
                result = h.run(h.train(config(), run, "run.resume_strict=true"), ranks=2)
                self.assert_one_error(result, 65, "CKPT-", str(newest / file))
                h.succeed(["ckpt", "verify", h.checkpoints(run)[-2], "--deep"])

    def test_no_whole_checkpoint_at_all_is_an_error(self):
        run = h.copy_run(oracle(), self.run_directory())
        for checkpoint in h.checkpoints(run):
            h.flip_bit(checkpoint / "optim-00000.h5")
        result = h.run(h.train(config(), run))
        self.assert_one_error(result, 65, "CKPT-NONE", "none of 3 checkpoints is valid")
        self.assertEqual(len(h.checkpoints(run)), 3)


class DeathWhileSaving(FaultCase):
    """SALA_FAULT ends every process at a point of a save, as if killed."""

    @staticmethod
    def after_two_steps(run):
        """The run as it was when two steps were done and saved."""
        h.copy_run(oracle(), run)
        for checkpoint in h.checkpoints(run)[1:]:
            shutil.rmtree(checkpoint)
        return run

    def test_the_next_start_goes_on_from_the_save_before(self):
        for point in ("after-slices", "before-manifest", "after-manifest", "before-rename"):
            with self.subTest(point):
                # The save of step 4 dies.
                run = self.after_two_steps(h.ROOT / "runs" / f"dies-{point}")
                result = h.run(h.train(config(), run), ranks=2, env={"SALA_FAULT": f"checkpoint:{point}"})
                self.assertEqual(result.code, 137, result)
                self.assertEqual([c.name for c in h.checkpoints(run)], ["step-000000002"])
                self.assertEqual(len(list((run / "checkpoints").glob(".tmp-step-000000004-*"))), 1)
                h.succeed(["ckpt", "verify", run / "checkpoints" / "step-000000002", "--deep"])
                result = h.succeed(h.train(config(), run), ranks=2)
                self.assertIn("resumed after step 2", result.err)
                self.assertEqual(h.differences(oracle(), run), [])
                self.assertEqual([p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")], [])

    def test_a_death_in_the_first_save_starts_anew(self):
        run = self.run_directory()
        result = h.run(h.train(config(), run), ranks=2, env={"SALA_FAULT": "checkpoint:before-manifest"})
        self.assertEqual(result.code, 137, result)
        h.succeed(h.train(config(), run), ranks=2)
        self.assertEqual(h.differences(oracle(), run), [])


class Directories(FaultCase):
    def test_a_run_directory_below_a_file(self):
        (h.ROOT / "plain").write_text("a file\n")
        self.assert_one_error(h.run(h.train(config(), h.ROOT / "plain" / "run"), ranks=2), 74, "FILE-WRITE", str(h.ROOT / "plain"))

    @unittest.skipIf(os.geteuid() == 0, "root may write everywhere")
    def test_a_directory_without_permission_to_write(self):
        closed = h.ROOT / "closed"
        closed.mkdir(mode=0o555)
        self.assert_one_error(h.run(h.train(config(), closed / "run"), ranks=2), 74, "FILE-WRITE", str(closed))

    def test_checkpoints_that_cannot_be_written(self):
        # A file where the folder of the checkpoints should be.
        run = self.run_directory()
        run.mkdir(parents=True)
        (run / "checkpoints").write_text("in the way\n")
        self.assert_one_error(h.run(h.train(config(), run), ranks=2), 74, "FILE-WRITE", str(run / "checkpoints"))

    def test_a_summary_that_cannot_be_written_costs_only_itself(self):
        run = self.run_directory()
        (run / "summary.json").mkdir(parents=True)
        stages = [h.pretrain("first", 2, first=True), h.pretrain("second", 2)]
        result = h.succeed(h.train(h.write_pipeline(h.ROOT / "faults" / "summary", stages), run), ranks=2)
        self.assertEqual(result.err.count("summary are not written any more"), 1, result)
        self.assertIn("summary.json", result.err)
        self.assertEqual(set(h.final_checkpoints(run)), {"first", "second"})

    def test_two_runs_in_one_directory(self):
        run = self.run_directory()
        job = h.Job(h.train(config(), run, "batch.steps=2000", "data.mixture.0.max_epochs=9999"), ranks=2)
        self.assertTrue(job.wait_for(lambda: h.metrics(run), "a step"))
        second = h.run(h.train(config(), run, "batch.steps=2000", "data.mixture.0.max_epochs=9999"), ranks=2)
        self.assertTrue(job.running())
        self.assert_one_error(second, 74, "RUN-LOCKED", str(run / "RUN.lock"), f"process {job.pid_of(0)}", "use another run directory")
        job.process.send_signal(h.SIGUSR2)
        self.assertEqual(job.result().code, 75)
        self.assertFalse((run / "RUN.lock").exists())

    def test_a_lock_of_a_dead_process_is_taken_over(self):
        run = h.copy_run(oracle(), self.run_directory())
        host = os.uname().nodename
        (run / "RUN.lock").write_text(f"host {host}\npid 4194303\nstarted 2001-01-01T00:00:00Z\n")
        result = h.succeed(h.train(config(), run))
        self.assertIn("stale lock of process 4194303", result.err)

    def test_a_lock_of_another_host_is_respected(self):
        run = h.copy_run(oracle(), self.run_directory())
        (run / "RUN.lock").write_text("host elsewhere\npid 17\nstarted 2001-01-01T00:00:00Z\n")
        self.assert_one_error(h.run(h.train(config(), run), ranks=2), 74, "RUN-LOCKED", "process 17 on elsewhere", "remove the file")
        self.assertTrue((run / "RUN.lock").exists())


class FullDisk(FaultCase):
    def test_a_full_disk_costs_no_earlier_checkpoint(self):
        disk = h.ROOT / "small-disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], capture_output=True, text=True, check=False)
        if mounted.returncode != 0:
            self.skipTest(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
        try:
            run = disk / "run"
            h.copy_run(DeathWhileSaving.after_two_steps(h.ROOT / "runs" / "before-full-disk"), run)
            filler = disk / "filler"
            free = shutil.disk_usage(disk).free
            filler.write_bytes(bytes(max(0, free - 100_000)))  # less than a checkpoint
            result = h.run(h.train(config(), run, "checkpoint.max_failures=1"), ranks=2)
            self.assertEqual(result.code, 74, result)
            self.assertEqual(len(result.error_lines), 1, result)
            self.assertEqual([c.name for c in h.checkpoints(run)], ["step-000000002"])
            h.succeed(["ckpt", "verify", run / "checkpoints" / "step-000000002", "--deep"])
            filler.unlink()
            h.succeed(h.train(config(), run, "checkpoint.keep_last=1"), ranks=2)
            self.assertEqual(h.differences(oracle(), run), [])
        finally:
            subprocess.run(["umount", disk], check=False)


if __name__ == "__main__":
    h.main()
