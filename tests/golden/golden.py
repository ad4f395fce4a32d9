#!/usr/bin/env python3
"""Exact losses of 100 steps of every kind of stage, against those that are committed.

    python3 tests/golden/golden.py --sala build/release/bin/sala                  # as a test
    python3 tests/golden/golden.py --sala build/release/bin/sala --make           # writes losses.json again

One tiny pipeline (4 layers on bytes, 12 s on one core) goes through pretraining, HALO's alignment and distillation, stable
training, decay, long decay with block-sparse attention and SFT. losses.json has the loss of each step as a hexadecimal float,
and of each stage a checksum of the data it saw and of the parameters it ended with. The bits must be these on every x86-64
machine, with every vector width, number of threads and C library: --threads, --cpu and --libm say what to try.

A difference is a change of the numbers. Where it is meant, make the file again and say in the commit what changed them.
"""

import argparse
import hashlib
import json
import os
import pathlib
import struct
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "integration"))

import harness as h  # noqa: E402

LOSSES = HERE / "losses.json"
STEPS = 100
LIMIT_SECONDS = 900  # the portable loops on a loaded machine; ends only what hangs
SKIPPED = 77  # exit code that ctest shows as "not run"

# No width is a multiple of a vector's, so that loops end in every way they can.
MODEL = {"hidden_size": 40, "intermediate_size": 104, "head_dim": 10, "initializer_range": 0.1,
         "sparse_config": {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "init_blocks": 1, "window_size": 16, "topk": 2,
                           "dense_len": 48}}
LONG = 120  # tokens of a sample in the long stages: most documents have at least dense_len

# What keeps the C library from choosing other variants of its functions: the names of glibc from 2.33 on, and those before.
OLD_PROCESSOR = ("glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F,-AVX512VL,-AVX512BW,-AVX512DQ"
                 ":glibc.cpu.x86_hwcaps=-AVX2_Usable,-FMA_Usable")


def stages():
    def common(sequences=4, micro=2, seq_len=h.SEQ):
        return {"batch": h.batch(STEPS, sequences, seq_len, micro), "checkpoint": {"every_steps": 0},
                "validation": {"every_steps": 0}}

    prose = h.data(h.ingest("prose"))
    long_data = h.data(h.ingest("long", documents=120, seed=5, most_sentences=5), packing="best_fit")
    halo = h.halo("halo", STEPS, STEPS, data=prose, **{key: value for key, value in common().items() if key != "batch"})
    for phase in ("align", "distil"):
        halo["halo"][phase]["schedule"] = {"shape": "cosine", "peak_lr": 0.01, "final_lr": 0.001, "warmup_steps": 5}
    return [
        h.pretrain("base", STEPS, first=True, model=h.model(**MODEL), data=prose, **common(),
                   schedule={"shape": "linear", "peak_lr": 0.02, "final_lr": 0.01, "warmup_steps": 10}),
        halo,
        h.pretrain("stable", STEPS, data=prose, **common()),
        h.pretrain("decay", STEPS, carry_optimizer=True, data=prose, **common(),
                   schedule={"shape": "exponential", "peak_lr": 0.01, "final_lr": 0.002}),
        h.pretrain("long_decay", STEPS, carry_optimizer=True, sparse_attention=True, data=long_data,
                   **common(2, 1, LONG), schedule={"shape": "exponential", "peak_lr": 0.005, "final_lr": 0.001}),
        h.sft("sft", STEPS, sparse_attention=True, **common(2, 1, LONG),
              schedule={"shape": "cosine", "peak_lr": 0.002, "final_lr": 0.0001, "warmup_steps": 5}),
    ]


def checksum_of_parameters(checkpoint, folder):
    """Of the names and the float32 bits of all tensors."""
    h.succeed(["export", "--ckpt", checkpoint, "--to", folder, "--dtype", "f32"])
    content = (folder / "model.safetensors").read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    header, values = json.loads(content[8:8 + size]), content[8 + size:]
    checksum = hashlib.sha256()
    for name in sorted(header.keys() - {"__metadata__"}):
        begin, end = header[name]["data_offsets"]
        checksum.update(name.encode() + b"\0" + values[begin:end])
    return checksum.hexdigest()


def train(count, threads, environment):
    """{stage or stage.phase: {losses, data, parameters}} of a new run of the first `count` stages."""
    run = h.ROOT / "runs" / "golden"
    pipeline = h.write_pipeline(h.ROOT / "golden", stages()[:count])
    h.succeed(h.train(pipeline, run, f"run.threads={threads}"), env=environment, limit=LIMIT_SECONDS)
    found, data = {}, {}
    for line in h.metrics(run).values():
        stage = line["stage"] + (f".{line['phase']}" if line["phase"] != "train" else "")
        found.setdefault(stage, {"losses": []})["losses"].append(line["loss_hex"])
        data.setdefault(stage, hashlib.sha256()).update(line["data_crc"].encode())
    for stage, checksum in data.items():
        found[stage]["data"] = checksum.hexdigest()
    for stage, checkpoint in h.final_checkpoints(run).items():
        last = [name for name in found if name.split(".")[0] == stage][-1]
        found[last]["parameters"] = checksum_of_parameters(checkpoint, h.ROOT / "exports" / stage)
    return found


# ---- comparison ----


def ordinal(value):
    """Neighbouring float64 numbers have neighbouring ordinals."""
    bits = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits if bits >= 0 else -(bits + 2**63)


def difference(stage, expected, found):
    """The first difference of a stage, "" where there is none."""
    for step, (a, b) in enumerate(zip(expected["losses"], found["losses"]), start=1):
        x, y = float.fromhex(a), float.fromhex(b)
        if x != y:
            before = f"steps 1 to {step - 1} are equal" if step > 1 else "no step is equal"
            data = "the same data" if expected["data"] == found["data"] else "OTHER DATA"
            return (f"{stage}: step {step}: expected {a} ({x:.9g}), found {b} ({y:.9g}): {abs(ordinal(x) - ordinal(y))} units in "
                    f"the last place apart; {before}; {data}")
    if len(expected["losses"]) != len(found["losses"]):
        return f"{stage}: expected {len(expected['losses'])} steps, found {len(found['losses'])}"
    for key in ("data", "parameters"):
        if expected.get(key) != found.get(key):
            return f"{stage}: all losses are equal, but not the {key}: expected {expected.get(key)}, found {found.get(key)}"
    return ""


def compare(expected, found):
    """A line for each stage that differs, in the order in which they run."""
    lines = [f"{stage}: {'missing' if stage in expected else 'not expected'}"
             for stage in [*expected, *found] if (stage in expected) != (stage in found)]
    return lines + [line for line in (difference(stage, expected[stage], found[stage]) for stage in expected if stage in found) if line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sala", required=True, metavar="PROGRAM")
    parser.add_argument("--make", action="store_true", help="write losses.json instead of comparing with it")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", choices=("portable", "avx2", "avx512"), help="SALA_CPU; default: the best one")
    parser.add_argument("--stages", type=int, metavar="N", help="only the first N stages")
    parser.add_argument("--libm", action="store_true", help="with the C library's functions for processors without AVX2 and FMA")
    options = parser.parse_args()

    environment = {"OMP_NUM_THREADS": "1"}
    if options.cpu:
        environment["SALA_CPU"] = options.cpu
    if options.libm:
        environment["GLIBC_TUNABLES"] = OLD_PROCESSOR
    h.SALA = os.path.abspath(options.sala)
    if not os.access(h.SALA, os.X_OK) or os.path.isdir(h.SALA):
        print(f"--sala {options.sala}: no such program; build it: ninja -C build/release sala", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="sala-golden-") as folder:
        h.ROOT = pathlib.Path(folder)
        if options.cpu and "SALA_CPU" in h.run(["doctor"], env=environment).err:
            print(f"this processor has no {options.cpu}")
            return SKIPPED
        found = train(options.stages, options.threads, environment)
    if options.make:
        LOSSES.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {LOSSES}")
        return 0
    expected = json.loads(LOSSES.read_text())
    if options.stages:
        expected = {stage: expected[stage] for stage in list(expected)[:len(found)]}
    lines = compare(expected, found)
    for line in lines:
        print(line)
    print(f"{len(found)} kinds of stages, {sum(len(stage['losses']) for stage in found.values())} steps: "
          + ("all bits as expected" if not lines else f"{len(lines)} differ"))
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
