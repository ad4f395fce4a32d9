"""The GPU path of the whole trainer, over the emulated CUDA module: the same program, configurations and checkpoints as on the CPU.

Run by CTest with SALA_CUDA_MODULE naming the emulated module, and by launch/gpu-test on hardware without it. Several ranks share
the device; in a build without MPI, where no --mpirun is named, what needs them is skipped.
"""

import json
import math
import os
import pathlib
import re
import subprocess
import unittest

import harness as h
from harness import relative_differences
from parallel_test import GRADIENT_TOLERANCE

# Rounding a tensor to bfloat16 adds a relative error of about 2^-9 (a uniform error of at most 2^-8). Some 20 tensors are
# rounded on the way through a layer and back; 4 layers, as a random walk: sqrt(80) / 512 = 1.7 %. Norms and softmax amplify
# by a factor of a few, taken as 3 as in tests/model/model_cuda_test.cc; here parameters are rounded besides, one more rounding
# on each path. A wrong formula changes a gradient by tens of percent.
BF16_GRADIENT = 3 * 0.017 + 2 / 256
BF16_LOSS = 0.005
# The forward pass alone has half of these roundings: a hidden state is off by sqrt(40) / 512 = 1.2 %, and logits by as much of their
# standard deviation, which is 1.2 in the model that is evaluated here. A log probability is a logit less the log of the sum of all
# exponentials, whose error is at most that of the largest logit: two such errors, amplified by norms and softmax as above.
BF16_LOG_PROBABILITY = 3 * math.sqrt(2) * 0.012 * 1.2

SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3, "dense_len": 64}
HYBRID = ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"]
EMULATED = "SALA_CUDA_MODULE" in os.environ


def model(**changes):
    return h.model(hidden_size=64, intermediate_size=96, head_dim=16, dim_model_base=32, sparse_config=SPARSE, **changes)


def hybrid(**changes):
    return model(mixer_types=HYBRID, attn_use_rope=False, attn_use_output_gate=True, **changes)


def one_step(name, **changes):
    """A stage of one update without clipping, saved after it."""
    return h.pretrain(name, 1, first=True, model=hybrid(), batch=h.batch(1, sequences=6, micro=1), schedule={"shape": "constant", "peak_lr": 0.001},
                      optimizer={"clip_norm": 0}, data=h.data(h.ingest("prose"), packing="best_fit", validation={"fraction": 0}),
                      checkpoint={"every_steps": 1}, **changes)


class Steps(unittest.TestCase):
    """One update of the tiny hybrid on 1 and, with MPI, 4 ranks."""

    @classmethod
    def setUpClass(cls):
        cls.config = h.write_stage(h.ROOT / "cuda" / "step.yaml", one_step("only", sparse_attention=True))
        cls.runs = {"cpu": cls.start("cpu", None, "run.device=cpu"), "cuda": cls.start("cuda", None, "run.device=cuda")}
        if h.MPIRUN:
            cls.runs["mpi"] = cls.start("mpi", 4, "run.device=cuda", "parallel.transport=mpi")
        if h.MPIRUN and EMULATED:
            cls.runs["nccl"] = cls.start("nccl", 4, "run.device=cuda", "parallel.transport=nccl")

    @classmethod
    def start(cls, name, ranks, *sets):
        run = h.ROOT / "runs" / f"cuda-{name}"
        h.succeed(h.train(cls.config, run, *sets), ranks=ranks)
        return run

    def first(self, name):
        return next(iter(h.metrics(self.runs[name]).values()))

    def gradients(self, a, b):
        return relative_differences(h.checkpoints(self.runs[a])[0], h.checkpoints(self.runs[b])[0], "exp_avg")

    def test_the_device_sees_the_same_samples(self):
        for name in self.runs:
            self.assertEqual(self.first(name)["data_crc"], self.first("cpu")["data_crc"])

    def test_loss_and_every_gradient_agree_with_the_cpu(self):
        self.assertAlmostEqual(self.first("cuda")["loss"] / self.first("cpu")["loss"], 1, delta=BF16_LOSS)
        self.assertAlmostEqual(self.first("cuda")["grad_norm"] / self.first("cpu")["grad_norm"], 1, delta=BF16_GRADIENT)
        found = self.gradients("cpu", "cuda")
        self.assertGreater(len(found), 40)
        for tensor, relative in found.items():
            self.assertLess(relative, BF16_GRADIENT, tensor)

    def test_four_ranks_agree_with_one(self):
        h.need_ranks()
        # Each sample is a micro-batch of its own, so only the order of the float32 sums over samples differs.
        for name in set(self.runs) & {"mpi", "nccl"}:
            for tensor, relative in self.gradients("cuda", name).items():
                self.assertLess(relative, GRADIENT_TOLERANCE, f"{name}: {tensor}")

    def test_nccl_and_mpi_have_the_same_bits(self):
        h.need_ranks()
        if not EMULATED:
            self.skipTest("needs a device per rank")
        self.assertEqual(h.differences(self.runs["mpi"], self.runs["nccl"]), [])


class SameBits(unittest.TestCase):
    def test_one_and_four_ranks_with_rank_independent_sums(self):
        h.need_ranks()
        stage = h.pretrain("only", 3, first=True, model=hybrid(), batch={**h.batch(3, sequences=4, micro=1), "rank_independent_sums": True})
        config = h.write_stage(h.ROOT / "cuda" / "independent.yaml", stage)
        runs = []
        for ranks in (1, 4):
            runs.append(h.ROOT / "runs" / f"cuda-independent-{ranks}")
            h.succeed(h.train(config, runs[-1], "run.device=cuda", "parallel.transport=mpi"), ranks=ranks)
        self.assertEqual(h.differences(*runs), [])

    @unittest.skipUnless(EMULATED, "the order is the emulator's to choose")
    def test_no_order_of_lanes_warps_and_blocks_shows(self):
        config = h.write_stage(h.ROOT / "cuda" / "order.yaml", one_step("only", sparse_attention=True))
        runs = {}
        for name, env in {"natural": {}, "shuffled": {"SALA_SIMT_SEED": "5"}, "other": {"SALA_SIMT_SEED": "23", "SALA_SIMT_THREADS": "2"}}.items():
            runs[name] = h.ROOT / "runs" / f"cuda-order-{name}"
            h.succeed(h.train(config, runs[name], "run.device=cuda"), env=env)
        for name in ("shuffled", "other"):
            self.assertEqual(h.differences(runs["natural"], runs[name]), [], name)

    def test_a_stopped_run_goes_on_to_the_same_bits(self):
        config = h.write_stage(h.ROOT / "cuda" / "resume.yaml", h.pretrain("only", 4, first=True, model=hybrid(), checkpoint={"every_steps": 2, "keep_last": 4}))
        whole, stopped = h.ROOT / "runs" / "cuda-whole", h.ROOT / "runs" / "cuda-stopped"
        h.succeed(h.train(config, whole, "run.device=cuda"))
        job = h.Job(h.train(config, stopped, "run.device=cuda"))
        job.wait_for(lambda: len(h.checkpoints(stopped)) > 0, "a checkpoint")
        job.signal_rank(0, h.SIGKILL)
        job.result()
        h.succeed(h.train(config, stopped, "run.device=cuda"))
        self.assertEqual(h.differences(whole, stopped), [])


class Stages(unittest.TestCase):
    """Conversion and training of all kinds on the GPU path, beside the same chain on the CPU."""

    @classmethod
    def setUpClass(cls):
        long_data = h.data(h.ingest("long", documents=120, seed=5, most_sentences=12), packing="best_fit")
        stages = [h.pretrain("base", 6, first=True, model=model()), h.halo("halo", 3, 3),
                  h.pretrain("long_decay", 2, sparse_attention=True, carry_optimizer=False, batch=h.batch(2, sequences=2, seq_len=128), data=long_data),
                  h.sft("sft", 2, sparse_attention=True, batch=h.batch(2, sequences=2, seq_len=128))]
        cls.config = h.write_pipeline(h.ROOT / "cuda-all", stages)
        cls.runs = {}
        for device in ("cpu", "cuda"):
            cls.runs[device] = h.ROOT / "runs" / f"stages-{device}"
            h.succeed(["train", cls.config, "--run", cls.runs[device], "--device", device])

    def test_losses_stay_beside_those_of_the_cpu(self):
        cpu, cuda = h.metrics(self.runs["cpu"]), h.metrics(self.runs["cuda"])
        self.assertEqual(list(cpu), list(cuda))
        for key, line in cpu.items():
            # A few updates apart, and the choice of layers may differ where scores are near ties.
            self.assertAlmostEqual(cuda[key]["loss"] / line["loss"], 1, delta=0.05, msg=str(key))

    def test_a_checkpoint_of_the_gpu_is_one_of_the_cpu(self):
        final = h.final_checkpoints(self.runs["cuda"])["sft"]
        h.succeed(["ckpt", "verify", final, "--deep"])
        text = h.succeed(["generate", "--ckpt", final, "--prompt", "the baker", "--max-new-tokens", "8", "--temperature", "0"]).out
        self.assertGreater(len(text), 0)

    def test_planned_and_used_memory_are_told(self):
        log = (self.runs["cuda"] / "logs" / "rank-00000.log").read_text()
        found = re.search(r"base/train: device memory: activations (\d+) KiB \(planned (\d+)\), work space (\d+) KiB \(planned (\d+)\)", log)
        self.assertIsNotNone(found, log)
        # Samples without padding have as many tokens as the planned documents; work space also depends on the documents.
        used, planned, scratch, planned_scratch = (int(n) for n in found.groups())
        self.assertEqual(used, planned)
        self.assertLessEqual(scratch, planned_scratch)


class Evaluations(unittest.TestCase):
    """Evaluations inside a run and by themselves, on the GPU path and the CPU."""

    @classmethod
    def setUpClass(cls):
        cls.haystack = h.ingest("texts", documents=200, seed=7, most_sentences=40)
        section = {"when": ["after"], "tasks": ["passkey", "loss_by_position"], "lengths_tokens": [400], "samples": 3, "haystack": str(cls.haystack)}
        stage = h.pretrain("only", 12, first=True, model=hybrid(), sparse_attention=True, eval=section)
        cls.trained = h.ROOT / "runs" / "cuda-eval"
        h.succeed(h.train(h.write_stage(h.ROOT / "cuda" / "eval.yaml", stage), cls.trained, "run.device=cuda"))
        cls.last = h.checkpoints(cls.trained)[-1]
        cls.cpu = cls.measure("cpu", device="cpu")
        cls.cuda = cls.measure("cuda")

    @classmethod
    def words(cls, folder, *more, device="cuda", checkpoint=None):
        return ["eval", "--ckpt", checkpoint or cls.last, "--to", folder, "--tasks", "passkey,loss_by_position", "--lengths", 400, "--samples", 3,
                "--haystack", cls.haystack, "--device", device, *more]

    @classmethod
    def measure(cls, name, *more, ranks=None, env=None, **options):
        folder = h.ROOT / "evaluations" / name
        h.succeed(cls.words(folder, *more, **options), ranks=ranks, env=env)
        return folder

    def values(self, folder):
        """log p of each answer, and the loss of each range of positions."""
        recall, losses = (json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines())
        samples = [json.loads(line) for line in (folder / "passkey-400.jsonl").read_text().splitlines()]
        self.assertEqual((recall["task"], losses["task"], len(samples)), ("passkey", "loss_by_position", 3))
        return [-s["log_probability"] for s in samples], [b["loss"] for b in losses["buckets"]]

    def measured(self, folder):
        """Every number that was measured, as it stands in the files."""
        return {p.name: p.read_bytes() for p in folder.glob("*-400.jsonl")}

    def distances(self, a, b):
        return [abs(x - y) for group, other in zip(self.values(a), self.values(b), strict=True) for x, y in zip(group, other, strict=True)]

    def test_log_probabilities_agree_with_the_cpu(self):
        self.assertLess(max(self.distances(self.cpu, self.cuda)), BF16_LOG_PROBABILITY)
        self.assertNotEqual(self.measured(self.cpu), self.measured(self.cuda))  # it was the other path
        self.assertEqual(json.loads((self.cuda / "settings.json").read_text())["device"], "cuda")

    def test_those_of_another_model_do_not(self):
        other = self.measure("other", device="cpu", checkpoint=h.checkpoints(self.trained)[-2])
        self.assertGreater(min(self.distances(other, self.cuda)), BF16_LOG_PROBABILITY)

    def test_a_run_measures_the_same(self):
        within = next((self.trained / "eval").iterdir())
        self.assertEqual(len(self.measured(within)), 2)
        self.assertEqual(self.measured(within), self.measured(self.cuda))

    def test_repetition_gives_the_same_bits(self):
        again = self.measure("again", env={"SALA_SIMT_SEED": "5"} if EMULATED else None)
        self.assertEqual(self.measured(again), self.measured(self.cuda))

    def test_ranks_give_the_same_bits(self):
        h.need_ranks()
        self.assertEqual(self.measured(self.measure("ranks", ranks=2)), self.measured(self.cuda))

    def test_split_prompts_and_heads_agree_with_the_cpu(self):
        h.need_ranks()
        for axis in ("--cp", "--tp"):
            folder = self.measure(f"split{axis}", axis, 2, ranks=2)
            self.assertLess(max(self.distances(self.cpu, folder)), BF16_LOG_PROBABILITY, axis)

    def fails(self, code, name, pattern, folder="failed", ranks=None, env=None, more=(), **options):
        target = h.ROOT / "evaluations" / folder
        result = h.run(self.words(target, *more, **options), ranks=ranks, env=env)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn(f"sala: error: {name}: ", result.error_lines[0])
        self.assertRegex(result.error_lines[0], pattern)
        return target

    def test_bad_input(self):
        narrow = h.ROOT / "runs" / "cuda-eval-narrow"
        h.succeed(h.train(h.write_stage(h.ROOT / "cuda" / "eval-narrow.yaml", h.pretrain("only", 1, first=True)), narrow))
        no_module = {"SALA_CUDA_MODULE": "./nowhere.so"}
        for ranks in (None, 2) if h.MPIRUN else (None,):
            target = self.fails(71, "CUDA-MODULE", r"nowhere\.so: no such file; the CPU path \(device: cpu\) needs no module", ranks=ranks, env=no_module)
            self.fails(78, "CFG-MODEL", "head_dim is 8, the GPU kernels need 16, 32, 64 or 128; use --device cpu", ranks=ranks,
                       checkpoint=h.checkpoints(narrow)[-1])
        self.fails(64, "USAGE", "--device.*gpu", device="gpu")
        self.assertFalse(target.exists())
        # The CPU needs none.
        self.assertEqual(self.measured(self.measure("no-module", device="cpu", env=no_module)), self.measured(self.cpu))

    @unittest.skipUnless(EMULATED, "the emulator says what devices there are")
    def test_no_device_and_too_little_memory(self):
        self.fails(71, "CUDA-NONE", r"no CUDA device: .*; use device: cpu, or see sala doctor", env={"SALA_SIMT_DEVICES": "0"})
        target = self.fails(71, "CUDA-MEMORY", r"rank 0 on ", env={"SALA_SIMT_MEMORY": str(1 << 20)})
        self.assertFalse((target / "summary.jsonl").exists())

    def test_a_pair_is_measured_on_one_device(self):
        target = h.copy_run(self.cpu, h.ROOT / "evaluations" / "pair")
        self.fails(74, "EVAL-EXISTS", "holds an evaluation", folder="pair", more=["--against", h.checkpoints(self.trained)[-2]])
        self.assertEqual(self.measured(target), self.measured(self.cpu))


class Errors(unittest.TestCase):
    """One line that says what and where, and the documented exit code."""

    @classmethod
    def setUpClass(cls):
        cls.config = h.write_stage(h.ROOT / "cuda" / "errors.yaml", one_step("only"))

    def fails(self, code, name, pattern, *sets, ranks=None, env=None):
        run = h.ROOT / "runs" / f"cuda-error-{self.id().rsplit('.', 1)[1]}"
        result = h.run(h.train(self.config, run, "run.device=cuda", *sets), ranks=ranks, env=env)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn(f"sala: error: {name}: ", result.error_lines[0])
        self.assertRegex(result.error_lines[0], pattern)

    def test_no_module(self):
        self.fails(71, "CUDA-MODULE", r"nowhere\.so: no such file; the CPU path \(device: cpu\) needs no module", env={"SALA_CUDA_MODULE": "./nowhere.so"})

    def test_something_else_in_place_of_the_module(self):
        other = next(iter(pathlib.Path("/usr/lib").glob("*-linux-gnu/libz.so*")), None)
        if other is None:
            self.skipTest("no library at hand")
        self.fails(71, "CUDA-MODULE", "is not a sala CUDA module", env={"SALA_CUDA_MODULE": str(other)})

    def test_model_the_kernels_do_not_know(self):
        config = h.write_stage(h.ROOT / "cuda" / "narrow.yaml", h.pretrain("only", 1, first=True, model=h.model(head_dim=8)))
        result = h.run(h.train(config, h.ROOT / "runs" / "cuda-narrow", "run.device=cuda"))
        self.assertEqual(result.code, 78, result)
        self.assertIn("CFG-MODEL: model.head_dim is 8, the GPU kernels need 16, 32, 64 or 128; use run.device: cpu", result.err)

    @unittest.skipUnless(EMULATED, "the emulator says how many devices there are")
    def test_no_device(self):
        self.fails(71, "CUDA-NONE", r"no CUDA device: .*; use device: cpu, or see sala doctor", env={"SALA_SIMT_DEVICES": "0"})

    @unittest.skipUnless(EMULATED, "failures are injected by the emulator")
    def test_too_little_memory(self):
        # Enough for parameters and optimizer, not for cuBLASLt's work space of 64 MiB.
        self.fails(71, "CUDA-MEMORY", r"a micro-batch of 1 x 64 tokens needs \d+ MiB .* MiB free", env={"SALA_SIMT_MEMORY": str(16 << 20)})

    def test_a_micro_batch_that_fits_no_device(self):
        # The activations of 8 million tokens are planned as hundreds of GB; the model itself is small.
        wide = h.model(hidden_size=512, intermediate_size=2048, head_dim=128)
        stage = h.pretrain("only", 1, first=True, model=wide, batch=h.batch(1, sequences=2**17, micro=2**17), checkpoint={"every_steps": 1},
                           data=h.data(h.ingest("prose"), validation={"fraction": 0}))
        stage["data"]["mixture"][0]["max_epochs"] = 1000
        config = h.write_stage(h.ROOT / "cuda" / "huge.yaml", stage)
        run = h.ROOT / "runs" / "cuda-huge"
        result = h.run(h.train(config, run, "run.device=cuda"))
        self.assertEqual(result.code, 71, result)
        self.assertRegex(result.err, r"CUDA-MEMORY: .*a micro-batch of 131072 x 64 tokens needs \d+ MiB .* MiB free")
        self.assertEqual(h.checkpoints(run), [])

    @unittest.skipUnless(EMULATED, "failures are injected by the emulator")
    def test_a_failing_launch_names_operation_shape_and_rank(self):
        self.fails(71, "CUDA-FAILED", r"SwiGluForward \[\d+, \d+\] bf16: .*, rank 0 on ", env={"SALA_SIMT_FAIL": "launch:SwiGluForward"})

    @unittest.skipUnless(EMULATED, "failures are injected by the emulator")
    def test_a_failing_launch_on_one_rank_ends_all(self):
        h.need_ranks()
        for transport in ("mpi", "nccl"):
            run = h.ROOT / "runs" / f"cuda-error-ranks-{transport}"
            program = h.command(h.train(self.config, run, "run.device=cuda", f"parallel.transport={transport}"))
            # The other rank waits in a collective meanwhile.
            job = [h.MPIRUN, "-np", "1", *program, ":", "-np", "1", "-x", "SALA_SIMT_FAIL=launch:SwiGluForward", *program]
            result = subprocess.run(job, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=h.ROOT, timeout=60, check=False)
            self.assertEqual(result.returncode, 71, result.stderr)
            self.assertRegex(result.stderr, r"CUDA-FAILED: SwiGluForward \[\d+, \d+\] bf16: .*, rank 1 on ")

    @unittest.skipUnless(EMULATED, "the emulator says how much memory there is")
    def test_memory_of_a_stage_is_free_for_the_next(self):
        # cuBLASLt's work space alone is 64 MiB: two stages' plans at once would not fit.
        stages = [h.pretrain("first", 1, first=True, model=hybrid()), h.pretrain("second", 1, batch=h.batch(1, seq_len=128))]
        config = h.write_pipeline(h.ROOT / "cuda-memory", stages)
        h.succeed(["train", config, "--run", h.ROOT / "runs" / "cuda-memory", "--device", "cuda"], env={"SALA_SIMT_MEMORY": str(100 << 20)})

    def test_sums_that_contradict_each_other(self):
        self.fails(78, "CFG-CONFLICT", "rank_independent_sums fixes the order of every sum", "run.deterministic=false", "batch.rank_independent_sums=true")


class Doctor(unittest.TestCase):
    def test_says_what_is_there(self):
        out = h.succeed(["doctor", "--need-cuda"]).out
        self.assertRegex(out, r"CUDA +module .*cuBLASLt \d+.*NCCL \d+")
        self.assertRegex(out, r"GPU +0: ")

    def test_says_why_nothing_is_there(self):
        env = {"SALA_CUDA_MODULE": "./nowhere.so"}
        self.assertIn("nowhere.so: no such file", h.succeed(["doctor"], env=env).out)
        self.assertEqual(h.run(["doctor", "--need-cuda"], env=env).code, 71)


if __name__ == "__main__":
    h.main()
