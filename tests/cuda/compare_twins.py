#!/usr/bin/env python3
"""Compares two files of ptx_twins.cu: the results of the device and of its emulation.

    python3 tests/cuda/compare_twins.py DEVICE EMULATED

Prints, for each instruction, how many results agree and the largest part of the tolerance that was used, then the first
lanes that differ. Exits 1 when any result differs, is missing, or when kernels/common/ptx.h has a function that neither
file knows.
"""

import argparse
import math
import os
import re
import struct
import sys

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
# Functions of ptx.h without a result of their own: an address, and what orders the copies that are compared.
WITHOUT_RESULT = {"SharedAddress", "CpAsyncCommit", "CpAsyncWait", "Opaque"}
SHOWN = 12


def read(path):
    """{(name, case, lane, element): (kind, bits, tolerance)}."""
    results = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            words = line.split()
            if len(words) != 7:
                raise ValueError(f"{path}:{number}: expected 7 words: {line.rstrip()}")
            name, case, lane, element, kind, bits, tolerance = words
            key = (name, int(case), int(lane), int(element))
            if key in results:
                raise ValueError(f"{path}:{number}: {key} stands there twice")
            results[key] = (kind, int(bits, 16), float(tolerance))
    return results


def as_float(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def difference(first, second):
    """0 where equal, 1 at the edge of what is allowed, more where they differ."""
    kind, bits, tolerance = first
    other_kind, other_bits, other_tolerance = second
    if kind != other_kind:
        return math.inf
    if bits == other_bits:
        return 0.0
    if kind == "x":
        return math.inf
    x, y = as_float(bits), as_float(other_bits)
    if math.isnan(x) or math.isnan(y):
        return 0.0 if math.isnan(x) and math.isnan(y) else math.inf
    if x == y:  # zeros of different sign
        return 0.0
    allowed = max(tolerance, other_tolerance)
    return abs(x - y) / allowed if allowed > 0 and math.isfinite(x) and math.isfinite(y) else math.inf


def shown(result):
    return f"{result[1]:08x}" + (f" ({as_float(result[1]):.9g})" if result[0] == "f" else "")


def wrappers():
    """The functions of kernels/common/ptx.h."""
    with open(os.path.join(ROOT, "kernels/common/ptx.h"), encoding="utf-8") as file:
        return set(re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", file.read()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("emulated")
    options = parser.parse_args()
    device, emulated = read(options.device), read(options.emulated)
    faults = [f"{key}: only in {options.device if key in device else options.emulated}"
              for key in sorted(device.keys() ^ emulated.keys())]
    table = {}
    for key in sorted(device.keys() & emulated.keys()):
        row = table.setdefault(key[0], [0, 0, 0.0])
        used = difference(device[key], emulated[key])
        row[0] += 1
        if used > 1:
            row[1] += 1
            faults.append(f"{key[0]} case {key[1]} lane {key[2]} element {key[3]}: device {shown(device[key])}, "
                          f"emulated {shown(emulated[key])}, tolerance {device[key][2]:.3g}")
        else:
            row[2] = max(row[2], used)
    known = {name.split(".")[0] for name in table}
    faults += [f"{name} of kernels/common/ptx.h: tests/cuda/ptx_twins.cu does not ask for it"
               for name in sorted(wrappers() - WITHOUT_RESULT - known)]
    print(f"{'instruction':<24}{'results':>9}{'differ':>9}{'tolerance used':>17}")
    for name, (count, wrong, used) in sorted(table.items()):
        print(f"{name:<24}{count:>9}{wrong:>9}{used:>17.3f}")
    for line in faults[:SHOWN]:
        print(line)
    if len(faults) > SHOWN:
        print(f"... and {len(faults) - SHOWN} more")
    print(f"{sum(row[0] for row in table.values())} results of {len(table)} instructions, {len(faults)} faults")
    return 1 if faults or not table else 0


if __name__ == "__main__":
    sys.exit(main())
