#!/usr/bin/env python3
"""Models that transformers made, with a tokenizer of their own, go through the whole path: import, HALO, a stage with sparse attention,
export and back; and through plain training, after which transformers loads the result.

    python tests/oracle/hf_own_models.py --build build/release [--keep DIR]

transformers has no class for the hybrid. Its folder is held against the released format by names, shapes, number type and fields, and its
weights against the masters of the checkpoint (an export in float32), rounded by torch. A teacher that is trained without HALO stays a model of
its family: transformers must compute what `sala logits` does. Prints one line per model and violation; exits 1 when there is any.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is fetched
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "integration"))
import harness as h
import own_model_test as own

transformers.utils.logging.disable_progress_bar()

SIZES = {"vocab_size": own.VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 16384, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
         "attention_bias": False}
MODELS = {
    # Qwen3-0.6B: heads of 128 that are not hidden / heads, one tensor for embedding and head, bfloat16.
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES, head_dim=128, rope_theta=1e6, tie_word_embeddings=True),
              torch.bfloat16),
    "qwen3_untied": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**{**SIZES, "num_key_value_heads": 1}, head_dim=16),
                     torch.float32),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, rope_theta=5e5), torch.bfloat16),
    "llama_head_dim": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES, head_dim=20, tie_word_embeddings=True), torch.float32),
}

# The largest max |sala - transformers| / max |transformers| in float32, as in hf_parity.py: both round at 6e-8 in other orders of sums,
# and transformers' rotary frequencies are float32. A wrong scale, norm or tensor makes 1e-2 and more.
BOUND = 2e-5

failures = []


def fail(text):
    failures.append(text)
    print(f"FAILED {text}")


def save(name, folder):
    make, config, dtype = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    model = make(config)
    with torch.no_grad():  # new norms are ones and new weights small: neither would show a fault
        for key, values in model.named_parameters():
            values.copy_(torch.randn_like(values) * 0.1 + (1 if "norm" in key else 0))
    model.to(dtype).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    words.train_from_iterator(["the baker watches the bridge"], tokenizers.trainers.BpeTrainer(
        vocab_size=own.VOCABULARY, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"],
        show_progress=False))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return config


def export(checkpoint, folder, dtype):
    h.succeed(["export", "--ckpt", checkpoint, "--to", folder, "--dtype", dtype, "--tokenizer", "none", "--verify"])
    return safetensors.torch.load_file(folder / "model.safetensors")


def check_hybrid(name, base, config, checkpoint):
    """The exported hybrid against the released format, and its weights against the checkpoint's."""
    rounded, masters = export(checkpoint, base / "hybrid", "bf16"), export(checkpoint, base / "hybrid-f32", "f32")
    exported = json.loads((base / "hybrid" / "config.json").read_text())
    found, expected = own.hybrid_fields(exported, config.to_dict())
    for key, value in expected.items():
        if found[key] != value:
            fail(f"{name}: config.json: {key} is {found[key]}, expected {value}")
    if set(rounded) != own.hybrid_names(exported["mixer_types"]):
        fail(f"{name}: other tensors than the released format: {set(rounded) ^ own.hybrid_names(exported['mixer_types'])}")
    for key, values in masters.items():
        if values.dtype != torch.float32 or not torch.equal(rounded[key], values.to(torch.bfloat16)):
            fail(f"{name}: {key} is not what torch rounds the checkpoint's to")
    h.succeed(["import", "--from", base / "hybrid", "--to", base / "hybrid-again"])
    again = export(base / "hybrid-again" / "checkpoints" / "step-000000000", base / "hybrid-twice", "bf16")
    if again.keys() != rounded.keys() or not all(torch.equal(again[key], rounded[key]) for key in rounded):
        fail(f"{name}: imported and exported again, the hybrid has other weights")
    return len(rounded)


def check_teacher(name, base, checkpoint):
    """The teacher trained on as it is: transformers computes the same."""
    export(checkpoint, base / "trained", "f32")
    model, problems = MODELS[name][0].from_pretrained(base / "trained", dtype=torch.float32, output_loading_info=True)
    if any(problems.values()):
        fail(f"{name}: transformers: {problems}")
    tokens = [(7 * i * i + 3 * i) % 256 for i in range(300)]
    ours = np.array(own.logits(base / "trained", f"{name}-trained", tokens)).reshape(len(tokens), -1)
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([tokens])).logits[0].numpy()
    worst = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    if not worst <= BOUND:
        fail(f"{name}: the trained model's logits differ by {worst:.2g}, the bound is {BOUND:.0e}")
    return worst


def check(name):
    base = h.ROOT / name
    config = save(name, base / "source")
    h.succeed(["import", "--from", base / "source", "--to", base / "teacher"])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (base / "source" / file).read_bytes() != (base / "teacher" / "tokenizer" / file).read_bytes():
            fail(f"{name}: {file} is not the folder's")
    teacher = base / "teacher" / "checkpoints" / "step-000000000"
    tokenizer = str(base / "teacher" / "tokenizer")  # the model's own
    prose = h.ingest(f"prose-{name}", tokenizer=tokenizer)
    long = h.ingest(f"long-{name}", documents=8, most_sentences=2000, tokenizer=tokenizer)
    chain = h.write_pipeline(base / "chain", [own.conversion(teacher, prose), own.stable(long)], tokenizer)
    h.succeed(h.train(chain, base / "run"))
    tensors = check_hybrid(name, base, config, h.final_checkpoints(base / "run")["stable"])
    plain = h.pretrain("plain", 2, init_from={"path": str(teacher)}, data=h.data(prose),
                       schedule={"shape": "constant", "peak_lr": 1e-3})
    h.succeed(h.train(h.write_stage(base / "plain.yaml", plain, tokenizer), base / "plain"))
    worst = check_teacher(name, base, h.final_checkpoints(base / "plain")["plain"])
    print(f"{name:16} hybrid of {tensors} tensors as released; the trained teacher's logits differ by {worst:.2g}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True, type=pathlib.Path, help="build directory")
    parser.add_argument("--keep", type=pathlib.Path, help="leave all folders here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="sala-hf-own-") as folder:
        h.SALA = str(options.build.resolve() / "bin" / "sala")
        h.ROOT = pathlib.Path(options.keep or folder).resolve()
        h.ROOT.mkdir(parents=True, exist_ok=True)
        for name in MODELS:
            check(name)
    print(f"bound: {BOUND:.0e}; {len(failures)} violation(s)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
