#!/usr/bin/env python3
"""Compares the trainer with the Hugging Face libraries: models that transformers made are imported, computed, exported and loaded again.

    python tests/oracle/hf_parity.py --build build/release [--keep DIR] [CASE ...]

For each case of CASES: a model with random weights is saved by transformers; `sala import` reads it; `sala logits` must agree with
transformers in float32 and in float64; `sala export` must give the folder back byte for byte; transformers must load what was exported,
without a missing or an unexpected tensor, and compute the same bits. Then the same of folders in the trainer's own form (another number
type, an untied head), and of safetensors files against the official package. Prints a table and one line per violation; exits 1 when
there is any.

MiniCPM is no class of transformers, but its Granite computes the same: embedding_multiplier is scale_emb, residual_multiplier is
scale_depth / sqrt(layers), logits_scaling is hidden_size / dim_model_base, attention_multiplier is 1 / sqrt(head_dim). A Granite model
is saved and its config.json written anew as one of model_type minicpm.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

LENGTHS = (1, 2, 7, 64, 513, 700)  # tokens of a document; the last two are beyond a block of 512
VOCABULARY = 97  # odd, so that no row count is a multiple of anything

# The largest max |sala - transformers| / max |transformers| that counts as agreement.
#   float32  Both sides round at 6e-8, in other orders of sums of up to 700 terms, over three layers: 2e-7 to 1e-6 of it. Besides,
#            transformers works out the rotary frequencies in float32: their last digit, times position 700, is an angle of 1e-5 or
#            so, which makes up to 4e-6 more. The bound is four times the sum; a bfloat16 rounding would make 4e-3 of it, a wrong
#            scale, frequency or norm 1e-2 and more.
#   float64  Both sides round at 1.1e-16: 1e-15 to 1e-14 of it. One number wrongly kept in float32 shows at 1e-8, or a hundred times
#            less where it matters little.
BOUNDS = {"float32": 2e-5, "float64": 1e-12}

ROOT = pathlib.Path()
BIN = pathlib.Path()
failures = []


def fail(text):
    failures.append(text)
    print(f"FAILED {text}")


@dataclasses.dataclass
class Case:
    name: str
    family: str  # llama, qwen3, minicpm
    config: dict
    stored: torch.dtype = torch.float32
    max_shard_size: object = "5GB"
    newer_config: bool = False  # config.json as later versions of transformers write it

    @property
    def tied(self):
        return self.config.get("tie_word_embeddings", False)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 1024, "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}


def sizes(**changes):
    return {**SIZES, **changes}


CASES = [
    Case("llama", "llama", sizes(attention_bias=False)),
    Case("llama_gqa", "llama", sizes(num_key_value_heads=2, rope_theta=500000.0), max_shard_size=20000),
    Case("llama_mqa_tied", "llama", sizes(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-5)),
    Case("llama_head_dim", "llama", sizes(head_dim=20, rope_theta=2000.0)),
    Case("llama_newer_config", "llama", sizes(num_key_value_heads=2, rope_theta=1e6), newer_config=True),
    Case("llama_bf16", "llama", sizes(num_key_value_heads=2), stored=torch.bfloat16, max_shard_size=12000),
    Case("llama_f16", "llama", sizes(num_key_value_heads=2), stored=torch.float16),
    Case("llama_f64", "llama", sizes(), stored=torch.float64),
    Case("qwen3", "qwen3", sizes(head_dim=16, num_key_value_heads=2, rope_theta=1e6)),
    Case("qwen3_tied", "qwen3", sizes(head_dim=32, num_key_value_heads=2, tie_word_embeddings=True), stored=torch.bfloat16,
         max_shard_size=12000),
    Case("minicpm", "minicpm", sizes(num_key_value_heads=2, scale_emb=12, scale_depth=1.4, dim_model_base=16)),
    Case("minicpm_tied", "minicpm", sizes(scale_emb=3.5, scale_depth=0.9, dim_model_base=24, tie_word_embeddings=True), max_shard_size=20000),
]


# ---- models of transformers ----


def granite(config):
    """The Granite configuration of a MiniCPM one."""
    config = dict(config)
    scale_emb, scale_depth, base = (config.pop(key) for key in ("scale_emb", "scale_depth", "dim_model_base"))
    for key in ("architectures", "model_type", "dtype", "torch_dtype", "pretraining_tp", "head_dim"):
        config.pop(key, None)
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    return transformers.GraniteConfig(**config, embedding_multiplier=scale_emb,
                                      residual_multiplier=scale_depth / math.sqrt(config["num_hidden_layers"]),
                                      logits_scaling=config["hidden_size"] / base, attention_multiplier=1 / math.sqrt(head_dim))


def make(case):
    torch.manual_seed(sum(case.name.encode()))
    if case.family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**case.config))
    elif case.family == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**case.config))
    else:
        model = transformers.GraniteForCausalLM(granite(case.config))
    # The initial norms are all ones and the initial weights so small that a layer does little: neither would show a fault.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(0.5 + torch.rand_like(parameter))
            else:
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[1]) if "embed" not in name else 0.5)
    return model.to(case.stored).eval()


def save(case, model, folder):
    model.save_pretrained(folder, max_shard_size=case.max_shard_size)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if case.family == "minicpm":
        config = {"architectures": ["MiniCPMForCausalLM"], "model_type": "minicpm", "hidden_act": "silu", "torch_dtype": "float32",
                  "rope_scaling": None, "attention_bias": False, "tie_word_embeddings": False, **case.config}
        path.write_text(json.dumps(config, indent=4))
    if case.newer_config:
        config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
        config.pop("rope_scaling")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def load(case, folder, dtype="auto"):
    """What transformers makes of a folder, and a violation where it misses or does not know a tensor."""
    options = {"output_loading_info": True, "dtype": dtype, "attn_implementation": "sdpa"}
    if case.family == "minicpm":
        config = json.loads((folder / "config.json").read_text())
        model, info = transformers.GraniteForCausalLM.from_pretrained(folder, config=granite(config), **options)
    else:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info[key]:
            fail(f"{case.name}: transformers loads {folder.name} with {key} {info[key]}")
    return model.eval()


def documents():
    draw = np.random.default_rng(7)
    return [draw.integers(0, VOCABULARY, n).tolist() for n in LENGTHS]


def logits_of(model, docs):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([doc])).logits[0] for doc in docs]).numpy()


def exact_norm(norm):
    epsilon = norm.variance_epsilon
    return lambda x: norm.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon))


def exact_rope(config, case, head_dim):
    """The angles are float32 as in every engine, their cosine and sine are not."""
    theta = case.config.get("rope_theta", 10000.0)
    frequency = (np.float64(np.float32(theta)) ** (-2.0 * np.arange(head_dim // 2) / head_dim)).astype(np.float32)

    def forward(x, position_ids):
        angle = position_ids[0].numpy().astype(np.float32)[:, None] * frequency
        angle = torch.from_numpy(np.concatenate([angle, angle], axis=1).astype(np.float64))[None]
        return angle.cos(), angle.sin()

    return forward, frequency


def in_float64(case, model):
    """The model in float64 throughout. transformers casts norms and rotary tables to float32 in every number type, and works out the
    frequencies in float32: those two functions are replaced. (Attention by torch's own function keeps float64.)"""
    model = model.double()
    head_dim = case.config.get("head_dim", case.config["hidden_size"] // case.config["num_attention_heads"])
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact_norm(module)
    forward, frequency = exact_rope(model.config, case, head_dim)
    theirs = model.model.rotary_emb.inv_freq.float().numpy()
    # float32 powers are good to some units in the last place.
    if np.max(np.abs(theirs / frequency - 1)) > 1e-6:
        fail(f"{case.name}: transformers has other rotary frequencies")
    model.model.rotary_emb.forward = forward
    return model


# ---- the program ----


def sala(*arguments):
    words = [str(word) for word in (BIN / "sala", *arguments)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def sala_logits(model, docs, arithmetic):
    tokens, to = ROOT / "tokens.json", ROOT / "logits.safetensors"
    tokens.write_text(json.dumps(docs))
    to.unlink(missing_ok=True)
    sala("logits", model, "--tokens", tokens, "--to", to, "--arithmetic", arithmetic)
    return safetensors.numpy.load_file(to)["logits"]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "export.json"}


def compare_folders(what, expected, found):
    expected, found = files(expected), files(found)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            fail(f"{what}: {name} is in one folder only")
        elif expected[name] != found[name]:
            fail(f"{what}: {name} has other bytes")


# ---- checks ----


def check_case(case):
    model = make(case)
    base = ROOT / case.name
    source = base / "source"
    save(case, model, source)
    run = base / "run"
    sala("import", "--from", source, "--to", run, *(["--keep-tied"] if case.tied else []))
    checkpoint = run / "checkpoints" / "step-000000000"

    docs = documents()
    errors = {}
    # Loaded as float32, not cast: a cast would round the rotary frequencies with the weights.
    reference = model if case.newer_config else load(case, source, torch.float32)
    for arithmetic in ("float32", "float64"):
        if arithmetic == "float64":
            reference = in_float64(case, reference)
        expected = logits_of(reference, docs)
        found = sala_logits(checkpoint, docs, arithmetic)
        if found.shape != expected.shape or found.dtype != np.dtype(arithmetic):
            fail(f"{case.name}: logits {found.dtype}{list(found.shape)}, expected {arithmetic}{list(expected.shape)}")
            continue
        ends = np.cumsum([len(doc) for doc in docs])
        errors[arithmetic] = max(np.max(np.abs(found[end - len(doc):end] - expected[end - len(doc):end])) /
                                 np.max(np.abs(expected[end - len(doc):end])) for doc, end in zip(docs, ends))
        if not errors[arithmetic] <= BOUNDS[arithmetic]:
            fail(f"{case.name}: {arithmetic}: the worst difference is {errors[arithmetic]:.2g}, the bound {BOUNDS[arithmetic]:.0e}")

    # Import and export are the identity; transformers loads the result, and computes the same bits.
    exported = base / "exported"
    sala("export", "--ckpt", checkpoint, "--to", exported, "--verify")
    compare_folders(f"{case.name}: import and export", source, exported)
    if not case.newer_config:  # this version of transformers does not read those
        short = docs[:4]
        before, after = load(case, source), load(case, exported)
        if not np.array_equal(logits_of(before.float(), short), logits_of(after.float(), short)):
            fail(f"{case.name}: the exported folder has other logits")
        check_own_form(case, checkpoint, base, before)
    return errors


def check_own_form(case, checkpoint, base, original):
    """Another number type: the trainer's own layout, which is cut and written as transformers does it."""
    other = torch.float16 if case.stored == torch.bfloat16 else torch.bfloat16
    name = {torch.float16: "f16", torch.bfloat16: "bf16"}[other]
    theirs = original.to(other)
    ours = base / name
    for limit in (10**9, 15000):
        if ours.exists():
            shutil.rmtree(ours)
        sala("export", "--ckpt", checkpoint, "--to", ours, "--dtype", name, "--max-shard", limit, "--verify")
        loaded = load(case, ours)
        expected = theirs.state_dict()
        for key, values in loaded.state_dict().items():
            if values.dtype != other or not torch.equal(values, expected[key]):
                fail(f"{case.name}: exported as {name}, {key} is not what torch rounds it to")
        saved = base / f"{name}-{limit}"
        theirs.save_pretrained(saved, max_shard_size=limit)
        for weights in saved.glob("*.safetensors"):
            if not (ours / weights.name).exists() or weights.read_bytes() != (ours / weights.name).read_bytes():
                fail(f"{case.name}: exported as {name} with files of {limit}, {weights.name} is not the one transformers writes")
        index = saved / "model.safetensors.index.json"
        if index.exists() != (ours / index.name).exists():
            fail(f"{case.name}: exported as {name} with files of {limit}: one side has an index")
        elif index.exists():
            a, b = json.loads(index.read_text()), json.loads((ours / index.name).read_text())
            if a["weight_map"] != b["weight_map"] or a["metadata"]["total_size"] != b["metadata"]["total_size"]:
                fail(f"{case.name}: exported as {name} with files of {limit}: another index")


def check_untied(case):
    """By default a tied head is untied: the same model with one tensor more."""
    base = ROOT / case.name
    source, exported = base / "source", base / "untied"
    sala("import", "--from", source, "--to", base / "untied-run")
    sala("export", "--ckpt", base / "untied-run" / "checkpoints" / "step-000000000", "--to", exported, "--verify")
    model = load(case, exported)
    if model.config.tie_word_embeddings or model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr():
        fail(f"{case.name}: the head is still tied")
    docs = documents()[:4]
    if not np.array_equal(logits_of(load(case, source).float(), docs), logits_of(model.float(), docs)):
        fail(f"{case.name}: untied, the exported folder has other logits")


def check_safetensors():
    """Files of the official package are read, and what is written of them has the same bytes."""
    draw = torch.Generator().manual_seed(3)
    types = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint16, torch.uint8]
    shapes = [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 4)]

    def tensor(dtype, shape):
        if dtype.is_floating_point:
            return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)
        return torch.randint(0, 200, shape, generator=draw).to(dtype)

    cases = {str(dtype).removeprefix("torch."): {f"t{i}": tensor(dtype, shape) for i, shape in enumerate(shapes)} for dtype in types}
    cases["all"] = {f"{dtype}.{i}": tensor(dtype, shape) for dtype in types for i, shape in enumerate(shapes)}
    cases["none"] = {}
    cases["names"] = {name: tensor(torch.float32, (2,)) for name in ("b", "a", "a.b", "\u00e4", "\"quoted\"", "back\\slash", "B", "\u732b")}
    for name, tensors in cases.items():
        official, ours = ROOT / f"{name}.official", ROOT / f"{name}.ours"
        safetensors.torch.save_file(tensors, official, metadata={"format": "pt"})
        subprocess.run([str(BIN / "safetensors_copy"), str(official), str(ours)], check=True, timeout=60)
        if official.read_bytes() != ours.read_bytes():
            fail(f"safetensors {name}: other bytes than the official package writes")
        loaded = safetensors.torch.load_file(ours)
        if loaded.keys() != tensors.keys():
            fail(f"safetensors {name}: the official package reads other names")
        for key, values in tensors.items():
            found = loaded[key]
            if found.dtype != values.dtype or found.shape != values.shape or not torch.equal(found, values):
                fail(f"safetensors {name}: {key} differs")
    return len(cases)


def main():
    global ROOT, BIN
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=pathlib.Path, help="build directory")
    parser.add_argument("--keep", type=pathlib.Path, help="leave all folders here")
    parser.add_argument("cases", nargs="*", help="names of cases; default: all")
    options = parser.parse_args()
    unknown = set(options.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    BIN = options.build.resolve() / "bin"
    torch.set_num_threads(1)  # its sums then have one order
    with tempfile.TemporaryDirectory(prefix="sala-hf-") as folder:
        ROOT = pathlib.Path(options.keep or folder).resolve()
        ROOT.mkdir(parents=True, exist_ok=True)
        print(f"{'model':20} {'stored':9} {'float32':>9} {'float64':>9}   worst of lengths {', '.join(map(str, LENGTHS))}")
        for case in CASES:
            if options.cases and case.name not in options.cases:
                continue
            errors = check_case(case)
            if case.tied:
                check_untied(case)
            print(f"{case.name:20} {str(case.stored).removeprefix('torch.'):9} "
                  f"{errors.get('float32', math.nan):9.2g} {errors.get('float64', math.nan):9.2g}", flush=True)
        print(f"safetensors files: {check_safetensors()}")
    print(f"bounds: float32 {BOUNDS['float32']:.0e}, float64 {BOUNDS['float64']:.0e}; {len(failures)} violation(s)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
