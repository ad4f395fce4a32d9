#!/usr/bin/env python3
"""A training step of `sala` beside the same model written plainly in PyTorch, eager and compiled: tokens per second and their ratio.

    build/oracle-python/bin/python -B tests/oracle/torch_peer.py --build build/release [--lengths 2048 8192] [--threads 1] [--rounds 3]

The model of tests/oracle/torch_model.py has the sizes of `sala bench step`'s own. Before anything is timed, both compute the logits of the
same weights, of a short document and of one that is long enough for block-sparse attention; a larger difference than rounding ends the
program with 1. A step is forward, loss, backward, clipping of the gradient norm and AdamW, in float32. The three take turns in each round.
A length from the model's dense_len on is block-sparse on both sides: PyTorch has no such attention on a CPU, so a mask does it there.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("--build", type=pathlib.Path, required=True)
parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192])
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--steps", type=int, default=2, help="of each in a round, after one that is not counted")
parser.add_argument("--json", type=pathlib.Path, help="file for all numbers")
options = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(options.threads)  # read when torch is loaded

import numpy as np
import safetensors.torch
import torch
from sala_oracle import config as oracle_config
from sala_oracle.model import decay_slopes

import torch_model

SALA = options.build / "bin" / "sala"

MODEL = """\
model:
  vocab_size: 4096
  hidden_size: 384
  intermediate_size: 896
  num_hidden_layers: 8
  num_attention_heads: 6
  num_key_value_heads: 2
  head_dim: 64
  tie_word_embeddings: true
  attn_use_rope: false
  attn_use_output_gate: true
  dim_model_base: 64
  scale_emb: 12
  mixer_types: [minicpm4, lightning-attn, lightning-attn, lightning-attn, lightning-attn, lightning-attn, lightning-attn, minicpm4]
  bos_token_id: 1
  eos_token_id: 2
  pad_token_id: 0
"""

# Both sides round at 6e-8 in other orders of sums, over eight layers: 1e-6 of the largest logit was seen. A wrong block in the selection
# of one query, or a wrong scale anywhere, makes 1e-3 and more.
BOUND = 2e-5


def sala(*words):
    done = subprocess.run([SALA, *map(str, words)], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, words))}: exit {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def make_model(folder):
    """The PyTorch model with random weights, and a folder that has the same ones."""
    (folder / "model.yaml").write_text(MODEL)
    sala("export", "--shapes-only", folder / "model.yaml", "--to", folder / "shapes", "--dtype", "f32")
    text = (folder / "shapes" / "config.json").read_text()
    config = oracle_config.read(json.loads(text))
    torch.manual_seed(1)
    model = torch_model.Model(config, json.loads(text)["intermediate_size"], decay_slopes(config.linear_heads).astype(np.float32))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.05) if weight.ndim == 2 else weight.uniform_(0.5, 1.5)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(text)
    tensors = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    safetensors.torch.save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    return model


def check_logits(model, folder, length):
    tokens = torch.randint(0, model.config.vocabulary, (length,))
    (folder / "tokens.json").write_text(json.dumps([tokens.tolist()]))
    to = folder / f"logits-{length}.safetensors"
    sala("logits", folder / "model", "--tokens", folder / "tokens.json", "--to", to, "--sparse", "on", "--threads", options.threads)
    theirs = safetensors.torch.load_file(to)["logits"]
    with torch.no_grad():
        ours = model(tokens)
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    print(f"same model  {length:,} tokens: logits differ by {error:.1e} of the largest (bound {BOUND:.0e})", flush=True)
    if not error < BOUND:
        sys.exit("the two do not compute the same: nothing was timed")


def sala_seconds(length, folder, sparse):
    to = folder / "step.json"
    words = ["--sparse"] if sparse else []
    sala("bench", "step", "--config", folder / "bench.yaml", "--seq-len", length, "--threads", options.threads, "--steps", options.steps,
         "--no-peers", "--json", to, *words)
    result = json.loads(to.read_text())
    return result["step_seconds"], result


def torch_seconds(model, function, optimizer, tokens):
    seconds = []
    for step in range(options.steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=False)
        loss = torch.nn.functional.cross_entropy(function(tokens)[:-1], tokens[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step > 0:
            seconds.append(time.perf_counter() - start)
    return seconds


def main():
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="sala-torch-peer-") as name:
        folder = pathlib.Path(name)
        model = make_model(folder)
        (folder / "bench.yaml").write_text(MODEL)
        check_logits(model, folder, 700)
        check_logits(model, folder, model.config.sparse.dense_len)
        compiled = torch.compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
        report, head = [], None
        for length in options.lengths:
            sparse = length >= model.config.sparse.dense_len
            tokens = torch.randint(0, model.config.vocabulary, (length,))
            seconds = {"sala": [], "eager": [], "compiled": []}
            for _ in range(options.rounds):
                own, head = sala_seconds(length, folder, sparse)
                seconds["sala"] += own
                seconds["eager"] += torch_seconds(model, model, optimizer, tokens)
                seconds["compiled"] += torch_seconds(model, compiled, optimizer, tokens)
            report.append({"length": length, "sparse": sparse, "seconds": seconds})
        print(f"hardware    {head['hardware']}")
        print(f"commit      {head['commit']} ({head['build']} build); PyTorch {torch.__version__}")
        print(f"command     {pathlib.Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}")
        print(f"threads     {options.threads}")
        print(f"\n{'tokens':>8} {'attention':>10} {'':>10} {'seconds a step':>24} {'tokens/s':>10} {'sala has':>10}")
        for entry in report:
            best = statistics.median(entry["seconds"]["sala"])
            for who, seconds in entry["seconds"].items():
                median = statistics.median(seconds)
                spread = f"{median:.3f} ({min(seconds):.3f}-{max(seconds):.3f})"
                ratio = "" if who == "sala" else f"{median / best:.2f} x"
                kind = "sparse" if entry["sparse"] else "dense"
                print(f"{entry['length']:>8,} {kind:>10} {who:>10} {spread:>24} {entry['length'] / median:>10.0f} {ratio:>10}")
        if options.json:
            options.json.write_text(json.dumps({"hardware": head["hardware"], "commit": head["commit"], "torch": torch.__version__,
                                                "threads": options.threads, "results": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
