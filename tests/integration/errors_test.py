"""Errors that only the program as a whole raises, what machines do to it, and one error of each exit code of docs/errors.md.

What a machine does rarely (a disk that changes what it stores, a network that breaks) a library does here that is loaded before the
system's own: it stands in for one function of it.
"""

import functools
import os
import pathlib
import re
import shutil
import subprocess
import unittest

import harness as h
from verify_test import one_stage

# Of a file with NAME in its path the last byte is another one once it is on the disk.
CHANGED_ON_DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
int fsync(int fd) {
  char link[64], path[4096] = "";
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if (readlink(link, path, sizeof path - 1) > 0 && strstr(path, NAME) != NULL) {
    const int file = open(path, O_RDWR);
    struct stat info;
    char byte;
    fstat(file, &info);
    if (pread(file, &byte, 1, info.st_size - 1) == 1) {
      byte ^= 1;
      pwrite(file, &byte, 1, info.st_size - 1);
    }
    close(file);
  }
  return ((int (*)(int))dlsym(RTLD_NEXT, "fsync"))(fd);
}
"""

# An exception that no code expects.
THROWS = """
#include <stdexcept>
extern "C" int fsync(int) { throw std::runtime_error("thrown where nothing throws"); }
"""

NO_PROCESSES = """
#include <errno.h>
#include <sys/types.h>
pid_t fork(void) {
  errno = EAGAIN;
  return -1;
}
"""

# The first sum over the ranks fails, on all of them.
BROKEN_NETWORK = """
#include <mpi.h>
int MPI_Allreduce(const void* send, void* receive, int n, MPI_Datatype type, MPI_Op op, MPI_Comm comm) { return MPI_ERR_OTHER; }
"""


@functools.cache
def stand_in(name, source, compiler="cc", *options):
    """Environment of a program in which this code stands before the system's."""
    if shutil.which(compiler) is None:
        raise unittest.SkipTest(f"not installed: {compiler}")
    path = h.ROOT / f"{name}{'.cc' if compiler == 'c++' else '.c'}"
    path.write_text(source)
    library = path.with_suffix(".so")
    subprocess.run([compiler, "-shared", "-fPIC", *options, "-o", library, path, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


@functools.cache
def run_of(name, seed=1):
    """A short run, and its configuration."""
    config = h.write_stage(h.ROOT / "errors" / f"{name}.yaml", h.pretrain("only", 2, first=True, seed=seed))
    run = h.ROOT / "runs" / name
    h.succeed(h.train(config, run))
    return config, run


def checkpoint(name="good", **changes):
    return h.checkpoints(run_of(name, **changes)[1])[-1]


class ErrorCase(unittest.TestCase):
    def refuse(self, arguments, code, name, *texts, **options):
        """One line with the code and all texts."""
        result = h.run(arguments, **options)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn(f"sala: error: {name}: ", result.error_lines[0])
        for text in texts:
            self.assertIn(str(text), result.error_lines[0])
        return result


class Machines(ErrorCase):
    def test_a_disk_that_changes_what_it_stores(self):
        for name, what in (("model.safetensors", "tensor model."), ("config.json", "config.json")):
            with self.subTest(name):
                env = stand_in(f"disk-{name.split('.')[0]}", CHANGED_ON_DISK, "cc", f'-DNAME="/{name}"')
                target = h.ROOT / "exports" / name
                self.refuse(["export", "--ckpt", checkpoint(), "--to", target, "--verify"], 65, "EXP-VERIFY", target, what,
                            "read back differs from what was written", "check the disk", env=env)
                self.assertFalse(target.exists(), "what is not right is not left under its name")

    def test_a_network_that_breaks(self):
        env = stand_in("network", BROKEN_NETWORK, "mpicc")
        run = h.ROOT / "runs" / "network"
        self.refuse(h.train(run_of("good")[0], run), 71, "COMM-FAILED", "MPI_Allreduce", "rank 0@", os.uname().nodename, ranks=2, env=env)

    def test_no_more_processes(self):
        self.refuse(["verify", one_stage("no-fork"), "--only", "saves"], 74, "CHILD-START", "cannot be started", "Resource temporarily unavailable",
                    "limits of this host", env=stand_in("fork", NO_PROCESSES))

    def test_no_more_memory(self):
        # Weights of 4 x 17 GB, and a limit of 4 GiB for all of the process.
        model = h.model(hidden_size=16384, intermediate_size=65536, num_attention_heads=128, num_key_value_heads=2, head_dim=128)
        config = h.write_stage(h.ROOT / "errors" / "large.yaml", h.pretrain("only", 2, first=True, model=model))
        words = h.command(h.train(config, h.ROOT / "runs" / "large"))
        done = subprocess.run(["/bin/sh", "-c", 'ulimit -v 4194304; exec "$@"', "sh", *words], capture_output=True, text=True, cwd=h.ROOT, timeout=60, check=False)
        result = h.Result(done.returncode, done.stdout, done.stderr)
        self.assertEqual(result.code, 71, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertRegex(result.error_lines[0], r"HOST-MEMORY: the system gave this process no more memory .*; ask for less .*sala plan")

    def test_a_defect(self):
        env = stand_in("throws", THROWS, "c++")
        self.refuse(h.train(run_of("good")[0], h.ROOT / "runs" / "throws"), 70, "INTERNAL", "thrown where nothing throws", "report it", env=env)
        # One rank of two: it waits for the other, says with its name what happened and ends the job.
        result = h.run(h.train(run_of("good")[0], h.ROOT / "runs" / "throws-2"), ranks=2, env=env)
        self.assertEqual(result.code, 70, result)
        self.assertRegex(result.err, r"error \[rank \d@\S+\] INTERNAL: thrown where nothing throws; .* report it")


class Program(ErrorCase):
    def test_checkpoints_that_differ(self):
        a, b = checkpoint(), checkpoint("other", seed=2)
        result = self.refuse(["ckpt", "diff", a, b], 65, "CKPT-DIFFERENT", a, b, "tensors differ")
        self.assertRegex(result.out, r"param +model\.embed_tokens\.weight +max \|a - b\|")

    def test_a_number_that_is_no_token(self):
        for text, words in (("1 9999", ["--text", "1 9999"]), ("-1", ["--text", "-1"]), ("a", ["--text", "[1, a]"])):
            with self.subTest(text):
                self.refuse(["tokenizer", "decode", "bytes", *words], 65, "TOK-RANGE", "--text", text.split()[-1], "expected 0 to 260")

    def test_a_run_of_a_check_that_fails(self):
        folder = h.ROOT / "launcher"
        folder.mkdir()
        (folder / "mpirun").write_text("#!/bin/sh\necho 'sala: error: FILE-MISSING: it is Sunday' >&2\nexit 9\n")
        (folder / "mpirun").chmod(0o755)
        result = self.refuse(["verify", one_stage("launcher"), "--only", "ranks"], 76, "VERIFY-FAILED", "ranks", env={"PATH": f"{folder}:{os.environ['PATH']}"})
        self.assertRegex(result.out, r"VERIFY-RUN: run \S+ ended with exit code 9, expected 0: FILE-MISSING: it is Sunday")

    def test_the_second_exit_code_of_a_row(self):
        synth = ["data", "synth", "--task", "passkey", "--tokenizer", "bytes", "--name", "s", "--to", h.ROOT / "synth", "--documents", "4"]
        self.refuse([*synth, "--length", "300", "--min-length", "301"], 64, "EVAL-TASK", "synthetic dataset s", "4 documents of 301 to 300 tokens", "a rising range")
        self.assertFalse((h.ROOT / "synth").exists())
        alone = h.copy_run(checkpoint(), h.ROOT / "alone" / "checkpoint")
        self.refuse(["export", "--ckpt", alone, "--to", h.ROOT / "alone" / "exported"], 66, "EXP-TOKENIZER", alone, "no tokenizer", "--tokenizer")
        text = h.ROOT / "alone" / "text.txt"
        text.write_text("a text\n")
        train = ["tokenizer", "train", "--input", text, "--to", h.ROOT / "alone" / "tokenizer", "--vocab-size", "262"]
        self.refuse([*train, "--added-token", "<a>", "<b>", "<c>"], 78, "TOK-TRAIN", "found 262", "expected at least 263")
        text.write_text("")
        self.refuse(train, 65, "TOK-TRAIN", text, "no text to train")

    def test_a_name_that_a_terminal_would_obey(self):
        self.refuse(["ckpt", "list", "red\x1b[31m\x07\u009b"], 66, "CKPT-NONE", r"red\x1b[31m\x07\xc2\x9b: no such directory")
        lines = "a\nsala: error: FILE-READ: made up"  # no second error
        for words, code in ((["generate", "--ckpt", lines, "--prompt", "a"], 66), (["export", "--ckpt", lines, "--to", "x"], 66),
                            (["eval", "--ckpt", lines, "--to", "x", "--tasks", "passkey", "--lengths", "512"], 66),
                            (["generate", "--ckpt", lines, "--prompt", "a", "--tokenizer", "bytes"], 65),
                            (["generate", "--ckpt", checkpoint(), "--tokenizer", "bytes", "--messages", lines], 66)):
            result = h.run(words)
            self.assertEqual(result.code, code, result)
            self.assertEqual(result.err.count("\n"), 1, result)


class ExitCodes(ErrorCase):
    """One error of each, through the program. That each row of the catalogue has the exit codes it is raised with is a check of
    tests/structure, and the harness looks at every error line of every test."""

    def stopped(self):
        run = h.ROOT / "runs" / "stopped"
        stage = h.pretrain("only", 400, first=True, data=h.data(h.ingest("prose"), validation={"fraction": 0}))
        for view in stage["data"]["mixture"]:
            view["max_epochs"] = 1000
        job = h.Job(h.train(h.write_stage(h.ROOT / "errors" / "stopped.yaml", stage), run))
        self.assertTrue(job.wait_for(lambda: len(h.metrics(run)) > 1, "steps"))
        self.assertTrue(job.signal_rank(0, h.SIGTERM))
        return job.result()

    def test_each(self):
        good, run = run_of("good")
        damaged = h.copy_run(checkpoint(), h.ROOT / "damaged")
        h.cut(damaged / "manifest.json")
        diverging = ["schedule.peak_lr=1e30", "optimizer.max_bad_steps=1", "batch.steps=6"]
        for code, name, result in (
                (64, "USAGE", lambda: h.run(["train"])),
                (65, "CKPT-MANIFEST", lambda: h.run(["ckpt", "verify", damaged])),
                (66, "FILE-MISSING", lambda: h.run(["train", h.ROOT / "nowhere.yaml"])),
                (70, "INTERNAL", lambda: h.run(h.train(good, h.ROOT / "runs" / "exit-70"), env=stand_in("throws", THROWS, "c++"))),
                (71, "CUDA-MODULE", lambda: h.run(h.train(good, h.ROOT / "runs" / "exit-71", "run.device=cuda"), env={"SALA_CUDA_MODULE": "./none.so"})),
                (74, "EVAL-EXISTS", lambda: self.second_evaluation()),
                (75, "STOPPED", self.stopped),
                (76, "NUM-NONFINITE", lambda: h.run(h.train(good, h.ROOT / "runs" / "exit-76", *diverging))),
                (78, "RUN-EXISTS", lambda: h.run([*h.train(good, run), "--resume", "never"]))):
            with self.subTest(code=code):
                self.codes = getattr(self, "codes", set()) | {code}
                found = result()
                self.assertEqual(found.code, code, found)
                self.assertEqual(len(found.error_lines), 1, found)
                self.assertIn(f"sala: error: {name}: ", found.error_lines[0])
        table = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text().split("\n## ")[1]
        listed = {int(number) for cell in re.findall(r"^\| ([0-9, ]+) \|", table, re.MULTILINE) for number in cell.split(",")}
        self.assertEqual(self.codes, {number for number in listed if 0 < number < 128})

    def second_evaluation(self):
        words = ["eval", "--ckpt", checkpoint(), "--to", h.ROOT / "evaluated", "--tasks", "loss_by_position", "--lengths", "128", "--haystack", h.ingest("prose"), "--samples", "1"]
        h.succeed(words)
        return h.run(words)


if __name__ == "__main__":
    h.main()
