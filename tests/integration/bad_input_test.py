"""What a user gets wrong: each mistake ends with its exit code and one line that says where, what was found and what to do."""

import gzip
import json
import shutil
import unittest

import harness as h


def place(path, text):
    """Line and column where `text` begins, as messages give them."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if text in line:
            return f"{path}:{number}:{line.index(text) + 1}"
    raise AssertionError(f"{text} is not in {path}")


class BadInputCase(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.stage = h.pretrain("only", 3, first=True)
        cls.base = h.write_stage(h.ROOT / "bad" / "base.yaml", cls.stage)
        cls.good = h.ROOT / "runs" / "good"
        if not cls.good.exists():
            h.succeed(h.train(cls.base, cls.good))
        cls.checkpoint = h.checkpoints(cls.good)[-1]

    def tearDown(self):
        # Nothing that was there before is lost.
        for checkpoint in h.checkpoints(self.good):
            h.succeed(["ckpt", "verify", checkpoint, "--deep"])

    def name(self):
        return self.id().rsplit(".", 1)[1]

    def config(self, **changes):
        return h.write_stage(h.ROOT / "bad" / f"{self.name()}.yaml", {**self.stage, **changes})

    def edited(self, old, new):
        """The good file with one text replaced."""
        path = h.ROOT / "bad" / f"{self.name()}.yaml"
        text = self.base.read_text()
        self.assertEqual(text.count(old), 1, text)
        path.write_text(text.replace(old, new))
        return path

    def run_directory(self):
        return h.ROOT / "runs" / self.name()

    def refuse(self, arguments, code, *texts, ranks=None, **options):
        result = h.run(arguments, ranks, **options)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in texts:
            self.assertIn(str(text), result.error_lines[0])
        return result

    def refuse_training(self, config, code, *texts, sets=()):
        """Alone and on two ranks: one line in both cases, and nothing that looks like a checkpoint."""
        for ranks in (None, 2):
            self.refuse(h.train(config, self.run_directory(), *sets), code, *texts, ranks=ranks)
        self.assertEqual(h.checkpoints(self.run_directory()), [])


class CommandLine(BadInputCase):
    def test_unknown_option(self):
        for ranks in (None, 2):
            self.refuse(["train", self.base, "--frobnicate"], 64, "USAGE", "--frobnicate", "--help", ranks=ranks)

    def test_unknown_subcommand(self):
        self.refuse(["trian"], 64, "USAGE", "trian")

    def test_no_subcommand(self):
        self.refuse([], 64, "USAGE")

    def test_missing_argument(self):
        for ranks in (None, 2):
            self.refuse(["train"], 64, "USAGE", "config", ranks=ranks)

    def test_value_out_of_range(self):
        self.refuse(["generate", "--ckpt", self.checkpoint, "--prompt", "a", "--top-p", "7"], 64, "USAGE", "--top-p")

    def test_contradictory_flags(self):
        self.refuse(["ckpt", "verify", self.checkpoint, "--quick", "--deep"], 64, "USAGE", "--deep", "--quick")


class Configuration(BadInputCase):
    def test_missing_file(self):
        missing = h.ROOT / "bad" / "nowhere.yaml"
        self.refuse_training(missing, 66, "FILE-MISSING", missing)

    def test_misspelt_key(self):
        path = self.edited("peak_lr", "peek_lr")
        self.refuse_training(path, 78, "CFG-KEY", place(path, "peek_lr"), "schedule.peek_lr", "did you mean `peak_lr`?")

    def test_wrong_type(self):
        path = self.edited("steps: 3", "steps: many")
        self.refuse_training(path, 78, "CFG-TYPE", place(path, "many"), "batch.steps", "many", "integer")

    def test_duplicate_key(self):
        path = self.edited("  steps: 3\n", "  steps: 3\n  steps: 4\n")
        line = path.read_text().splitlines().index("  steps: 4") + 1
        self.refuse_training(path, 78, "CFG-DUP", f"{path}:{line}", "steps")

    def test_missing_key(self):
        path = self.edited("  steps: 3\n", "")
        self.refuse_training(path, 78, "CFG-MISSING", path, "batch.steps")

    def test_number_out_of_range(self):
        path = self.edited("steps: 3", "steps: 0")
        self.refuse_training(path, 78, "CFG-RANGE", place(path, "steps: 0").rsplit(":", 1)[0], "batch.steps", "1")

    def test_contradictory_keys(self):
        path = self.edited("peak_lr: 0.01", "peak_lr: 0.01\n  final_lr: 0.001")
        self.refuse_training(path, 78, "CFG-CONFLICT", place(path, "0.001"), "schedule.final_lr", "remove it")

    def test_batch_that_is_no_multiple_of_the_length(self):
        path = self.edited("global_batch_tokens: 256", "global_batch_tokens: 250")
        self.refuse_training(path, 78, "CFG-CONFLICT", place(path, "250"), "found 250", "seq_len_tokens 64", "nearest is 256")

    def test_several_mistakes_are_one_message(self):
        path = self.edited("peak_lr", "peek_lr")
        path.write_text(path.read_text().replace("steps: 3", "steps: many"))
        result = h.run(h.train(path, self.run_directory()))
        self.assertEqual(result.code, 78, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in ("peek_lr", "many", "schedule.peak_lr"):
            self.assertIn(text, result.err)

    def test_no_yaml(self):
        path = self.edited("kind: ", "kind: [")
        self.refuse_training(path, 78, "CFG-SYNTAX", path)

    def test_anchor(self):
        path = self.edited("steps: 3", "steps: &many 3")
        self.refuse_training(path, 78, "CFG-SYNTAX", path)

    def test_unknown_override(self):
        self.refuse_training(self.base, 78, "CFG-KEY", "batch.stepz", "steps", sets=["batch.stepz=4"])
        pipeline = h.write_pipeline(h.ROOT / "bad" / "overrides", [self.stage])
        self.refuse_training(pipeline, 78, "CFG-SET", "onyl.batch.steps=4", "did you mean 'only'?", sets=["onyl.batch.steps=4"])

    def test_override_without_a_value(self):
        self.refuse_training(self.base, 78, "CFG-SET", "batch.steps", sets=["batch.steps"])

    def test_sizes_that_do_not_fit(self):
        path = self.config(model=h.model(num_key_value_heads=3))
        self.refuse_training(path, 78, "CFG-MODEL", "num_key_value_heads", "3", "4")

    def test_meshes_of_other_sizes(self):
        self.refuse_training(self.base, 78, "CFG-MESH", "parallel.cp 1 x parallel.tp 3 = 3", sets=["parallel.tp=3"])
        self.refuse_training(self.base, 78, "CFG-MESH", "parallel.dp 5 x cp 1 x tp 1 = 5", sets=["parallel.dp=5"])
        self.refuse_training(self.base, 78, "CFG-MESH", "parallel.dp 2 x cp 2", sets=["parallel.dp=2", "parallel.cp=2"])
        # The product of the two is 0 in 64 bits.
        self.refuse_training(self.base, 78, "CFG-RANGE", "parallel.cp", "4294967296", sets=["parallel.cp=4294967296", "parallel.tp=4294967296"])

    def test_heads_that_tensor_ranks_do_not_divide(self):
        result = self.refuse(h.train(self.base, self.run_directory(), "parallel.tp=3"), 78, "CFG-MESH", "stage only",
                             "num_attention_heads is 4", ranks=3)
        self.assertNotIn("learning rate", result.err)  # before anything is trained

    def test_tensor_ranks_of_a_later_stage(self):
        stages = [self.stage, {**h.pretrain("later", 2), "parallel": {"tp": 3}}]
        pipeline = h.write_pipeline(h.ROOT / "bad" / "later-mesh", stages)
        self.refuse(h.train(pipeline, self.run_directory()), 78, "CFG-MESH", "stage later", "num_attention_heads", ranks=3)
        self.assertEqual(h.checkpoints(self.run_directory()), [])

    def test_key_value_heads_that_do_not_fit(self):
        path = self.config(model=h.model(num_attention_heads=12, num_key_value_heads=4))
        self.refuse(h.train(path, self.run_directory(), "parallel.tp=3"), 78, "CFG-MESH", "num_key_value_heads is 4", ranks=3)

    def test_first_stage_without_a_model(self):
        stage = {key: value for key, value in self.stage.items() if key != "model"}
        path = h.write_stage(h.ROOT / "bad" / "no-model.yaml", stage)
        self.refuse_training(path, 78, "CFG-MISSING", "only", "init_from")

    def test_conversion_without_a_teacher(self):
        path = h.write_stage(h.ROOT / "bad" / "no-teacher.yaml", {**h.halo("convert", 2, 2), "model": h.model()})
        self.refuse_training(path, 78, "CFG-HALO", "init_from")

    def test_a_recall_task_that_does_not_fit(self):
        # Said when the stage starts, before anything is aligned.
        halo = h.halo("convert", 2, 2, halo={"score": {"text_tokens": 512, "recall_items": 4, "recall_length_tokens": 8, "bootstrap": 0}})
        path = h.write_stage(h.ROOT / "bad" / "short-recall.yaml", {**halo, "init_from": {"path": str(self.checkpoint)}})
        self.refuse_training(path, 78, "EVAL-LENGTH", "halo.score.recall_length_tokens", "greater length")
        self.assertEqual(h.metrics(self.run_directory()), {})

    def test_a_stage_that_needs_more_data_than_there_is(self):
        self.refuse_training(self.base, 78, "MIX-EPOCHS", "max_epochs", sets=["batch.steps=100000"])


class Data(BadInputCase):
    def ingest(self, *inputs, more=()):
        store = h.ROOT / "stores" / self.name()
        words = [word for path in inputs for word in ("--input", path)]
        return ["data", "ingest", *words, "--tokenizer", "bytes", "--name", "bad", "--to", store, *more]

    def text(self, content, name="input.txt"):
        path = h.ROOT / "texts" / self.name() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def refuse_ingest(self, arguments, code, *texts):
        self.refuse(arguments, code, *texts)
        self.assertFalse((h.ROOT / "stores" / self.name() / "dataset.json").exists())

    def test_missing_input(self):
        missing = h.ROOT / "texts" / "nowhere"
        self.refuse_ingest(self.ingest(missing), 66, "ING-INPUT", missing)

    def test_empty_folder(self):
        folder = h.ROOT / "texts" / "empty"
        folder.mkdir(parents=True)
        self.refuse_ingest(self.ingest(folder), 65, "ING-EMPTY", "0 files")

    def test_empty_corpus(self):
        self.refuse_ingest(self.ingest(self.text(b"")), 65, "ING-EMPTY", "give files with text")

    def test_text_that_is_not_utf8(self):
        path = self.text(b"first line\nsecond \xff line\n")
        self.refuse_ingest(self.ingest(path), 65, "ING-UTF8", path, "on line 2, byte 18", "0xff", "invalid_utf8")

    def test_a_line_that_is_no_json(self):
        path = self.text(b'{"text": "good"}\n{"text": bad}\n', "input.jsonl")
        self.refuse_ingest(self.ingest(path), 65, "ING-JSON", f"{path}:2", "set the rule not_json to skip")

    def test_a_record_without_its_field(self):
        path = self.text(b'{"text": "good"}\n{"txet": "bad"}\n', "input.jsonl")
        self.refuse_ingest(self.ingest(path), 65, "ING-FIELD", f"{path}:2", "text")

    def test_unknown_kind_of_file(self):
        path = self.text(b"a,b\n", "input.csv")
        self.refuse_ingest(self.ingest(path), 65, "ING-FORMAT", path)

    def test_store_that_exists(self):
        store = h.ingest("prose")
        before = (store / "dataset.json").read_bytes()
        self.refuse(["data", "ingest", "--input", self.text(b"text\n"), "--tokenizer", "bytes", "--name", "bad", "--to", store], 74, "DS-EXISTS", store)
        self.assertEqual((store / "dataset.json").read_bytes(), before)

    def test_missing_tokenizer(self):
        missing = h.ROOT / "nowhere"
        self.refuse(["tokenizer", "info", missing], 66, "TOK-MISSING", missing)
        path = h.ROOT / "bad" / "no-tokenizer.yaml"
        self.refuse_training(h.write_stage(path, self.stage, tokenizer=str(missing)), 66, "TOK-MISSING", missing)

    def test_missing_store(self):
        missing = h.ROOT / "corpus" / "nowhere"
        self.refuse_training(self.config(data=h.data(missing)), 66, "DS-MISSING", missing)

    def test_damaged_store(self):
        for kind, change, code in (("bit", lambda path: h.flip_bit(path), "DS-CRC"), ("cut", lambda path: h.cut(path), "DS-SIZE")):
            store = h.ROOT / "corpus" / f"damaged-{kind}"
            shutil.copytree(h.ingest("prose"), store)
            change(store / "tokens-00000.h5")
            self.refuse_training(self.config(data=h.data(store)), 65, code, store / "tokens-00000.h5")

    def test_damaged_description_of_a_store(self):
        store = h.ROOT / "corpus" / "damaged-description"
        shutil.copytree(h.ingest("prose"), store)
        h.flip_bit(store / "dataset.json")
        self.refuse_training(self.config(data=h.data(store)), 65, "DS-", store / "dataset.json")

    def test_filters_that_leave_nothing(self):
        data = h.data(h.ingest("prose"))
        data["mixture"][0]["min_tokens"] = 1_000_000
        self.refuse_training(self.config(data=data), 65, "DS-EMPTY", "min_tokens")

    def test_chat_stage_on_text(self):
        self.refuse_training(self.config(kind="sft", data=h.data(h.ingest("prose"), packing="best_fit")), 78, "CFG-DATA", "prose", "loss mask")

    def test_negative_weight(self):
        data = h.data(h.ingest("prose"))
        data["mixture"][0]["weight"] = -1
        self.refuse_training(self.config(data=data), 78, "weight")


class Folders(BadInputCase):
    def test_what_is_not_read_and_what_was_left_out_is_said(self):
        folder = h.ROOT / "folder"
        folder.mkdir()
        train = ["tokenizer", "train", "--input", folder, "--vocab-size", "300", "--to", h.ROOT / "corpus" / "folder-tokenizer"]
        ingest = ["data", "ingest", "--input", folder, "--tokenizer", "bytes", "--name", "folder", "--to", h.ROOT / "corpus" / "folder"]
        (folder / "notes.md").write_text("notes\n")
        self.refuse(train, 65, "TOK-TRAIN", folder, "1 file is not read: ", folder / "notes.md")
        draws = h.Draws(7)
        texts = [h.sentences(draws, 3) for _ in range(100)]
        with gzip.open(folder / "texts.jsonl.gz", "wt") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in [*texts, ""])
        for words in (train, ingest):
            result = h.succeed(words)
            self.assertRegex(result.out, r"empty +1  records without text")
            self.assertRegex(result.err, r"\A[^\n]*1 file is not read: [^\n]*/notes\.md [^\n]*\n\Z")
        self.assertIn("/ingest.log.jsonl", result.out)


class Models(BadInputCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tokenizer = h.ROOT / "corpus" / "tokenizer"
        if not cls.tokenizer.exists():
            h.ingest("prose")
            h.succeed(["tokenizer", "train", "--input", h.ROOT / "corpus" / "prose.txt", "--vocab-size", "300", "--to", cls.tokenizer])
        cls.pieces = h.ingest("pieces", tokenizer=str(cls.tokenizer))

    def test_training_a_tokenizer_where_one_is(self):
        before = {path.name: path.read_bytes() for path in self.tokenizer.iterdir()}
        command = ["tokenizer", "train", "--input", h.ROOT / "corpus" / "prose.txt", "--vocab-size", "301", "--to"]
        self.refuse([*command, self.tokenizer], 74, "TOK-EXISTS", self.tokenizer, "another directory")
        self.assertEqual({path.name: path.read_bytes() for path in self.tokenizer.iterdir()}, before)
        # A failure leaves nothing that would stand in the way of the next attempt.
        short = h.ROOT / "corpus" / "short.txt"
        short.write_text("a few words only\n")
        target = h.ROOT / "corpus" / "second-tokenizer"
        self.refuse(["tokenizer", "train", "--input", short, "--vocab-size", "5000", "--to", target], 65, "TOK-TRAIN")
        h.succeed([*command, target])

    def test_store_of_another_tokenizer(self):
        self.refuse_training(self.config(data=h.data(self.pieces)), 65, "TOK-MISMATCH", self.pieces)

    def test_vocabulary_that_is_too_small(self):
        self.refuse_training(self.config(model=h.model(vocab_size=200)), 65, "TOK-VOCAB", "200", "vocab_size")

    def test_model_of_another_tokenizer(self):
        folders = {"with": [], "without": ["--tokenizer", "none"]}
        for name, more in folders.items():
            folder = h.ROOT / "exports" / f"tokenizer-{name}"
            h.succeed(["export", "--ckpt", self.checkpoint, "--to", folder, *more])
        for start in (self.checkpoint, *(h.ROOT / "exports" / f"tokenizer-{name}" for name in folders)):
            stage = {**self.stage, "init_from": {"path": str(start)}, "data": h.data(self.pieces)}
            del stage["model"]
            path = h.write_stage(h.ROOT / "bad" / "other-tokenizer.yaml", stage, tokenizer=str(self.tokenizer))
            self.refuse_training(path, 65, "TOK-MISMATCH", start)
            with self.subTest("with its own it starts"):
                path = h.write_stage(h.ROOT / "bad" / "own-tokenizer.yaml", {**stage, "data": self.stage["data"]})
                h.succeed(h.train(path, h.ROOT / "runs" / f"own-tokenizer-{start.name}"))

    def test_tokens_that_are_no_tokens(self):
        path = h.ROOT / "bad" / "tokens.json"
        target = h.ROOT / "bad" / "logits.safetensors"

        def logits(tokens):
            if isinstance(tokens, bytes):
                path.write_bytes(tokens)
                tokens = path
            return ["logits", self.checkpoint, "--tokens", tokens, "--to", target]

        for tokens, *texts in (
            ("1,70000", "--tokens", "token 70000", "expected 0 to"),
            ("-1,2", "--tokens", "token -1"),
            ("1,,2", "--tokens", "no JSON list"),
            (b"[[1, 2], [3, 70000]]", path, "token 70000"),
            (b"[1, 2.5]", path, "found 2.5"),
            (b'[1, "2"]', path, 'found "2"'),
            (b"[]", path, "without tokens"),
            (b"[[1], []]", path, "without tokens"),
            (b"[[1], 2]", path, "found 2 beside lists"),
            (b"[1, 2", path, "no JSON list"),
            (b"\xff\x00", path, "no JSON list"),
            (b"", path, "no JSON list"),
            (b"[" * 200000 + b"]" * 200000, path, "no JSON list"),
        ):
            with self.subTest(tokens=tokens[:20]):
                self.refuse(logits(tokens), 65, "TOK-LIST", *texts)
                self.assertFalse(target.exists())
        nowhere = h.ROOT / "bad" / "nowhere.json"
        self.refuse(logits(nowhere), 66, "FILE-MISSING", nowhere, "neither token ids nor a file")
        target.write_text("precious")
        self.refuse(logits("1"), 74, "EXP-EXISTS", target)
        self.assertEqual(target.read_text(), "precious")
        target.unlink()
        h.succeed(logits(b"[[1, 2], [30]]"))
        self.assertIn(b'"logits":{"dtype":"F32","shape":[3,', target.read_bytes())

    def test_checkpoint_that_is_not_there(self):
        missing = h.ROOT / "runs" / "nowhere"
        stage = {**self.stage, "init_from": {"path": str(missing)}}
        del stage["model"]
        path = h.write_stage(h.ROOT / "bad" / "no-start.yaml", stage)
        self.refuse_training(path, 65, "CKPT-NONE", missing)
        for command in (["generate", "--ckpt", missing, "--prompt", "a", "--tokenizer", "bytes"],
                        ["export", "--ckpt", missing, "--to", h.ROOT / "exports" / "none", "--tokenizer", "bytes"],
                        ["ckpt", "info", missing], ["ckpt", "verify", missing]):
            self.refuse(command, 65, "CKPT-NONE", f"{missing}: does not exist")
        for command in ("info", "verify"):
            self.refuse(["ckpt", command, self.good], 65, "CKPT-NONE", f"{self.good}: is a run directory", "sala ckpt list")
        self.refuse(["ckpt", "list", missing], 66, "CKPT-NONE", missing)

    def test_resuming_with_another_model(self):
        run = h.copy_run(self.good, self.run_directory())
        shutil.rmtree(h.checkpoints(run)[-1])
        for ranks in (None, 2):
            self.refuse(h.train(self.base, run, "model.hidden_size=48", "model.dim_model_base=48"), 78, "CFG-RESUME", "hidden_size: 32", "hidden_size: 48", ranks=ranks)

    def test_resuming_another_pipeline(self):
        run = h.copy_run(self.good, self.run_directory())
        for ranks in (None, 2):
            self.refuse(h.train(self.config(name="other"), run), 65, "CKPT-LINEAGE", "'only'", ranks=ranks)

    def test_resuming_with_other_data(self):
        run = h.copy_run(self.good, self.run_directory())
        shutil.rmtree(h.checkpoints(run)[-1])
        # The configuration names the same folder, which holds other documents now.
        store = h.ROOT / "corpus" / "swapped"
        shutil.copytree(h.ingest("prose"), store)
        config = self.config(data=h.data(store))
        run = self.run_directory().parent / "swapped"
        h.succeed(h.train(config, run))
        shutil.rmtree(h.checkpoints(run)[-1])
        shutil.rmtree(store)
        shutil.copytree(h.ingest("other", seed=77), store)
        for ranks in (None, 2):
            self.refuse(h.train(config, run), 78, "DATA-CHANGED", ranks=ranks)

    def test_never_in_a_directory_with_checkpoints(self):
        for ranks in (None, 2):
            self.refuse([*h.train(self.base, self.good), "--resume", "never"], 78, "RUN-EXISTS", self.good, ranks=ranks)

    def test_named_checkpoint_that_is_not_there(self):
        missing = h.ROOT / "runs" / "nowhere"
        for ranks in (None, 2):
            self.refuse([*h.train(self.base, self.run_directory()), "--resume", missing], 65, "CKPT-NONE", missing, ranks=ranks)

    def test_moments_where_there_are_none(self):
        folder = h.ROOT / "exports" / "start"
        h.succeed(["export", "--ckpt", self.checkpoint, "--to", folder])
        stage = {**self.stage, "init_from": {"path": str(folder), "carry_optimizer": True}}
        del stage["model"]
        self.refuse_training(h.write_stage(h.ROOT / "bad" / "no-moments.yaml", stage), 78, "CFG-CONFLICT", "carry_optimizer", folder)

    def test_export_into_a_folder_that_exists(self):
        folder = h.ROOT / "exports" / "twice"
        h.succeed(["export", "--ckpt", self.checkpoint, "--to", folder])
        before = (folder / "export.json").read_bytes()
        self.refuse(["export", "--ckpt", self.checkpoint, "--to", folder], 74, "EXP-EXISTS", folder, "--force")
        self.assertEqual((folder / "export.json").read_bytes(), before)
        h.succeed(["export", "--ckpt", self.checkpoint, "--to", folder, "--force"])
        strange = h.ROOT / "exports" / "strange"
        strange.mkdir()
        (strange / "letter.txt").write_text("mine\n")
        self.refuse(["export", "--ckpt", self.checkpoint, "--to", strange, "--force"], 74, "EXP-EXISTS", strange)
        self.assertEqual((strange / "letter.txt").read_text(), "mine\n")

    def test_shapes_without_token_ids(self):
        path = h.ROOT / "bad" / "shapes.yaml"
        path.write_text(h.yaml({"model": h.model(vocab_size=300, eos_token_id=2)}))
        self.refuse(["export", "--shapes-only", path, "--to", h.ROOT / "exports" / "shapes"], 78, "CFG-MISSING", path, "model.bos_token_id, model.pad_token_id")
        self.assertFalse((h.ROOT / "exports" / "shapes").exists())

    def test_damaged_export(self):
        folder = h.ROOT / "exports" / "damaged"
        h.succeed(["export", "--ckpt", self.checkpoint, "--to", folder])
        h.cut(folder / "model.safetensors")
        self.refuse(["generate", "--ckpt", folder, "--prompt", "a"], 65, "ST-", folder / "model.safetensors")

    def test_export_with_another_tokenizer(self):
        self.refuse(["export", "--ckpt", self.checkpoint, "--to", h.ROOT / "exports" / "other", "--tokenizer", self.tokenizer], 65, "TOK-MISMATCH", self.checkpoint)
        self.assertFalse((h.ROOT / "exports" / "other").exists())

    def test_generating_and_evaluating_with_another_tokenizer(self):
        # Another one of the same number of tokens, which nothing but the fingerprint tells apart.
        same_size = h.ROOT / "corpus" / "same-size"
        h.succeed(["tokenizer", "train", "--input", h.ROOT / "corpus" / "prose.txt", "--vocab-size", "300", "--added-token", "<a>", "--to", same_size])
        stage = h.write_stage(h.ROOT / "bad" / "pieces.yaml", {**self.stage, "data": h.data(self.pieces)}, tokenizer=str(self.tokenizer))
        run = h.ROOT / "runs" / "pieces"
        h.succeed(h.train(stage, run))
        checkpoint = h.checkpoints(run)[-1]
        fingerprint = h.manifest(checkpoint)["tokenizer_fingerprint"][:12]
        folder, plain = h.ROOT / "exports" / "pieces", h.ROOT / "exports" / "pieces-unknown"
        h.succeed(["export", "--ckpt", checkpoint, "--to", folder])
        for model in (checkpoint, folder):
            generate = ["generate", "--ckpt", model, "--prompt", "a", "--max-new-tokens", "2"]
            evaluate = ["eval", "--ckpt", model, "--tasks", "passkey", "--lengths", "256", "--samples", "1", "--to", h.ROOT / "evaluations" / model.name]
            for words in (generate, evaluate):
                for other in ("bytes", same_size):
                    self.refuse([*words, "--tokenizer", other], 65, "TOK-MISMATCH", model, fingerprint, "found ", "name the right one with --tokenizer")
                h.succeed([*words, "--tokenizer", self.tokenizer])
        # The second of a pair is looked at before the first is measured; each has a tokenizer of its own.
        pair = h.ROOT / "evaluations" / "pair"
        self.refuse(["eval", "--ckpt", checkpoint, "--against", self.checkpoint, "--tasks", "passkey", "--lengths", "256", "--to", pair, "--tokenizer", self.tokenizer],
                    65, "TOK-MISMATCH", self.checkpoint, "name the right one with --tokenizer")
        self.assertFalse(pair.exists())
        # A folder that does not say what it was trained with is taken with any.
        shutil.copytree(folder, plain)
        (plain / "export.json").unlink()
        h.succeed(["generate", "--ckpt", plain, "--prompt", "a", "--max-new-tokens", "2", "--tokenizer", same_size])

    def test_empty_prompt(self):
        # The byte tokenizer has a start token, so there is something to go on from.
        h.succeed(["generate", "--ckpt", self.checkpoint, "--prompt", "", "--max-new-tokens", "2"])


class Numbers(BadInputCase):
    def test_a_run_that_diverges_ends(self):
        # A rate of 1e30 makes weights whose products overflow; two bad steps are allowed, the third ends the run.
        config = self.config(schedule={"shape": "constant", "peak_lr": 1e30}, batch=h.batch(12), checkpoint={"every_steps": 1, "keep_last": 3})
        for ranks in (None, 2):
            run = h.ROOT / "runs" / f"diverges-{ranks}"
            result = self.refuse(h.train(config, run, "optimizer.max_bad_steps=2"), 76, "NUM-NONFINITE", "stage only", "3 time(s) in a row", "max_bad_steps", "learning rate", ranks=ranks)
            self.assertIn("not finite, the update is skipped", result.err)
            skipped = [line for line in h.metrics(run).values() if line["skipped"]]
            self.assertEqual(len(skipped), 3)
            # Skipped steps left the weights alone: what was saved before is whole.
            for checkpoint in h.checkpoints(run):
                h.succeed(["ckpt", "verify", checkpoint, "--full"])
            self.assertEqual(json.loads((run / "status.json").read_text())["state"], "failed")


if __name__ == "__main__":
    h.main()
