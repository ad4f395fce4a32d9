#!/usr/bin/env python3
"""Compares the losses of two runs of the same pipeline, one on the CPU in float32 and one on a GPU in bfloat16.

    python3 tests/cuda/compare_runs.py CPU_RUN GPU_RUN

The first losses come from the same weights on the same tokens: they differ by the rounding of one forward pass (FIRST).
After that the two are runs of their own: every update is rounded differently, HALO may choose another layer where two
scores are near, and held-out losses at the end of a stage differ as those of two runs with different seeds would. LATER is
a few times that, and far less than what a wrong gradient does to training; it is a threshold for a person to look, not a
proof that all is well.
"""

import argparse
import json
import math
import os
import sys

FIRST = 0.005
LATER = 0.04


def read_summary(run):
    path = os.path.join(run, "summary.json")
    if not os.path.exists(path):
        return {}
    with open(path, encoding="utf-8") as file:
        return {row["stage"]: row for row in json.load(file)}


def first_loss(run):
    """The training loss of the first step."""
    path = os.path.join(run, "metrics", "train.jsonl")
    if not os.path.exists(path):
        return math.nan
    with open(path, encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if "loss" in row:
                return row["loss"]
    return math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cpu")
    parser.add_argument("gpu")
    options = parser.parse_args()
    cpu, gpu = read_summary(options.cpu), read_summary(options.gpu)
    rows = [("first step", first_loss(options.cpu), first_loss(options.gpu), FIRST)]
    for stage in cpu:
        other = gpu.get(stage)
        rows.append((stage, cpu[stage]["loss_after"], other["loss_after"] if other else math.nan, LATER))
    faults = 0
    print(f"{'stage':<16}{'CPU':>10}{'GPU':>10}{'difference':>12}{'allowed':>9}")
    for stage, expected, found, allowed in rows:
        difference = (found - expected) / expected if expected else math.nan
        good = abs(difference) <= allowed  # false for a missing number
        faults += not good
        print(f"{stage:<16}{expected:>10.4f}{found:>10.4f}{100 * difference:>11.2f}%{100 * allowed:>8.1f}%" +
              ("" if good else "  too far"))
    if len(rows) < 2:
        print(f"{options.cpu}: no finished stage to compare with")
        faults += 1
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
