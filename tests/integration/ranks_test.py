"""Runs of several ranks and of two hosts that lose a rank, a host or a disk: all ranks end soon, one paragraph names the cause, and
the same command goes on to the same bits."""

import os
import pathlib
import re
import signal
import subprocess
import time
import unittest

import harness as h

RANKS = 4
STEPS = 120
# Of a step or a save that takes some milliseconds, and longer on a busy machine.
LIMITS = ("run.watchdog.step_seconds=4", "run.watchdog.data_seconds=4", "run.watchdog.save_seconds=4")
END_SECONDS = 60      # the promise: from the fault to the end of all ranks

LAUNCHER = pathlib.Path(__file__).resolve().parents[2] / "launch" / "mpirun"


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
        started = self.job.wait_for(lambda: h.checkpoints(self.run_directory), "a checkpoint")
        self.assertTrue(started, None if started else self.job.result())
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
        self.start(*LIMITS)
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

    def test_the_launcher_starts_again_and_names_the_killed_rank(self):
        oracle()
        run = self.run_directory = h.ROOT / "runs" / "launcher"
        self.job = h.Job([], program=[LAUNCHER, "-np", RANKS, "--", *h.train(config(), run)], env=launcher_environment())
        self.wait_for_a_checkpoint()
        os.kill(self.pids[1], h.SIGKILL)
        result = self.job.result()
        self.assertEqual(result.code, 0, result)
        self.assertIn(f"launch/mpirun: rank 1@{os.uname().nodename} was ended by signal 9 (Killed)", result.err)
        self.assertRegex(result.err, r"launch/mpirun: exit code 137; starting again \(1 of 3\) from .*/checkpoints/step-")
        self.assertEqual(h.differences(oracle(), run), [])

    def test_the_launcher_stops_on_request(self):
        oracle()
        run = self.run_directory = h.ROOT / "runs" / "launcher-stops"
        self.job = h.Job([], program=[LAUNCHER, "-np", RANKS, "--", *h.train(config(), run)], env=launcher_environment())
        self.wait_for_a_checkpoint()
        self.job.process.send_signal(h.SIGTERM)
        self.assertEqual(self.end().code, 75)
        self.assert_resumes()

    def test_ctrl_c_and_a_closed_terminal_save(self):
        oracle()
        for number in (h.signal.SIGINT, h.signal.SIGHUP):
            with self.subTest(number):
                run = self.run_directory = h.ROOT / "runs" / f"launcher-{number}"
                # In a process group of its own, all of which gets the signal, as from a terminal.
                self.job = h.Job([], program=["setsid", LAUNCHER, "-np", RANKS, "--", *h.train(config(), run)], env=launcher_environment())
                self.wait_for_a_checkpoint()
                os.killpg(self.job.process.pid, number)
                result = self.end()
                self.assertEqual(result.code, 75, result)
                self.assertIn("STOPPED", result.err)
                self.assert_resumes()

    def test_the_launcher_gives_up_where_nothing_gets_on(self):
        # Every start dies in its first save.
        run = h.ROOT / "runs" / "launcher-gives-up"
        result = h.Job([], program=[LAUNCHER, "-np", 2, "--", *h.train(config(), run)],
                       env={**launcher_environment(), "SALA_FAULT": "checkpoint:before-manifest"}).result()
        self.assertEqual(result.code, 137, result)
        self.assertEqual(result.err.count("starting again"), 1, result)
        self.assertIn("not started again: two starts in a row made no new checkpoint", result.err)


def launcher_environment():
    return {"SALA_PROGRAM": h.SALA, "SALA_MPIRUN": h.MPIRUN, "SALA_LINGER_SECONDS": "3"}


# Writes of one rank below checkpoints/ fail as on a full disk, behind so many bytes, until a file appears.
FULL_DISK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int full(int fd, size_t n) {
  static size_t taken = 0;
  const char* rank = getenv("OMPI_COMM_WORLD_RANK");
  char link[64], path[4096];
  if (rank == NULL || strcmp(rank, getenv("FULL_DISK_RANK")) != 0) return 0;
  snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof(path) - 1);
  if (length < 0) return 0;
  path[length] = 0;
  if (strstr(path, "/checkpoints/") == NULL || access(getenv("FULL_DISK_UNTIL"), F_OK) == 0) return 0;
  taken += n;
  if (taken <= (size_t)atol(getenv("FULL_DISK_BYTES"))) return 0;
  errno = ENOSPC;
  return 1;
}

ssize_t write(int fd, const void* data, size_t n) {
  static ssize_t (*real)(int, const void*, size_t) = NULL;
  if (real == NULL) real = (ssize_t(*)(int, const void*, size_t))dlsym(RTLD_NEXT, "write");
  return full(fd, n) ? -1 : real(fd, data, n);
}
ssize_t pwrite(int fd, const void* data, size_t n, off_t at) {
  static ssize_t (*real)(int, const void*, size_t, off_t) = NULL;
  if (real == NULL) real = (ssize_t(*)(int, const void*, size_t, off_t))dlsym(RTLD_NEXT, "pwrite");
  return full(fd, n) ? -1 : real(fd, data, n, at);
}
ssize_t pwrite64(int fd, const void* data, size_t n, off_t at) {
  static ssize_t (*real)(int, const void*, size_t, off_t) = NULL;
  if (real == NULL) real = (ssize_t(*)(int, const void*, size_t, off_t))dlsym(RTLD_NEXT, "pwrite64");
  return full(fd, n) ? -1 : real(fd, data, n, at);
}
"""


class FullDiskOfOneRank(RanksCase):
    FULL_RANK = 2

    def environment(self):
        library = h.ROOT / "full_disk.so"
        if not library.exists():
            (h.ROOT / "full_disk.c").write_text(FULL_DISK)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", library, h.ROOT / "full_disk.c", "-ldl"], check=True)
        self.room = h.ROOT / f"room-{self.id().rsplit('.', 1)[1]}"
        # Some checkpoints fit: a rank's files of this model have less than 200,000 bytes.
        return {"LD_PRELOAD": str(library), "FULL_DISK_RANK": str(self.FULL_RANK), "FULL_DISK_BYTES": "500000",
                "FULL_DISK_UNTIL": str(self.room)}

    def assert_named(self, line):
        """Rank, host, file and what the system said."""
        self.assertRegex(line, rf"rank {self.FULL_RANK}\b")
        self.assertIn(os.uname().nodename, line)
        self.assertRegex(line, r"/checkpoints/\S*(model|optim)-00002\.h5")
        self.assertIn("No space left on device", line)

    def test_training_goes_on_and_saves_again_when_there_is_room(self):
        self.start("checkpoint.max_failures=1000", env=self.environment())
        log = self.run_directory / "logs" / "rank-00000.log"
        failures = lambda: [line for line in log.read_text().splitlines() if "CKPT-SAVE" in line or "No space" in line]
        self.assertTrue(self.job.wait_for(failures, "a failed save"))
        self.room.touch()
        result = self.job.result()
        self.assertEqual(result.code, 0, result)
        self.assert_named(failures()[0])
        self.assertEqual(h.differences(oracle(), self.run_directory), [])

    def test_the_run_ends_when_no_save_succeeds(self):
        self.start(env=self.environment())
        result = self.end()
        self.assertEqual(result.code, 74, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn("CKPT-SAVE", result.error_lines[0])
        self.assert_named(result.error_lines[0])
        h.succeed(["ckpt", "verify", h.checkpoints(self.run_directory)[-1], "--deep"])
        self.assert_resumes()


class TwoHosts(RanksCase):
    """Two network namespaces with a cable between them. They share the file system, as hosts with a shared run directory do."""

    def setUp(self):
        if os.geteuid() != 0:
            self.skipTest("needs root for network namespaces")
        name = f"s{os.getpid() % 100000}"
        self.hosts = [f"{name}a", f"{name}b"]
        self.addCleanup(self.remove_hosts)
        self.commands = [["ip", "netns", "add", host] for host in self.hosts]
        self.commands += [["ip", "link", "add", f"{name}v0", "netns", self.hosts[0], "type", "veth", "peer", "name", f"{name}v1", "netns", self.hosts[1]]]
        self.link = f"{name}v0"
        for i, host in enumerate(self.hosts):
            self.commands += [["ip", "-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"{name}v{i}"],
                              ["ip", "-n", host, "link", "set", f"{name}v{i}", "up"], ["ip", "-n", host, "link", "set", "lo", "up"]]
        try:
            for command in self.commands:
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f"network namespaces cannot be made here: {getattr(error, 'stderr', '') or error}")
        table = "127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {host}\n" for i, host in enumerate(self.hosts))
        for host in self.hosts:
            folder = pathlib.Path("/etc/netns") / host
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(table)
        # In place of ssh: HOST COMMAND...
        self.shell = h.ROOT / "on-host.sh"
        self.shell.write_text('#!/usr/bin/env bash\nhost=$1\nshift\n'
                              'exec ip netns exec "$host" unshare --uts bash -c \'hostname "$0"; eval "$*"\' "$host" "$@"\n')
        self.shell.chmod(0o755)

    def remove_hosts(self):
        for host in self.hosts:
            pids = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True, check=False).stdout.split()
            for pid in pids:  # mpirun's daemon outlives a cut cable
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            subprocess.run(["ip", "netns", "del", host], capture_output=True, check=False)
            folder = pathlib.Path("/etc/netns") / host
            if folder.exists():
                (folder / "hosts").unlink(missing_ok=True)
                folder.rmdir()

    def across(self, *more, **environment):
        a, b = self.hosts
        program = [self.shell, a, LAUNCHER, "--mca", "plm_rsh_agent", self.shell, "--host", f"{a}:2,{b}:2", "-np", RANKS, "--",
                   *h.train(config(), self.run_directory, *more)]
        return h.Job([], program=program, env={**launcher_environment(), **environment})

    def test_a_cut_cable(self):
        reference = oracle()
        self.run_directory = h.ROOT / "runs" / "two-hosts"
        self.job = self.across(*LIMITS, SALA_RETRIES="0")
        self.wait_for_a_checkpoint()
        a, b = self.hosts
        subprocess.run(["ip", "-n", a, "link", "set", self.link, "down"], check=True)
        result = self.end()
        self.assertEqual(result.code, 71, result)
        paragraph = self.paragraph(result)
        self.assertIn("no rank is missing", paragraph)
        self.assertIn("the network between hosts does not carry it", paragraph)
        self.assertIn(f"ranks 0, 1@{a} and ranks 2, 3@{b}", paragraph)
        # The host is back.
        subprocess.run(["ip", "-n", a, "link", "set", self.link, "up"], check=True)
        self.job = self.across()
        result = self.job.result()
        self.assertEqual(result.code, 0, result)
        self.assertIn("resumed after step", result.err)
        self.assertEqual(h.differences(reference, self.run_directory), [])


if __name__ == "__main__":
    h.main()
