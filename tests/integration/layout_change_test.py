"""A run goes on in another layout than it was saved in, and the stages of a run may each have their own: samples are the same,
losses are those of one layout up to the order of sums."""

import json
import shutil
import struct
import unittest

import harness as h
import layouts as l
from layouts import Layout

SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1, "window_size": 32, "topk": 3, "dense_len": 48}
HYBRID = ["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"]
MODEL = h.model(num_attention_heads=4, num_key_value_heads=2, lightning_nh=4, mixer_types=HYBRID, sparse_config=SPARSE,
                attn_use_rope=False, attn_use_output_gate=True)
VALIDATION = {"fraction": 0.1, "max_tokens": 256}

# Gradients of two layouts differ by 1e-6 of their size (layouts.TOLERANCE), so parameters after n steps by about n * 1e-6 of
# what they have moved; a loss near 3 then differs by less than 1e-5 of itself after 20 steps. Adam divides by the root of the
# second moment: an element whose gradient is near zero turns an error of rounding into a step of full length; that is why
# weights are not compared, and why the rate here is small.
LOSS_TOLERANCE = 1e-5

EXPORT_TOLERANCE = 1e-5  # of a weight after all stages; the reason is beside the rates

STEPS = 40
CHANGES = [
    (Layout(tp=1), Layout(tp=2)),
    (Layout(cp=1), Layout(cp=4)),
    (Layout(dp=4), Layout(dp=3)),
    (Layout(dp=2, zero=1), Layout(dp=2, zero=3)),
    (Layout(dp=3, cp=1, tp=1, zero=3), Layout(dp=1, cp=2, tp=4, zero=2)),
]


def verify(run):
    for checkpoint in h.checkpoints(run):
        h.succeed(["ckpt", "verify", checkpoint, "--deep"])


class Resume(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        stage = h.pretrain("only", STEPS, first=True, model=MODEL, batch=h.batch(STEPS, sequences=5, seq_len=128), sparse_attention=True,
                           data=h.data(h.ingest("prose"), packing="best_fit", validation=VALIDATION),
                           schedule={"shape": "cosine", "peak_lr": 0.002, "final_lr": 0.0005, "warmup_steps": 4},
                           checkpoint={"every_steps": STEPS // 2, "keep_last": 9})
        cls.config = h.write_pipeline(h.ROOT / "change", [stage])

    def start(self, name, layout, *sets):
        run = h.ROOT / "runs" / name
        h.succeed(h.train(self.config, run, *layout.sets("only"), *sets), ranks=layout.ranks)
        return run

    def test_training_goes_on_in_another_layout(self):
        for number, (before, after) in enumerate(CHANGES):
            with self.subTest(f"{before} -> {after}"):
                whole = self.start(f"whole-{number}", before)
                # The first half is the same to the bit, so it need not be run again.
                changed = h.copy_run(whole, h.ROOT / "runs" / f"changed-{number}")
                self.assertEqual(len(h.checkpoints(changed)), 2)
                shutil.rmtree(h.checkpoints(changed)[1])
                shutil.rmtree(changed / "metrics")
                self.start(f"changed-{number}", after)
                verify(changed)
                self.assertEqual(h.manifest(h.checkpoints(changed)[1])["topology"]["world"], after.ranks)
                a, b = h.metrics(whole), h.metrics(changed)
                self.assertEqual([step for step, _, _ in b], list(range(STEPS // 2 + 1, STEPS + 1)))
                for key, line in b.items():
                    for field in ("data_crc", "tokens", "target_tokens", "tokens_total", "lr"):
                        self.assertEqual(line[field], a[key][field], (key, field))
                    self.assertLess(l.relative(a[key]["loss"], line["loss"]), LOSS_TOLERANCE, key)
                # The first step has the same parameters to the bit.
                first = (STEPS // 2 + 1, "only", "train")
                for field in ("loss", "grad_norm"):
                    self.assertLess(l.relative(a[first][field], b[first][field]), l.TOLERANCE, field)

    def test_losses_of_another_run_are_far_from_the_tolerance(self):
        whole = self.start("control-a", Layout())
        other = self.start("control-b", Layout(), "only.optimizer.beta2=0.94")
        a, b = (list(h.metrics(run).values())[-1] for run in (whole, other))
        self.assertEqual(a["data_crc"], b["data_crc"])
        self.assertGreater(l.relative(a["loss"], b["loss"]), 10 * LOSS_TOLERANCE)


def tensors(folder):
    """Of an export in float32: {name: list of numbers}."""
    content = (folder / "model.safetensors").read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + size])
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        assert entry["dtype"] == "F32", entry
        begin, end = (8 + size + offset for offset in entry["data_offsets"])
        found[name] = struct.unpack(f"<{(end - begin) // 4}f", content[begin:end])
    return found


class RanksOfDoneStages(unittest.TestCase):
    def test_only_what_is_left_must_fit_the_ranks(self):
        first = h.pretrain("base", 2, first=True, parallel=Layout(dp=2).section())
        config = h.write_pipeline(h.ROOT / "done", [first, h.pretrain("next", 4)])
        run = h.ROOT / "runs" / "done"
        h.succeed(h.train(config, run), ranks=2)
        shutil.rmtree(h.final_checkpoints(run)["next"])
        h.succeed(h.train(config, run), ranks=3)
        self.assertEqual(h.manifest(h.final_checkpoints(run)["next"])["topology"]["world"], 3)


class Stages(unittest.TestCase):
    LAYOUTS = {"base": Layout(dp=2), "halo": Layout(tp=2), "stable": Layout(dp=1, cp=2, tp=1, zero=3), "long": Layout(cp=2, zero=0),
               "tuned": Layout(tp=2, zero=2)}

    @staticmethod
    def stages():
        data = h.data(h.ingest("prose"), validation=VALIDATION)
        # 20 updates move a weight, which is near 0.1, by up to 6 % of its size. Adam moves an element whose gradient is within
        # rounding of zero by up to the rate, either way: one in a million does so, and a tensor then differs by
        # sqrt(1e-6) * 3e-4 / 0.1 = 3e-6 of its size.
        slow = {"shape": "constant", "peak_lr": 3e-4}
        halo = h.halo("halo", 4, 4, data=data, halo={"score": {"text_tokens": 256, "recall_items": 2, "recall_length_tokens": 384,
                                                               "bootstrap": 10}})
        for phase in ("align", "distil"):
            halo["halo"][phase]["schedule"] = slow
        return [h.pretrain("base", 6, first=True, model=h.model(lightning_nh=4, sparse_config=SPARSE), data=data, schedule=slow), halo,
                h.pretrain("stable", 4, data=data, schedule=slow),
                h.pretrain("long", 3, data=data, schedule=slow, carry_optimizer=True, sparse_attention=True,
                           batch=h.batch(3, sequences=2, seq_len=128, micro=1)),
                h.sft("tuned", 3, data=h.data(h.chat(), packing="best_fit", validation=VALIDATION), schedule=slow)]

    def test_every_stage_has_its_own_layout(self):
        stages = self.stages()
        config = h.write_pipeline(h.ROOT / "stages", stages)
        one, many = (h.ROOT / "runs" / name for name in ("stages-one", "stages-many"))
        h.succeed(h.train(config, one))
        # All layouts have two ranks: one start of mpirun runs all stages.
        sets = [word for name, layout in self.LAYOUTS.items() for word in layout.sets(name)]
        self.assertEqual({layout.ranks for layout in self.LAYOUTS.values()}, {2})
        h.succeed(h.train(config, many, *sets), ranks=2)
        verify(many)
        self.assertEqual(list(h.final_checkpoints(many)), [stage["name"] for stage in stages])
        a, b = h.metrics(one), h.metrics(many)
        self.assertEqual(list(a), list(b))
        for key, line in b.items():
            self.assertEqual(line["data_crc"], a[key]["data_crc"], key)
            self.assertLess(l.relative(a[key]["loss"], line["loss"]), LOSS_TOLERANCE, key)
        exports = []
        for run in (one, many):
            folder = h.ROOT / "exports" / run.name
            h.succeed(["export", "--ckpt", h.final_checkpoints(run)["tuned"], "--to", folder, "--dtype", "f32", "--verify"])
            exports.append(tensors(folder))
        self.assertEqual(exports[0].keys(), exports[1].keys())
        for name, values in exports[0].items():
            other = exports[1][name]
            difference = sum((x - y) ** 2 for x, y in zip(values, other, strict=True)) ** 0.5
            size = sum(x * x for x in values) ** 0.5
            self.assertLess(difference, EXPORT_TOLERANCE * size, name)


if __name__ == "__main__":
    h.main()
