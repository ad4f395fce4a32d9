"""Runs of several ranks and of two hosts that lose a rank, a host or a disk: all ranks end soon, one paragraph names the cause, and
the same command goes on to the same bits."""

import os
import pathlib
import re
import time
import unittest

import harness as h

RANKS = 4
STEPS = 120
WATCHDOG_SECONDS = 4  # of a step that takes some milliseconds, and longer on a busy machine
END_SECONDS = 60      # the promise: from the fault to the end of all ranks


def config():
    path = h.ROOT / "ranks" / "stage.yaml"
    if not path.exists():
        h.write_stage(path, h.pretrain("only", STEPS, first=True, checkpoint={"every_steps": 10, "keep_last": 2},
                                       data=h.data(h.ingest("long", documents=900, seed=3))))
    return path


def oracle():
    run = h.ROOT / "runs" / "oracle"
    if not run.exists():
        h.succeed(h.train(config(), run), ranks=RANKS)
    return run


def alive(pid):
    """Not counting what has ended and is only waited for."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def ranks_of(run):
    """Process ids of the ranks that work in this run directory, on this machine whatever their launcher."""
    found = {}
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if words[0] == h.SALA.encode() and b"train" in words and str(run).encode() in words:
                environment = (folder / "environ").read_bytes()
                found[int(re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", environment).group(1))] = int(folder.name)
        except (OSError, IndexError, AttributeError):
            continue
    return found


class RanksCase(unittest.TestCase):
    def start(self, *more, env=None):
        self.run_directory = h.ROOT / "runs" / self.id().rsplit(".", 1)[1]
        oracle()
        self.job = h.Job(h.train(config(), self.run_directory, *more), ranks=RANKS, env=env)
        self.wait_for_a_checkpoint()

    def wait_for_a_checkpoint(self):
        self.assertTrue(self.job.wait_for(lambda: h.checkpoints(self.run_directory), "a checkpoint"))
        self.pids = ranks_of(self.run_directory)
        self.assertEqual(sorted(self.pids), list(range(RANKS)))

    def end(self):
        """The job's result; all its ranks must be gone by then."""
        started = time.monotonic()
        result = self.job.result()
        while any(alive(pid) for pid in self.pids.values()) and time.monotonic() - started < END_SECONDS:
            time.sleep(0.1)
        self.assertLess(time.monotonic() - started, END_SECONDS)
        self.assertEqual([rank for rank, pid in self.pids.items() if alive(pid)], [])
        self.assertLess(max(line["step"] for line in h.metrics(self.run_directory).values()), STEPS)
        return result

    def assert_resumes(self):
        result = h.succeed(h.train(config(), self.run_directory), ranks=RANKS)
        self.assertIn("resumed after step", result.err)
        self.assertEqual(h.differences(oracle(), self.run_directory), [])

    def paragraph(self, result):
        found = [line for line in result.err.splitlines() if "WATCHDOG: " in line]
        self.assertEqual(len(found), 1, result)
        return found[0]


class OneHost(RanksCase):
    def test_a_killed_rank(self):
        self.start()
        os.kill(self.pids[2], h.SIGKILL)
        self.assertEqual(self.end().code, 137)
        self.assert_resumes()

    def test_a_stopped_rank(self):
        self.start(f"run.watchdog.step_seconds={WATCHDOG_SECONDS}")
        os.kill(self.pids[2], h.signal.SIGSTOP)
        result = self.end()
        self.assertEqual(result.code, 71, result)
        host = os.uname().nodename
        paragraph = self.paragraph(result)
        self.assertIn(f"WATCHDOG: rank 2@{host} did not arrive and left no fault file", paragraph)
        self.assertRegex(paragraph, rf"while ranks 0, 1, 3@{host} wait for \d+(\.\d)? s in \w+ number \d+ of group (world|dp) \(ranks 0-3, \d+ bytes")
        logs = self.run_directory / "logs"
        self.assertIn(paragraph[paragraph.index("WATCHDOG"):], (logs / "rank-00000.log").read_text())
        explained = h.succeed(["explain-fault", self.run_directory]).out.splitlines()
        self.assertEqual(len(explained), 2, explained)
        self.assertIn(f"rank 2@{host} did not arrive", explained[0])
        self.assertRegex(explained[1], rf"first collective not common to all its ranks: .*rank 2@{host}: no fault file")
        self.assert_resumes()
        self.assertEqual(sorted(p.name for p in (logs / "earlier").iterdir()),
                         ["fault-rank-00000.json", "fault-rank-00001.json", "fault-rank-00003.json", "fault-report.txt"])
        self.assertEqual(h.run(["explain-fault", self.run_directory]).code, 66)


if __name__ == "__main__":
    h.main()
