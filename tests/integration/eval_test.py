"""Evaluations, of models and inside runs: the same prompts and results on any number of ranks, gates that end a run between two
stages, restarts that do not measure twice, and training that has the same bits with and without them."""

import json
import re
import shutil
import unittest

import harness as h

TASKS = "passkey,niah_single_1,niah_single_2,niah_single_3,niah_multikey_1,niah_multikey_2,niah_multikey_3,niah_multivalue," \
        "niah_multiquery,tracking,common_words,frequent_words,kv,loss_by_position,loss_by_context"

# Of sample 1 of each task at length 1024 on bytes with the harness's corpus: prompts must stay what they are, or results of different
# versions cannot be compared.
PROMPT_HASHES = {
    "passkey": "7dcd96d1b4360df6", "niah_single_1": "f3d7376b03139ef7", "niah_single_2": "3555ba2df3cdaa6e",
    "niah_single_3": "6b9750483a899f8e", "niah_multikey_1": "20bde1ca3bd7238d", "niah_multikey_2": "932a3fb3a064a40f",
    "niah_multikey_3": "67d9dde1172bd612", "niah_multivalue": "021b4857d4ce7949", "niah_multiquery": "130aefacdb4c3255",
    "tracking": "0f2e0d679d9bbffe", "common_words": "4a35d51eca3c987d", "frequent_words": "115866fbbdf486f0", "kv": "a97e982ea558fa80"}


def base(name="plain"):
    """A checkpoint of a model that has seen text for some steps."""
    run = h.ROOT / "runs" / f"base-{name}"
    if not run.exists():
        seed = 1234 if name == "plain" else 99
        stage = h.write_stage(h.ROOT / "base" / f"{name}.yaml", h.pretrain("only", 6, first=True, seed=seed))
        h.succeed(h.train(stage, run))
    return h.checkpoints(run)[-1]


def long_texts():
    return h.ingest("long", documents=200, seed=7, most_sentences=40)


def arguments(target, *more, tasks="passkey,niah_single_2,loss_by_position", lengths="512", samples=5, checkpoint=None):
    return ["eval", "--ckpt", checkpoint or base(), "--to", target, "--tasks", tasks, "--lengths", lengths, "--samples", samples,
            "--haystack", long_texts(), *more]


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def summary(folder):
    return [json.loads(line) for line in (folder / "summary.jsonl").read_text().splitlines()]


class Command(unittest.TestCase):
    def test_all_tasks(self):
        target = h.ROOT / "eval-all"
        out = h.succeed(arguments(target, "--depths", 5, tasks=TASKS, lengths="1024", samples=2)).out
        lines = summary(target)
        self.assertEqual([line["task"] for line in lines], TASKS.split(","))
        for line in lines:
            task = line["task"]
            samples = [json.loads(text) for text in (target / f"{task}-1024.jsonl").read_text().splitlines()]
            self.assertEqual([sample["index"] for sample in samples], [0, 1])
            self.assertEqual(line["count"], 2)
            self.assertEqual((line["stage"], line["when"], line["step"]), (None, None, 6))
            self.assertIn(task, out)
            if task.startswith("loss"):
                # Six steps of training: near a guess among 261 tokens (5.6 nats) or already below.
                self.assertTrue(all(0 < bucket["loss"] < 7 for bucket in line["buckets"]), line)
                continue
            self.assertEqual(samples[1]["prompt_hash"], PROMPT_HASHES[task], task)
            self.assertEqual(line["share"], sum(sample["right"] for sample in samples) / 2)
            self.assertLess(line["mean_log_probability"], 0)
            self.assertEqual(sum(row["count"] for row in line["depths"]), 0 if task.endswith("words") else 2)
        self.assertIn("<svg", (target / "depths.svg").read_text())

    def test_results_do_not_depend_on_ranks(self):
        folders = []
        for ranks in (None, 2, 3):
            folders.append(h.ROOT / f"eval-ranks-{ranks}")
            h.succeed(arguments(folders[-1]), ranks=ranks)
        for folder in folders[1:]:
            self.assertEqual(files(folder), files(folders[0]))
        for axis in ("--tp", "--cp"):
            folder = h.ROOT / f"eval{axis}"
            h.succeed(arguments(folder, axis, 2), ranks=2)
            for line, other in zip(summary(folder), summary(folders[0])):
                # Sums in another order, of float32: 1e-4 of values around 5.
                if "buckets" in line:
                    for bucket, same in zip(line["buckets"], other["buckets"]):
                        self.assertAlmostEqual(bucket["loss"], same["loss"], delta=5e-4)
                else:
                    self.assertAlmostEqual(line["mean_log_probability"], other["mean_log_probability"], delta=5e-4)

    def test_comparison(self):
        target = h.ROOT / "eval-against"
        out = h.succeed(arguments(target, "--against", base("other"), "--json")).out
        rows = [json.loads(line) for line in out.splitlines()][-3:]
        self.assertEqual([row["task"] for row in rows], ["passkey", "niah_single_2", "loss_by_position"])
        self.assertNotEqual(rows[2]["log_probability_difference"], 0)
        again = h.succeed(["eval", "compare", target, target / "against", "--json"]).out.splitlines()
        self.assertEqual([json.loads(line) for line in again], rows)
        for row in (json.loads(line) for line in h.succeed(["eval", "compare", target, target, "--json"]).out.splitlines()):
            self.assertEqual((row["log_probability_difference"], row["log_probability_interval"]), (0, [0, 0]))
            self.assertEqual(row["verdict"], "no difference shown")

    def test_what_was_killed_goes_on(self):
        words = {"tasks": "passkey,kv,loss_by_position,niah_single_1", "lengths": "512,768", "samples": 40}
        whole, parts = h.ROOT / "eval-whole", h.ROOT / "eval-parts"
        h.succeed(arguments(whole, **words), ranks=2)
        kills = 0
        done = -1
        while not (parts / "summary.jsonl").exists():
            job = h.Job(arguments(parts, **words), ranks=2, env={"OMPI_MCA_odls_base_sigkill_timeout": "0"})
            part = parts / "summary.part.jsonl"
            lines = part.read_text().count("\n") if part.exists() else 0
            self.assertGreater(lines, done)
            done = lines
            if job.wait_for(lambda: part.exists() and part.read_text().count("\n") > lines or (parts / "summary.jsonl").exists(), "a task") \
                    and job.signal_rank(0, h.SIGKILL):
                kills += 1
            job.result()
        self.assertGreaterEqual(kills, 2, "nothing was cut off")
        self.assertEqual(files(parts), files(whole))
        # Of lines that are gone the rest is measured: two ranks wrote it, and rows of one are the same.
        lines = (parts / "summary.jsonl").read_text().splitlines(keepends=True)
        (parts / "summary.jsonl").unlink()
        (parts / "summary.part.jsonl").write_text("".join(lines[:2]))
        times = {p.name: p.stat().st_mtime_ns for p in parts.glob("*-*.jsonl")}
        h.succeed(arguments(parts, **words))
        self.assertEqual(files(parts), files(whole))
        measured = {name for name, time in times.items() if (parts / name).stat().st_mtime_ns != time}
        self.assertEqual(len(measured), len(times) - 2)
        # Another command is refused, and nothing of what is there goes.
        (parts / "summary.jsonl").rename(parts / "summary.part.jsonl")
        kept = files(parts)
        result = h.run(arguments(parts, **{**words, "samples": 41}), ranks=2)
        self.assertEqual(result.code, 74, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn("EVAL-EXISTS", result.error_lines[0])
        self.assertIn("samples: 40 and 41", result.error_lines[0])
        self.assertEqual(files(parts), kept)

    def test_a_pair_goes_on_with_its_second_model(self):
        target = h.ROOT / "eval-pair"
        pair = arguments(target, "--against", base("other"))
        h.succeed(pair)
        kept = {**files(target), **files(target / "against")}
        shutil.rmtree(target / "against")
        first = (target / "summary.jsonl").stat().st_mtime_ns
        h.succeed(pair)
        self.assertEqual({**files(target), **files(target / "against")}, kept)
        self.assertEqual((target / "summary.jsonl").stat().st_mtime_ns, first)
        # One that replaces another goes on, too, and nothing of that other stays beside a new first.
        shutil.rmtree(target / "against")
        h.succeed([*pair, "--force"])
        self.assertEqual((target / "summary.jsonl").stat().st_mtime_ns, first)
        self.assertEqual({**files(target), **files(target / "against")}, kept)
        job = h.Job([*arguments(target, "--against", base("other"), samples=20), "--force"])
        self.assertTrue(job.wait_for((target / "summary.part.jsonl").exists, "the first task"))
        self.assertFalse((target / "against" / "summary.jsonl").exists())
        job.signal_rank(0, h.SIGKILL)
        job.result()
        h.succeed([*pair, "--force"])
        self.assertEqual({**files(target), **files(target / "against")}, kept)
        first = (target / "summary.jsonl").stat().st_mtime_ns
        shutil.rmtree(target / "against")
        result = h.run(arguments(target, "--against", base("other"), samples=4))
        self.assertEqual(result.code, 74, result)
        self.assertIn("EVAL-EXISTS", result.err)
        self.assertEqual((target / "summary.jsonl").stat().st_mtime_ns, first)

    def test_what_cannot_be_compared(self):
        folders = {}
        for name, more, samples in (("plain", [], 4), ("few", [], 2), ("seed", ["--seed", 7], 4), ("chat", ["--chat"], 4)):
            folders[name] = h.ROOT / f"eval-compare-{name}"
            h.succeed(arguments(folders[name], *more, tasks="passkey,loss_by_position", samples=samples))
        def compare(other):
            return [json.loads(line) for line in h.succeed(["eval", "compare", folders["plain"], folders[other], "--json"]).out.splitlines()]
        self.assertEqual([row["count"] for row in compare("few")], [2, 2])
        for name, text in (("seed", "seed: 1234 and 7"), ("chat", "chat: false and true")):
            rows = compare(name)
            self.assertEqual(rows[0]["not_comparable"], text)
            self.assertEqual(rows[1]["log_probability_difference"], 0)  # losses of documents: the same ones
            for folder in (folders["plain"], folders[name]):
                lines = summary(folder)
                only = h.ROOT / f"{folder.name}-only"
                if not only.exists():
                    shutil.copytree(folder, only)
                    (only / "summary.jsonl").write_text(json.dumps(lines[0]) + "\n")
            result = h.run(["eval", "compare", h.ROOT / "eval-compare-plain-only", h.ROOT / f"eval-compare-{name}-only"])
            self.assertEqual(result.code, 65, result)
            self.assertIn("EVAL-COMPARE", result.err)
            self.assertIn(text, result.err)

    def test_bad_input(self):
        target = h.ROOT / "eval-bad"
        prompts = h.ROOT / "prompts.jsonl"
        prompts.write_text('{"prompt": "a", "answer": " b"}\n{"prompt": "a"}\n')
        for ranks in (None, 2):
            for words, code, name in (
                    (arguments(target, tasks="passkeys"), 78, "EVAL-TASK"), (arguments(target, lengths="40"), 78, "EVAL-LENGTH"),
                    (arguments(target, "--prompts", prompts), 65, "EVAL-PROMPTS"),
                    (arguments(target, checkpoint=h.ROOT / "none"), 66, "")):
                result = h.run(words, ranks=ranks)
                self.assertEqual(result.code, code, result)
                self.assertEqual(len(result.error_lines), 1, result)
                self.assertIn(name, result.error_lines[0])
        for words in (["eval", "--to", target], arguments(target, lengths="0"), ["eval", "--ckpt", base(), "--to", target]):
            self.assertEqual(h.run(words).code, 64)
        self.assertFalse((target / "summary.jsonl").exists())
        h.succeed(arguments(target))
        result = h.run(arguments(target))
        self.assertEqual(result.code, 74)
        self.assertIn("EVAL-EXISTS", result.err)
        (target / "mine.txt").write_text("not of an evaluation")
        result = h.run([*arguments(target, "--force", samples=2), "--tokenizer", "nowhere"])
        self.assertEqual(result.code, 66, result)
        self.assertTrue((target / "summary.jsonl").exists(), "removed before it was known that there is something to write")
        h.succeed(arguments(target, "--force", samples=2))
        self.assertTrue((target / "mine.txt").exists())
        (target / "settings.json").write_text('{"model": "another program"}')
        kept = files(target)
        for more in ([], ["--force"]):
            result = h.run(arguments(target, *more, samples=2))
            self.assertEqual(result.code, 74, result)
            self.assertIn("no evaluation's", result.err)
            self.assertEqual(files(target), kept)
        result = h.run(arguments(h.ROOT / "twice", tasks="passkey,passkey"))
        self.assertEqual(result.code, 64)
        self.assertIn("names a task twice", result.err)
        self.assertEqual(summary(target)[0]["count"], 2)


class InRuns(unittest.TestCase):
    def pipeline(self, name, gate=(), evaluate=True):
        section = {"when": ["before", "after"], "tasks": ["passkey", "loss_by_position"], "lengths_tokens": [400], "samples": 3,
                   "haystack": str(long_texts()), "gate": list(gate)}
        first = h.pretrain("first", 4, first=True)
        second = h.pretrain("second", 4)
        if evaluate:
            first["eval"] = {**section, "when": ["after"], "gate": []}
            second["eval"] = section
        return h.write_pipeline(h.ROOT / name, [first, second])

    def test_training_keeps_its_bits_and_nothing_is_measured_twice(self):
        plain, measured = h.ROOT / "runs" / "plain", h.ROOT / "runs" / "measured"
        h.succeed(h.train(self.pipeline("plain", evaluate=False), plain))
        config = self.pipeline("measured")
        h.succeed(h.train(config, measured))
        self.assertEqual(h.differences(plain, measured), [])
        names = sorted(p.name for p in (measured / "eval").iterdir())
        self.assertEqual(names, ["000000004-after-first", "000000004-before-second", "000000008-after-second"])
        line = summary(measured / "eval" / names[2])[0]
        self.assertEqual((line["task"], line["stage"], line["when"], line["step"], line["count"]), ("passkey", "second", "after", 8, 3))
        kept = {name: files(measured / "eval" / name) for name in names}
        # The same model, so the same numbers.
        self.assertEqual(kept[names[0]]["passkey-400.jsonl"], kept[names[1]]["passkey-400.jsonl"])

        # A run that was ended while it measured: what is missing is measured, the rest is not.
        shutil.rmtree(measured / "eval" / names[2])
        result = h.succeed(h.train(config, measured))
        self.assertNotIn("step 4", result.out)
        self.assertEqual({name: files(measured / "eval" / name) for name in names}, kept)
        self.assertIn("is complete", h.succeed(h.train(config, measured)).err)
        ranks = h.ROOT / "runs" / "measured-3"
        h.succeed(h.train(config, ranks), ranks=3)
        self.assertEqual(sorted(p.name for p in (ranks / "eval").iterdir()), names)

    def test_a_stop_between_two_tasks(self):
        config = self.pipeline("stopped")
        whole = h.ROOT / "runs" / "measured-whole"
        run = h.ROOT / "runs" / "stopped"
        h.succeed(h.train(config, whole))
        job = h.Job(h.train(config, run))
        last = run / "eval" / "000000008-after-second"
        part = last / "summary.part.jsonl"
        self.assertTrue(job.wait_for(part.exists, "the first task"))
        job.signal_rank(0, h.SIGTERM)
        result = job.result()
        if result.code == 0:  # it was quicker than the signal
            (last / "summary.jsonl").rename(part)
            part.write_text(part.read_text().splitlines()[0] + "\n")
        else:
            self.assertEqual(result.code, 75, result)
        first = (last / "passkey-400.jsonl").stat().st_mtime_ns
        h.succeed(h.train(config, run))
        self.assertEqual((last / "passkey-400.jsonl").stat().st_mtime_ns, first, "measured twice")

        def texts(directory):  # but for the model: the names of saves differ, and the paths
            return {name: re.sub(rb'"(model|checkpoint)": ?"[^"]*"', b"", text) for name, text in files(directory / "eval" / last.name).items()}
        self.assertEqual(texts(run), texts(whole))

    def test_gates(self):
        # A model of four steps is never right: the limit cannot hold, the drop from nothing to nothing does.
        holds = {"task": "passkey", "length": 400, "max_drop_from": "before", "max_drop": 0}
        config = self.pipeline("gated", [holds, {"task": "passkey", "length": 400, "min": 0.5}])
        run = h.ROOT / "runs" / "gated"
        # Of a run that went another way, and further.
        stale = run / "eval" / "000000099-after-second"
        stale.mkdir(parents=True)
        (stale / "summary.jsonl").write_text(json.dumps({"task": "passkey", "length": 400, "count": 3, "right": 3, "share": 1.0}) + "\n")
        for _ in range(2):  # also when all is measured
            result = h.run(h.train(config, run))
            self.assertEqual(result.code, 76, result)
            self.assertEqual(len(result.error_lines), 1, result)
            self.assertIn("EVAL-GATE: stage second: passkey at length 400: found 0.000 (0 of 3), expected at least 0.500;",
                          result.error_lines[0])
            self.assertEqual(json.loads((run / "status.json").read_text())["state"], "failed")
        self.assertIn("gate ignored: passkey at length 400", h.succeed([*h.train(config, run), "--ignore-gates"]).err)
        against_first = [holds, {**holds, "max_drop_from": "first"}]
        config = self.pipeline("held", against_first)
        run = h.ROOT / "runs" / "held"
        h.succeed(h.train(config, run))
        # Numbers of other prompts say nothing of a drop.
        path = run / "eval" / "000000004-after-first" / "passkey-400.jsonl"
        path.write_text(path.read_text().replace('"prompt_hash":"', '"prompt_hash":"x'))
        result = h.run(h.train(config, run))
        self.assertEqual(result.code, 76, result)
        self.assertIn("which cannot be compared with that of stage first: they measured other prompts", result.err)
        for change, text in (("first.eval.seed=4", "another seed (4 and 1234)"), ("second.eval.samples=4", "another samples (3 and 4)"),
                             ("first.eval.chat=true", "another chat (true and false)")):
            result = h.run(h.train(config, h.ROOT / "runs" / "never", change))
            self.assertEqual(result.code, 78, result)
            self.assertIn("CFG-CONFLICT", result.err)
            self.assertIn(text, result.err)

    def test_bad_configurations(self):
        gate = {"task": "passkey", "length": 400, "min": 0.5}
        for bad, code, text in (({**gate, "length": 401}, "CFG-CONFLICT", "is not measured"),
                                ({**gate, "max_drop_from": "first", "max_drop": 0.1}, "CFG-CONFLICT", "either min or"),
                                ({"task": "passkey", "length": 400}, "CFG-MISSING", "either min or"),
                                ({"task": "passkey", "length": 400, "max_drop_from": "third", "max_drop": 0.1}, "CFG-CONFLICT", "third"),
                                ({**gate, "minimum": 1}, "CFG-KEY", "minimum")):
            result = h.run(h.train(self.pipeline("bad", [bad]), h.ROOT / "runs" / "bad"))
            self.assertEqual(result.code, 78, result)
            self.assertIn(code, result.err)
            self.assertIn(text, result.err)
        for change, code in (("second.eval.tasks=[passkeys]", "EVAL-TASK"), ("second.eval.when=[after,later]", "CFG-RANGE"),
                             ("second.eval.lengths_tokens=[30]", "EVAL-LENGTH"), ("second.eval.haystack=nowhere", "EVAL-HAYSTACK"),
                             ("first.eval.when=[before]", "CFG-CONFLICT")):
            result = h.run(h.train(self.pipeline("bad"), h.ROOT / "runs" / "bad", change))
            self.assertEqual(result.code, 78, result)
            self.assertIn(code, result.err)
        self.assertEqual(h.checkpoints(h.ROOT / "runs" / "bad"), [])


if __name__ == "__main__":
    h.main()
