#!/usr/bin/env python3
"""Compares two evaluations of one checkpoint with the same options, one on the CPU in float32 and one on a GPU in bfloat16.

    python3 tests/cuda/compare_evaluations.py CPU_EVALUATION GPU_EVALUATION

The weights and the prompts are the same, so the numbers differ by the rounding of one forward pass. A mean loss over many tokens:
as the first step of a run (LOSS, FIRST of compare_runs.py). The mean log probability of an answer is of few tokens, and relative
to a log probability near 0 any difference is large: ANSWER is in nats. A hidden state is off by some 1 % (sqrt(40) roundings of
2^-9), the logits of a trained model deviate by 2 to 3 from their mean, and a log probability holds two such errors: 0.04 nats of
one token. Where block-sparse attention chooses other blocks it is more, and it does so for few tokens.
"""

import argparse
import json
import math
import os
import sys

LOSS = 0.005
ANSWER = 0.04


def read(folder):
    """{task and length: mean loss, or mean log probability}, and the counts of right answers."""
    values, right = {}, {}
    path = os.path.join(folder, "summary.jsonl")
    if not os.path.exists(path):
        return values, right
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            name = f"{row['task']} {row['length']}"
            if "buckets" in row:
                tokens = sum(bucket["count"] for bucket in row["buckets"])
                values[name] = sum(bucket["loss"] * bucket["count"] for bucket in row["buckets"]) / tokens
            else:
                values[name] = row["mean_log_probability"]
                right[name] = f"{row['right']}/{row['count']}"
    return values, right


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu")
    parser.add_argument("gpu")
    options = parser.parse_args()
    (cpu, cpu_right), (gpu, gpu_right) = read(options.cpu), read(options.gpu)
    faults = 0
    print(f"{'task and length':<24}{'CPU':>10}{'GPU':>10}{'difference':>12}{'allowed':>9}  right on CPU, GPU")
    for name in sorted(cpu.keys() | gpu.keys()):
        expected, found = cpu.get(name, math.nan), gpu.get(name, math.nan)
        allowed = ANSWER if name in cpu_right else LOSS * expected
        difference = found - expected
        good = abs(difference) <= allowed  # false for a missing number
        faults += not good
        print(f"{name:<24}{expected:>10.4f}{found:>10.4f}{difference:>12.5f}{allowed:>9.4f}"
              f"  {cpu_right.get(name, '-')}, {gpu_right.get(name, '-')}" + ("" if good else "  too far"))
    if not cpu:
        print(f"{options.cpu}: holds no evaluation")
        faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
