"""From a folder of text and a file of chats to a model that answers as it was taught: the commands of docs/howto/pretrain.md and
docs/howto/sft.md with the configurations in configs/own, on generated data."""

import gzip
import json
import pathlib
import random
import re
import shutil
import unittest

import harness as h

SOURCES = pathlib.Path(__file__).resolve().parents[2]
ANIMALS = ["owl", "fox", "hen", "cat", "dog", "eel", "bee", "ant", "cow", "pig"]
PLACES = ["barn", "lake", "hill", "wood", "yard", "cave", "moor", "dune"]
ANSWER = re.compile(r"^ANSWER: (\w+) in the (\w+)\.$")


def write_own_data(folder):
    """Text with a grammar, and chats whose answers have one form that no text has."""
    draws = random.Random(7)
    (folder / "texts").mkdir(parents=True)
    for number in range(12):
        lines = [f"The {draws.choice(ANIMALS)} lives in the {draws.choice(PLACES)} and sees the {draws.choice(ANIMALS)}." for _ in range(400)]
        (folder / "texts" / f"part-{number:02}.txt").write_text("\n\n".join(" ".join(lines[i:i + 8]) for i in range(0, 400, 8)) + "\n")
    with gzip.open(folder / "chats.jsonl.gz", "wt") as file:
        for _ in range(2000):
            animal, place = draws.choice(ANIMALS), draws.choice(PLACES)
            file.write(json.dumps({"messages": [{"role": "user", "content": f"Where is the {animal}? It went to the {place}."},
                                                {"role": "assistant", "content": f"ANSWER: {animal} in the {place}."}]}) + "\n")


class OwnData(unittest.TestCase):
    def test_from_nothing_to_the_taught_answers(self):
        folder = h.ROOT / "own"
        write_own_data(folder)
        shutil.copytree(SOURCES / "configs" / "own", folder / "configs" / "own")

        def sala(*words):
            return h.succeed(words, cwd=folder, limit=400)

        sala("tokenizer", "train", "--input", "texts", "--vocab-size", "384", "--to", "corpora/tokenizer")
        sala("data", "ingest", "--input", "texts", "--blank-lines", "--tokenizer", "corpora/tokenizer", "--name", "text", "--to", "corpora/text")
        shown = sala("data", "render", "chats.jsonl.gz", "--tokenizer", "corpora/tokenizer").out
        self.assertIn("ANSWER", shown)
        sala("data", "ingest", "--input", "chats.jsonl.gz", "--tokenizer", "corpora/tokenizer", "--name", "chat", "--to", "corpora/chat")
        plan = sala("data", "plan", "configs/own/pipeline.yaml", "--set", "pretrain.batch.steps=30").out
        self.assertIn("pretrain", plan)
        # The chain with a teacher: its files fit each other and these stores.
        chain = sala("train", "configs/own/teacher_pipeline.yaml", "--dry-run", "--set", "teacher.batch.steps=30").out
        for stage in ("teacher", "halo", "stable", "sft"):
            self.assertIn(stage, chain)
        # Fewer steps on text than a user takes: what is checked is the chat.
        sala("train", "configs/own/pipeline.yaml", "--run", "runs/own", "--set", "pretrain.batch.steps=30", "--set", "sft.batch.steps=80")
        newest = sorted((folder / "runs/own/checkpoints").iterdir())[-1]

        # The form is what so few steps teach; that the words are those of the question is not asked for.
        questions = [("owl", "lake"), ("pig", "cave"), ("bee", "moor"), ("dog", "barn"), ("hen", "dune"), ("fox", "yard"), ("ant", "hill"), ("cow", "wood")]
        for animal, place in questions:
            answer = sala("generate", "--ckpt", newest, "--chat", "--prompt", f"Where is the {animal}? It went to the {place}.",
                          "--max-new-tokens", "48").out.strip()
            self.assertRegex(answer, ANSWER, f"not in the taught form: {answer!r}")

        sala("export", "--ckpt", newest, "--to", "exported", "--verify")
        sala("import", "--from", "exported", "--check")
        page = (folder / "runs" / "own" / "report.html")
        sala("report", "runs/own", "--to", page)
        self.assertIn("<svg", page.read_text())


if __name__ == "__main__":
    h.main()
