"""Runs oracle_driver on a case and compares what it wrote with what was expected. Only Python's standard library is used, so that the
committed goldens can be checked where there is no package.

Tensors are (dtype, shape, array) with dtype "F32", "F64" or "I32", shape a list and a flat array.array.
"""

import array
import json
import math
import pathlib
import struct
import subprocess
import sys

TYPE_CODES = {"F32": "f", "F64": "d", "I32": "i"}

# The largest relative error of a tensor that counts as agreement.
#   float64  Both sides round at 1.1e-16. Chains of some hundred operations and sums of some hundred terms, in another order on each
#            side, make 1e-15 to 1e-13 of it (docs/numerics.md has the figures). The smallest mistakes there are, one table or one
#            gate wrongly kept in float32 (6e-8), show from 4e-9 up (planted_test.py). The bound lies in the middle.
#   float32  The fast path rounds at 6e-8; the same chains make 1e-6 to 3e-6 of it. The bound is a few times that, for the other
#            orders of sums of other vector widths, and a hundredth of the 4e-3 by which a single bfloat16 rounding would differ.
BOUNDS = {"float64": 1e-11, "float32": 2e-5}

LIMIT_SECONDS = 300  # of one run; the longest takes some seconds


# ---- safetensors ----


def read_safetensors(path):
    """(metadata, {name: tensor}) of a file."""
    data = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = array.array(TYPE_CODES[entry["dtype"]], data[8 + length + begin : 8 + length + end])
        if sys.byteorder == "big":
            values.byteswap()
        if len(values) != math.prod(entry["shape"]):
            raise ValueError(f"{path}: {name} has {len(values)} values for shape {entry['shape']}")
        tensors[name] = (entry["dtype"], entry["shape"], values)
    return metadata, tensors


def write_safetensors(path, tensors, metadata=None):
    header, offset, pieces = {"__metadata__": metadata} if metadata else {}, 0, []
    # Wider types first, so that every tensor is aligned.
    for name, (dtype, shape, values) in sorted(tensors.items(), key=lambda item: (item[1][0] != "F64", item[0])):
        if sys.byteorder == "big":
            values = array.array(values.typecode, values)
            values.byteswap()
        pieces.append(values.tobytes())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(pieces[-1])]}
        offset += len(pieces[-1])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(pieces))


def tensor(values):
    """The tensor of a numpy array of float32, float64 or int32."""
    dtype = {"float32": "F32", "float64": "F64", "int32": "I32"}[values.dtype.name]
    return dtype, list(values.shape), array.array(TYPE_CODES[dtype], values.tobytes())


# ---- a case on disk ----


def write_case(folder, request, model, batch, teacher=None):
    """Lays out a case for oracle_driver. `model` and `teacher` are (config.json as a dict, {name: tensor}); `batch` has tokens, labels
    and cu_seqlens."""
    folder = pathlib.Path(folder)
    for name, part in (("model", model), ("teacher", teacher)):
        if part is not None:
            (folder / name).mkdir(parents=True, exist_ok=True)
            (folder / name / "config.json").write_text(json.dumps(part[0], indent=2) + "\n", encoding="utf-8")
            write_safetensors(folder / name / "model.safetensors", part[1], {"format": "pt"})
    write_safetensors(folder / "batch.safetensors", batch)
    (folder / "request.json").write_text(json.dumps(request, indent=2) + "\n", encoding="utf-8")


class DriverError(Exception):
    """oracle_driver refused a case or died."""


def run_driver(program, folder, arithmetic):
    """{name: tensor} that oracle_driver writes for the case in `folder`."""
    folder = pathlib.Path(folder)
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    (folder / "request.json").write_text(json.dumps(request | {"arithmetic": arithmetic}, indent=2) + "\n", encoding="utf-8")
    out = folder / "out.safetensors"
    out.unlink(missing_ok=True)
    result = subprocess.run([program, str(folder)], capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    if result.returncode != 0:
        raise DriverError(f"{program}: exit code {result.returncode}: {result.stderr.strip()}")
    return read_safetensors(out)[1]


# ---- comparison ----


def relative_error(found, expected):
    """max |found - expected| / max |expected| over a tensor; infinite when a number is not finite. There is no floor: a tensor that is
    expected to be zero must be zero."""
    largest = max((abs(e) for e in expected), default=0.0)
    worst = 0.0
    for f, e in zip(found, expected):
        difference = abs(f - e)
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference)
    if worst == 0.0:
        return 0.0
    return worst / largest if largest > 0.0 else math.inf


def compare(found, expected):
    """([(relative error, name)] of every expected tensor, worst first; [text] of tensors that are missing or have another shape).
    `expected` maps names to (shape, flat sequence of floats); what else was found does not matter, except gradients."""
    errors, faults = [], []
    for name, (shape, values) in expected.items():
        if name not in found:
            faults.append(f"{name}: not written")
        elif list(found[name][1]) != list(shape):
            faults.append(f"{name}: shape {list(found[name][1])}, expected {list(shape)}")
        else:
            errors.append((relative_error(found[name][2], values), name))
    faults += [f"{name}: not expected" for name in found if name.startswith("grad/") and name not in expected]
    return sorted(errors, reverse=True), faults


def violations(case, arithmetic, errors, faults, bound):
    """One line per fault and per tensor beyond the bound."""
    lines = [f"{case}: {arithmetic}: {fault}" for fault in faults]
    lines += [f"{case}: {arithmetic}: {name}: relative error {e:.2g}, allowed {bound:g}" for e, name in errors if not e <= bound]
    if not errors:
        lines.append(f"{case}: {arithmetic}: nothing was compared")
    return lines
