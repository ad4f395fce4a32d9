"""`sala verify`: a good configuration passes; a broken checkpoint, a broken line of a kernel and a broken resume are found, and the
table says where."""

import concurrent.futures
import json
import os
import pathlib
import shlex
import signal
import subprocess
import tempfile
import time
import unittest

import harness as h

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 300  # of one start, which starts some thirty runs, on a machine that may have other work
HYBRID = h.model(mixer_types=["minicpm4", "lightning-attn", "lightning-attn", "minicpm4"], attn_use_output_gate=True)
CHECKS = ["gradients", "packed", "updates", "resume", "saves", "ranks", "export", "checkpoints"]


def setUpModule():
    (h.ROOT / "tmp").mkdir()
    os.environ["TMPDIR"] = str(h.ROOT / "tmp")


def temporaries():
    """What verify has made below TMPDIR, a folder of this test alone, and not removed."""
    return {path.name for path in pathlib.Path(os.environ["TMPDIR"]).glob("sala-verify-*")}


def verify(config, *more, program=None, cwd=None):
    """Result and rows of the table by check."""
    table = h.ROOT / "table.json"
    table.unlink(missing_ok=True)
    words = [program or h.SALA, "verify", config, "--json", table, *more]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, cwd=cwd or h.ROOT, timeout=LIMIT_SECONDS, check=False)
    rows = {row["check"]: row for row in json.loads(table.read_text())["rows"]} if table.exists() else {}
    return h.Result(done.returncode, done.stdout, done.stderr), rows


def one_stage(name="one", **changes):
    """A stage of a small hybrid, whose data do not exist: verify makes its own."""
    stage = h.pretrain("only", 20, first=True, model=HYBRID, data={"mixture": [{"dataset": "nowhere/text"}]}, **changes)
    return h.write_stage(h.ROOT / name / "stage.yaml", stage, tokenizer="nowhere/tokenizer")


# ---- programs with one line changed ----


class Build:
    """How the program under test was built; None where that is not known (an installed program, or no ninja)."""

    def __init__(self):
        self.folder = pathlib.Path(h.SALA).resolve().parents[1]
        self.commands = self.folder / "compile_commands.json"
        cache = self.folder / "CMakeCache.txt"
        lines = cache.read_text().splitlines() if cache.exists() else []
        self.ninja = next((line.split("=", 1)[1] for line in lines if line.startswith("CMAKE_MAKE_PROGRAM:") and line.endswith("ninja")), "")

    def known(self):
        return self.ninja and self.commands.exists()

    def with_line(self, source, old, new):
        """A program in which one line of one source file is another: that file compiled again, the program linked again with it in
        front of the library that has the right one."""
        folder = pathlib.Path(tempfile.mkdtemp(dir=h.ROOT))
        text = (REPOSITORY / source).read_text()
        if text.count(old) != 1:
            raise AssertionError(f"{source} has {text.count(old)} times: {old}")
        broken = folder / "broken.cc"
        broken.write_text(text.replace(old, new))
        # The emulator has the same sources in a form of its own.
        entry = next(e for e in json.loads(self.commands.read_text())
                     if e["file"] == str(REPOSITORY / source) and "SALA_EMULATED" not in e["command"])
        words = shlex.split(entry["command"])
        words[words.index("-o") + 1] = str(folder / "broken.o")
        words[words.index("-c") + 1] = str(broken)
        words.append("-O0")  # quicker to compile
        subprocess.run(words, cwd=entry["directory"], check=True)
        listed = subprocess.run([self.ninja, "-t", "commands", os.path.relpath(h.SALA, self.folder)], cwd=self.folder, check=True,
                                capture_output=True, text=True).stdout.splitlines()
        link = shlex.split(listed[-1].removeprefix(": && ").removesuffix(" && :"))
        at = link.index("-o")
        program = folder / "sala"
        link[at:at + 2] = [str(folder / "broken.o"), "-o", str(program)]
        subprocess.run(link, cwd=self.folder, check=True)
        return program


class GoodConfigurations(unittest.TestCase):
    def test_the_tiny_pipeline_passes(self):
        before = temporaries()
        result, rows = verify("configs/tiny/pipeline.yaml", cwd=REPOSITORY)
        self.assertEqual(result.code, 0, result)
        self.assertEqual(list(rows), CHECKS)
        self.assertEqual({row["verdict"] for row in rows.values()}, {"holds"}, rows)
        self.assertIn("stage base: seq_len_tokens 256 -> 64", result.out)
        self.assertEqual(temporaries(), before, "the temporary directory goes")

    def test_cut_samples_and_sharded_parameters(self):
        config = one_stage("cut", sparse_attention=True, parallel={"cp": 2, "zero_stage": 3})
        result, rows = verify(config, "--only", "ranks,saves")
        self.assertEqual(result.code, 0, result)
        self.assertEqual(list(rows), ["saves", "ranks"], "in the order of the table")
        self.assertIn("cp x tp on 2 ranks", rows["ranks"]["compared"])

    def test_the_hybrid_at_the_end_of_a_pipeline_is_exported(self):
        """No stage trains on it, so that no pass has it."""
        folder = h.ROOT / "ends_with_halo"
        result, rows = verify(h.write_pipeline(folder, [h.pretrain("base", 2, first=True), h.halo("convert", 2, 2)]), "--only", "export")
        self.assertEqual((result.code, rows["export"]["verdict"]), (0, "holds"), result)
        self.assertIn(": 2 models, ", rows["export"]["compared"])
        self.assertIn("the model of stage convert, handed on", result.err)

    def test_what_is_kept_can_be_looked_at(self):
        kept = h.ROOT / "kept"
        result, _ = verify(one_stage(), "--only", "saves", "--keep", kept)
        self.assertEqual(result.code, 0, result)
        self.assertTrue((kept / "runs" / "straight" / "status.json").exists())
        again, _ = verify(one_stage(), "--only", "saves", "--keep", kept)
        self.assertEqual(again.code, 64, again)


class BrokenThings(unittest.TestCase):
    def test_a_bit_of_a_checkpoint(self):
        run = h.ROOT / "runs" / "mine"
        stage = h.pretrain("only", 3, first=True, model=HYBRID)
        config = h.write_stage(h.ROOT / "mine" / "stage.yaml", stage)
        h.succeed(h.train(config, run))
        result, rows = verify(config, "--only", "checkpoints", "--set", f"run.dir={run}")
        self.assertEqual(result.code, 0, result)
        self.assertIn("2 of 2 are whole", rows["checkpoints"]["measured"])
        broken = h.checkpoints(run)[0]
        content = (broken / "model-00000.h5").read_bytes()
        values = next(at for at in range(0, len(content), 4096) if content[at:at + 4096].count(0) < 100)  # not between tensors
        h.flip_bit(broken / "model-00000.h5", offset=values + 2048)
        listing = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        result, rows = verify(config, "--only", "checkpoints", "--set", f"run.dir={run}")
        self.assertEqual(result.code, 76, result)
        self.assertEqual([line for line in result.error_lines if "VERIFY-FAILED" in line and "checkpoints" in line], result.error_lines)
        self.assertEqual(len(rows["checkpoints"]["failures"]), 1, rows)
        self.assertRegex(rows["checkpoints"]["failures"][0], rf"CKPT-CRC.*{broken.name}.*model-00000.h5.*(model\.|lm_head)")
        self.assertEqual({path: path.read_bytes() for path in run.rglob("*") if path.is_file()}, listing, "only read")

    def test_a_line_of_the_program(self):
        build = Build()
        if not build.known():
            self.skipTest("not known how the program was built")
        faults = [
            # Backward of the output gate: the derivative of the sigmoid is not whole.
            ("kernels/output_gate/cpu.cc", "dz[i] = dy[i] * (o[i] * rstd * weight[i]) * (s * (1.0F - s));",
             "dz[i] = dy[i] * (o[i] * rstd * weight[i]) * s;", "gradients",
             r"stage only: gradient of model\.layers\.1\.self_attn\.z_proj\.weight \(layer 1\): element \d+: found"),
            # Decays of the linear heads.
            ("kernels/lightning/cpu.cc", "PortableExp2(-8.0 * static_cast<double>(h + 1)", "PortableExp2(-8.1 * static_cast<double>(h + 1)",
             "gradients", r"stage only: gradient of model\.layers\.1\."),
            # Linear attention: a document sees the one before it where both lie in one chunk.
            ("kernels/lightning/cpu.cc", "chunk.first[static_cast<size_t>(i)] = std::max<int64_t>(0, start);",
             "chunk.first[static_cast<size_t>(i)] = 0;", "packed",
             r"stage only: loss of token \d+ of document \d+ .*with other documents around it"),
            # Every token learns to predict itself.
            ("data/stream.cc", "std::copy(next.begin() + 1, next.end(), sample->labels.begin() + at);",
             "std::copy(next.begin(), next.end() - 1, sample->labels.begin() + at);", "packed",
             r"stage only: label of token 0 of document 0: found \d+, expected the next token"),
            # No correction of the first moments.
            ("recipes/optimizer.cc", ".step = updates_,", ".step = 1000000,", "updates",
             r"step 2 \(stage only, train\): model\.\S+ \(param\): element 0: found"),
            # Rates one step late.
            ("recipes/schedule.cc", "if (step < warmup)", "step -= 1;\n  if (step < warmup)", "updates",
             r"step \d \(stage only, train\): learning rate"),
            # A resumed run counts its updates from zero.
            ("recipes/step_loop.cc", 'optimizer_.set_updates(trainer.value("updates", int64_t{0}));', "optimizer_.set_updates(0);",
             "resume", r"stage only, train, resumed after step 2: step \d \(stage only, train\): loss_hex"),
            # A save counts as an update.
            ("recipes/step_loop.cc", "request.parent = config_.parent;",
             "request.parent = config_.parent; optimizer_.set_updates(optimizer_.updates() + 1);", "saves",
             r"saving every step: step \d \(stage only, train\): loss_hex"),
            # Each rank divides by its own targets.
            ("recipes/step_batch.cc", "SALA_RETURN_IF_ERROR(group.AllReduce(std::span<int64_t>(sums), parallel::Reduce::kSum));",
             "static_cast<void>(group);", "ranks", r"2 ranks, rank_independent_sums: step 1 \(stage only, train\): loss_hex"),
            # Cut off instead of rounded.
            ("recipes/export.cc", "const BF16 rounded(value);",
             "BF16 rounded; rounded.bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);", "export",
             r"stage only, bf16: model\.embed_tokens\.weight: element \d+: exported"),
            # Checksums of slices are not looked at.
            ("core/checkpoint_read.cc", "if (crc == slice.crc) return OkStatus();", "return OkStatus();", "checkpoints", r"control: one bit of .* was turned over"),
        ]
        config = one_stage("fault")
        result, _ = verify(config, "--only", ",".join(fault[3] for fault in faults))
        self.assertEqual(result.code, 0, result)
        self.assertEqual(list(dict.fromkeys(fault[3] for fault in faults)), CHECKS, "every check can fail")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            programs = pool.map(lambda fault: build.with_line(*fault[:3]), faults)
            for (source, _, new, check, expected), program in zip(faults, programs, strict=True):
                with self.subTest(f"{source}: {new}"):
                    result, rows = verify(config, "--only", check, program=program)
                    self.assertEqual(result.code, 76, result)
                    self.assertEqual(rows[check]["verdict"], "FAILS")
                    self.assertRegex("\n".join(rows[check]["failures"]), expected)


class Use(unittest.TestCase):
    def test_ctrl_c_leaves_nothing_behind(self):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with self.subTest(number.name):
                before = temporaries()
                job = h.Job(["verify", one_stage(), "--only", "resume"])
                self.assertTrue(job.wait_for(lambda: temporaries() - before, "a temporary directory"))
                time.sleep(0.5)  # a run is under way, most likely
                job.process.send_signal(number)
                self.assertEqual(job.result().code, -number)
                self.assertEqual(temporaries(), before)

    def test_no_mpirun(self):
        config = one_stage("no-mpirun")
        env = {"PATH": "/nowhere"}
        words = ["verify", config, "--only", "ranks"]
        result = h.run(words, env=env)
        self.assertEqual(result.code, 76, result)
        self.assertIn("mpirun was not found in PATH", result.out)
        result = h.run([*words, "--ranks", "1"], env=env)
        self.assertEqual(result.code, 0, result)
        self.assertIn("not checked", result.out)

    def test_no_gpu(self):
        words = ["verify", one_stage("no-gpu"), "--only", "gradients", "--set", "run.device=cuda"]
        env = {"SALA_CUDA_MODULE": "/nowhere/libsala_cuda.so"}
        result = h.run(words, env=env)
        self.assertEqual(result.code, 76, result)
        self.assertIn("the GPU path was not checked: CUDA-MODULE", result.out)
        result = h.run([*words, "--device", "cpu"], env=env)
        self.assertEqual(result.code, 0, result)

    def test_mistakes(self):
        for words, code, text in (([one_stage(), "--only", "gradient"], 64, "expected some of gradients, packed"),
                                  (["nowhere.yaml"], 66, "nowhere.yaml"),
                                  ([one_stage(), "--set", "model.num_key_value_heads=3"], 78, "CFG-MODEL")):
            result = h.run(["verify", *words])
            self.assertEqual(result.code, code, result)
            self.assertEqual(len(result.error_lines), 1, result)
            self.assertIn(text, result.error_lines[0])


if __name__ == "__main__":
    h.main()
