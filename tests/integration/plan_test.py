"""What `sala plan` says is what a run does: exchanges of every rank equal to the call and byte, memory within 5 percent.

Runs have no validation and no checkpoint between their steps, so that the last step counts one step and nothing else.
"""

import json
import os
import unittest

import harness as h

MEMORY_TOLERANCE = 0.05  # asked of the plan


def plan(config, ranks, *sets, stage=None):
    words = [word for value in sets for word in ("--set", value)]
    only = ["--stage", stage] if stage else []
    done = h.succeed(["plan", config, "--ranks", ranks, "--json", *only, *words])
    return json.loads(done.out)


def phases(content):
    return {(stage["stage"], phase["phase"]): phase for stage in content["stages"] for phase in stage["phases"]}


def measured(run):
    """By stage and phase, a list by rank."""
    lines = (run / "metrics" / "ranks.jsonl").read_text().splitlines()
    return {(line["stage"], line["phase"]): line["ranks"] for line in map(json.loads, lines)}


def stage(**changes):
    return h.pretrain("only", 3, first=True, checkpoint={"every_steps": 0}, **changes)


def model(**changes):
    """Both mixers, and heads that four tensor ranks can share."""
    return h.model(mixer_types=["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"], **changes)


SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 16, "topk": 2, "dense_len": 32}

LAYOUTS = {
    "dp 1": (1, {}, {}),
    "dp 2, ZeRO-0": (2, {"zero_stage": 0}, {}),
    "dp 2, ZeRO-1": (2, {"zero_stage": 1}, {}),
    "dp 3, uneven samples": (3, {"zero_stage": 1}, {"batch": h.batch(3, sequences=7, micro=2)}),
    "dp 2, ZeRO-2, accumulation": (2, {"zero_stage": 2}, {"batch": h.batch(3, sequences=8, micro=1)}),
    "dp 3, ZeRO-2, uneven samples": (3, {"zero_stage": 2}, {"batch": h.batch(3, sequences=7, micro=1)}),
    "dp 2, ZeRO-3": (2, {"zero_stage": 3}, {}),
    "dp 2, ZeRO-3, recompute off": (2, {"zero_stage": 3}, {"recompute": False}),
    "dp 2, ZeRO-3, tied": (2, {"zero_stage": 3}, {"model": model(tie_word_embeddings=True)}),
    "cp 2": (2, {"cp": 2}, {}),
    "cp 4, long samples": (4, {"cp": 4}, {"batch": h.batch(3, seq_len=256, sequences=2, micro=1)}),
    "tp 2": (2, {"tp": 2}, {}),
    "tp 2, tied, recompute off": (2, {"tp": 2}, {"model": model(tie_word_embeddings=True), "recompute": False}),
    "tp 4, two ranks a head": (4, {"tp": 4}, {}),
    "tp 4, sparse": (4, {"tp": 4}, {"model": model(sparse_config=SPARSE), "sparse_attention": True}),
    "cp 2 x tp 2, sparse, gates": (4, {"cp": 2, "tp": 2},
                                   {"model": model(sparse_config=SPARSE, attn_use_output_gate=True, attn_use_rope=False),
                                    "sparse_attention": True}),
    "dp 2 x cp 2 x tp 2, ZeRO-3": (8, {"cp": 2, "tp": 2, "zero_stage": 3}, {}),
    "dp 2 x tp 2, ZeRO-2, no norms": (4, {"tp": 2, "zero_stage": 2}, {"model": model(qk_norm=False, use_output_norm=False)}),
    "dp 2, rank independent": (2, {"zero_stage": 1}, {"batch": {**h.batch(3, sequences=8, micro=2), "rank_independent_sums": True}}),
}


class Exchanges(unittest.TestCase):
    def assert_same(self, planned, ranks, where):
        self.assertEqual(len(planned["ranks"]), len(ranks))
        for rank, (expected, found) in enumerate(zip(planned["ranks"], ranks)):
            self.assertEqual(expected["comm"], found["comm"], f"{where}, rank {rank}")

    def test_layouts(self):
        for name, (ranks, parallel, changes) in LAYOUTS.items():
            with self.subTest(name):
                changes = {"model": model(), **changes}
                folder = h.ROOT / "plan" / name.replace(" ", "_").replace(",", "")
                config = h.write_stage(folder / "stage.yaml", {**stage(**changes), "parallel": parallel})
                h.succeed(h.train(config, folder / "run"), ranks=ranks)
                planned = phases(plan(config, ranks))["only", "train"]
                self.assert_same(planned, measured(folder / "run")["only", "train"], name)
                # Rank 0 says the same in every step but the first, which has no update before it.
                lines = [line["comm"] for line in h.metrics(folder / "run").values()]
                self.assertEqual(lines[1:], [planned["ranks"][0]["comm"]] * (len(lines) - 1))

    def halo(self, name, ranks, parallel, **changes):
        stage_changes = {"checkpoint": {"every_steps": 0}, "parallel": parallel}
        halo = h.halo("halo", 3, 3, halo={"selector": "uniform", **changes}, **stage_changes)
        halo["halo"]["align"]["schedule"]["warmup_steps"] = 0
        base = h.pretrain("base", 2, first=True, parallel=parallel)
        config = h.write_pipeline(h.ROOT / "plan" / name, [base, halo])
        run = h.ROOT / "plan" / name / "run"
        h.succeed(h.train(config, run), ranks=ranks)
        planned, found = phases(plan(config, ranks)), measured(run)
        for phase in ("align", "distil"):
            self.assert_same(planned["halo", phase], found["halo", phase], f"{name} {phase}")

    def test_halo(self):
        self.halo("halo_dp_zero_1", 2, {"zero_stage": 1})
        self.halo("halo_cp_tp", 4, {"cp": 2, "tp": 2, "zero_stage": 2}, ce_weight=0.5)
        self.halo("halo_zero_3", 2, {"zero_stage": 3}, trainable="all")

    def test_a_wrong_plan_is_seen(self):
        folder = h.ROOT / "plan" / "wrong"
        config = h.write_stage(folder / "stage.yaml", stage(model=model()))
        h.succeed(h.train(config, folder / "run"), ranks=2)
        planned = phases(plan(config, 2, "parallel.zero_stage=3"))["only", "train"]
        with self.assertRaises(AssertionError):
            self.assert_same(planned, measured(folder / "run")["only", "train"], "")


class Memory(unittest.TestCase):
    """A model of 6.2 M parameters, 25 MB a copy: a buffer that the plan forgets would show."""

    LAYOUTS = {
        "one rank": (1, {}),
        "ZeRO-1, dp 4": (4, {"zero_stage": 1}),
        "ZeRO-2, dp 4": (4, {"zero_stage": 2}),
        "ZeRO-3, dp 4": (4, {"zero_stage": 3}),
        "tp 2": (2, {"tp": 2, "zero_stage": 0}),
        "cp 4": (4, {"cp": 4, "zero_stage": 0}),
    }

    @classmethod
    def setUpClass(cls):
        cls.planned, cls.found = {}, {}
        big = h.model(hidden_size=256, intermediate_size=640, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
                      head_dim=32, mixer_types=["minicpm4", "lightning-attn"] * 4)
        for name, (ranks, parallel) in cls.LAYOUTS.items():
            folder = h.ROOT / "memory" / name.replace(" ", "_").replace(",", "")
            content = {**stage(model=big, batch=h.batch(2, seq_len=512, sequences=4, micro=1), recompute=False),
                       "schedule": h.schedule(2), "parallel": parallel}
            # Documents longer than a sample, as the plan assumes: how far the last range of cp looks back follows from them.
            content["data"] = h.data(h.ingest("long", documents=60, most_sentences=400), validation={"fraction": 0})
            config = h.write_stage(folder / "stage.yaml", content)
            h.succeed(h.train(config, folder / "run"), ranks=ranks)
            cls.planned[name] = [rank["memory"] for rank in phases(plan(config, ranks))["only", "train"]["ranks"]]
            cls.found[name] = [rank["memory"] for rank in measured(folder / "run")["only", "train"]]

    def most(self, name, kind):
        return max(rank[kind] for rank in self.planned[name])

    def test_every_kind_is_within_the_tolerance_on_every_rank(self):
        for name in self.LAYOUTS:
            for rank, (planned, found) in enumerate(zip(self.planned[name], self.found[name])):
                total = found["buffers"] + found["activations"] + found["work_space"]
                print(f"{name:14} rank {rank}: planned {planned['total'] / 1e6:7.2f} MB, allocated {total / 1e6:7.2f} MB "
                      f"({planned['total'] / total - 1:+.2%}), resident with libraries {found['resident'] / 1e6:7.2f} MB")
                self.assertAlmostEqual(planned["total"] / total, 1, delta=MEMORY_TOLERANCE, msg=f"{name}, rank {rank}")
                for kind in ("buffers", "activations", "work_space"):
                    self.assertAlmostEqual(planned[kind] / found[kind], 1, delta=MEMORY_TOLERANCE, msg=f"{name}, rank {rank}, {kind}")
                self.assertGreater(found["resident"], total)

    def test_each_layout_cuts_what_it_is_for(self):
        one = "one rank"
        # Pieces are multiples of 16 elements: hardly more than a quarter.
        self.assertAlmostEqual(self.most("ZeRO-1, dp 4", "optimizer") / self.most(one, "optimizer"), 1 / 4, delta=0.01)
        self.assertEqual(self.most("ZeRO-1, dp 4", "parameters"), self.most(one, "parameters"))
        self.assertLess(self.most("ZeRO-2, dp 4", "gradients"), self.most("ZeRO-1, dp 4", "gradients") * 0.6)
        self.assertAlmostEqual(self.most("ZeRO-3, dp 4", "parameters") / self.most(one, "parameters"), 1 / 4, delta=0.01)
        self.assertGreater(self.most("ZeRO-3, dp 4", "slots"), 0)
        self.assertAlmostEqual(self.most("tp 2", "parameters") / self.most(one, "parameters"), 1 / 2, delta=0.01)
        for kind in ("gradients", "optimizer"):
            self.assertLess(self.most("tp 2", kind), self.most(one, kind) * 0.51)
        # Keys and values of all tokens are on every rank, so it is more than a quarter; of the measured peaks.
        cp = max(rank["activations"] for rank in self.found["cp 4"]) / self.found[one][0]["activations"]
        self.assertLess(cp, 0.4)
        buffers = [self.found[name][0]["buffers"] for name in (one, "ZeRO-1, dp 4", "ZeRO-2, dp 4", "ZeRO-3, dp 4")]
        self.assertLess(buffers[2], buffers[1])
        self.assertLess(buffers[3], buffers[2])
        self.assertLess(self.found["tp 2"][0]["buffers"], buffers[0] * 0.51)


class StageMemory(unittest.TestCase):
    """Every kind of stage on one and two ranks: a model of 1.8 M parameters, of which each kind of memory is some MB."""

    SHAPE = {"hidden_size": 192, "intermediate_size": 480, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
             "head_dim": 32}
    MIXERS = ["minicpm4", "lightning-attn"] * 2
    SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 4, "dense_len": 256}

    def content(self, **changes):
        # Documents longer than a sample, as the plan assumes.
        return {**stage(batch=h.batch(2, seq_len=512, sequences=4, micro=1), **changes), "schedule": h.schedule(2),
                "data": h.data(h.ingest("long", documents=60, most_sentences=400), validation={"fraction": 0})}

    def compare(self, name, planned, found):
        for rank, (expected, measured_rank) in enumerate(zip(planned, found)):
            expected, actual = expected["memory"], measured_rank["memory"]
            for kind in ("buffers", "activations", "work_space"):
                self.assertGreater(actual[kind], 0)
                self.assertAlmostEqual(expected[kind] / actual[kind], 1, delta=MEMORY_TOLERANCE, msg=f"{name}, rank {rank}, {kind}")
            total = sum(actual[kind] for kind in ("buffers", "activations", "work_space"))
            print(f"{name:24} rank {rank}: planned {expected['total'] / 1e6:7.2f} MB, allocated {total / 1e6:7.2f} MB "
                  f"({expected['total'] / total - 1:+.2%})")
            self.assertAlmostEqual(expected["total"] / total, 1, delta=MEMORY_TOLERANCE, msg=f"{name}, rank {rank}")

    def single(self, name, **changes):
        for ranks in (1, 2):
            with self.subTest(name, ranks=ranks):
                folder = h.ROOT / "stage_memory" / f"{name}_{ranks}"
                config = h.write_stage(folder / "stage.yaml", self.content(**changes))
                h.succeed(h.train(config, folder / "run"), ranks=ranks)
                self.compare(f"{name}, {ranks} ranks", phases(plan(config, ranks))["only", "train"]["ranks"],
                             measured(folder / "run")["only", "train"])

    def test_dense(self):
        self.single("dense", model=h.model(**self.SHAPE, mixer_types=self.MIXERS))

    def test_sparse(self):
        self.single("sparse", model=h.model(**self.SHAPE, mixer_types=self.MIXERS, sparse_config=self.SPARSE), sparse_attention=True)

    def test_halo(self):
        """In a process of its own, as ranks.jsonl has the most since the process began: of the distillation the most of its steps and of
        the moment when the hybrid was put together before them."""
        content = self.content(model=h.model(**self.SHAPE))
        base = h.ROOT / "stage_memory" / "halo_base"
        h.succeed(h.train(h.write_stage(base / "stage.yaml", content), base / "run"))
        halo = h.halo("halo", 2, 2, halo={"selector": "uniform"}, checkpoint={"every_steps": 0}, data=content["data"],
                      init_from={"path": str(h.checkpoints(base / "run")[-1])})
        for phase in ("align", "distil"):
            halo["halo"][phase]["batch"] = content["batch"]
            halo["halo"][phase]["schedule"] = content["schedule"]
        for ranks in (1, 2):
            with self.subTest(ranks=ranks):
                folder = h.ROOT / "stage_memory" / f"halo_{ranks}"
                config = h.write_stage(folder / "stage.yaml", halo)
                h.succeed(h.train(config, folder / "run"), ranks=ranks)
                planned, found = phases(plan(config, ranks)), measured(folder / "run")
                self.compare(f"halo align, {ranks} ranks", planned["halo", "align"]["ranks"], found["halo", "align"])
                for expected, actual in zip(planned["halo", "distil"]["ranks"], found["halo", "distil"]):
                    for kind in ("activations", "work_space"):
                        self.assertAlmostEqual(expected["memory"][kind] / actual["memory"][kind], 1, delta=MEMORY_TOLERANCE, msg=kind)
                    buffers = max(expected["memory"]["buffers"], expected["memory"]["assembly"])
                    self.assertAlmostEqual(buffers / actual["memory"]["buffers"], 1, delta=MEMORY_TOLERANCE, msg="buffers")


@unittest.skipUnless("SALA_CUDA_MODULE" in os.environ, "needs a CUDA module")
class Cuda(unittest.TestCase):
    """On the device: the same exchanges with activations of 2 bytes, and activations to the byte."""

    LAYOUTS = {"zero_1": (2, {"zero_stage": 1}), "zero_3": (2, {"zero_stage": 3}), "cp_tp": (4, {"cp": 2, "tp": 2, "zero_stage": 2})}

    def test_layouts(self):
        shape = model(hidden_size=64, intermediate_size=96, head_dim=16, sparse_config=SPARSE, attn_use_output_gate=True)
        for name, (ranks, parallel) in self.LAYOUTS.items():
            with self.subTest(name):
                folder = h.ROOT / "cuda" / name
                content = {**stage(model=shape, batch=h.batch(2, sequences=4, micro=1), sparse_attention=True), "schedule": h.schedule(2),
                           "data": h.data(h.ingest("long", documents=60, most_sentences=400), validation={"fraction": 0}),
                           "parallel": {**parallel, "transport": "mpi"}}
                config = h.write_stage(folder / "stage.yaml", content)
                h.succeed(h.train(config, folder / "run", "run.device=cuda"), ranks=ranks)
                planned = phases(plan(config, ranks, "run.device=cuda"))["only", "train"]["ranks"]
                for expected, found in zip(planned, measured(folder / "run")["only", "train"]):
                    self.assertEqual(expected["comm"], found["comm"])
                    self.assertEqual(expected["memory"]["activations"], found["memory"]["activations"])
                    self.assertAlmostEqual(expected["memory"]["work_space"] / found["memory"]["work_space"], 1, delta=MEMORY_TOLERANCE)


class Command(unittest.TestCase):
    def test_refusals_are_those_of_the_run(self):
        config = h.write_stage(h.ROOT / "plan" / "refused" / "stage.yaml", stage(model=model()))
        for ranks, sets in ((3, ["parallel.tp=3"]), (3, ["parallel.cp=2"]),
                            (2, ["parallel.tp=2", "batch.rank_independent_sums=true"])):
            words = [word for value in sets for word in ("--set", value)]
            planned = h.run(["plan", config, "--ranks", ranks, *words])
            ran = h.run(h.train(config, h.ROOT / "plan" / "refused" / f"run-{'-'.join(sets)}", *sets), ranks=ranks)
            self.assertEqual((planned.code, ran.code), (78, 78), (planned, ran))
            message = planned.error_lines[0].split("CFG-MESH")[1].split("stage only: ")[-1]
            self.assertIn(message.lstrip(": "), ran.err)
        self.assertEqual(h.run(["plan", config, "--stage", "other"]).code, 64)

    def test_the_published_shape_on_64_ranks(self):
        softmax = {0, 9, 16, 17, 22, 29, 30, 31}
        types = ["minicpm4" if layer in softmax else "lightning-attn" for layer in range(32)]
        published = {"vocab_size": 73448, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mixer_types": types,
                     "attn_use_rope": False, "attn_use_output_gate": True}
        content = stage(model=published, batch={"seq_len_tokens": 4096, "global_batch_tokens": 4096 * 512, "steps": 10})
        content["parallel"] = {"cp": 2, "tp": 4, "zero_stage": 1}
        config = h.write_stage(h.ROOT / "plan" / "published" / "stage.yaml", content)
        for device in ("cpu", "cuda"):
            phase = phases(plan(config, 64, f"run.device={device}"))["only", "train"]
            self.assertEqual(phase["mesh"], {"dp": 8, "cp": 2, "tp": 4, "zero_stage": 1})
            self.assertEqual(len(phase["ranks"]), 64)
            self.assertAlmostEqual(phase["parameters"] / 9.48e9, 1, delta=0.01)  # 9.48 billion, embedding and head included
        text = h.succeed(["plan", config, "--ranks", "64"]).out
        self.assertIn("dp 8 x cp 2 x tp 4, ZeRO 1", text)


if __name__ == "__main__":
    h.main()
