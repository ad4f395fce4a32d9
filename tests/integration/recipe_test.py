"""The 9B recipe of configs/9b as far as it can be checked without data, weights and GPUs: `train --dry-run` and `plan --gpus`
against the numbers of the report, and against numbers worked out here in another way."""

import json
import math
import os
import pathlib
import re
import subprocess
import unittest

import harness as h

PIPELINE = pathlib.Path(__file__).resolve().parents[2] / "configs" / "9b" / "pipeline.yaml"

# MiniCPM-SALA report, table 1: sequences x length of a batch, tokens of the stage in billions, first and last rate. A number of
# sequences is the one that gives the report's two digits of the batch in tokens.
PUBLISHED = {
    "stable": (1904, 4096, 7.8e6, "314.6", 7.5e-3, 7.5e-3),
    "short_decay": (1904, 4096, 7.8e6, "1006.6", 7.5e-3, 3.75e-4),
    "long_decay_1": (238, 32768, 7.8e6, "102.2", 3e-4, 2e-4),
    "long_decay_2": (60, 163840, 9.8e6, "62.9", 2e-4, 1e-4),
    "long_decay_3": (19, 532480, 10.1e6, "50.6", 1e-4, 3.75e-5),
    "sft_1": (240, 65536, 15.7e6, "204.5", 1e-3, 1e-4),
    "sft_2": (124, 143360, 17.8e6, "213.3", 1e-3, 1e-4),
}
PARAMETERS = 9_477_203_968  # of the released weights
LAYERS, SOFTMAX, HIDDEN, INNER, HEADS, KV_HEADS, HEAD, VOCABULARY = 32, 8, 4096, 16384, 32, 2, 128, 73448


def dry_run(*arguments, config=PIPELINE):
    return json.loads(h.succeed(["train", config, "--dry-run", "--json", *arguments]).out)


def phases(content):
    return {(stage["stage"], phase["phase"]): phase for stage in content["stages"] for phase in stage["phases"]}


def products():
    """FLOP of the matrices a token meets forward, from shapes: by layer kind."""
    softmax = HIDDEN * HEAD * (3 * HEADS + 2 * KV_HEADS)  # q, o, gate; k, v
    linear = HIDDEN * HEAD * 5 * HEADS  # q, k, v, o, gate
    return {"softmax_layers": 2 * SOFTMAX * softmax, "linear_layers": 2 * (LAYERS - SOFTMAX) * linear,
            "mlp": 2 * LAYERS * 3 * HIDDEN * INNER, "head": 2 * VOCABULARY * HIDDEN}


def seen_keys(n, sparse):
    """Keys a query sees, over a document of n tokens, on average: 96 blocks of 64, of which its own up to itself."""
    if not sparse or n < 8192:
        return (n + 1) / 2
    budget = 96 * 64
    return (budget * (budget + 1) / 2 + (n - budget) * (95 * 64 + 32.5)) / n


class NineBillion(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.content = dry_run("--ranks", "64")
        cls.phases = phases(cls.content)

    def test_batches_tokens_and_rates_are_the_reports(self):
        self.assertEqual({stage for stage, _ in self.phases}, {"halo", *PUBLISHED})
        for stage, (sequences, length, batch, billions, first, last) in PUBLISHED.items():
            phase = self.phases[stage, "train"]
            self.assertEqual((phase["global_batch_sequences"], phase["seq_len_tokens"]), (sequences, length), stage)
            self.assertEqual(phase["global_batch_tokens"], sequences * length)
            self.assertLess(abs(phase["global_batch_tokens"] - batch), length, stage)  # one sequence more or less is further off
            self.assertEqual(f"{phase['tokens'] / 1e9:.1f}", billions, stage)
            self.assertEqual(phase["tokens"], phase["steps"] * phase["global_batch_tokens"])
            self.assertLessEqual(abs(phase["tokens"] - phase["tokens_asked"]), phase["global_batch_tokens"] / 2)
            peak = max(point["rate"] for point in phase["rates"])
            self.assertAlmostEqual(peak / first, 1, delta=1e-12, msg=stage)
            # The last update lies one step before the end of the decay: at most 1e-3 of the rate away with thousands of steps.
            self.assertAlmostEqual(phase["rates"][-1]["rate"] / last, 1, delta=1e-3, msg=stage)
            self.assertEqual(phase["rates"][-1]["step"], phase["steps"] - 1)
            self.assertGreaterEqual(len(phase["rates"]), 12)
        halo = [self.phases["halo", phase] for phase in ("align", "distil")]
        self.assertEqual(sum(phase["tokens"] for phase in halo), 1_310_720_000)  # the report's 1.3B

    def test_warm_up(self):
        for stage, steps in (("stable", 2000), ("sft_1", 1000), ("sft_2", 1000)):
            rates = {point["step"]: point["rate"] for point in self.phases[stage, "train"]["rates"]}
            self.assertEqual(rates[0], 0)
            self.assertEqual(rates[steps], max(rates.values()))

    def test_exponential_decay(self):
        phase = self.phases["short_decay", "train"]
        for point in phase["rates"]:
            expected = 7.5e-3 * math.exp(math.log(3.75e-4 / 7.5e-3) * point["step"] / phase["steps"])
            self.assertAlmostEqual(point["rate"] / expected, 1, delta=1e-12)  # roundings of float64

    def test_parameters(self):
        for (stage, phase), sheet in self.phases.items():
            parameters = dict(sheet["parameters"])
            whole, trained = parameters.pop("all"), parameters.pop("trained")
            self.assertEqual(sum(parameters.values()), whole)
            self.assertEqual(sum(group["parameters"] for group in sheet["rate_groups"]), trained)
            if phase != "train":
                continue
            self.assertEqual((whole, trained), (PARAMETERS, PARAMETERS), stage)
            for kind in ("embedding", "head"):
                self.assertEqual(parameters[kind], VOCABULARY * HIDDEN)
            self.assertEqual(parameters["MLP"], LAYERS * 3 * HIDDEN * INNER)
            self.assertEqual(parameters["softmax gates"], SOFTMAX * HIDDEN * HIDDEN)
            self.assertEqual(parameters["linear gates"], (LAYERS - SOFTMAX) * HIDDEN * HIDDEN)
            self.assertEqual(parameters["norms of layers"], (2 * LAYERS + 1) * HIDDEN)
            self.assertEqual(parameters["norms of mixers"], (LAYERS - SOFTMAX) * (2 * HEAD + HIDDEN))
        # Reading A: in the distillation only the linear mixers learn.
        mixers = (LAYERS - SOFTMAX) * (5 * HIDDEN * HIDDEN + 2 * HEAD + HIDDEN)
        self.assertEqual(self.phases["halo", "distil"]["parameters"]["trained"], mixers)

    def test_muP_rates(self):
        groups = {group["name"]: group for group in self.phases["stable", "train"]["rate_groups"]}
        self.assertEqual({name: group["multiplier"] for name, group in groups.items()},
                         {"matrices": 1 / 16, "embedding": 1, "head": 1, "norms": 1})
        self.assertEqual({name: group["weight_decay"] for name, group in groups.items()},
                         {"matrices": 0.1, "embedding": 0, "head": 0.1, "norms": 0})

    def test_operations(self):
        for stage, (_, length, *_) in PUBLISHED.items():
            phase = self.phases[stage, "train"]
            sparse = stage not in ("stable", "short_decay")
            flop = phase["flop_per_token"]
            self.assertEqual(flop["forward_products_of"], products())
            forward = flop["forward"]
            self.assertEqual(forward["products"], sum(products().values()))
            self.assertEqual(forward["lightning"], (LAYERS - SOFTMAX) * HEADS * 4 * HEAD**2)
            attention = SOFTMAX * 4 * HEADS * HEAD * seen_keys(length, sparse)
            self.assertAlmostEqual(forward["attention"] / attention, 1, delta=1e-9, msg=stage)
            # A compressed key every 16 and every 64 tokens, half of them in the past: 2,560 n. The first ones are missing: below 1 %
            # from 8,192 tokens on.
            selection = SOFTMAX * 2 * HEADS * HEAD * (length / 2) * (1 / 16 + 1 / 64) if sparse else 0
            self.assertAlmostEqual(forward["selection"], selection, delta=0.01 * selection, msg=stage)
            training = 3 * (forward["products"] + forward["attention"] + forward["lightning"]) + forward["selection"]
            self.assertAlmostEqual(flop["training"]["all"] / training, 1, delta=1e-12)

    def test_operations_against_the_table_of_the_design(self):
        """GFLOP a token, forward and training, rounded as they were worked out by hand."""
        table = {"stable": (18.67, 56.0), "long_decay_1": (19.21, 57.5), "sft_1": (19.33, 57.7), "long_decay_2": (19.61, 58.0),
                 "long_decay_3": (20.56, 59.0)}
        for stage, (forward, training) in table.items():
            flop = self.phases[stage, "train"]["flop_per_token"]
            self.assertAlmostEqual(flop["forward"]["all"] / 1e9, forward, delta=0.006, msg=stage)  # two digits behind the point
            self.assertAlmostEqual(flop["training"]["all"] / 1e9, training, delta=0.06, msg=stage)
        # The base with full attention: 15.77 of products and 262,144 n of attention.
        teacher = self.phases["halo", "align"]["flop_per_token"]["forward"]
        self.assertAlmostEqual(teacher["products"] / 1e9, 15.77, delta=0.006)
        self.assertAlmostEqual(teacher["attention"] / (262144 * 512), 1, delta=1 / 512)  # n + 1 for n

    def test_memory_is_what_plan_says(self):
        plan = phases(json.loads(h.succeed(["plan", PIPELINE, "--ranks", "64", "--json"]).out))
        for key, sheet in self.phases.items():
            self.assertEqual(sheet["memory"]["total"], max(rank["memory"]["total"] for rank in plan[key]["ranks"][:1] + plan[key]["ranks"][-1:]))
            self.assertLess(sheet["memory"]["total"], 0.95 * 141e9, key)  # the layouts are for such GPUs
            self.assertEqual(sheet["memory"]["buffers"] + sheet["memory"]["activations"] + sheet["memory"]["work_space"],
                             sheet["memory"]["total"])

    def test_what_is_missing_is_listed(self):
        missing = self.content["missing"]
        self.assertTrue(any(line.startswith("tokenizer models/MiniCPM4-8B") for line in missing), missing)
        self.assertIn("model models/MiniCPM4-8B (halo)", missing)
        self.assertIn("dataset corpora/long_decay (long_decay_1, long_decay_2, long_decay_3)", missing)
        self.assertFalse(any(stage["data_checked"] for stage in self.content["stages"]))

    def test_nothing_of_the_model_is_allocated(self):
        """36 GB of float32 parameters are planned in a process of less than 200 MB."""
        for arguments in (["train", PIPELINE, "--dry-run", "--ranks", "64"], ["plan", PIPELINE, "--gpus", "8", "--gpu", "h200", "--stage", "sft_2"]):
            process = subprocess.Popen(h.command(arguments), stdout=subprocess.DEVNULL, cwd=h.ROOT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            self.assertEqual(process.returncode, 0)
            print(f"{arguments[0]}: peak resident {usage.ru_maxrss / 1024:.0f} MiB")
            self.assertLess(usage.ru_maxrss * 1024, 200e6)

    def test_the_text_has_the_same_numbers(self):
        text = h.succeed(["train", PIPELINE, "--dry-run"]).out  # the fewest ranks that its layouts can use
        for part in ("sala-9b on 64 ranks", "9,477,203,968", "19 x 532,480 = 10,117,120", "314.60 B", "1006.60 B", "not there yet",
                     "dp 1 x cp 64 x tp 1, ZeRO 1"):
            self.assertIn(part, text)

    def test_shapes_only_export_goes_on_working(self):
        target = h.ROOT / "shapes"
        h.succeed(["export", "--shapes-only", PIPELINE.parent / "model.yaml", "--to", target])
        index = json.loads((target / "model.safetensors.index.json").read_text())
        self.assertEqual(len(index["weight_map"]), 395)


class Layouts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        words = ["plan", PIPELINE, "--gpus", "64", "--gpu", "h200", "--stage", "long_decay_3"]
        cls.text = h.succeed(words).out
        cls.content = json.loads(h.succeed([*words, "--json"]).out)
        cls.stage = cls.content["stages"][0]

    def test_the_files_layout_is_the_first_proposal(self):
        self.assertEqual(self.stage["as_written"]["mesh"], self.stage["best"][0]["mesh"])
        self.assertEqual(self.stage["as_written"]["recompute"], self.stage["best"][0]["recompute"])

    def test_days_of_all_steps(self):
        found = re.search(r"days on 64 GPUs: long_decay_3 ([\d.]+), together ([\d.]+)\n", self.text)
        self.assertIsNotNone(found, self.text)
        step = self.stage["best"][0]["phases"][0]["step_seconds"]["all"]
        expected = 5001 * step / 86400  # 50.6 billion tokens of 10,117,120 a step
        for text in found.groups():
            self.assertAlmostEqual(float(text), expected, delta=0.005 * expected)  # three digits

    def test_proposals_fit_are_ordered_and_use_all_gpus(self):
        seconds = [layout["seconds"] for layout in self.stage["best"]]
        self.assertEqual(seconds, sorted(seconds))
        self.assertGreater(len(seconds), 1)
        for layout in self.stage["best"]:
            mesh = layout["mesh"]
            self.assertEqual(mesh["dp"] * mesh["cp"] * mesh["tp"], 64)
            for phase in layout["phases"]:
                self.assertLessEqual(phase["memory"]["total"], 0.95 * self.content["gpu"]["memory_bytes"])
                parts = dict(phase["step_seconds"])
                self.assertAlmostEqual(parts.pop("all"), sum(parts.values()), delta=1e-9)
                self.assertAlmostEqual(phase["tokens_per_second_per_gpu"] * 64 * phase["step_seconds"]["all"] / 10_117_120, 1, delta=1e-9)
                self.assertLess(phase["share_of_peak"], 0.71)  # what products alone are taken to reach

    def test_memory_and_exchanges_are_those_of_plan(self):
        """A proposal pasted into the configuration plans to the same numbers."""
        for layout in self.stage["best"][:2]:
            mesh, phase = layout["mesh"], layout["phases"][0]
            sets = [f"long_decay_3.parallel.{key}={mesh[key]}" for key in ("cp", "tp", "zero_stage")]
            sets += [f"long_decay_3.recompute={str(layout['recompute']).lower()}",
                     f"long_decay_3.batch.micro_batch_sequences={phase['micro_batch_sequences']}"]
            words = [word for value in sets for word in ("--set", value)]
            ranks = phases(json.loads(h.succeed(["plan", PIPELINE, "--ranks", "64", "--stage", "long_decay_3", "--json", *words]).out))
            ends = [ranks["long_decay_3", "train"]["ranks"][i] for i in (0, -1)]
            self.assertEqual(phase["memory"]["total"], max(rank["memory"]["total"] for rank in ends))
            self.assertEqual(phase["exchanged_bytes_per_step"], max(sum(c["bytes"] for c in rank["comm"].values()) for rank in ends))

    def test_text(self):
        for part in ("not measured", "Times are a model's", "long_decay_3:  parallel: {cp: 64, tp: 1, zero_stage: 1}  recompute: false"):
            self.assertIn(part, self.text)

    def test_smaller_memory_cuts_more(self):
        """What 141 GB hold without recomputation, 80 GB hold only with parameters cut or layers run again."""
        content = json.loads(h.succeed(["plan", PIPELINE, "--gpus", "64", "--gpu", "h100", "--stage", "long_decay_3", "--json"]).out)
        stage = content["stages"][0]
        self.assertFalse(stage["as_written"]["fits"])
        self.assertLess(stage["fitting"], self.stage["fitting"])
        for layout in stage["best"]:
            self.assertTrue(layout["recompute"] or layout["mesh"]["zero_stage"] == 3)


class BadInput(unittest.TestCase):
    def refuse(self, arguments, code, *texts):
        result = h.run(arguments)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in texts:
            self.assertIn(text, result.error_lines[0])

    def stage(self, name, **changes):
        return h.write_stage(h.ROOT / "recipe" / f"{name}.yaml", {**h.pretrain("only", 3, first=True), **changes})

    def test_command_line(self):
        self.refuse(["plan", PIPELINE, "--gpus", "8", "--gpu", "b100"], 64, "USAGE", "'b100'", "h200, h100, a100")
        self.refuse(["plan", PIPELINE, "--gpus", "8"], 64, "USAGE", "--gpu")
        self.refuse(["plan", PIPELINE, "--gpu", "h200"], 64, "USAGE", "--gpus")
        self.refuse(["plan", PIPELINE, "--gpus", "8", "--gpu", "h200", "--ranks", "8"], 64, "USAGE", "--ranks")
        self.refuse(["train", PIPELINE, "--ranks", "8"], 64, "USAGE", "--dry-run")
        under_mpi = h.run(["train", PIPELINE, "--dry-run"], ranks=2)
        self.assertEqual(under_mpi.code, 64)
        self.assertIn("start it without mpirun", under_mpi.err)

    def test_layouts(self):
        self.refuse(["train", PIPELINE, "--dry-run", "--ranks", "8"], 78, "CFG-MESH", "stage long_decay_2",
                    "parallel.cp 16")
        self.refuse(["plan", PIPELINE, "--gpus", "1", "--gpu", "h200"], 78, "PLAN-FIT", "stage halo", "1 x h200", "needs")
        self.refuse(["plan", PIPELINE, "--gpus", "4", "--gpu", "rtx4090", "--stage", "sft_1"], 78, "PLAN-FIT", "stage sft_1", "more GPUs")

    def test_length_of_a_stage(self):
        batch = h.batch(3)
        both = self.stage("both", batch={**batch, "tokens": 1000})
        self.refuse(["train", both, "--dry-run"], 78, "CFG-CONFLICT", "both.yaml", "batch.tokens", "keep one")
        del batch["steps"]
        self.refuse(["train", self.stage("neither", batch=batch), "--dry-run"], 78, "CFG-MISSING", "batch.steps", "tokens")
        self.refuse(["train", self.stage("none", batch={**batch, "tokens": 0}), "--dry-run"], 78, "CFG-RANGE", "batch.tokens")
        self.refuse(["train", self.stage("many", batch={**batch, "tokens": 10**13}), "--dry-run"], 78, "CFG-RANGE", "batch.tokens", "steps")

    def test_inputs_that_are_there_are_checked(self):
        tokenizer = h.write_stage(h.ROOT / "recipe" / "vocabulary.yaml", h.pretrain("only", 3, first=True, model=h.model(vocab_size=100)))
        self.refuse(["train", tokenizer, "--dry-run"], 65, "TOK-VOCAB", "stage only", "100")
        many = self.stage("epochs", batch=h.batch(5000), data=h.data(h.ingest("prose"), mixture=[{"dataset": str(h.ingest("prose"))}]))
        self.refuse(["train", many, "--dry-run"], 78, "MIX-EPOCHS", "stage only")
        text = self.stage("text", kind="sft")
        self.refuse(["train", text, "--dry-run"], 78, "CFG-DATA", "stage only", "sft")

    def test_recall_prompts(self):
        halo = h.halo("halo", 3, 3, halo={"score": {"text_tokens": 512, "recall_items": 4, "recall_length_tokens": 96, "bootstrap": 10}})
        config = h.write_pipeline(h.ROOT / "recipe" / "recall", [h.pretrain("base", 2, first=True), halo])
        for words in (["plan", config], ["plan", config, "--gpus", "1", "--gpu", "h100"], ["train", config, "--dry-run"]):
            self.refuse(words, 78, "EVAL-LENGTH", "stage halo", "halo.score.recall_length_tokens")

    def test_another_model_than_described(self):
        run = h.ROOT / "runs" / "described"
        first = h.pretrain("only", 2, first=True)
        h.succeed(h.train(h.write_stage(h.ROOT / "recipe" / "first.yaml", first), run))
        checkpoint = h.checkpoints(run)[-1]
        described = {**h.model(vocab_size=261)}
        next_stage = {**h.pretrain("next", 2), "init_from": {"path": str(checkpoint), "model": described}}
        good = h.write_stage(h.ROOT / "recipe" / "next.yaml", next_stage)
        h.succeed(["train", good, "--dry-run"])
        h.succeed(h.train(good, h.ROOT / "runs" / "next"))
        next_stage["init_from"]["model"] = {**described, "num_key_value_heads": 1}
        wrong = h.write_stage(h.ROOT / "recipe" / "wrong.yaml", next_stage)
        for words in (["train", wrong, "--dry-run"], ["plan", wrong], h.train(wrong, h.ROOT / "runs" / "wrong"), ["verify", wrong]):
            self.refuse(words, 78, "CFG-MODEL", str(checkpoint), "num_key_value_heads: 2", "num_key_value_heads: 1")
        # A description never stands for the weights.
        next_stage["init_from"] = {"path": str(h.ROOT / "nowhere"), "model": described}
        missing = h.write_stage(h.ROOT / "recipe" / "missing.yaml", next_stage)
        self.assertIn("model " + str(h.ROOT / "nowhere"), h.succeed(["train", missing, "--dry-run"]).out)
        self.refuse(h.train(missing, h.ROOT / "runs" / "missing"), 65, "CKPT-NONE", "nowhere")
        self.assertFalse((h.ROOT / "runs" / "missing" / "checkpoints").exists() and h.checkpoints(h.ROOT / "runs" / "missing"))


class Budget(unittest.TestCase):
    def test_tokens_become_steps(self):
        """And the resolved configuration, which resume reads again, has steps."""
        batch = h.batch(1)
        del batch["steps"]
        tokens = 3 * batch["global_batch_tokens"] + 100
        config = h.write_stage(h.ROOT / "recipe" / "budget.yaml", {**h.pretrain("only", 3, first=True), "batch": {**batch, "tokens": tokens},
                                                                     "schedule": h.schedule(3)})
        sheet = dry_run(config=config)["stages"][0]
        self.assertTrue(sheet["data_checked"])
        self.assertEqual((sheet["phases"][0]["steps"], sheet["phases"][0]["tokens_asked"]), (3, tokens))
        self.assertTrue(any("became 3 whole steps" in note for note in sheet["notes"]), sheet["notes"])
        run = h.ROOT / "runs" / "budget"
        h.succeed(h.train(config, run))
        self.assertEqual(len(h.metrics(run)), 3)
        h.succeed(h.train(config, run))  # complete: reads what it wrote
        self.assertEqual(len(h.metrics(run)), 3)

    def test_run_directory_by_flag(self):
        """A stage file without `run` is planned, checked and made small with --run, as it is trained."""
        path = h.ROOT / "recipe" / "bare.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(h.yaml({**h.pretrain("only", 3, first=True), "tokenizer": "bytes"}))
        run = h.ROOT / "runs" / "bare"
        for words in (["plan", path], ["train", path, "--dry-run"], ["verify", path, "--only", "gradients", "--ranks", "1"]):
            self.assertEqual(h.run(words).code, 78)
            h.succeed([*words, "--run", run])
        self.assertFalse(run.exists())


if __name__ == "__main__":
    h.main()
