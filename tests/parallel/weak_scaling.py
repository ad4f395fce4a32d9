#!/usr/bin/env python3
"""Weak scaling of training: constant work a rank on 1, 2, 4 and 8 ranks, as a Markdown table. No test: it measures.

    python3 tests/parallel/weak_scaling.py --sala build/release/bin/sala --mpirun mpirun

dp: as many samples a rank.  cp: a sequence that grows with the ranks (attention's work for each token grows with it, which is
said, not hidden: `useful work` is relative to one rank).  tp: as many samples a rank, so one replica works on more of them.
Times are medians over the steps behind the first two, of this invocation only. On a machine with fewer cores than ranks the ranks
take turns: the efficiency that matters there is `per core`, what is left when the cores' sharing is taken out.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "integration"))
import harness as h  # noqa: E402

STEPS = 5
WARM = 2
SEQ = 256
MODEL = h.model(hidden_size=128, intermediate_size=320, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                head_dim=16, mixer_types=["minicpm4", "lightning-attn", "lightning-attn", "lightning-attn"])


def stage(seq_len, sequences):
    return {**h.pretrain("only", STEPS, first=True, model=MODEL, checkpoint={"every_steps": 0},
                         batch=h.batch(STEPS, seq_len=seq_len, sequences=sequences, micro=1)),
            "data": h.data(h.ingest("prose", documents=4000), validation={"fraction": 0})}


# By kind: parallel section, sequence length and sequences for so many ranks.
KINDS = {
    "dp, ZeRO-1": lambda n: ({"zero_stage": 1}, SEQ, 4 * n),
    "dp, ZeRO-3": lambda n: ({"zero_stage": 3}, SEQ, 4 * n),
    "cp": lambda n: ({"cp": n}, SEQ * n, 4),
    "tp": lambda n: ({"tp": n}, SEQ, 4 * n),
}


def measure(kind, ranks):
    parallel, seq_len, sequences = KINDS[kind](ranks)
    folder = h.ROOT / f"{kind.replace(', ', '_')}-{ranks}"
    config = h.write_stage(folder / "stage.yaml", {**stage(seq_len, sequences), "parallel": parallel})
    h.succeed(h.train(config, folder / "run"), ranks=ranks, limit=1200)
    lines = list(h.metrics(folder / "run").values())[WARM:]
    step = statistics.median(line["step_ms"] for line in lines)
    stragglers = folder / "run" / "metrics" / "stragglers.jsonl"
    slow, comm = 1.0, [0.0]
    if ranks > 1:
        rows = [json.loads(text) for text in stragglers.read_text().splitlines()][WARM:]
        last = rows[-1]["p50_ms"]
        slow = max(last) / statistics.median(last)
        comm = [statistics.median(row["comm_ms"][rank] for row in rows) for rank in range(ranks)]
    all_ranks = json.loads((folder / "run" / "metrics" / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    sent = [sum(count["bytes"] for count in rank["comm"].values()) for rank in all_ranks]
    planned = json.loads(h.succeed(["plan", config, "--ranks", ranks, "--json"]).out)["stages"][0]["phases"][0]
    return {"step": step, "comm": statistics.median(comm), "comm_most": max(comm), "slow": slow, "bytes": max(sent),
            "flop": planned["flop_per_step"] / ranks}


def hardware():
    model = next((line.split(":", 1)[1].strip() for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())
    memory = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) / (1 << 20)
    return f"{len(os.sched_getaffinity(0))} cores ({model}), {memory:.0f} GiB"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sala", required=True)
    parser.add_argument("--mpirun", required=True)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    arguments = parser.parse_args()
    h.SALA, h.MPIRUN = os.path.abspath(arguments.sala), arguments.mpirun
    version = subprocess.run([h.SALA, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    cores = len(os.sched_getaffinity(0))
    print(f"hardware: {hardware()}; load before: {os.getloadavg()[0]:.1f}; {version}")
    print("command: " + " ".join(["python3", "tests/parallel/weak_scaling.py", "--sala", "SALA", "--mpirun", "MPIRUN"]) + "\n")
    print("| kind | ranks | step ms | to one rank | useful work a rank | per core | collectives ms, median (most) of ranks | "
          "slowest / median rank | MB a rank and step |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="sala-scaling-") as folder:
        h.ROOT = pathlib.Path(folder)
        one = None
        for kind in KINDS:
            for ranks in arguments.ranks:
                # One rank is the same run for all kinds but ZeRO-3, which fetches even alone.
                row = measure(kind, ranks)
                if ranks == arguments.ranks[0]:
                    one = row
                ratio, work = row["step"] / one["step"], row["flop"] / one["flop"]
                turns = max(1, ranks / cores) / max(1, arguments.ranks[0] / cores)
                print(f"| {kind} | {ranks} | {row['step']:.1f} | {ratio:.2f} | {work:.2f} | {turns * work / ratio:.2f} | "
                      f"{row['comm']:.1f} ({row['comm_most']:.1f}) | {row['slow']:.2f} | {row['bytes'] / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
