"""Model folders of other programs: import, training from them, export in their form; folders that are refused; the 9B model's shapes."""

import json
import math
import os
import pathlib
import shutil
import struct
import subprocess
import unittest

import harness as h

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]

# A teacher for the byte tokenizer, as another program would describe it: fields that are not read here, another order.
CONFIG = {"transformers_version": "9.9", "vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
          "hidden_act": "silu", "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "rope_theta": 20000.0}

MINICPM = {"model_type": "minicpm", "scale_emb": 4, "scale_depth": 1.4, "dim_model_base": 16, "tie_word_embeddings": False}


def shapes(config):
    hidden, heads, pairs, d = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"))
    found = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden],
             "lm_head.weight": [config["vocab_size"], hidden]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {prefix + "input_layernorm.weight": [hidden], prefix + "post_attention_layernorm.weight": [hidden],
                  prefix + "mlp.gate_proj.weight": [config["intermediate_size"], hidden],
                  prefix + "mlp.up_proj.weight": [config["intermediate_size"], hidden],
                  prefix + "mlp.down_proj.weight": [hidden, config["intermediate_size"]],
                  prefix + "self_attn.q_proj.weight": [heads * d, hidden], prefix + "self_attn.k_proj.weight": [pairs * d, hidden],
                  prefix + "self_attn.v_proj.weight": [pairs * d, hidden], prefix + "self_attn.o_proj.weight": [hidden, heads * d]}
    return found


def header_of(path):
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return content[: 8 + length]


def write_weights(folder, tensors):
    """{name: shape} as float32 numbers of a fixed sequence; norms are ones."""
    draws, header, data = h.Draws(11), {}, bytearray()
    for name in reversed(tensors):
        n = math.prod(tensors[name])
        values = [1.0] * n if "norm" in name else [(draws.below(2001) - 1000) / 8000 for _ in range(n)]
        header[name] = {"shape": tensors[name], "dtype": "F32", "data_offsets": [len(data), len(data) + 4 * n]}
        data += struct.pack(f"<{n}f", *values)
    text = json.dumps(header).encode()  # with spaces, without padding
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def teacher(name, **changes):
    """Made once."""
    folder = h.ROOT / "models" / name
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    config = {"model_type": "llama", **CONFIG, **changes}
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    (folder / "generation_config.json").write_text('{"eos_token_id": 257, "top_p": 0.8}')
    (folder / "byte_tokenizer.json").write_text('{"type": "bytes", "version": 1}\n')
    (folder / "tokenizer.json").write_text('{"is": "not read here"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_weights(folder, shapes(config))
    return folder


def imported(name, **changes):
    folder, run = teacher(name, **changes), h.ROOT / "runs" / f"import-{name}"
    if not run.exists():
        h.succeed(["import", "--from", folder, "--to", run])
    return folder, run / "checkpoints" / "step-000000000"


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "export.json"}


class Exchange(unittest.TestCase):
    def test_import_and_export_are_the_identity(self):
        folder, checkpoint = imported("llama")
        exported = h.ROOT / "exports" / "identity"
        result = h.succeed(["export", "--ckpt", checkpoint, "--to", exported, "--verify"])
        self.assertIn("in the form of the folder it came from", result.out)
        self.assertEqual(files(exported), files(folder))
        # A tokenizer that is named is written in place of the folder's; none leaves it out.
        h.succeed(["export", "--ckpt", checkpoint, "--to", h.ROOT / "exports" / "named", "--tokenizer", "bytes"])
        named = files(h.ROOT / "exports" / "named")
        self.assertIn("special_tokens_map.json", named)
        self.assertNotIn("tokenizer.json", named)
        self.assertEqual(named["model.safetensors"], files(folder)["model.safetensors"])
        h.succeed(["export", "--ckpt", checkpoint, "--to", h.ROOT / "exports" / "no-tokenizer", "--tokenizer", "none"])
        self.assertEqual({name for name in files(h.ROOT / "exports" / "no-tokenizer")},
                         {"config.json", "generation_config.json", "model.safetensors"})
        # Likewise without a checkpoint in between, and the form comes before the size of files.
        again = h.succeed(["export", "--ckpt", folder, "--to", h.ROOT / "exports" / "again", "--max-shard", "20000"])
        self.assertIn("--max-shard was ignored", again.err)
        self.assertEqual(files(h.ROOT / "exports" / "again"), files(folder))

    def test_engines(self):
        exports = h.ROOT / "exports"
        _, llama = imported("llama")
        for engine, command in (("hf", "AutoModelForCausalLM.from_pretrained("), ("sglang", "python -m sglang.launch_server --model-path "),
                                ("vllm", "vllm serve ")):
            out = h.succeed(["export", "--ckpt", llama, "--to", exports / f"for-{engine}", "--engine", engine, "--print-eval-commands"]).out
            self.assertIn(command, out)
            self.assertIn("lm_eval --model ", out)
        folder, minicpm = imported("minicpm", **MINICPM)
        base = h.ROOT / "models" / "published"
        shutil.copytree(folder, base)
        config = json.loads((base / "config.json").read_text())
        config["auto_map"] = {"AutoConfig": "configuration_m.C", "AutoModelForCausalLM": "modeling_m.M"}
        (base / "config.json").write_text(json.dumps(config))
        for name in ("configuration_m.py", "modeling_m.py", "LICENSE"):
            (base / name).write_text(f"# {name}\n")
        (base / "generation_config.json").write_text("{}")
        target = exports / "engine"
        for arguments, code, texts in (
                ([minicpm, "--engine", "hf"], 65, ["EXP-ENGINE", "auto_map: found none", "--base"]),
                ([llama, "--engine", "vllm", "--tokenizer", "bytes"], 65, ["EXP-ENGINE", "tokenizer: found neither"]),
                ([llama, "--engine", "sglang", "--dtype", "f64"], 65, ["EXP-ENGINE", "torch_dtype: found float64"]),
                ([minicpm, "--base", teacher("llama")], 65, ["EXP-BASE", "found 'llama', expected 'minicpm'"]),
                ([minicpm, "--base", h.ROOT / "nowhere"], 66, ["FILE-MISSING"]),
                ([llama, "--engine", "llama.cpp"], 64, ["USAGE"])):
            result = h.run(["export", "--ckpt", arguments[0], "--to", target, *arguments[1:]])
            self.assertEqual(result.code, code, result)
            self.assertEqual(len(result.error_lines), 1, result)
            for text in texts:
                self.assertIn(text, result.error_lines[0])
            self.assertEqual([path for path in exports.iterdir() if path.name.startswith("engine")], [])
        self.assertEqual(h.run(["export", "--ckpt", llama, "--to", exports / "a,b", "--print-eval-commands"]).code, 64)
        self.assertFalse((exports / "a,b").exists())

        out = h.succeed(["export", "--ckpt", minicpm, "--to", target, "--engine", "hf", "--base", base, "--verify"]).out
        self.assertIn(f"taken from {base}: LICENSE, configuration_m.py, modeling_m.py", out)
        self.assertIn("trust_remote_code=True", out)
        self.assertEqual((target / "modeling_m.py").read_text(), "# modeling_m.py\n")
        self.assertEqual((target / "generation_config.json").read_bytes(), (folder / "generation_config.json").read_bytes())
        written = json.loads((target / "config.json").read_text())
        self.assertEqual(written, {**json.loads((folder / "config.json").read_text()), "auto_map": config["auto_map"]})
        self.assertIn("modeling_m.py", json.loads((target / "export.json").read_text())["sha256"])
        h.succeed(["export", "--ckpt", minicpm, "--to", target, "--engine", "sglang", "--base", base, "--force"])
        self.assertEqual(json.loads((target / "config.json").read_text())["auto_map"], config["auto_map"])
        result = h.succeed(["export", "--ckpt", minicpm, "--to", target, "--base", base, "--tokenizer", "none", "--force"])
        self.assertIn("left out, with the tokenizer: ", result.out)
        (base / "modeling_m.py").rename(base / "other.py")
        result = h.run(["export", "--ckpt", minicpm, "--to", target, "--engine", "hf", "--base", base, "--force"])
        self.assertEqual(result.code, 65, result)
        self.assertIn("auto_map.AutoModelForCausalLM: found modeling_m.M", result.err)

    def test_a_model_that_learned_chats_stops_at_the_end_of_a_turn(self):
        folder, checkpoint = imported("llama")
        stage = {**h.sft("talk", 2), "init_from": {"path": str(checkpoint)}, "data": h.data(h.chat())}
        run = h.ROOT / "runs" / "talk"
        h.succeed(h.train(h.write_stage(h.ROOT / "talk" / "stage.yaml", stage), run))
        exported = h.ROOT / "exports" / "talk"
        h.succeed(["export", "--ckpt", h.final_checkpoints(run)["talk"], "--to", exported])
        self.assertEqual(json.loads((exported / "generation_config.json").read_text()), {"eos_token_id": [257, 260], "top_p": 0.8})
        self.assertEqual((exported / "config.json").read_bytes(), (folder / "config.json").read_bytes())
        # Also where the folder said nothing of it, alone or with that of a base.
        silent = h.ROOT / "models" / "silent"
        shutil.copytree(folder, silent)
        (silent / "generation_config.json").unlink()
        h.succeed(["import", "--from", silent, "--to", h.ROOT / "runs" / "import-silent"])
        stage["init_from"] = {"path": str(h.ROOT / "runs" / "import-silent" / "checkpoints" / "step-000000000")}
        run = h.ROOT / "runs" / "silent"
        h.succeed(h.train(h.write_stage(h.ROOT / "talk" / "silent.yaml", stage), run))
        for more, found in (([], [257, 260]), (["--base", folder], [257, 260])):
            h.succeed(["export", "--ckpt", h.final_checkpoints(run)["talk"], "--to", exported, "--force", *more])
            generation = json.loads((exported / "generation_config.json").read_text())
            self.assertEqual(generation["eos_token_id"], found)
            self.assertEqual("top_p" in generation, bool(more))

    def test_commands_take_the_checkpoint(self):
        _, checkpoint = imported("llama")
        h.succeed(["ckpt", "verify", checkpoint, "--deep"])
        self.assertIn("llama", h.succeed(["import", "--from", h.ROOT / "models" / "llama", "--check"]).out)
        text = h.succeed(["generate", "--ckpt", checkpoint, "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0"]).out
        self.assertGreater(len(text), len("the\n"))
        # What the folder says of where it stops holds: here at every byte.
        stops = h.ROOT / "models" / "stops"
        shutil.copytree(teacher("llama"), stops)
        (stops / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(256))}))
        words = ["--tokenizer", "bytes", "--prompt", "the", "--max-new-tokens", "4", "--temperature", "0"]
        self.assertEqual(h.succeed(["generate", "--ckpt", stops, *words]).out, "the\n")

    def test_a_tokenizer_that_is_not_read_is_handed_on(self):
        folder = h.ROOT / "models" / "other-tokenizer"
        shutil.copytree(teacher("llama"), folder)
        (folder / "byte_tokenizer.json").unlink()
        run = h.ROOT / "runs" / "other-tokenizer"
        result = h.succeed(["import", "--from", folder, "--to", run])
        self.assertIn("TOK-UNSUPPORTED: ", result.err)
        self.assertIn("the tokenizer is kept for exports", result.err)
        checkpoint = run / "checkpoints" / "step-000000000"
        for name, more, form in (("same", [], "in the form of the folder it came from"),
                                 ("other-type", ["--dtype", "bf16"], "not in the form of the folder it came from: --dtype is another")):
            exported = h.ROOT / "exports" / f"other-tokenizer-{name}"
            self.assertIn(form, h.succeed(["export", "--ckpt", checkpoint, "--to", exported, *more]).out)
            for file in ("tokenizer.json", "chat_template.jinja"):
                self.assertEqual((exported / file).read_bytes(), (folder / file).read_bytes())
        self.assertEqual(files(h.ROOT / "exports" / "other-tokenizer-same"), files(folder))
        result = h.run(["generate", "--ckpt", checkpoint, "--prompt", "the"])
        self.assertEqual(result.code, 65, result)
        self.assertIn("TOK-UNSUPPORTED", result.err)
        # Where the run's tokenizer is gone, that is said.
        shutil.rmtree(run / "tokenizer")
        result = h.run(["export", "--ckpt", checkpoint, "--to", h.ROOT / "exports" / "lost"])
        self.assertEqual(result.code, 66, result)
        self.assertIn("EXP-TOKENIZER", result.err)

    def test_the_table_names_every_kind(self):
        folder = teacher("table")
        lines = h.succeed(["import", "--from", folder, "--to", h.ROOT / "runs" / "table"]).out.splitlines()
        self.assertEqual(lines[0].split(), ["kind", "tensors", "shape", "dtype", "mean", "std", "absmax"])
        norm = next(line.split() for line in lines if line.startswith("model.layers.*.input_layernorm.weight"))
        self.assertEqual(norm[1:], ["4", "[32]", "F32", "1", "0", "1"])

    def test_training_keeps_the_form_and_changes_the_values(self):
        folder, checkpoint = imported("minicpm", **MINICPM)
        stage = h.pretrain("go_on", 3, init_from={"path": str(checkpoint)})
        config = h.write_stage(h.ROOT / "keep" / "stage.yaml", stage)
        run = h.ROOT / "runs" / "keep"
        h.succeed(h.train(config, run))
        exported = h.ROOT / "exports" / "keep"
        h.succeed(["export", "--ckpt", h.final_checkpoints(run)["go_on"], "--to", exported])
        for name in ("config.json", "generation_config.json"):
            self.assertEqual((exported / name).read_bytes(), (folder / name).read_bytes())
        self.assertEqual(header_of(exported / "model.safetensors"), header_of(folder / "model.safetensors"))
        self.assertNotEqual((exported / "model.safetensors").read_bytes(), (folder / "model.safetensors").read_bytes())
        # A run that was interrupted keeps it too.
        resumed = h.ROOT / "runs" / "keep-resumed"
        h.succeed(h.train(config, resumed))
        for path in h.checkpoints(resumed)[1:]:
            shutil.rmtree(path)
        self.assertFalse(h.manifest(h.checkpoints(resumed)[0])["stage"]["final"])
        h.succeed(h.train(config, resumed))
        h.succeed(["export", "--ckpt", h.final_checkpoints(resumed)["go_on"], "--to", h.ROOT / "exports" / "keep-resumed"])
        self.assertEqual((h.ROOT / "exports" / "keep-resumed" / "config.json").read_bytes(), (folder / "config.json").read_bytes())

    def test_a_rank_reads_its_part_of_a_folder_as_of_a_checkpoint(self):
        folder, checkpoint = imported("minicpm", **MINICPM)
        runs = []
        for name, path in (("folder", folder), ("checkpoint", checkpoint)):
            stage = h.pretrain("go_on", 2, init_from={"path": str(path)}, parallel={"tp": 2, "dp": 1, "zero_stage": 3})
            config = h.write_stage(h.ROOT / "parts" / f"{name}.yaml", stage)
            runs.append(h.ROOT / "runs" / f"parts-{name}")
            h.succeed(h.train(config, runs[-1]), ranks=2)
        self.assertEqual(h.differences(*runs), [])

    def test_a_conversion_is_written_as_what_it_became(self):
        _, checkpoint = imported("minicpm", **MINICPM)
        stage = h.halo("halo", 3, 3, init_from={"path": str(checkpoint)})
        config = h.write_stage(h.ROOT / "halo" / "stage.yaml", stage)
        run = h.ROOT / "runs" / "halo"
        h.succeed(h.train(config, run))
        exported = h.ROOT / "exports" / "halo"
        result = h.succeed(["export", "--ckpt", h.final_checkpoints(run)["halo"], "--to", exported])
        self.assertIn("not in the form of the folder it came from: the model is another one than it says", result.out)
        written = json.loads((exported / "config.json").read_text())
        self.assertEqual(written["model_type"], "minicpm_sala")
        self.assertEqual(written["mixer_types"].count("lightning-attn"), 2)
        self.assertNotIn("transformers_version", written)
        self.assertEqual(written["torch_dtype"], "float32")  # of the folder


class Refusals(unittest.TestCase):
    """Each with one line, before anything is written."""

    def refuse(self, folder, code, *texts, more=(), exit_code=65):
        run = h.ROOT / "runs" / "refused"
        for mode in (["--check"], ["--to", run]):
            result = h.run(["import", "--from", folder, *mode, *more])
            self.assertEqual(result.code, exit_code, result)
            self.assertEqual(len(result.error_lines), 1, result)
            for text in (code, *texts):
                self.assertIn(str(text), result.error_lines[0])
            self.assertEqual(result.out, "")
            self.assertFalse(run.exists())

    def spoilt(self, name, **changes):
        folder = h.ROOT / "models" / f"spoilt-{name}"
        shutil.copytree(teacher("llama"), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        return folder

    def test_what_a_configuration_asks_for_in_vain(self):
        table = [("quantised", {"quantization_config": {"quant_method": "gptq"}}, "IMP-QUANT"),
                 ("experts", {"num_experts": 8}, "IMP-ARCH"),
                 ("moe", {"model_type": "qwen3_moe"}, "IMP-ARCH"),
                 ("mixtral", {"model_type": "mixtral"}, "IMP-ARCH"),
                 ("latent", {"kv_lora_rank": 64}, "IMP-ARCH"),
                 ("minicpm3", {"model_type": "minicpm3"}, "IMP-ARCH"),
                 ("deepseek", {"model_type": "deepseek_v3"}, "IMP-ARCH"),
                 ("window", {"sliding_window": 128}, "IMP-ARCH"),
                 ("windows", {"layer_types": ["sliding_attention"] * 4}, "IMP-ARCH"),
                 ("activation", {"hidden_act": "gelu"}, "IMP-ARCH"),
                 ("bias", {"attention_bias": True}, "IMP-BIAS"),
                 ("rope", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "IMP-ARCH"),
                 ("rope5", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 20000.0}}, "IMP-ARCH"),
                 ("missing", {"num_hidden_layers": 5}, "IMP-MISSING"),
                 ("extra", {"num_hidden_layers": 3}, "IMP-EXTRA"),
                 ("shape", {"intermediate_size": 64}, "IMP-SHAPE")]
        for name, changes, code in table:
            with self.subTest(name):
                together = ["do not belong together"] if name in ("missing", "extra", "shape") else []
                self.refuse(self.spoilt(name, **changes), code, f"spoilt-{name}", *together)

    def test_a_bias_among_the_weights(self):
        folder = self.spoilt("bias-tensor")
        write_weights(folder, {**shapes(CONFIG), "model.layers.0.self_attn.q_proj.bias": [32]})
        self.refuse(folder, "IMP-BIAS", "model.layers.0.self_attn.q_proj.bias")

    def test_other_forms_of_weights(self):
        for name in ("pytorch_model.bin", "model-q4_k_m.gguf"):
            folder = self.spoilt(name)
            (folder / "model.safetensors").rename(folder / name)
            self.refuse(folder, "ST-FORMAT", name)
            (folder / "config.json").unlink()  # such folders often have none
            self.refuse(folder, "ST-FORMAT", name)

    def test_nothing_there(self):
        self.refuse(h.ROOT / "models" / "nowhere", "FILE-MISSING", "nowhere: no such folder", exit_code=66)
        self.refuse(teacher("llama"), "IMP-ARCH", "--arch says qwen3", more=["--arch", "qwen3"])
        self.assertEqual(h.run(["import", "--from", teacher("llama")]).code, 64)
        unused = h.run(["import", "--from", teacher("llama"), "--check", "--to", h.ROOT / "runs" / "unused"])
        self.assertEqual(unused.code, 64, unused)
        self.assertIn("leave --to out", unused.err)

    def test_a_run_directory_in_use(self):
        folder, checkpoint = imported("llama")
        before = (checkpoint / "manifest.json").read_bytes()
        result = h.run(["import", "--from", folder, "--to", checkpoint.parents[1]])
        self.assertEqual(result.code, 74, result)
        self.assertIn("IMP-EXISTS", result.err)
        self.assertEqual((checkpoint / "manifest.json").read_bytes(), before)


class Released(unittest.TestCase):
    """The 9B model takes 18 GB; its headers alone take next to nothing, and nothing more may be used."""

    LIMIT_KB = 64 << 10  # memory of the program: it starts with 17 MiB; one large weight matrix has 128 MiB

    def run_within(self, arguments):
        child = subprocess.Popen(h.command(arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = child.stdout.read(), child.stderr.read()
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        child.stdout.close()
        child.stderr.close()
        self.assertEqual(child.returncode, 0, err)
        self.assertLess(usage.ru_maxrss, self.LIMIT_KB)
        return out

    def test_shapes_only(self):
        facts = json.loads((REPOSITORY / "tests" / "recipes" / "export" / "minicpm_sala_9b.json").read_text())
        for dtype, width in (("bf16", 1), ("f32", 2)):
            folder = h.ROOT / "exports" / f"released-{dtype}"
            self.run_within(["export", "--shapes-only", REPOSITORY / "configs" / "9b" / "model.yaml", "--to", folder, "--dtype", dtype])
            sizes = [path.stat() for path in folder.iterdir()]
            self.assertGreater(sum(s.st_size for s in sizes), facts["total_size"] * width)
            self.assertLess(sum(s.st_blocks for s in sizes) * 512, 1 << 20)
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            self.assertEqual(index["metadata"]["total_size"], facts["total_size"] * width)
            self.assertEqual(len(index["weight_map"]), facts["tensor_count"])
            config = json.loads((folder / "config.json").read_text())
            expected = {**facts["config"], "dtype": "bfloat16" if dtype == "bf16" else "float32"}
            self.assertEqual({key: config.get(key) for key in expected}, expected)
            checked = self.run_within(["import", "--from", folder, "--check"])
            self.assertIn(f"{facts['tensor_count']} tensors, {facts['parameters']:,} parameters", checked)


if __name__ == "__main__":
    h.main()
