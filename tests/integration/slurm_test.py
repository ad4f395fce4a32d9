"""launch/slurm.sbatch on two Slurm nodes in this machine: network namespaces with host names and /tmp of their own.

    python3 tests/integration/slurm_test.py --sala build/release/bin/sala --mpirun mpirun

Not one of the ctests: it needs root and Debian's slurmctld, slurmd, slurm-client and munge, and skips where something is missing.
"""

import os
import pathlib
import re
import shutil
import subprocess
import tempfile
import time
import unittest

import harness as h
import ranks_test as r

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "sinfo", "nsenter", "unshare", "ip")
SCRIPT = r.LAUNCHER.with_name("slurm.sbatch")

CONFIGURATION = """
ClusterName=sala
SlurmctldHost={0}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
NodeName={0} CPUs=2 State=UNKNOWN
NodeName={1} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """munged, slurmctld and two slurmd."""

    def __init__(self, hosts):
        self.hosts = hosts
        self.root = pathlib.Path(tempfile.mkdtemp(prefix="slurm-", dir=h.ROOT))
        self.processes = []
        (self.root / "state").mkdir()
        (self.root / "slurm.conf").write_text(CONFIGURATION.format(*hosts, root=self.root))
        (self.root / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i + 1} {host}\n" for i, host in enumerate(hosts)))
        (self.root / "munge.key").write_bytes(os.urandom(128))
        (self.root / "munge.key").chmod(0o600)
        self.environment = {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def begin(self):
        munge = [f"--{what}={self.root}/munge.{name}" for what, name in
                 (("key-file", "key"), ("socket", "socket"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]
        self.start(["munged", "--foreground", "--force", *munge])
        self.wait_for(lambda: (self.root / "munge.socket").exists(), "munged")
        self.start(self.on(self.hosts[0], ["slurmctld", "-D"]))
        for host in self.hosts:
            self.start(self.on(host, ["slurmd", "-D", "-N", host]))
        self.wait_for(lambda: self.ask(["sinfo", "-h", "-t", "idle", "-o", "%D"]).strip() == "2", "two idle nodes")

    def on(self, host, command):
        """A command on a node. Not by `ip netns exec`, which mounts a /sys without cgroups: slurmd would stop."""
        inside = f'hostname {host}; mount --bind {self.root}/hosts /etc/hosts; mount -t tmpfs tmpfs /tmp; exec "$@"'
        return ["nsenter", f"--net=/var/run/netns/{host}", "unshare", "--uts", "--mount", "bash", "-c", inside, "bash", *map(str, command)]

    def start(self, command):
        with (self.root / "daemons.log").open("a") as log:
            self.processes.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def ask(self, command):
        done = subprocess.run(self.on(self.hosts[0], command), env={**self.environment, "SALA_PROGRAM": h.SALA}, capture_output=True,
                              text=True, check=False)
        return done.stdout if done.returncode == 0 else f"failed: {done.stderr}"

    def daemons(self):
        return "\n--- daemons\n" + "".join(log.read_text()[-4000:] for log in self.root.glob("*.log"))

    def wait_for(self, condition, what, seconds=60):
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {seconds} s for {what}: {self.daemons()}")
            time.sleep(0.1)

    def end(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Slurm(r.TwoHosts):
    test_a_cut_cable = None  # ranks_test.py has it

    def setUp(self):
        missing = [program for program in PROGRAMS if shutil.which(program) is None]
        if missing:
            self.skipTest(f"not installed: {', '.join(missing)}")
        super().setUp()
        self.cluster = Cluster(self.hosts)
        self.addCleanup(self.cluster.end)
        self.cluster.begin()

    def submit(self, name, *more):
        self.run_directory = h.ROOT / "runs" / name
        self.log = h.ROOT / f"{name}.log"
        arguments = h.train(r.config(), self.run_directory, *more)
        out = self.cluster.ask(["sbatch", "--parsable", f"--output={self.log}", "--time=60", SCRIPT, arguments[1], arguments[3], *arguments[4:]])
        self.assertRegex(out, r"^\d+\s*$")
        self.job = out.strip()

    def show(self, field):
        found = re.search(rf"\b{field}=(\S+)", self.cluster.ask(["scontrol", "show", "job", self.job]))
        return found.group(1) if found else ""

    def ranks(self):
        """As r.ranks_of, by Slurm's own variable."""
        found = {}
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().split(b"\0")
                if words[0] == h.SALA.encode() and str(self.run_directory).encode() in words:
                    found[int(re.search(rb"SLURM_PROCID=(\d+)", (folder / "environ").read_bytes()).group(1))] = int(folder.name)
            except (OSError, IndexError, AttributeError):
                continue
        return found

    def wait_for_a_checkpoint(self):
        self.cluster.wait_for(lambda: h.checkpoints(self.run_directory), "a checkpoint", 120)
        self.pids = self.ranks()
        self.assertEqual(sorted(self.pids), list(range(r.RANKS)))

    def assert_completes(self):
        self.cluster.wait_for(lambda: self.show("JobState") in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), "the end of the job", 200)
        self.assertEqual(self.show("JobState"), "COMPLETED",
                         self.log.read_text() + self.cluster.ask(["scontrol", "show", "job", self.job]) + self.cluster.daemons())
        self.assertEqual(h.differences(r.oracle(), self.run_directory), [])

    def assert_queued_again(self, code):
        """And the job, when it starts again, goes on to the same bits."""
        self.cluster.wait_for(lambda: self.show("Restarts") == "1", f"the job to be queued again: {self.log.read_text()}")
        self.assertEqual({rank for rank, pid in self.pids.items() if r.alive(pid)}, set())
        self.assertIn(f"exit code {code}; queued again, restart 1 of 20", self.log.read_text())
        time.sleep(3)  # the revoked credential of the first start counts for its second
        self.cluster.ask(["scontrol", "update", f"JobId={self.job}", "StartTime=now"])  # in place of two minutes of waiting
        self.assert_completes()
        self.assertIn("resumed after step", self.log.read_text())

    def test_a_job_of_two_nodes(self):
        self.submit("completes")
        self.assert_completes()
        hosts = h.json.loads((self.run_directory / "logs" / "ranks.json").read_text())["hosts"]
        self.assertEqual(hosts, [self.hosts[0]] * 2 + [self.hosts[1]] * 2)

    def test_a_job_at_its_time_limit(self):
        r.oracle()
        self.submit("time-limit")
        self.wait_for_a_checkpoint()
        self.cluster.ask(["scancel", "--signal=USR2", self.job])  # what --signal=USR2@600 does
        self.assert_queued_again(75)

    def test_a_job_that_loses_a_rank(self):
        r.oracle()
        self.submit("killed")
        self.wait_for_a_checkpoint()
        os.kill(self.pids[3], h.SIGKILL)
        self.assert_queued_again(137)

    def test_a_job_that_hangs(self):
        r.oracle()
        self.submit("hangs", *r.LIMITS)
        self.wait_for_a_checkpoint()
        os.kill(self.pids[3], h.signal.SIGSTOP)
        self.assert_queued_again(71)
        self.assertIn(f"WATCHDOG: rank 3@{self.hosts[1]} did not arrive", self.log.read_text())


del r.TwoHosts, r.OneHost, r.FullDiskOfOneRank  # only the classes of this file are run

if __name__ == "__main__":
    tempfile.tempdir = "/var/tmp"  # each node has a /tmp of its own
    h.main()
