"""Chats from files to training: shapes and templates at ingest, what is shown of them, what a stage refuses, and the plan of its data."""

import json
import os
import pty
import re
import subprocess
import unittest

import harness as h

MARKED = re.compile(r"\[\[(.*?)\]\]")


def write_records(name, records):
    path = h.ROOT / "chats" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def talk(question, answer, **more):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]}


def ingest(name, records, *more):
    store = h.ROOT / "corpus" / name
    h.succeed(["data", "ingest", "--input", write_records(name, records), "--tokenizer", "bytes", "--name", name, "--to", store, *more])
    return store


def mixture(*views, **changes):
    return {"packing": "best_fit", "mixture": [{"max_epochs": 50, **view} for view in views], **changes}


class ChatCase(unittest.TestCase):
    def refuse(self, arguments, code, *texts):
        result = h.run(arguments)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in texts:
            self.assertIn(str(text), result.error_lines[0])
        return result

    def shown(self, store, number=0):
        return h.succeed(["data", "show", store, "--doc", str(number), "--tokenizer", "bytes"]).out

    def sft(self, name, data, **changes):
        stage = {**h.sft(name, 2), "model": h.model(), "data": data, **changes}
        return h.write_stage(h.ROOT / "chats" / f"{name}.yaml", stage)


class Shapes(ChatCase):
    def test_every_shape_gives_the_same_document(self):
        records = {
            "messages": talk("q", "a"),
            "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "alpaca": {"instruction": "q", "input": "", "output": "a"},
        }
        documents = {self.shown(ingest(name, [record])).split("\n", 1)[1] for name, record in records.items()}
        self.assertEqual(len(documents), 1, documents)
        self.assertEqual(MARKED.findall(documents.pop()), ["a<|im_end|>"])

    def test_one_shape_per_file(self):
        path = write_records("mixed", [talk("q", "a"), {"instruction": "q", "output": "a"}])
        self.refuse(["data", "ingest", "--input", path, "--tokenizer", "bytes", "--name", "x", "--to", h.ROOT / "corpus" / "mixed"], 65,
                    "ING-SHAPE", f"{path}:2", "Alpaca", "messages")


class Templates(ChatCase):
    def test_render_and_ingest_agree(self):
        template = h.ROOT / "chats" / "t.jinja"
        template.parent.mkdir(parents=True, exist_ok=True)
        template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>\n{% endfor %}"
                            "{% if add_generation_prompt %}<assistant>{% endif %}")
        records = [talk("q", "a"), talk("é", "ü", train=False), talk("two", "lines\nhere")]
        path = write_records("rendered", records)
        for name, wanted in (("plain", " lines\\nhere\\n"), (template, "lines\\nhere</assistant>\\n"), ("chatml", "lines\\nhere<|im_end|>")):
            rendered = h.succeed(["data", "render", path, "--tokenizer", "bytes", "--chat-template", name, "--record", "2"]).out
            self.assertEqual(MARKED.findall(rendered), [wanted])
            self.assertIn("shape messages", rendered)
            store = ingest(f"store-{getattr(name, 'stem', name)}", records, "--chat-template", name)
            as_json = json.loads(h.succeed(["data", "render", path, "--tokenizer", "bytes", "--chat-template", name, "--record", "2",
                                            "--json"]).out)
            ids = self.shown_ids(store, 1)  # record 1 teaches nothing and is left out
            self.assertEqual([f"{token}{'*' if learned else ''}" for token, learned in zip(as_json["tokens"], as_json["mask"])], ids)
        self.refuse(["data", "render", path, "--tokenizer", "bytes", "--record", "3"], 64, "PREVIEW-RECORD", "3 records")
        self.refuse(["data", "render", path, "--tokenizer", "bytes", "--chat-template", "chatlm"], 78, "CHAT-TEMPLATE", "chatlm", "llama3")

    def test_learned_text_is_green_on_a_terminal(self):
        path = write_records("green", [talk("q", "a")])
        near, far = pty.openpty()
        done = subprocess.run(h.command(["data", "render", path, "--tokenizer", "bytes"]), stdout=far, check=True)
        os.close(far)
        self.assertEqual(done.returncode, 0)
        self.assertIn("\x1b[32ma<|im_end|>\x1b[0m", os.read(near, 4096).decode())
        os.close(near)

    def shown_ids(self, store, number):
        return h.succeed(["data", "show", store, "--doc", str(number)]).out.split("\n")[1].split()

    def test_without_python(self):
        template = h.ROOT / "chats" / "x.jinja"
        template.parent.mkdir(parents=True, exist_ok=True)
        template.write_text("x")
        path = write_records("no-python", [talk("q", "a")])
        result = h.run(["data", "render", path, "--tokenizer", "bytes", "--chat-template", template], env={"PATH": "/nonexistent"})
        self.assertEqual(result.code, 74, result)
        self.assertIn("CHAT-HELPER", result.err)
        self.assertIn("python3-jinja2", result.err)


class Stage(ChatCase):
    def test_the_first_document_is_logged_with_its_mask(self):
        store = ingest("logged", [talk(f"q\n{i}", "the answer") for i in range(40)])
        run = h.ROOT / "runs" / "logged"
        result = h.succeed(h.train(self.sft("logged", mixture({"dataset": str(store)})), run), ranks=2)
        line, = [line for line in result.err.splitlines() if "its first document" in line]  # once, whatever the ranks
        self.assertEqual(MARKED.findall(line), ["the answer<|im_end|>"])
        self.assertRegex(line, r"<\|im_start\|>user\\nq\\n\d+<\|im_end\|>")
        self.assertIn("11 learned", line)
        self.assertNotIn("learned; is the mask", result.err)

    def test_a_stage_that_learns_nothing_is_refused(self):
        # Answers behind seq_len: truncating leaves prompts only.
        store = ingest("cut", [talk("x" * 100, "a") for _ in range(8)])
        config = self.sft("cut", mixture({"dataset": str(store)}, long_documents="truncate"))
        for ranks in (None, 2):
            result = h.run(h.train(config, h.ROOT / "runs" / "cut"), ranks)
            self.assertEqual(result.code, 65, result)
            self.assertEqual(len(result.error_lines), 1, result)
            for text in ("CHAT-NOMASK", "view cut", "truncate"):
                self.assertIn(text, result.error_lines[0])
        self.assertFalse(h.checkpoints(h.ROOT / "runs" / "cut"))

    def test_a_small_share_is_warned_about(self):
        store = ingest("rare", [talk("x" * 300, "") for _ in range(8)])
        config = self.sft("rare", mixture({"dataset": str(store)}), batch=h.batch(2, seq_len=512, sequences=2, micro=1))
        result = h.succeed(h.train(config, h.ROOT / "runs" / "rare"))
        self.assertRegex(result.err, r"warn .*only 8 \(0\.\d\d %\) are learned")


class Plan(ChatCase):
    def plan(self, config, *more):
        return json.loads(h.succeed(["data", "plan", config, "--json", *more]).out)["stages"]

    def test_chats(self):
        records = [talk("q" * 10, "a" * 10) for _ in range(6)] + [talk("q" * 99, "a") for _ in range(3)]
        store = ingest("planned", records)
        config = self.sft("planned", mixture({"dataset": str(store)}))
        stage, = self.plan(config)
        view, = stage["views"]
        # <|im_start|>user\n..<|im_end|>\n<|im_start|>assistant\n..<|im_end|>\n and bos and eos: 43 bytes; 64 slots hold one.
        self.assertEqual({key: view[key] for key in ("documents", "dropped_over_seq_len", "samples_per_epoch", "samples", "segments_max",
                                                     "verdict", "kind")},
                         {"documents": 6, "dropped_over_seq_len": 3, "samples_per_epoch": 6, "samples": 8, "segments_max": 1,
                          "verdict": "ok", "kind": "sft"})
        length = view["tokens"] // 6
        self.assertAlmostEqual(view["padding_share"], 1 - length / 64)
        self.assertAlmostEqual(view["learned_share"], 11 / length)
        self.assertIn("chats over seq_len     3", h.succeed(["data", "plan", config]).out)

    def test_one_dataset_in_two_views(self):
        prose = h.ingest("prose")
        views = [{"dataset": str(prose), "max_tokens": 64, "weight": 1}, {"dataset": str(prose), "min_tokens": 64, "weight": 3, "name": "long"}]
        data = {"packing": "concat", "validation": {"fraction": 0.1}, "mixture": [{"max_epochs": 9, **view} for view in views]}
        config = h.write_stage(h.ROOT / "chats" / "two.yaml", h.pretrain("two", 20, first=True, data=data))
        stage, = self.plan(config)
        short, long = stage["views"]
        for view in (short, long):
            self.assertEqual(view["documents"] + view["held_out"] + view["below_min_tokens"] + view["not_below_max_tokens"],
                             view["dataset_documents"])
        self.assertEqual(short["held_out"], long["held_out"])
        self.assertEqual(short["documents"], long["below_min_tokens"])
        self.assertEqual((short["samples"], long["samples"]), (20, 60))
        # What was planned is what the steps consist of.
        traced = [line for step in range(20)
                  for line in h.succeed(["data", "trace", config, "--step", str(step)]).out.splitlines() if line.startswith("sample")]
        self.assertEqual(len(traced), 80)
        self.assertEqual(sum("view long," in line for line in traced), 60)
        if long["samples"] <= long["samples_per_epoch"]:
            segments = [int(re.search(r"(\d+) segments", line).group(1)) for line in traced if "view long," in line]
            self.assertEqual((min(segments), max(segments)), (long["segments_min"], long["segments_max"]))
        self.refuse(["data", "trace", config, "--step", "20"], 64, "USAGE", "0 to 19")

    def test_too_many_epochs(self):
        data = {"packing": "concat", "mixture": [{"dataset": str(h.ingest("prose")), "max_epochs": 1}]}
        config = h.write_stage(h.ROOT / "chats" / "often.yaml", h.pretrain("often", 2000, first=True, data=data))
        result = self.refuse(["data", "plan", config], 78, "MIX-EPOCHS", "view prose")
        self.assertIn("max_epochs 1: MIX-EPOCHS", result.out)

    def test_nothing_left(self):
        data = {"packing": "concat", "mixture": [{"dataset": str(h.ingest("prose")), "min_tokens": 100000}]}
        config = h.write_stage(h.ROOT / "chats" / "empty.yaml", h.pretrain("empty", 2, first=True, data=data))
        self.refuse(["data", "plan", config], 65, "DS-EMPTY", "stage empty", "300 shorter than min_tokens 100000")

    def test_phases_of_a_halo_stage(self):
        halo = h.halo("halo", 2, 3)
        pipeline = h.write_pipeline(h.ROOT / "chats" / "chain", [h.pretrain("base", 2, first=True), halo])
        names = [(row["stage"], row["phase"], row["samples"]) for row in self.plan(pipeline)]
        self.assertEqual(names, [("base", "", 8), ("halo", "align", 8), ("halo", "distil", 12)])
        self.refuse(["data", "trace", pipeline, "--stage", "halo", "--step", "0"], 64, "halo/distil")
        self.refuse(["data", "plan", pipeline, "--stage", "hallo"], 64, "base, halo/align, halo/distil")


if __name__ == "__main__":
    h.main()
