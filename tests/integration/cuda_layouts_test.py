"""Layouts of several ranks on the GPU path have the gradients of one rank, whatever carries device memory between them.

Run by CTest with SALA_CUDA_MODULE naming the emulated module, whose ranks share one device and whose NCCL is a stand-in; on
hardware that leaves the runs over MPI.

What may differ. Each rank rounds its activations to bfloat16 where one rank does, as often as one rank does; what is summed over
tensor and context ranks travels as float32 (parts of the gradient of keys and values that other ranks' tokens add are rounded
first, once). So a layout is as far from the CPU as one rank is: BF16_GRADIENT of cuda_test.py. The order of the float32 sums
differs, by some 1e-7, and decides which way a value close to the middle of two bfloat16 numbers goes; each such flip moves more
values across a middle, so after a few layers the roundings of two layouts are independent draws. The difference of two independent
draws is sqrt(2) times one draw, and one draw is not larger than the difference between CPU and GPU on one rank, which has the rounding of
the parameters besides. One tensor of 16 elements says little, so this is asked of all tensors together (root mean square). Where the ranks
only share out micro-batches, no rounding changes at all: GRADIENT_TOLERANCE of parallel_test.py.
"""

import math
import subprocess
import unittest

import harness as h
from cuda_test import BF16_GRADIENT, BF16_LOSS, EMULATED, hybrid, model
from harness import relative_differences
from parallel_test import GRADIENT_TOLERANCE

# 128 tokens a sample, documents of up to 128: ranges of context ranks begin inside of them, and those of at least 64 are sparse.
SEQ = 128

# name: ranks, keys of `parallel`. The model has 4 heads and 2 key/value heads, so tp 4 splits the heads that share one.
LAYOUTS = {"dp2": (2, {}), "tp2": (2, {"tp": 2}), "cp2": (2, {"cp": 2}), "dp2-tp2": (4, {"tp": 2}), "cp2-tp2": (4, {"cp": 2, "tp": 2}),
           "tp4": (4, {"tp": 4}), "zero0": (2, {"zero_stage": 0}), "zero2": (2, {"zero_stage": 2}), "zero3": (2, {"zero_stage": 3}),
           "cp2-tp2-zero3": (4, {"cp": 2, "tp": 2, "zero_stage": 3})}
WHOLE_SAMPLES = ("dp2", "zero0", "zero2", "zero3")  # the ranks share out micro-batches and nothing else
OVER_NCCL = ("cp2", "tp4", "dp2-tp2", "zero2", "zero3", "cp2-tp2-zero3")


def long_data():
    return h.data(h.ingest("long", documents=120, seed=5, most_sentences=12), packing="best_fit", validation={"fraction": 0})


def stage(steps, sequences, micro=1, **changes):
    return h.pretrain("only", steps, first=True, model=hybrid(), sparse_attention=True, batch=h.batch(steps, sequences, SEQ, micro),
                      schedule={"shape": "constant", "peak_lr": 0.001}, optimizer={"clip_norm": 0}, data=long_data(),
                      checkpoint={"every_steps": 1, "keep_last": 9}, **changes)


def start(config, name, layout=None, transport="mpi", device="cuda", more=(), of=""):
    """A run of this layout; None: of one rank. `of`: "all." for the stages of a pipeline."""
    run = h.ROOT / "runs" / f"layouts-{name}"
    ranks, keys = LAYOUTS[layout] if layout else (None, {})
    sets = [f"run.device={device}", *(f"{of}parallel.{key}={value}" for key, value in {**keys, "transport": transport}.items())]
    h.succeed(h.train(config, run, *sets, *more), ranks=ranks, limit=2 * h.LIMIT_SECONDS)
    return run


def first(run):
    return next(iter(h.metrics(run).values()))


def root_mean_square(values):
    return math.sqrt(sum(v * v for v in values) / len(values))


class LayoutsCase(unittest.TestCase):
    def assert_near_the_cpu(self, checkpoint_cpu, checkpoint, what):
        found = relative_differences(checkpoint_cpu, checkpoint, "exp_avg")
        self.assertGreater(len(found), 10, what)
        for tensor, relative in found.items():
            self.assertLess(relative, BF16_GRADIENT, f"{what}: {tensor}")
        return found

    def assert_independent_roundings(self, one_draw, checkpoint_one, checkpoint, what):
        two = relative_differences(checkpoint_one, checkpoint, "exp_avg")
        self.assertLessEqual(root_mean_square(list(two.values()) or [0]), math.sqrt(2) * root_mean_square(list(one_draw.values())), what)


class FirstStep(LayoutsCase):
    """One update of 4 micro-batches of one sample."""

    @classmethod
    def setUpClass(cls):
        cls.config = h.write_stage(h.ROOT / "layouts" / "step.yaml", stage(1, 4))
        cls.runs = {"cpu": start(cls.config, "cpu", device="cpu"), "one": start(cls.config, "one")}
        for layout in LAYOUTS:
            cls.runs[layout] = start(cls.config, layout, layout)
        for layout in OVER_NCCL if EMULATED else ():
            cls.runs[layout, "nccl"] = start(cls.config, f"{layout}-nccl", layout, "nccl")

    def checkpoint(self, name):
        return h.checkpoints(self.runs[name])[0]

    def test_each_exchanges_what_its_name_says(self):
        # The gathers behind an update count for the next step.
        for layout, expected in {"dp2": {"param.reduce_scatter"}, "tp2": {"tp.all_gather", "tp.reduce_scatter"},
                                 "cp2": {"cp.all_gather", "cp.reduce_scatter", "cp.send_receive"}, "tp4": {"kv.all_gather"}}.items():
            self.assertLessEqual(expected, set(first(self.runs[layout])["comm"]), layout)

    def test_loss_and_every_gradient_agree_with_the_cpu(self):
        cpu = first(self.runs["cpu"])
        for name, run in self.runs.items():
            if name == "cpu":
                continue
            line = first(run)
            self.assertEqual(line["data_crc"], cpu["data_crc"], name)
            self.assertAlmostEqual(line["loss"] / cpu["loss"], 1, delta=BF16_LOSS, msg=name)
            self.assertAlmostEqual(line["grad_norm"] / cpu["grad_norm"], 1, delta=BF16_GRADIENT, msg=name)
            self.assert_near_the_cpu(self.checkpoint("cpu"), self.checkpoint(name), name)

    def test_every_gradient_agrees_with_one_rank(self):
        one_draw = relative_differences(self.checkpoint("cpu"), self.checkpoint("one"), "exp_avg")
        for layout in LAYOUTS:
            if layout in WHOLE_SAMPLES:
                for tensor, relative in relative_differences(self.checkpoint("one"), self.checkpoint(layout), "exp_avg").items():
                    self.assertLess(relative, GRADIENT_TOLERANCE, f"{layout}: {tensor}")
            else:
                self.assert_independent_roundings(one_draw, self.checkpoint("one"), self.checkpoint(layout), layout)

    def test_gradients_of_other_data_do_not_agree(self):
        other = h.checkpoints(start(self.config, "other", more=["data.seed=2"]))[0]
        one_draw = relative_differences(self.checkpoint("cpu"), self.checkpoint("one"), "exp_avg")
        found = relative_differences(self.checkpoint("one"), other, "exp_avg")
        self.assertGreater(max(found.values()), BF16_GRADIENT)
        self.assertGreater(root_mean_square(list(found.values())), math.sqrt(2) * root_mean_square(list(one_draw.values())))

    def test_nccl_and_mpi_have_the_same_bits(self):
        if not EMULATED:
            self.skipTest("needs a device per rank")
        for layout in OVER_NCCL:
            self.assertEqual(h.differences(self.runs[layout], self.runs[layout, "nccl"]), [], layout)

    def test_repetition_gives_the_same_bits(self):
        again = start(self.config, "again", "cp2-tp2-zero3")
        self.assertEqual(h.differences(self.runs["cp2-tp2-zero3"], again), [])

    def test_splitting_more_changes_no_bit(self):
        # Stage 0 and 1 add a rank's micro-batches and then the ranks; 2 and 3 the ranks of each micro-batch and then those
        # sums. Between the two the order differs where a rank has several micro-batches, as here.
        self.assertEqual(h.differences(self.runs["zero0"], self.runs["dp2"]), [])
        self.assertEqual(h.differences(self.runs["zero2"], self.runs["zero3"]), [])

    def test_planned_memory_is_what_is_used(self):
        for name, run in self.runs.items():
            if name == "cpu":
                continue
            log = (run / "logs" / "rank-00000.log").read_text()
            self.assertRegex(log, r"device memory: activations (\d+) KiB \(planned \1\), work space (\d+) KiB \(planned \2\)", name)


class OneMicroBatchEach(unittest.TestCase):
    """Two steps in which each of two ranks has one micro-batch: every ZeRO stage adds the same numbers in the same order."""

    def test_all_stages_have_the_same_bits(self):
        config = h.write_stage(h.ROOT / "layouts" / "each.yaml", stage(2, 2))
        runs = [start(config, f"each-{layout}", layout, transport)
                for layout, transport in (("dp2", "mpi"), ("zero2", "mpi"), ("zero3", "nccl" if EMULATED else "mpi"))]
        for run in runs[1:]:
            self.assertEqual(h.differences(runs[0], run), [])


class FewTokens(LayoutsCase):
    def test_a_rank_without_a_micro_batch(self):
        # 3 samples for 2 data ranks: with ZeRO 2 and 3 one of them goes along with an empty micro-batch.
        config = h.write_stage(h.ROOT / "layouts" / "empty.yaml", stage(1, 3))
        one = h.checkpoints(start(config, "empty-one"))[0]
        for layout in ("zero2", "zero3"):
            checkpoint = h.checkpoints(start(config, f"empty-{layout}", layout))[0]
            for tensor, relative in relative_differences(one, checkpoint, "exp_avg").items():
                self.assertLess(relative, GRADIENT_TOLERANCE, f"{layout}: {tensor}")

    def test_fewer_tokens_than_ranks(self):
        # Micro-batches of 3 tokens for 4 ranks; 8 of them, since in one the gradient of softmax queries may vanish.
        few = h.pretrain("only", 1, first=True, model=hybrid(), batch=h.batch(1, 8, 3, 1), schedule={"shape": "constant", "peak_lr": 0.001},
                         optimizer={"clip_norm": 0}, checkpoint={"every_steps": 1},
                         data=h.data(h.ingest("prose"), validation={"fraction": 0}))
        config = h.write_stage(h.ROOT / "layouts" / "few.yaml", few)
        cpu = h.checkpoints(start(config, "few-cpu", device="cpu"))[0]
        for layout in ("cp2-tp2", "tp4", "cp2-tp2-zero3"):
            self.assert_near_the_cpu(cpu, h.checkpoints(start(config, f"few-{layout}", layout))[0], layout)


class OtherLayouts(unittest.TestCase):
    def test_a_checkpoint_goes_on_in_another_layout_on_another_device(self):
        config = h.write_stage(h.ROOT / "layouts" / "change.yaml", stage(3, 2))
        run = start(config, "change", "cp2-tp2-zero3")
        for kept, layout, device in ((1, "tp4", "cpu"), (2, "zero3", "cuda")):
            # This step had the same parameters to the bit.
            expected = h.metrics(run)[kept + 1, "only", "train"]
            for checkpoint in h.checkpoints(run)[kept:]:
                h.shutil.rmtree(checkpoint)
            start(config, "change", layout, device=device)
            line = h.metrics(run)[kept + 1, "only", "train"]
            self.assertEqual(line["data_crc"], expected["data_crc"])
            self.assertNotEqual(line["loss_hex"], expected["loss_hex"])
            self.assertAlmostEqual(line["loss"] / expected["loss"], 1, delta=BF16_LOSS)
            self.assertAlmostEqual(line["grad_norm"] / expected["grad_norm"], 1, delta=BF16_GRADIENT)


class Errors(unittest.TestCase):
    @unittest.skipUnless(EMULATED, "failures are injected by the emulator")
    def test_a_failing_launch_ends_all_while_exchanges_are_under_way(self):
        # With ZeRO-3 the next layer's parameters are being gathered when the launch fails.
        config = h.write_stage(h.ROOT / "layouts" / "errors.yaml", stage(1, 2))
        fault = "SALA_SIMT_FAIL=launch:SwiGluForward"
        for transport in ("mpi", "nccl"):
            sets = ["run.device=cuda", "parallel.zero_stage=3", f"parallel.transport={transport}"]
            program = h.command(h.train(config, h.ROOT / "runs" / f"layouts-error-{transport}", *sets))
            for name, job in {"one": ["-np", "1", *program, ":", "-np", "1", "-x", fault, *program], "all": ["-np", "2", "-x", fault, *program]}.items():
                result = subprocess.run([h.MPIRUN, *job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=h.ROOT, timeout=60, check=False)
                self.assertEqual(result.returncode, 71, f"{transport}, {name}: {result.stderr}")
                self.assertRegex(result.stderr, r"CUDA-FAILED: SwiGluForward \[\d+, \d+\] bf16: .*, rank [01] on ", f"{transport}, {name}")


class Stages(LayoutsCase):
    """Alignment and distillation with tensor and context ranks, and fine-tuning, each from the very start the CPU had."""

    @classmethod
    def setUpClass(cls):
        unvalidated = h.data(h.ingest("prose"), validation={"fraction": 0})
        halo = h.halo("halo", 1, 1, checkpoint={"every_steps": 1, "keep_last": 9}, data=unvalidated)
        for phase in ("align", "distil"):
            halo["halo"][phase]["optimizer"]["clip_norm"] = 0
            halo["halo"][phase]["batch"] = h.batch(1, sequences=2, micro=1)
        # The choice of layers is fixed, and the rate of the alignment zero: what is distilled is the same to the bit.
        halo["halo"].update({"selector": "explicit", "explicit_layers": [2]})
        halo["halo"]["align"]["schedule"]["peak_lr"] = 0
        sft = h.sft("sft", 1, sparse_attention=True, batch=h.batch(1, sequences=2, seq_len=SEQ, micro=1), optimizer={"clip_norm": 0},
                    checkpoint={"every_steps": 1, "keep_last": 9}, data=h.data(h.chat(), packing="best_fit", validation={"fraction": 0}))
        base = h.pretrain("base", 4, first=True, model=model(), data=unvalidated)
        cls.config = h.write_pipeline(h.ROOT / "layouts-stages", [base, halo, sft])
        cls.more = ["halo.checkpoint.keep_last=99"]
        cls.cpu = start(cls.config, "stages-cpu", device="cpu", more=cls.more, of="all.")

    def again(self, name, dropped, layout=None, transport="mpi"):
        """Another run of the stages `dropped` on the GPU path, from what the CPU had before them."""
        run = h.copy_run(self.cpu, h.ROOT / "runs" / f"layouts-{name}")
        for checkpoint in h.checkpoints(run):
            if h.manifest(checkpoint)["stage"]["name"] in dropped:
                h.shutil.rmtree(checkpoint)
        return start(self.config, name, layout, transport, more=self.more, of="all.")

    def assert_same_gradients(self, stage_name, phase, one, run, what):
        cpu, one, found = (next(c for c in h.checkpoints(r) if (h.manifest(c)["stage"]["name"], h.manifest(c)["stage"]["phase"]) == (stage_name, phase))
                           for r in (self.cpu, one, run))
        one_draw = self.assert_near_the_cpu(cpu, one, f"one rank: {what}")
        self.assert_near_the_cpu(cpu, found, what)
        self.assert_independent_roundings(one_draw, one, found, what)

    def test_alignment_and_distillation(self):
        one = self.again("halo-one", ("halo", "sft"))
        for layout, transport in (("tp2", "mpi"), ("cp2", "nccl" if EMULATED else "mpi")):
            run = self.again(f"halo-{layout}", ("halo", "sft"), layout, transport)
            for phase in ("align", "distil"):
                self.assert_same_gradients("halo", phase, one, run, f"{layout}: {phase}")

    def test_fine_tuning(self):
        one = self.again("sft-one", ("sft",))
        self.assert_same_gradients("sft", "train", one, self.again("sft-cp2-tp2-zero3", ("sft",), "cp2-tp2-zero3"), "sft")


if __name__ == "__main__":
    h.main()
