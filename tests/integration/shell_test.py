"""What a shell sees of every command: help, examples, completion, --quiet, colour, and doctor."""

import json
import os
import pathlib
import pty
import re
import shlex
import subprocess
import unittest

import harness as h


def commands(path=()):
    """All command paths, the program itself first, as --help names them."""
    out = h.succeed([*path, "--help"]).out
    yield path, out
    section = re.search(r"^Subcommands:\n((?:  .*\n)+)", out, re.MULTILINE)
    if section:
        for name in re.findall(r"^  ([a-z-]+) ", section.group(1), re.MULTILINE):
            yield from commands((*path, name))


def on_terminal(arguments):
    """Exit code and everything that a terminal was sent."""
    parent, child = pty.openpty()
    process = subprocess.Popen([h.SALA, *map(str, arguments)], stdin=subprocess.DEVNULL, stdout=child, stderr=child, cwd=h.ROOT,
                               env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"})
    os.close(child)
    text = b""
    while True:
        try:
            piece = os.read(parent, 65536)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        text += piece
    os.close(parent)
    return process.wait(), text.decode()


class Help(unittest.TestCase):
    def test_every_command_has_an_example_that_is_understood(self):
        folder = h.ROOT / "examples"
        folder.mkdir()
        seen = 0
        for path, out in commands():
            if not path:
                continue
            example = re.search(r"^Examples?:\n((?:  .*\n)+)", out, re.MULTILINE)
            self.assertIsNotNone(example, f"sala {' '.join(path)} --help has no example")
            for line in example.group(1).splitlines():
                words = shlex.split(line.split("  #")[0].split("|")[0].split("<")[0].split(">")[0])
                if words[:2] == ["sala", "bench"] or words[:1] != ["sala"]:
                    continue  # minutes of measuring; another program in front
                seen += 1
                # Whatever it lacks here, it is no wrong command line.
                done = subprocess.run([h.SALA, *words[1:]], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                                      check=False)
                self.assertNotEqual(done.returncode, 64, f"{line}: {done.stderr}")
        self.assertGreater(seen, 15)


class Completion(unittest.TestCase):
    def words(self, *typed):
        script = ('source <("$SALA" completion bash)\nCOMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _sala; printf "%s\\n" "${COMPREPLY[@]}"')
        done = subprocess.run(["bash", "-c", script, "bash", *typed], env={**os.environ, "SALA": h.SALA}, capture_output=True, text=True, check=True)
        self.assertEqual(done.stderr, "")
        return done.stdout.split()

    def test_commands_and_options(self):
        self.assertEqual(self.words("sala", "doc"), ["doctor"])
        self.assertIn("ingest", self.words("sala", "data", ""))
        self.assertEqual(self.words("sala", "data", "ingest", "--tok"), ["--tokenizer"])
        self.assertEqual(self.words("sala", "--quiet", "data", "inf"), ["info"])  # an option before the command
        self.assertIn("--quiet", self.words("sala", "ckpt", "list", "runs/train", "--"))

    def test_every_command_is_there(self):
        for path, _ in commands():
            if path:
                self.assertIn(path[-1], self.words("sala", *path))


class Terminal(unittest.TestCase):
    def test_colour_only_on_a_terminal(self):
        code, text = on_terminal(["data", "info", "nowhere"])
        self.assertEqual(code, 66)
        self.assertIn("sala: \x1b[31merror:\x1b[0m DS-MISSING", text)
        code, text = on_terminal(["--color", "never", "data", "info", "nowhere"])
        self.assertIn("sala: error: DS-MISSING", text)
        self.assertNotIn("\x1b", h.run(["data", "info", "nowhere"]).err)
        self.assertIn("\x1b[31m", h.run(["data", "info", "nowhere", "--color", "always"]).err)
        self.assertEqual(h.run(["data", "info", "nowhere", "--color", "red"]).code, 64)

    def test_quiet_run_says_only_what_is_wrong(self):
        config = h.write_pipeline(h.ROOT / "quiet", [h.pretrain("only", 2, first=True)])
        loud = h.succeed(["train", config, "--run", h.ROOT / "runs" / "loud"])
        self.assertRegex(loud.err, r" info .*only")
        quiet = h.succeed(["train", config, "--run", h.ROOT / "runs" / "quiet", "--quiet"])
        self.assertEqual(quiet.err, "")
        losses = [[line["loss_hex"] for line in h.metrics(h.ROOT / "runs" / name).values()] for name in ("loud", "quiet")]
        self.assertEqual(*losses)
        log = (h.ROOT / "runs" / "quiet" / "logs" / "rank-00000.log").read_text()
        self.assertRegex(log, r" info .*only")


class Doctor(unittest.TestCase):
    def rows(self, *arguments, code=0, env=None):
        result = h.run(["doctor", "--json", *arguments], env=env)
        self.assertEqual(result.code, code, str(result))
        return {row["name"]: row for row in json.loads(result.out)}, result

    def test_a_good_machine(self):
        rows, _ = self.rows("--dir", h.ROOT)
        for name in ("CPU", "MPI", "HDF5"):
            self.assertEqual(rows[name]["verdict"], "ok", rows[name])
        self.assertIn("mpirun -np 2 works", rows["MPI"]["found"])
        self.assertRegex(rows["disk"]["found"], r"writes \d+ MB/s")
        self.assertEqual([p.name for p in pathlib.Path(h.ROOT).glob(".sala-doctor*")], [])

    def test_no_launcher(self):
        rows, result = self.rows("--dir", h.ROOT, code=71, env={"PATH": "/nonexistent"})
        self.assertEqual(rows["MPI"]["verdict"], "FAILS")
        self.assertIn("openmpi-bin", rows["MPI"]["remedy"])
        self.assertRegex(result.err, r"DOCTOR: MPI: not in order")

    def test_a_launcher_that_refuses(self):
        folder = h.ROOT / "fake"
        folder.mkdir()
        (folder / "mpirun").write_text("#!/bin/sh\necho it is Sunday\nexit 3\n")
        (folder / "mpirun").chmod(0o755)
        rows, _ = self.rows("--dir", h.ROOT, code=71, env={"PATH": f"{folder}:/usr/bin:/bin"})
        self.assertIn("ends with exit code 3: it is Sunday", rows["MPI"]["found"])

    def test_slow_instructions(self):
        rows, _ = self.rows("--dir", h.ROOT, env={"SALA_CPU": "portable"})
        self.assertEqual(rows["CPU"]["verdict"], "warn")

    def test_nothing_can_be_written(self):
        rows, result = self.rows("--dir", "/proc", code=74)
        self.assertEqual(rows["HDF5"]["verdict"], "FAILS")
        self.assertIn("--dir", rows["HDF5"]["remedy"])
        self.assertEqual(h.run(["doctor", "--dir", h.ROOT / "nowhere"]).code, 66)
        self.assertIn("DOCTOR: HDF5", result.err)


if __name__ == "__main__":
    h.main()
