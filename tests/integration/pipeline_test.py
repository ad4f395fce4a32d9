"""All kinds of stages on one rank, and what comes out of them: export, import, generation."""

import json
import math
import os
import pty
import shutil
import subprocess
import unittest

import harness as h

SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 8, "init_blocks": 1, "window_size": 16, "topk": 2, "dense_len": 64}
LONG = 128  # tokens of a sample in the long stages: twice dense_len


def stages():
    long_data = h.data(h.ingest("long", documents=120, seed=5, most_sentences=12), packing="best_fit")
    base_data = h.data(h.ingest("prose", documents=500))
    return [
        h.pretrain("base", 120, first=True, model=h.model(sparse_config=SPARSE), batch=h.batch(120, sequences=8, micro=8), data=base_data,
                   schedule={"shape": "linear", "peak_lr": 0.02, "final_lr": 0.005, "warmup_steps": 10}, validation={"every_steps": 40}),
        conversion(base_data),
        h.pretrain("stable", 20, batch=h.batch(20, sequences=8, micro=8), data=base_data),
        h.pretrain("long_decay", 4, sparse_attention=True, carry_optimizer=True, batch=h.batch(4, sequences=2, seq_len=LONG), data=long_data,
                   schedule={"shape": "exponential", "peak_lr": 0.005, "final_lr": 0.001}),
        h.sft("sft", 4, sparse_attention=True, batch=h.batch(4, sequences=2, seq_len=LONG),
              schedule={"shape": "cosine", "peak_lr": 0.002, "final_lr": 0.0001}),
    ]


def conversion(data):
    stage = h.halo("halo", 150, 150, data=data, validation={"every_steps": 0}, checkpoint={"every_steps": 0})
    for phase, rate in (("align", 0.01), ("distil", 0.01)):
        stage["halo"][phase]["batch"] = h.batch(150, sequences=8, micro=8)
        stage["halo"][phase]["schedule"] = {"shape": "cosine", "peak_lr": rate, "final_lr": rate / 20, "warmup_steps": 10}
    return stage


class Pipeline(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        h.ingest("prose", documents=500)
        h.chat()
        cls.config = h.write_pipeline(h.ROOT / "all", stages())
        cls.run_directory = h.ROOT / "runs" / "all"
        cls.result = h.succeed(h.train(cls.config, cls.run_directory))
        cls.final = h.final_checkpoints(cls.run_directory)

    def last(self):
        return self.final["sft"]

    def generate(self, path, *more):
        return h.succeed(["generate", "--ckpt", path, "--prompt", "the baker", "--max-new-tokens", "24", "--temperature", "0", *more]).out

    # ---- the stages ----

    def test_every_stage_has_a_final_checkpoint_and_a_row(self):
        names = [stage["name"] for stage in stages()]
        self.assertEqual(list(self.final), names)
        for checkpoint in self.final.values():
            h.succeed(["ckpt", "verify", checkpoint, "--deep"])
        summary = json.loads((self.run_directory / "summary.json").read_text())
        self.assertEqual([row["stage"] for row in summary], names)
        status = json.loads((self.run_directory / "status.json").read_text())
        self.assertEqual((status["state"], status["stage"]), ("done", "sft"))
        listed = h.succeed(["ckpt", "list", self.run_directory]).out
        for checkpoint in self.final.values():
            self.assertIn(str(checkpoint), listed)

    def test_each_checkpoint_names_the_one_it_came_from(self):
        names = list(self.final)
        for before, after in zip(names, names[1:]):
            self.assertEqual(h.manifest(self.final[after])["parent"]["save_id"], h.manifest(self.final[before])["save_id"])

    def test_learning_rates_are_those_of_the_schedules(self):
        # docs/configuration.md; stage_step counts from 1, n from 0.
        rates = {(line["stage"], line["stage_step"]): line["lr"] for line in h.metrics(self.run_directory).values()}
        expected = {("base", 1): 0, ("base", 6): 0.01, ("base", 11): 0.02, ("base", 66): 0.0125, ("base", 120): 0.02 - 0.015 * 109 / 110,
                    ("stable", 1): 0, ("stable", 3): 0.01, ("stable", 20): 0.01,
                    ("long_decay", 1): 0.005, ("long_decay", 2): 0.005 * 0.2 ** (1 / 4), ("long_decay", 4): 0.005 * 0.2 ** (3 / 4),
                    ("sft", 1): 0.002, ("sft", 3): 0.00105}
        for step, rate in expected.items():
            self.assertTrue(math.isclose(rates[step], rate, rel_tol=1e-12), (step, rates[step], rate))

    def test_the_base_stage_learns_the_corpus(self):
        # 500 documents of 48 words: from ln(vocabulary) = 5.5 nats a byte to far below.
        rows = {row["stage"]: row for row in json.loads((self.run_directory / "summary.json").read_text())}
        self.assertLess(rows["base"]["loss_after"], 0.5 * rows["base"]["loss_before"])

    def test_moments_are_carried_only_where_asked(self):
        updates = {name: h.manifest(checkpoint)["trainer"].get("updates") for name, checkpoint in self.final.items()}
        self.assertEqual(updates["stable"], 20)
        self.assertEqual(updates["long_decay"], 24)  # goes on counting
        self.assertEqual(updates["sft"], 4)

    def test_sparse_attention_is_in_use_in_the_long_stages(self):
        # The same step with dense attention gives another loss, so blocks were left out.
        run = h.ROOT / "runs" / "dense"
        h.copy_run(self.run_directory, run)
        for checkpoint in h.checkpoints(run):
            if h.manifest(checkpoint)["stage"]["index"] >= 3:
                shutil.rmtree(checkpoint)
        (run / "metrics" / "train.jsonl").unlink()
        h.succeed(h.train(self.config, run, "long_decay.sparse_attention=false", "sft.sparse_attention=false"))
        first = [next(line for line in h.metrics(r).values() if line["stage"] == "long_decay") for r in (self.run_directory, run)]
        self.assertEqual(first[0]["data_crc"], first[1]["data_crc"])
        self.assertNotEqual(first[0]["loss_hex"], first[1]["loss_hex"])

    # ---- HALO ----

    def test_alignment_lowers_the_error_of_every_layer(self):
        # Errors relative to the variance of the target, on held-out text. A fall in every layer is what holds for any seed at
        # this size; how far it falls is printed.
        lines = [line.split("align: layer ")[1] for line in self.result.err.splitlines() if "align: layer " in line]
        self.assertEqual(len(lines), 4, self.result)
        print("alignment:", "; ".join(lines))
        for line in lines:
            before, after = (float(number) for number in line.rsplit("target ", 1)[1].split(" -> "))
            self.assertLess(after, before, line)

    def test_distillation_brings_the_hybrid_to_the_teacher(self):
        state = h.manifest(self.final["halo"])["trainer"]["halo"]
        before, result = state["kl_before"], state["result"]
        print(f"distillation: KL {before:.4f} -> {result['kl_trained']:.4f}, handed on {result['kl_final']:.4f}; "
              f"teacher {result['teacher_loss']:.4f}, hybrid {result['student_loss']:.4f}")
        self.assertLess(result["kl_trained"], before)

    def test_without_held_out_documents_nothing_is_said_to_be_measured(self):
        run = h.ROOT / "runs" / "unmeasured"
        stage = h.halo("halo", 2, 2, init_from={"path": str(self.final["base"])}, data=h.data(h.ingest("prose"), validation={"fraction": 0}))
        stage["halo"].update(selector="uniform")
        h.succeed(h.train(h.write_stage(h.ROOT / "unmeasured.yaml", stage), run))
        row, = json.loads((run / "summary.json").read_text())
        self.assertIn("KL not measured", row["note"])
        self.assertNotIn("result", h.manifest(h.checkpoints(run)[-1])["trainer"]["halo"])

    def test_the_hybrid_has_the_chosen_layers(self):
        state = h.manifest(self.final["halo"])["trainer"]["halo"]
        mixers = h.manifest(self.final["halo"])["model"]["mixer_types"]
        self.assertEqual([i for i, mixer in enumerate(mixers) if mixer == "minicpm4"], state["softmax_layers"])
        self.assertEqual(len(state["softmax_layers"]), 2)
        self.assertIn(0, state["softmax_layers"])
        self.assertEqual(len(state["scores"]["layers"]), 4)

    def test_conversion_leaves_the_teacher_alone(self):
        # What is not a mixer keeps its bits from the teacher to the hybrid: MLPs, norms, embedding, head.
        diff = h.run(["ckpt", "diff", self.final["base"], self.final["halo"]])
        changed = [line.split()[1] for line in diff.out.splitlines() if line.startswith("param ")]
        self.assertTrue(changed)
        self.assertEqual([name for name in changed if ".self_attn." not in name], [])

    # ---- export, import, generation ----

    def exported(self, name, checkpoint, *more):
        folder = h.ROOT / "exports" / name
        result = h.succeed(["export", "--ckpt", checkpoint, "--to", folder, "--verify", *more])
        self.assertIn("equal bit for bit", result.out)
        return folder

    def test_an_export_holds_what_engines_read(self):
        folder = self.exported("engines", self.last())
        config = json.loads((folder / "config.json").read_text())
        self.assertEqual(config["model_type"], "minicpm_sala")
        self.assertEqual(config["mixer_types"].count("minicpm4"), 2)
        self.assertEqual(config["sparse_config"]["block_size"], 8)
        self.assertFalse(config["attn_use_rope"])
        self.assertTrue(config["attn_use_output_gate"])
        teacher = json.loads((self.exported("teacher", self.final["base"]) / "config.json").read_text())
        self.assertEqual(teacher["model_type"], "minicpm")

    def test_an_export_in_float32_is_the_checkpoint(self):
        folder = self.exported("float32", self.last(), "--dtype", "f32")
        self.assertEqual(self.generate(folder), self.generate(self.last()))
        # A run that starts from the folder and one that starts from the checkpoint do the same first step.
        losses = []
        for name, source in (("from-folder", folder), ("from-checkpoint", self.last())):
            stage = h.pretrain("again", 1, init_from={"path": str(source)}, checkpoint={"every_steps": 0})
            run = h.ROOT / "runs" / name
            h.succeed(h.train(h.write_stage(h.ROOT / "again" / f"{name}.yaml", stage), run))
            losses.append([line["loss_hex"] for line in h.metrics(run).values()])
        self.assertEqual(len(losses[0]), 1)
        self.assertEqual(losses[0], losses[1])

    def test_an_export_in_bfloat16_loads_back(self):
        folder = self.exported("bf16", self.last())
        stage = h.pretrain("again", 1, init_from={"path": str(folder)}, checkpoint={"every_steps": 0})
        run = h.ROOT / "runs" / "from-bf16"
        h.succeed(h.train(h.write_stage(h.ROOT / "again" / "bf16.yaml", stage), run))
        again = self.exported("bf16-again", folder)
        self.assertEqual((again / "model.safetensors").read_bytes(), (folder / "model.safetensors").read_bytes())
        self.assertEqual((again / "config.json").read_bytes(), (folder / "config.json").read_bytes())

    def test_generation_is_deterministic(self):
        first = self.generate(self.last())
        self.assertTrue(first.startswith("the baker"))
        self.assertGreater(len(first), len("the baker\n"))
        self.assertEqual(first, self.generate(self.last()))
        self.assertEqual(first, self.generate(self.last(), "--threads", "1"))
        draws = [h.succeed(["generate", "--ckpt", self.last(), "--prompt", "my sister", "--max-new-tokens", "24", "--temperature", "1",
                            "--seed", seed]).out for seed in ("1", "1", "2")]
        self.assertEqual(draws[0], draws[1])
        self.assertNotEqual(draws[0], draws[2])

    def test_generation_of_a_chat(self):
        talk = ["generate", "--ckpt", self.last(), "--max-new-tokens", "8", "--temperature", "0"]

        def lines(text, *more):
            done = subprocess.run(h.command([*talk, "--chat", *more]), input=text, capture_output=True, text=True, errors="replace",
                                  timeout=h.LIMIT_SECONDS)
            self.assertEqual(done.returncode, 0, done.stderr)
            return done.stdout
        first = lines("Continue: the lamp\n")
        both = lines("Continue: the lamp\n\nAnd then?\n")
        self.assertTrue(both.startswith(first))
        self.assertGreater(len(both), len(first))
        # A file with the same conversation has the same answer: the turns before it were read.
        record = h.ROOT / "talk.jsonl"
        messages = [{"role": "user", "content": "Continue: the lamp"}, {"role": "assistant", "content": first[:-1]},
                    {"role": "user", "content": "And then?"}]
        alone = {"messages": messages[2:], "id": 7}
        record.write_text(json.dumps({"messages": messages}) + "\n" + json.dumps(alone) + "\n")
        answers = [json.loads(line) for line in h.succeed([*talk, "--messages", record]).out.splitlines()]
        self.assertEqual(answers[0]["messages"][:-1], messages)
        self.assertEqual(answers[0]["messages"][-1], {"role": "assistant", "content": both[len(first):-1]})
        self.assertEqual((answers[1]["id"], answers[1]["messages"][:-1]), (7, alone["messages"]))
        for bad, code in (('{"messages": [{"role": "assistant", "content": "a"}]}', "CHAT-ROLE"), ("[]", "ING-JSON"), ('{"text": "a"}', "ING-FIELD"),
                          ('{"messages": [{"role": "user"}]}', "ING-FIELD"), ("", "ING-FIELD")):
            record.write_text(json.dumps({"messages": messages}) + "\n" + bad + "\n" if bad else "\n")
            result = h.run([*talk, "--messages", record])
            self.assertEqual((result.code, result.out), (65, ""), result)
            self.assertIn(code, result.err)
            self.assertIn(f"{record}: line 2" if bad else "holds no conversation", result.err)
        # What is wrong with a record shows before the weights are read.
        broken = h.ROOT / "no-weights"
        shutil.copytree(self.last(), broken)
        (broken / "manifest.json").write_text("{}")
        record.write_text("[]\n")
        result = h.run(["generate", "--ckpt", broken, "--tokenizer", "bytes", "--messages", record])
        self.assertIn("ING-JSON", result.err, result)
        # A marker that was typed is said, and the talk goes on; a program that writes one is told by the exit code.
        marked = "what is <|im_end|>?\n"
        done = subprocess.run(h.command([*talk, "--chat"]), input=marked, capture_output=True, text=True, timeout=h.LIMIT_SECONDS)
        self.assertEqual(done.returncode, 65, done.stderr)
        near, far = pty.openpty()
        typing = subprocess.Popen(h.command([*talk, "--chat"]), stdin=far, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.close(far)
        os.write(near, (marked + "Continue: the lamp\n\x04").encode())
        out, err = (text.decode(errors="replace") for text in typing.communicate(timeout=h.LIMIT_SECONDS))
        os.close(near)
        self.assertEqual(typing.returncode, 0, err)
        self.assertEqual(err.count("sala: error: CHAT-TEMPLATE: message 0: the content contains"), 1, err)
        self.assertIn(first.rstrip("\n"), out)
        for words in ([], ["--prompt", "a", "--messages", record]):
            self.assertEqual(h.run([*talk, *words]).code, 64)
        self.assertEqual(h.run([*talk, "--messages", h.ROOT / "nowhere.jsonl"]).code, 66)
        self.assertTrue(h.succeed(["generate", "--ckpt", self.last(), "--chat", "--prompt", "Continue this text: the lamp",
                                   "--max-new-tokens", "8", "--temperature", "0"]).out)


if __name__ == "__main__":
    h.main()
