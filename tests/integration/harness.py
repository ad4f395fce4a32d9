"""What the integration tests share: a tiny corpus, tiny configurations, and running `sala` alone or under mpirun.

A model of 4 layers with width 32 on bytes takes a few milliseconds a step, so a test can afford whole runs. Everything a test
makes lies in a temporary folder that goes with the process. Only Python's standard library is used.
"""

import argparse
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

SALA = ""
MPIRUN = ""
ROOT = pathlib.Path()  # temporary folder of this process
LIMIT_SECONDS = 120  # of one command; the longest takes a few seconds, so this only ends what hangs

SEQ = 64  # tokens of a sample


def main():
    """Reads the command line of a test program, makes its folder and runs its unittest classes."""
    global SALA, MPIRUN, ROOT
    parser = argparse.ArgumentParser()
    parser.add_argument("--sala", required=True)
    ranks = parser.add_mutually_exclusive_group(required=True)
    ranks.add_argument("--mpirun")
    ranks.add_argument("--no-mpi", dest="mpirun", action="store_const", const="", help="tests of several ranks are skipped")
    known, rest = parser.parse_known_args()
    SALA, MPIRUN = os.path.abspath(known.sala), known.mpirun
    with tempfile.TemporaryDirectory(prefix="sala-integration-") as folder:
        ROOT = pathlib.Path(folder)
        program = unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=2)
    sys.exit(0 if program.result.wasSuccessful() else 1)


# ---- commands ----

# Behind the code comes what was wrong, not a second code.
ERROR_LINE = re.compile(r"sala: error: ([A-Z]+(?:-[A-Z0-9]+)*): (?![A-Z]+(?:-[A-Z0-9]+)+: )\S")


@functools.cache
def error_catalogue():
    """{code: exit codes}, from docs/errors.md."""
    text = (pathlib.Path(__file__).resolve().parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([A-Z0-9-]+)` \| ([0-9, ]+) \|", text, re.MULTILINE)
    return {code: {int(number) for number in numbers.split(",")} for code, numbers in rows}


class Result:
    """What a command printed and its exit code. Each error line of the program must be one of docs/errors.md: a code of its tables,
    with an exit code of that row, and nothing unprintable in it."""

    def __init__(self, code, out, err, mpirun=False):
        self.code, self.out, self.err = code, out, err
        for line in self.error_lines:
            found = ERROR_LINE.search(line)
            if found is None or not line.isprintable():
                raise AssertionError(f"not an error line of docs/errors.md: {line!r}: {self}")
            # Below 0 and above 128 it was a signal that ended the process; 1 may be mpirun's own, where a signal ended it.
            if (1 if mpirun else 0) < code < 128 and code not in error_catalogue().get(found.group(1), set()):
                raise AssertionError(f"docs/errors.md has no row of {found.group(1)} with exit code {code}: {self}")

    @property
    def error_lines(self):
        return [line for line in self.err.splitlines() if "sala: error:" in line]

    def __str__(self):
        return f"exit code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def need_ranks():
    """Skips what needs several ranks where there is nothing to start them with."""
    if not MPIRUN:
        raise unittest.SkipTest("needs several ranks: a program without MPI (--no-mpi) is one process")


def command(arguments, ranks=None):
    """ranks None: without mpirun."""
    program = [SALA, *(str(a) for a in arguments)]
    if ranks is None:
        return program
    need_ranks()
    return [MPIRUN, "-np", str(ranks), *program]


def run(arguments, ranks=None, env=None, cwd=None, limit=LIMIT_SECONDS):
    done = subprocess.run(command(arguments, ranks), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                          env={**os.environ, **(env or {})}, cwd=cwd or ROOT, timeout=limit, check=False)
    return Result(done.returncode, done.stdout, done.stderr, mpirun=ranks is not None)


def succeed(arguments, ranks=None, **options):
    result = run(arguments, ranks, **options)
    if result.code != 0:
        raise AssertionError(f"sala {' '.join(str(a) for a in arguments)}: {result}")
    return result


class Job:
    """A run in the background."""

    def __init__(self, arguments, ranks=None, env=None, program=None):
        """`program`: words to start in place of `sala arguments`."""
        self.ranks = ranks
        self._out = tempfile.TemporaryFile(mode="w+", dir=ROOT)
        self._err = tempfile.TemporaryFile(mode="w+", dir=ROOT)
        words = command(arguments, ranks) if program is None else [str(word) for word in program]
        self.process = subprocess.Popen(words, stdout=self._out, stderr=self._err, cwd=ROOT,
                                        env={**os.environ, **(env or {})})

    def running(self):
        return self.process.poll() is None

    def wait_for(self, condition, what):
        """False when the job ended before the condition held."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"waited {LIMIT_SECONDS} s for {what}: {self.result()}")
            time.sleep(0.001)
        return True

    def pid_of(self, rank):
        """Process id of a rank, None while it does not exist (or no longer)."""
        if self.ranks is None:
            return self.process.pid
        wanted = f"OMPI_COMM_WORLD_RANK={rank}".encode()
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
                if parent == self.process.pid and wanted in (stat.parent / "environ").read_bytes().split(b"\0"):
                    return int(stat.parent.name)
            except (OSError, IndexError):
                continue
        return None

    def signal_rank(self, rank, number):
        pid = self.pid_of(rank)
        if pid is None:
            return False
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def result(self):
        try:
            code = self.process.wait(timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"still running after {LIMIT_SECONDS} s: {' '.join(self.process.args)}") from None
        texts = []
        for stream in (self._out, self._err):
            stream.seek(0)
            texts.append(stream.read())
            stream.close()
        return Result(code, *texts, mpirun=self.ranks is not None)


# Gathers on the thread beside the computation, which is not the process's first one, take their time.
_SLOW_GATHERS = """
#define _GNU_SOURCE
#include <mpi.h>
#include <sys/syscall.h>
#include <unistd.h>
int MPI_Allgatherv(const void* send, int n, MPI_Datatype type, void* all, const int* counts, const int* offsets,
                   MPI_Datatype all_type, MPI_Comm comm) {
  if (syscall(SYS_gettid) != getpid()) usleep(MICROSECONDS);
  return PMPI_Allgatherv(send, n, type, all, counts, offsets, all_type, comm);
}
"""


def slow_gathers(seconds):
    """Environment of a run whose gathers beside the computation take this much longer, as over a slow network."""
    compiler = shutil.which("mpicc")
    if compiler is None:
        raise unittest.SkipTest("not installed: mpicc")
    source = ROOT / f"slow-{seconds}.c"
    source.write_text(_SLOW_GATHERS)
    library = source.with_suffix(".so")
    subprocess.run([compiler, f"-DMICROSECONDS={round(seconds * 1e6)}", "-shared", "-fPIC", "-o", library, source], check=True)
    return {"LD_PRELOAD": str(library)}


# ---- data ----

_WORDS = {
    "subject": ["the baker", "a quiet river", "my sister", "the old engine", "every student", "the lamp", "a grey cat", "the captain"],
    "verb": ["watches", "repairs", "remembers", "carries", "follows", "paints", "measures", "forgets"],
    "object": ["the bridge", "seven apples", "a long letter", "the garden", "an open door", "the map", "cold bread", "two stones"],
    "end": ["before noon.", "in the rain.", "without a word.", "near the harbour.", "again and again.", "for a friend."],
}


class Draws:
    """A linear congruential generator (Knuth's MMIX constants): the corpus is the same bytes with every Python."""

    def __init__(self, seed):
        self.state = seed

    def below(self, n):
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % n


def sentences(draws, count):
    return " ".join(" ".join(words[draws.below(len(words))] for words in _WORDS.values()) for _ in range(count))


def write_texts(path, documents, seed=1, most_sentences=6):
    """One document a paragraph."""
    draws = Draws(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(sentences(draws, 1 + draws.below(most_sentences)) for _ in range(documents)) + "\n")


def ingest(name, documents=300, seed=1, tokenizer="bytes", most_sentences=6):
    """A token store of text, made once."""
    store = ROOT / "corpus" / name
    if not store.exists():
        text = ROOT / "corpus" / f"{name}.txt"
        write_texts(text, documents, seed, most_sentences)
        succeed(["data", "ingest", "--input", text, "--blank-lines", "--tokenizer", tokenizer, "--name", name, "--to", store])
    return store


def chat(name="chat", tokenizer="bytes"):
    store = ROOT / "corpus" / name
    if not store.exists():
        succeed(["data", "synth", "--task", "continuation", "--from", ingest("prose"), "--tokenizer", tokenizer, "--name", name,
                 "--to", store, "--documents", "120", "--prompt-tokens", "12", "--answer-tokens", "16"])
    return store


# ---- configurations ----


def model(**changes):
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "dim_model_base": 16, "scale_emb": 4, **changes}


def data(*stores, **changes):
    return {"packing": "concat", "validation": {"fraction": 0.1, "max_tokens": 1024},
            "mixture": [{"dataset": str(store), "max_epochs": 8} for store in stores], **changes}


def batch(steps, sequences=4, seq_len=SEQ, micro=2):
    return {"seq_len_tokens": seq_len, "global_batch_tokens": sequences * seq_len, "micro_batch_sequences": micro, "steps": steps}


def schedule(steps, peak_lr=0.01):
    return {"shape": "constant", "peak_lr": peak_lr, "warmup_steps": min(2, steps - 1)}


def pretrain(name, steps, first=False, **changes):
    stage = {"kind": "pretrain", "name": name}
    if first:
        stage["model"] = model()
    return {**stage, "batch": batch(steps), "schedule": schedule(steps), "optimizer": {"clip_norm": 1.0},
            "data": data(ingest("prose")), "checkpoint": {"every_steps": 2, "keep_last": 2}, **changes}


def sft(name, steps, **changes):
    return {"kind": "sft", "name": name, "batch": batch(steps), "schedule": schedule(steps, 0.002),
            "data": data(chat(), packing="best_fit"), "checkpoint": {"every_steps": 2, "keep_last": 2}, **changes}


def halo(name, align_steps, distil_steps, **changes):
    def phase(steps, lr):
        return {"batch": batch(steps), "schedule": schedule(steps, lr), "optimizer": {"weight_decay": 0, "matrix_lr_multiplier": 1}}

    section = {"keep": [0], "softmax_layers": 2, "score": {"text_tokens": 512, "recall_items": 4, "recall_length_tokens": 384, "bootstrap": 10},
               "align": phase(align_steps, 0.003), "distil": phase(distil_steps, 0.002), **changes.pop("halo", {})}
    return {"kind": "halo", "name": name, "data": data(ingest("prose")), "checkpoint": {"every_steps": 2, "keep_last": 2},
            "halo": section, **changes}


def yaml(value, indent=0):
    """Block style down to lists, which are written in flow style (JSON is YAML)."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [" " * indent + f"{key}:", yaml(item, indent + 2).rstrip("\n")]
        else:
            lines.append(" " * indent + f"{key}: {json.dumps(item)}")
    return "\n".join(lines) + "\n"


def write_stage(path, stage, tokenizer="bytes"):
    """A stage that is run on its own; the run directory comes from --run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml({**stage, "tokenizer": tokenizer, "run": {"dir": str(ROOT / "runs" / "unnamed")}}))
    return path


def write_pipeline(folder, stages, tokenizer="bytes"):
    folder.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        (folder / f"{stage['name']}.yaml").write_text(yaml(stage))
    pipeline = folder / "pipeline.yaml"
    pipeline.write_text(yaml({"kind": "pipeline", "name": folder.name, "tokenizer": tokenizer,
                              "run": {"dir": str(ROOT / "runs" / "unnamed")}, "stages": [f"{s['name']}.yaml" for s in stages]}))
    return pipeline


def train(config, run_directory, *more):
    """Arguments of `sala train`; `more` are --set values."""
    sets = [word for value in more for word in ("--set", value)]
    return ["train", config, "--run", run_directory, *sets]


# ---- results ----


def metrics(run_directory, name="train"):
    """The last line of each step and phase, without half lines of killed processes and without events."""
    lines = {}
    path = run_directory / "metrics" / f"{name}.jsonl"
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if "stage" in line:
            lines[line["step"], line["stage"], line["phase"]] = line
    return lines


def checkpoints(run_directory):
    return sorted((run_directory / "checkpoints").glob("step-*"))


def manifest(checkpoint):
    return json.loads((checkpoint / "manifest.json").read_text())


def final_checkpoints(run_directory):
    """By stage."""
    found = {}
    for checkpoint in checkpoints(run_directory):
        stage = manifest(checkpoint)["stage"]
        if stage["final"]:
            found[stage["name"]] = checkpoint
    return found


# Of a line of metrics, everything that the bits of a run decide; the rest is time and memory.
STEP_FIELDS = ("stage_step", "tokens", "target_tokens", "tokens_total", "loss_hex", "grad_norm_hex", "lr", "clipped", "skipped", "data_crc")


def differences(run_a, run_b):
    """Where two runs are not the same, bit for bit, as a list of lines: metrics of every step, values of every validation, and
    every tensor of every stage's final checkpoint."""
    found = []
    a, b = metrics(run_a), metrics(run_b)
    if not a or a.keys() != b.keys():
        found.append(f"other steps: {sorted(a.keys() ^ b.keys())} of {len(a)} and {len(b)}")
    for key in sorted(a.keys() & b.keys()):
        found += [f"step {key}: {field}: {a[key][field]} and {b[key][field]}" for field in STEP_FIELDS if a[key][field] != b[key][field]]
    a, b = metrics(run_a, "valid"), metrics(run_b, "valid")
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            found.append(f"validation {key}: {a.get(key)} and {b.get(key)}")
    a, b = final_checkpoints(run_a), final_checkpoints(run_b)
    if not a or a.keys() != b.keys():
        found.append(f"final checkpoints of other stages: {sorted(a)} and {sorted(b)}")
    for stage in sorted(a.keys() & b.keys()):
        result = run(["ckpt", "diff", a[stage], b[stage]])
        if result.code != 0:
            found.append(f"final checkpoint of {stage}: {result.out}{result.err}")
    return found


def relative_differences(checkpoint_a, checkpoint_b, kind):
    """By tensor; tensors of equal bits are left out. Fails when the checkpoints hold other tensors."""
    result = run(["ckpt", "diff", checkpoint_a, checkpoint_b])
    found = {}
    for line in result.out.splitlines():
        words = line.split()
        if words and words[0] == kind:
            relative = re.search(r"relative (\S+)$", line)
            if relative is None:
                raise AssertionError(line)
            found[words[1]] = float(relative.group(1))
    if result.code not in (0, 65) or "tensors have the same bits" not in result.out:
        raise AssertionError(result)
    return found


# ---- damage ----

_CRC_TABLE = []
for _byte in range(256):
    for _ in range(8):
        _byte = (_byte >> 1) ^ (0x82F63B78 if _byte & 1 else 0)
    _CRC_TABLE.append(_byte)


def crc32c(content):
    crc = 0xFFFFFFFF
    for byte in content:
        crc = (crc >> 8) ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def seal_manifest(checkpoint, change):
    """Applies `change` to the manifest and gives it a right checksum again (docs/formats.md)."""
    path = checkpoint / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    content.pop("self_crc32c")
    content["self_crc32c"] = "00000000"
    text = json.dumps(content, indent=2) + "\n"
    at = text.rindex("00000000")
    path.write_text(text[:at] + f"{crc32c(text.encode()):08x}" + text[at + 8:])


def flip_bit(path, offset=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 4
    path.write_bytes(content)


def cut(path, by=16):
    path.write_bytes(path.read_bytes()[:-by])


def copy_run(source, target):
    shutil.copytree(source, target, symlinks=True)
    return target


SIGKILL, SIGUSR1, SIGUSR2, SIGTERM = signal.SIGKILL, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM
