#!/usr/bin/env python3
"""Times of other programs' kernels for the cases of cuda_bench, in the same form, on the same device.

    python3 tests/cuda/bench_peers.py --json FILE [--sections rows,mixers,...] [--smoke]

Each row has the name and the number of tokens of a case of cuda_bench and says what was measured (`peer`). Peers are what
PyTorch brings (matmul, scaled_dot_product_attention, torch.compile of the plain formula, fused AdamW) and, where it can be
imported, flash-linear-attention's simple_gla. What is missing is named and left out. Measured as in cuda_bench: operands
rotate through several times the L2 cache, random data, events on the stream, warm-up first, the median of at most 25
samples. --smoke uses tiny shapes, on the CPU where there is no GPU: that the code runs, nothing more.
"""

import argparse
import json
import math
import statistics
import sys
import time

try:
    import torch
    import torch._functorch.config
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError:
    torch = None

HEADS, KV_HEADS, HEAD_DIM = 32, 2, 128
SECTIONS = ("limits", "products", "rows", "losses", "optimizer", "mixers")


class Peers:
    def __init__(self, options):
        self.smoke = options.smoke
        self.sections = options.sections.split(",")
        self.seconds = options.seconds
        self.file = open(options.json, "w", encoding="utf-8")
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        self.rows = 0
        if self.cuda:
            self.l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 64 << 20)
        torch.manual_seed(1)
        # A compiled backward pass may otherwise reuse what the forward pass saved, and could not be walked twice.
        torch._functorch.config.donated_buffer = False

    # ---- what cases are made of

    def size(self, full, small):
        return small if self.smoke else full

    def lengths(self):
        return [64] if self.smoke else [4096, 32768, 131072]

    def random(self, *shape, scale=1.0, dtype=None, grad=False):
        dtype = dtype or torch.bfloat16
        x = (torch.rand(*shape, device=self.device, dtype=torch.float32) * 2 - 1) * scale
        return x.to(dtype).requires_grad_(grad)

    def sets(self, set_bytes):
        if self.smoke or not self.cuda:
            return 2
        if set_bytes >= 4 * self.l2:
            return 1
        return max(2, min(8, math.ceil(4 * self.l2 / set_bytes)))

    def write(self, row):
        self.rows += 1
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        print(f"{row['name']:<32}{row['tokens']:>8}  {row['peer']:<44}" +
              (f"{row['seconds'] * 1e6:>12.1f} us" if "seconds" in row else row["skipped"]), flush=True)

    def skip(self, name, tokens, peer, why):
        self.write({"name": name, "tokens": tokens, "peer": peer, "skipped": f"skipped: {why}"})

    # ---- measuring

    def elapsed(self, calls):
        """Seconds on the device for all of `calls`."""
        if not self.cuda:
            start = time.perf_counter()
            for call in calls:
                call()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    def measure(self, name, tokens, peer, set_bytes, prepare):
        """prepare() makes one set of operands and returns what calls the kernel on it."""
        if self.cuda:
            torch.cuda.empty_cache()
        try:
            calls = [prepare() for _ in range(self.sets(set_bytes))]
            for call in calls + calls[:1]:  # compiles, tunes, touches pages
                call()
            one = max(1e-7, self.elapsed(calls[:1]))
            count = 1 if self.smoke else max(1, min(1000, math.ceil(2e-3 / one)))
            samples = 3 if self.smoke else int(max(5, min(25, self.seconds / (one * count))))
            times, following = [], 0
            for _ in range(samples):
                batch = [calls[(following + i) % len(calls)] for i in range(count)]
                following += count
                times.append(self.elapsed(batch) / count)
        except Exception as error:  # pylint: disable=broad-except # a peer that does not run is no reason to end
            self.skip(name, tokens, peer, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200])
            return
        self.write({"name": name, "tokens": tokens, "peer": peer, "seconds": statistics.median(times), "low": min(times),
                    "high": max(times), "samples": samples})

    def forward(self, name, tokens, peer, set_bytes, operands, function):
        def prepare():
            values = operands()
            return lambda: function(*values)

        with torch.no_grad():
            self.measure(name, tokens, peer, set_bytes, prepare)

    def backward(self, name, tokens, peer, set_bytes, operands, function):
        """The backward pass alone: the graph of one forward pass is kept and walked again and again."""

        def prepare():
            values = operands()
            wanted = [value for value in values if isinstance(value, torch.Tensor) and value.requires_grad]
            result = function(*values)
            gradient = self.random(*result.shape)
            return lambda: torch.autograd.grad(result, wanted, gradient, retain_graph=True)

        self.measure(name, tokens, peer, set_bytes, prepare)

    # ---- cases

    def limits(self):
        side = self.size(8192, 64)
        self.forward("limit_product", side, "torch.matmul", 6 * side * side,
                     lambda: (self.random(side, side), self.random(side, side)), torch.matmul)
        count = self.size(1 << 30, 1 << 12) // 2
        self.forward("limit_copy", 0, "Tensor.copy_", 4 * count, lambda: (self.random(count), self.random(count)),
                     lambda to, source: to.copy_(source))

    def products(self):
        hidden, mlp = self.size(4096, 64), self.size(16384, 96)
        for tokens in self.lengths()[:2]:
            for name, out, inner in (("mlp_inputs", 2 * mlp, hidden), ("mlp_output", hidden, mlp)):
                self.forward(f"{name}_forward", tokens, "F.linear", 2 * (tokens * (out + inner) + out * inner),
                             lambda: (self.random(tokens, inner), self.random(out, inner, scale=0.02)), F.linear)

    def rows_cases(self):
        hidden, mlp = self.size(4096, 64), self.size(16384, 96)

        def rms_norm(x, weight):
            x32 = x.float()
            return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight

        def swiglu(gate, up):
            return F.silu(gate) * up

        compiled_norm, compiled_swiglu = torch.compile(rms_norm, dynamic=False), torch.compile(swiglu, dynamic=False)
        for tokens in self.lengths():
            def norm(grad, tokens=tokens):
                return self.random(tokens, hidden, grad=grad), torch.ones(hidden, device=self.device, dtype=torch.bfloat16,
                                                                          requires_grad=grad)

            def pair(grad, tokens=tokens):
                return self.random(tokens, mlp, grad=grad), self.random(tokens, mlp, grad=grad)

            self.forward("rms_norm_forward", tokens, "torch.compile", 4 * tokens * hidden, lambda: norm(False), compiled_norm)
            self.backward("rms_norm_backward", tokens, "torch.compile, dx overwritten", 6 * tokens * hidden,
                          lambda: norm(True), compiled_norm)
            self.forward("swiglu_forward", tokens, "torch.compile", 6 * tokens * mlp, lambda: pair(False), compiled_swiglu)
            self.backward("swiglu_backward", tokens, "torch.compile", 10 * tokens * mlp, lambda: pair(True), compiled_swiglu)

    def losses(self):
        hidden, vocabulary = self.size(4096, 64), self.size(73448, 96)

        def loss(x, weight, labels):
            return F.cross_entropy(F.linear(x, weight).float(), labels)

        compiled = torch.compile(loss, dynamic=False)
        for tokens in self.lengths()[:1]:  # all logits at once: longer ones do not fit
            def prepare(tokens=tokens):
                x, weight = self.random(tokens, hidden, grad=True), self.random(vocabulary, hidden, scale=0.02, grad=True)
                labels = torch.randint(vocabulary, (tokens,), device=self.device)
                return lambda: torch.autograd.grad(compiled(x, weight, labels), (x, weight))

            self.measure("cross_entropy_step", tokens, "torch.compile, all logits at once", 6 * vocabulary * hidden, prepare)

    def optimizer(self):
        count = self.size(1 << 28, 1 << 12)

        def prepare():
            parameter = torch.nn.Parameter(self.random(count, dtype=torch.float32))
            parameter.grad = self.random(count, dtype=torch.float32)
            adamw = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
            return adamw.step

        self.measure("adamw", 0, "torch.optim.AdamW(fused=True), no rounded copy: 28 bytes a parameter", 16 * count, prepare)

    def mixers(self):
        heads, kv_heads, head_dim = (4, 2, 16) if self.smoke else (HEADS, KV_HEADS, HEAD_DIM)

        def attention(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        for tokens in self.lengths():
            def operands(grad, tokens=tokens):
                return tuple(self.random(1, n, tokens, head_dim, grad=grad) for n in (heads, kv_heads, kv_heads))

            one = 2 * tokens * head_dim * (2 * heads + 2 * kv_heads)
            for backend, peer in ((SDPBackend.FLASH_ATTENTION, "flash"), (SDPBackend.CUDNN_ATTENTION, "cuDNN")):
                peer = f"scaled_dot_product_attention, {peer}"
                with sdpa_kernel([backend]):
                    self.forward("dense_attention_forward", tokens, peer, one, lambda: operands(False), attention)
                    self.backward("dense_attention_backward", tokens, peer, 2 * one, lambda: operands(True), attention)
        self.linear_attention(heads if self.smoke else HEADS, head_dim)

    def linear_attention(self, heads, head_dim):
        peer = "flash-linear-attention simple_gla"
        try:
            from fla.ops.simple_gla import chunk_simple_gla
        except Exception as error:  # pylint: disable=broad-except # its import may fail in many ways
            for tokens in self.lengths():
                for name in ("lightning_forward", "lightning_backward"):
                    self.skip(name, tokens, peer, f"cannot be imported ({type(error).__name__})")
            return
        # The decays of the model: lambda_h = exp(-2^(-8 (h + 1) / heads)), the same for every token.
        decay = torch.tensor([-(2.0 ** (-8 * (h + 1) / heads)) for h in range(heads)], device=self.device)

        def mixer(q, k, v):
            g = decay.expand(1, q.shape[1], heads).contiguous()
            return chunk_simple_gla(q, k, v, g=g, scale=head_dim**-0.5)[0]

        for tokens in self.lengths():
            def operands(grad, tokens=tokens):
                return tuple(self.random(1, tokens, heads, head_dim, grad=grad) for _ in range(3))

            one = 8 * tokens * heads * head_dim
            self.forward("lightning_forward", tokens, peer, one, lambda: operands(False), mixer)
            self.backward("lightning_backward", tokens, peer, 2 * one, lambda: operands(True), mixer)

    def run(self):
        cases = {"limits": self.limits, "products": self.products, "rows": self.rows_cases, "losses": self.losses,
                 "optimizer": self.optimizer, "mixers": self.mixers}
        for section in self.sections:
            cases[section]()
        print(f"{self.rows} rows of peers, PyTorch {torch.__version__} on {self.device}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    unknown = [name for name in options.sections.split(",") if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {unknown[0]}; there are {', '.join(SECTIONS)}")
    if torch is None:
        print("SKIPPED: PyTorch is not on this machine: no peers were measured")
        return 77
    if not torch.cuda.is_available() and not options.smoke:
        print("SKIPPED: PyTorch sees no GPU: no peers were measured")
        return 77
    Peers(options).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
