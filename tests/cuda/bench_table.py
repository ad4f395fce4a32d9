#!/usr/bin/env python3
"""Makes the Markdown tables of docs/benchmarks from what cuda_bench and bench_peers.py measured.

    python3 tests/cuda/bench_table.py --bench ROWS.jsonl [--peers ROWS.jsonl] [--machine FILE] [--command TEXT] [--title TEXT]

Prints Markdown. Every number comes from the files, except the peak rates of data sheets below. FILE has lines
"name<TAB>value" about the machine.
"""

import argparse
import json
import os
import sys

# Dense bfloat16 products with float32 sums, TFLOP/s, from the vendor's data sheets; the first name that the GPU's contains.
DATASHEET = (("H100 PCIe", 756), ("H100 NVL", 835), ("H200", 989), ("H100", 989), ("A100", 312), ("RTX 4090", 165), ("L40S", 362),
             ("RTX 5090", 210))
SECTIONS = (("limits", "What the device can do"), ("products", "Matrix products (cuBLASLt)"), ("rows", "Norms, gates, SwiGLU, embedding"),
            ("losses", "Losses with the output head"), ("optimizer", "Optimizer"), ("mixers", "Attention and Lightning"))
CONVENTIONS = """\
Useful work only: what is computed twice or read again does not count. Product 2 M N K; dense attention 4 N D for each pair of
query and key in the causal half, backward 2.5 times that; sparse attention the same over the selected pairs; selection 2 N D
for each compressed key a query may see; a step 3 (products + Lightning + attention) + selection, recomputation not counted,
Lightning 4 N D^2 per token. Bytes: every input read once, every output written once. "of limit": the rate over that of the
limits measured in the same run, the product for work in FLOP/s, the copy for work in bytes. Time: median of the
samples, lowest and highest; operands rotate through several times the L2 cache; random data; "host" is the time the CPU needs
to queue one call, marked (!) where the device waits for it or it for the device."""


def read_rows(path):
    if not path or not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def time_text(seconds):
    for limit, factor, unit in ((1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (float("inf"), 1.0, "s")):
        if seconds < limit:
            return f"{seconds * factor:.4g} {unit}"
    return ""


def gib(count):
    return f"{count / 2**30:.1f} GiB"


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join("---" for _ in head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


class Report:
    def __init__(self, rows, peers):
        self.rows = rows
        self.device = next((row for row in rows if row["section"] == "device"), {})
        self.limits = {row["name"]: row for row in rows if row["section"] == "limits" and "seconds" in row}
        self.peers = {}
        for row in peers:
            self.peers.setdefault((row["name"], row["tokens"]), []).append(row)

    def rate(self, kind):
        """FLOP/s of the large product ('flops'), bytes/s of the copy ('bytes'); 0 where it was not measured."""
        row = self.limits.get({"flops": "limit_product", "bytes": "limit_copy"}[kind])
        return row[kind] / row["seconds"] if row else 0

    def datasheet(self):
        name = self.device.get("shape", "")
        return next(((known, peak * 1e12) for known, peak in DATASHEET if known in name), (None, 0))

    def kernel_row(self, row):
        if "seconds" not in row:
            return [row["name"], row["shape"], row.get("skipped", ""), "", "", "", "", "", row.get("note", "")]
        kind = "flops" if row.get("flops", 0) > 0 else "bytes"
        rate = row[kind] / row["seconds"]
        limit = self.rate(kind)
        peers = [f"{time_text(p['seconds'])} ({p['seconds'] / row['seconds']:.2f}x) {p['peer']}" if "seconds" in p else
                 f"{p['peer']}: {p['skipped']}" for p in self.peers.get((row["name"], row["tokens"]), [])]
        host = row["host_seconds"]
        return [row["name"], row["shape"], time_text(row["seconds"]), f"{time_text(row['low'])} to {time_text(row['high'])}",
                time_text(host) + (" (!)" if host > 0.9 * row["seconds"] else ""),
                f"{rate * 1e-12:.1f} TFLOP/s" if kind == "flops" else f"{rate * 1e-9:.0f} GB/s",
                f"{100 * rate / limit:.0f}%" if limit else "", "<br>".join(peers), row.get("note", "")]

    def kernels(self):
        text = ""
        head = ["case", "shape", "time", "lowest to highest", "host", "rate", "of limit", "peer: time (over ours)", "note"]
        for section, title in SECTIONS:
            rows = [row for row in self.rows if row["section"] == section]
            if rows:
                text += f"\n## {title}\n\n" + table(head, [self.kernel_row(row) for row in rows])
        return text

    def steps(self):
        rows = [row for row in self.rows if row["section"] == "steps"]
        if not rows:
            return ""
        known, peak = self.datasheet()
        cells = []
        for row in rows:
            if "seconds" not in row:
                cells.append([row["name"], row["shape"], row["skipped"]] + [""] * 7)
                continue
            rate = row["flops"] / row["seconds"]
            cells.append([row["name"], row["shape"],
                          f"{time_text(row['seconds'])} ({time_text(row['low'])} to {time_text(row['high'])}, {row['samples']})",
                          f"{row['tokens'] / row['seconds']:.0f}", f"{rate * 1e-12:.1f}", f"{rate / peak:.3f}" if peak else "",
                          f"{rate / self.rate('flops'):.3f}" if self.rate("flops") else "", gib(row["plan_bytes"]),
                          gib(row["used_bytes"]), f"{row['loss']:.3f}"])
        note = (f"MFU (sheet) against {peak * 1e-12:.0f} TFLOP/s of the {known}'s data sheet, " if peak else "No data sheet is known "
                "for this GPU; ") + "MFU (measured) against the large product of this run."
        return ("\n## Training steps\n\nForward and backward pass with recomputation of each layer, gradient norm and AdamW on all "
                "parameters; one document. " + note + " Memory: what a dry run planned, and what was taken from the device.\n\n" +
                table(["model", "shape", "step (spread, samples)", "tokens/s", "TFLOP/s", "MFU (sheet)", "MFU (measured)", "planned",
                       "taken", "loss"], cells))

    def prefill(self):
        rows = [row for row in self.rows if row["section"] == "prefill"]
        if not rows:
            return ""
        hybrid = {row["tokens"]: row for row in rows if row["name"] == "hybrid_prefill" and "seconds" in row}
        cells = []
        for row in rows:
            if "seconds" not in row:
                cells.append([row["name"], row["shape"], row["skipped"]] + [""] * 5)
                continue
            rate = row["flops"] / row["seconds"]
            other = hybrid.get(row["tokens"])
            same = other and other["layers"] == row["layers"]
            cells.append([row["name"], row["shape"], f"{time_text(row['seconds'])} ({time_text(row['low'])} to "
                          f"{time_text(row['high'])}, {row['samples']})", f"{row['tokens'] / row['seconds']:.0f}",
                          f"{rate * 1e-12:.1f}", f"{row['seconds'] / other['seconds']:.2f}" if same else "",
                          gib(row["plan_bytes"]), gib(row["used_bytes"])])
        return ("\n## Reading a prompt\n\nThe forward pass over one document and the logits of its last token.\n\n" +
                table(["model", "shape", "time (spread, samples)", "tokens/s", "TFLOP/s", "time over the hybrid's", "planned", "taken"],
                      cells))

    def text(self, title, machine, command):
        text = f"# {title}\n\n"
        if self.device.get("smoke") or self.device.get("emulated"):
            text += ("**A rehearsal with tiny shapes" + (" on the emulator" if self.device.get("emulated") else "") +
                     ": it shows that the programs run. None of its times says anything about a GPU.**\n\n")
        text += "".join(f"    {name:<24}{value}\n" for name, value in machine)
        if command:
            text += f"    {'command':<24}{command}\n"
        text += f"    {'module':<24}{self.device.get('module', 'unknown')}\n"
        text += f"    {'device':<24}{self.device.get('shape', 'unknown')}, {self.device.get('skipped', '')}\n"
        text += f"\n{CONVENTIONS}\n"
        return text + self.kernels() + self.steps() + self.prefill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", required=True)
    parser.add_argument("--peers")
    parser.add_argument("--machine")
    parser.add_argument("--command", default="")
    parser.add_argument("--title", default="CUDA kernels and steps at the shapes of the 9B model")
    options = parser.parse_args()
    rows = read_rows(options.bench)
    if not rows:
        print(f"{options.bench}: no rows", file=sys.stderr)
        return 1
    machine = []
    if options.machine:
        with open(options.machine, encoding="utf-8") as file:
            machine = [line.rstrip("\n").split("\t", 1) for line in file if "\t" in line]
    print(Report(rows, read_rows(options.peers)).text(options.title, machine, options.command), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
