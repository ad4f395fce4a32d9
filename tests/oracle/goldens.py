#!/usr/bin/env python3
"""Makes the committed goldens: small cases with weights, inputs and what the oracle says of them, one file each.

    python tests/oracle/goldens.py --make

A file tests/oracle/golden/CASE.safetensors has "model/NAME", "teacher/NAME" (F32), "batch/NAME" (I32) and "expected/NAME" (F64: loss,
hidden, logits, grad/NAME); the metadata has request, model and teacher as JSON. golden_test.py reads it with Python alone.
compare.py checks that the oracle still says the same.
"""

import argparse
import json
import pathlib
import sys

import cases
import driver
from sala_oracle import tasks

FOLDER = pathlib.Path(__file__).resolve().parent / "golden"

# The oracle against its own earlier results. Other versions of the packages and other processors add in another order; that is 1e-15 to
# 1e-13, as between the two programs.
SAME = 1e-12


def tensors(case, expected):
    arrays = {f"model/{name}": w for name, w in case.student.weights.items()}
    arrays |= {f"teacher/{name}": w for name, w in (case.teacher.weights.items() if case.teacher else ())}
    arrays |= {"batch/tokens": case.batch.tokens, "batch/labels": case.batch.labels, "batch/cu_seqlens": case.batch.borders}
    arrays |= {f"expected/{name}": value for name, value in expected.items()}
    return {name: driver.tensor(value) for name, value in arrays.items()}


def metadata(case):
    texts = {"request": case.request, "model": case.student.config}
    if case.teacher:
        texts["teacher"] = case.teacher.config
    return {name: json.dumps(value, sort_keys=True) for name, value in texts.items()}


def differences(case, expected):
    """One line per way in which the committed golden of a case is not what the oracle has now."""
    path = FOLDER / f"{case.name}.safetensors"
    remake = "if that is meant, run tests/oracle/goldens.py --make"
    if not path.exists():
        return [f"{case.name}: there is no {path.name}; run tests/oracle/goldens.py --make"]
    found_metadata, found = driver.read_safetensors(path)
    wanted = tensors(case, expected)
    lines = []
    if found_metadata != metadata(case):
        lines.append(f"{case.name}: golden: another request or configuration; {remake}")
    if found.keys() != wanted.keys():
        return lines + [f"{case.name}: golden: other tensors; {remake}"]
    for name, (dtype, shape, values) in wanted.items():
        bound = SAME if name.startswith("expected/") else 0.0
        same_form = found[name][:2] == (dtype, shape)
        if not same_form or not driver.relative_error(found[name][2], values) <= bound:
            lines.append(f"{case.name}: golden: {name} is not what it was; {remake}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true", required=True, help="write the files")
    parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    total = 0
    for maker in cases.all_cases().values():
        case = maker()
        if case.golden:
            path = FOLDER / f"{case.name}.safetensors"
            expected = tasks.run(case.request, case.student, case.batch, case.teacher)
            driver.write_safetensors(path, tensors(case, expected), metadata(case))
            total += path.stat().st_size
            print(f"{path.name}: {path.stat().st_size} bytes")
    print(f"{total} bytes")


if __name__ == "__main__":
    sys.exit(main())
