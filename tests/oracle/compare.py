#!/usr/bin/env python3
"""Compares the trainer with the oracle: loss, hidden states, logits and every gradient of every case of cases.py.

    python tests/oracle/compare.py --build build/release [--table] [--keep DIR] [CASE ...]

oracle_driver of the build computes each case three times: with the fast path (float32), with the reference (float64), and, where
the case says so, with the reference in the rounding of the published code (forward only). The oracle computes it once, and once more in
that rounding. The committed goldens must be what the oracle says today. Prints one line per case and one per violation, and exits 1
when there is any. --table writes the figures into docs/numerics.md.

The relative error of a tensor is max |found - expected| / max |expected|; driver.py has the bounds and their reasons.
"""

import argparse
import math
import os
import pathlib
import sys
import tempfile
import time

import numpy as np

import cases
import driver
import goldens
from sala_oracle import config as configs
from sala_oracle import model, selection, tasks

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "numerics.md"
BEGIN, END = "<!-- made by tests/oracle/compare.py --table -->", "<!-- end -->"

# The least relative distance between a chosen and a refused block score that counts as a clear choice: ten times what float32 may
# do to a score (its relative error is that of an exponent around 5 and of some products, 2e-6 at most).
CLEAR = 2e-5


def tensors(arrays):
    return {name: driver.tensor(values) for name, values in arrays.items()}


def write_case(folder, case):
    def part(m):
        return (m.config, tensors(m.weights)) if m else None

    batch = {"tokens": case.batch.tokens, "labels": case.batch.labels, "cu_seqlens": case.batch.borders}
    driver.write_case(folder, case.request, part(case.student), tensors(batch), part(case.teacher))


def expected_of(case):
    if case.gradients:
        return tasks.run(case.request, case.student, case.batch, case.teacher)
    return tasks.run_forward(case.request, case.student, case.batch)


def flat(arrays):
    """{name: (shape, flat list)}, as driver.compare wants it."""
    return {name: (list(values.shape), values.ravel().tolist()) for name, values in arrays.items()}


def margin_of(case):
    """(queries with a real choice, least margin) over all layers and documents with block selection."""
    sparse = configs.read(case.student.config).sparse
    margins = [selection.cut_margins(q, k, sparse) for q, k in tasks.queries_and_keys(case.request, case.student, case.batch)]
    return sum(cuts for cuts, _ in margins), min((least for _, least in margins), default=math.inf)


def margin_faults(case):
    """A case with block selection is one only when blocks are dropped, and can be compared only when both sides must agree on which."""
    if not case.request.get("sparse_attention"):
        return [], ""
    cuts, least = margin_of(case)
    faults = []
    if cuts == 0:
        faults.append(f"{case.name}: no query drops a block, so block selection is not tested")
    if least < CLEAR:
        faults.append(f"{case.name}: the closest selection is {least:.2g}, less than {CLEAR:g}: choose another seed in cases.py")
    return faults, f"{cuts} selections that drop blocks, closest {least:.1e}"


def published_faults(case, program, folder):
    """Both sides round what the published code stores and keep float64 between, so nothing but a value next to a border of rounding
    could differ, and with 8 bits kept of 53 none is: the same bits are asked for."""
    found = driver.run_driver(program, folder, "published_rounding")
    expected = tasks.run_forward(case.request, case.student, case.batch, model.Published)
    faults = []
    for name in ("hidden", "logits"):
        other = int((np.asarray(found[name][2]) != expected[name].ravel()).sum())
        if other:
            faults.append(f"{case.name}: published_rounding: {name}: {other} of {expected[name].size} values have other bits")
    return faults


def run_case(case, program, folder):
    """(figures for the table, lines of violations, text about block selection)."""
    write_case(folder, case)
    arrays = expected_of(case)
    expected = flat(arrays)
    row = {"name": case.name, "what": case.what, "tensors": len(expected), "published": case.published}
    faults, clear = margin_faults(case)
    if case.golden:
        faults += goldens.differences(case, arrays)
    for arithmetic, bound in driver.BOUNDS.items():
        row[arithmetic] = (math.inf, "nothing")
        try:
            found = driver.run_driver(program, folder, arithmetic)
        except driver.DriverError as error:
            faults.append(f"{case.name}: {arithmetic}: {error}")
            continue
        if not case.gradients:
            found = {name: tensor for name, tensor in found.items() if not name.startswith("grad/")}
        errors, missing = driver.compare(found, expected)
        faults += driver.violations(case.name, arithmetic, errors, missing, bound)
        if errors:
            row[arithmetic] = (errors[0][0], short(errors[0][1]))
    if case.published:
        faults += published_faults(case, program, folder)
    return row, faults, clear


def short(name):
    """A gradient's name without what all have."""
    if not name.startswith("grad/"):
        return name
    return name.removeprefix("grad/").removeprefix("model.").removesuffix(".weight").replace("layers.", "")


def table(rows):
    lines = [
        "| case | what it has | tensors | float64: worst, of | float32: worst, of | published rounding |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        worst = [f"{row[arithmetic][0]:.0e}, `{row[arithmetic][1]}`" for arithmetic in driver.BOUNDS]
        published = "same bits" if row["published"] else ""
        lines.append(f"| `{row['name']}` | {row['what']} | {row['tensors']} | {worst[0]} | {worst[1]} | {published} |")
    return "\n".join(lines)


def write_page(text):
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default=str(ROOT / "build" / "release"))
    parser.add_argument("--table", action="store_true", help="write the figures into docs/numerics.md")
    parser.add_argument("--keep", help="a folder in which the cases stay, for a look at them")
    parser.add_argument("cases", nargs="*", metavar="CASE")
    options = parser.parse_args()
    program = os.path.join(options.build, "bin", "oracle_driver")
    if not os.path.exists(program):
        parser.error(f"there is no {program}; build the target oracle_driver")
    makers = cases.all_cases()
    unknown = [name for name in options.cases if name not in makers]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(makers)}")
    if options.table and options.cases:
        parser.error("--table needs all cases")

    rows, problems = [], []
    with tempfile.TemporaryDirectory(prefix="sala-oracle-") as temporary:
        for name in options.cases or makers:
            start = time.monotonic()
            row, faults, clear = run_case(makers[name](), program, pathlib.Path(options.keep or temporary) / name)
            rows.append(row)
            problems += faults
            figures = "  ".join(f"{a} {row[a][0]:.1e} ({row[a][1]})" for a in driver.BOUNDS)
            print(f"{name:<24}{row['tensors']:>4} tensors  {figures}  {time.monotonic() - start:.0f} s  {clear}", flush=True)
    for line in problems:
        print(line)
    print(f"{len(rows)} cases, {sum(row['tensors'] for row in rows)} tensors, {len(problems)} violations")
    if options.table and not problems:
        write_page(table(rows))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
