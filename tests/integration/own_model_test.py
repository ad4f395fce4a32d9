"""A model folder of one's own, from end to end: import, HALO, a stage with sparse attention, export, and back again.

The folders are written here by hand, as another program would leave them. tests/oracle/hf_own_models.py does the same with folders that
transformers made.
"""

import json
import math
import random
import struct
import unittest

import harness as h

VOCABULARY = 264  # the byte tokenizer's 261, and rows that no token uses
LONG = 8448  # tokens of a sample of the sparse stage: more than the 8,192 that an imported model's sparse attention begins at

COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 16384,
          "rms_norm_eps": 1e-6, "initializer_range": 0.02, "bos_token_id": 257, "eos_token_id": 258}
FAMILIES = {
    # Heads wider than hidden / heads, an embedding that is the head: as Qwen3-0.6B has them.
    "qwen3": {**COMMON, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "rope_theta": 1000000,
              "tie_word_embeddings": True, "use_sliding_window": False, "sliding_window": None, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "llama": {**COMMON, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "head_dim": 12, "rope_theta": 500000.0,
              "tie_word_embeddings": False, "mlp_bias": False, "rope_scaling": None, "torch_dtype": "float32"},
}


def shapes(config):
    """Tensors of a full-attention folder, by name."""
    hidden, inner, head_dim = (config[key] for key in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    found = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = [config["vocab_size"], hidden]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {at + "input_layernorm.weight": [hidden], at + "post_attention_layernorm.weight": [hidden],
                  at + "mlp.gate_proj.weight": [inner, hidden], at + "mlp.up_proj.weight": [inner, hidden],
                  at + "mlp.down_proj.weight": [hidden, inner], at + "self_attn.q_proj.weight": [q, hidden],
                  at + "self_attn.k_proj.weight": [kv, hidden], at + "self_attn.v_proj.weight": [kv, hidden],
                  at + "self_attn.o_proj.weight": [hidden, q]}
        if config["model_type"] == "qwen3":
            found |= {at + "self_attn.q_norm.weight": [head_dim], at + "self_attn.k_norm.weight": [head_dim]}
    return found


def write_folder(path, config, seed=1):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    draw = random.Random(seed)
    header, content = {}, bytearray()
    for name, shape in shapes(config).items():
        begin = len(content)
        centre, deviation = (1, 0.1) if "norm" in name else (0, 0.1)
        for _ in range(math.prod(shape)):
            value = struct.pack("<f", draw.gauss(centre, deviation))
            content += value if config["torch_dtype"] == "float32" else value[2:]  # bfloat16: its upper half
        header[name] = {"dtype": "F32" if config["torch_dtype"] == "float32" else "BF16", "shape": shape, "data_offsets": [begin, len(content)]}
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + content)


def read_safetensors(path):
    """{name: (dtype, shape, bytes)}"""
    content = path.read_bytes()
    size = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8:8 + size])
    header.pop("__metadata__", None)
    return {name: (entry["dtype"], entry["shape"], content[8 + size + entry["data_offsets"][0]:8 + size + entry["data_offsets"][1]])
            for name, entry in header.items()}


def floats(content):
    return struct.unpack(f"<{len(content) // 4}f", content)


def conversion(teacher, store, **changes):
    """The HALO stage: a few updates of each phase. Every second layer and the first keep softmax attention."""
    halo = h.halo("halo", 4, 4, data=h.data(store), init_from={"path": str(teacher)}, checkpoint={"every_steps": 2, "keep_last": 9})
    halo["halo"] |= {"keep": [0], "softmax_layers": 2, "selector": "kl_swap", **changes}
    return halo


def stable(long_store):
    # No muP factors come with these families: every matrix has the rate of the schedule.
    return h.pretrain("stable", 2, sparse_attention=True, batch=h.batch(2, sequences=1, seq_len=LONG, micro=1), data=h.data(long_store),
                      schedule={"shape": "constant", "peak_lr": 1e-3}, checkpoint={"keep_last": 9})


def hybrid_fields(config, family):
    """What config.json of an exported hybrid says, of a teacher with this configuration."""
    heads, head_dim = family["num_attention_heads"], family["head_dim"]
    expected = {key: family[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                             "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "rope_theta")}
    expected |= {"model_type": "minicpm_sala", "architectures": ["MiniCPMSALAForCausalLM"], "attn_use_rope": False,
                 "attn_use_output_gate": True, "lightning_nh": heads, "lightning_nkv": heads, "lightning_head_dim": head_dim,
                 "lightning_scale": "1/sqrt(d)", "lightning_use_rope": True, "qk_norm": True, "use_output_norm": True, "use_output_gate": True,
                 "tie_word_embeddings": False, "scale_emb": 1, "scale_depth": math.sqrt(family["num_hidden_layers"]),
                 "dim_model_base": family["hidden_size"]}
    found = {key: config.get(key) for key in expected}
    return found, expected


def hybrid_names(mixer_types):
    """Tensors of the released format."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer, mixer in enumerate(mixer_types):
        at = f"model.layers.{layer}."
        own = ["o_gate"] if mixer == "minicpm4" else ["z_proj", "q_norm", "k_norm", "o_norm"]
        names |= {at + f"self_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", *own)}
        names |= {at + f"mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
        names |= {at + f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
    return names


def logits(path, name, tokens):
    target = h.ROOT / f"{name}.safetensors"
    h.succeed(["logits", path, "--tokens", ",".join(map(str, tokens)), "--to", target, "--threads", "1"])
    return floats(read_safetensors(target)["logits"][2])


class OwnModel:
    family = None

    @classmethod
    def setUpClass(cls):
        cls.config = FAMILIES[cls.family]
        cls.base = h.ROOT / cls.family
        cls.folder = cls.base / "folder"
        write_folder(cls.folder, cls.config)
        cls.check = h.succeed(["import", "--from", cls.folder, "--check"])
        h.succeed(["import", "--from", cls.folder, "--to", cls.base / "teacher"])
        cls.teacher = cls.base / "teacher" / "checkpoints" / "step-000000000"
        cls.chain = h.write_pipeline(cls.base / "chain", [conversion(cls.teacher, h.ingest("prose")),
                                                          stable(h.ingest("long", documents=8, most_sentences=2000))])
        cls.run_directory = cls.base / "run"
        cls.result = h.succeed(h.train(cls.chain, cls.run_directory))
        cls.final = h.final_checkpoints(cls.run_directory)
        cls.exported = cls.base / "exported"
        h.succeed(["export", "--ckpt", cls.final["stable"], "--to", cls.exported, "--dtype", "bf16", "--verify"])

    def test_the_export_is_the_released_format(self):
        config = json.loads((self.exported / "config.json").read_text())
        found, expected = hybrid_fields(config, self.config)
        self.assertEqual(found, expected)
        mixers = config["mixer_types"]
        self.assertEqual([mixers[0], mixers.count("minicpm4"), len(mixers)], ["minicpm4", 2, 4])
        tensors = read_safetensors(self.exported / "model.safetensors")
        self.assertEqual(set(tensors), hybrid_names(mixers))
        self.assertEqual({dtype for dtype, _, _ in tensors.values()}, {"BF16"})
        h.succeed(["import", "--from", self.exported, "--check"])

    def test_the_export_computes_what_the_checkpoint_does(self):
        tokens = [(7 * i * i + 3 * i) % 256 for i in range(300)]
        from_checkpoint = logits(self.final["stable"], f"{self.family}-checkpoint", tokens)
        whole = self.base / "exported-f32"
        h.succeed(["export", "--ckpt", self.final["stable"], "--to", whole, "--dtype", "f32"])
        self.assertEqual(logits(whole, f"{self.family}-f32", tokens), from_checkpoint)  # float32 weights are the masters themselves
        # Every weight moves by at most 2^-9 of itself; a logit by that times the square root of the number of roundings on its way, some
        # ten products in each of four layers: 2^-9 * sqrt(40) = 1.2 % of the largest. A tensor in another's place is 50 % and more.
        rounded = logits(self.exported, f"{self.family}-bf16", tokens)
        largest = max(map(abs, from_checkpoint))
        worst = max(abs(a - b) for a, b in zip(from_checkpoint, rounded)) / largest
        self.assertGreater(worst, 0)
        self.assertLess(worst, 0.05)

    def test_the_export_is_imported_and_trained_on(self):
        again = self.base / "again"
        h.succeed(["import", "--from", self.exported, "--to", again])
        stage = h.pretrain("more", 1, init_from={"path": str(again / "checkpoints" / "step-000000000")}, sparse_attention=True,
                           batch=h.batch(1), data=h.data(h.ingest("prose")), schedule={"shape": "constant", "peak_lr": 1e-3})
        config = h.write_stage(self.base / "more.yaml", stage)
        h.succeed(h.train(config, self.base / "more"))
        self.assertTrue(h.final_checkpoints(self.base / "more")["more"].exists())


class Qwen3(OwnModel, unittest.TestCase):
    family = "qwen3"

    def test_the_head_is_untied_on_import(self):
        self.assertIn("head untied from the embedding", self.check.out)

    def test_the_norm_of_softmax_layers_is_folded(self):
        self.assertNotIn("EXP-QKNORM", self.result.err + self.result.out)
        self.assertIn("folded into their projections", self.result.err + self.result.out)

    def test_killed_behind_the_distillation_and_resumed_gives_the_same_bits(self):
        killed = h.copy_run(self.run_directory, self.base / "killed")
        for checkpoint in h.checkpoints(killed):
            stage = h.manifest(checkpoint)["stage"]
            if stage["name"] == "stable" or stage["phase"] == "assemble":
                h.shutil.rmtree(checkpoint)
        self.assertEqual(h.manifest(h.checkpoints(killed)[-1])["stage"]["phase"], "distil")
        h.succeed(h.train(self.chain, killed))
        self.assertEqual(h.differences(self.run_directory, killed), [])

    def test_a_norm_that_is_kept_cannot_be_exported(self):
        stage = conversion(self.teacher, h.ingest("prose"), softmax_qk_norm="keep", selector="uniform")
        config = h.write_stage(self.base / "keep.yaml", stage)
        result = h.succeed(h.train(config, self.base / "keep"))
        self.assertIn("halo.softmax_qk_norm is keep", result.err + result.out)
        refused = h.run(["export", "--ckpt", h.final_checkpoints(self.base / "keep")["halo"], "--to", self.base / "keep-exported"])
        self.assertEqual(refused.code, 65, refused)
        self.assertEqual(len(refused.error_lines), 1, refused)
        self.assertIn("EXP-QKNORM", refused.err)
        self.assertIn("halo.softmax_qk_norm: fold", refused.err)
        self.assertFalse((self.base / "keep-exported").exists())


class Llama(OwnModel, unittest.TestCase):
    family = "llama"

    def test_the_softmax_layers_are_sparse_in_the_long_stage(self):
        # Of documents of more than 8,192 tokens; without sparse attention the loss has other bits.
        dense = self.base / "dense"
        h.copy_run(self.run_directory, dense)
        for checkpoint in h.checkpoints(dense):
            if h.manifest(checkpoint)["stage"]["name"] == "stable":
                h.shutil.rmtree(checkpoint)
        h.succeed(h.train(self.chain, dense, "stable.sparse_attention=false"))
        losses = [[line["loss_hex"] for line in h.metrics(run).values() if line["stage"] == "stable"] for run in (self.run_directory, dense)]
        self.assertEqual([len(losses[0]), len(losses[1])], [2, 2])
        self.assertNotEqual(losses[0][0], losses[1][0])

    def test_rotary_scaling_is_refused(self):
        scaled = self.base / "scaled"
        write_folder(scaled, {**self.config, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
        result = h.run(["import", "--from", scaled, "--to", self.base / "scaled-run"])
        self.assertEqual(result.code, 65, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn("IMP-ARCH", result.err)
        self.assertIn("rope_scaling", result.err)
        self.assertFalse((self.base / "scaled-run").exists())


if __name__ == "__main__":
    h.main()
