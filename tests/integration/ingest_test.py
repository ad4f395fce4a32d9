"""Ingest as a process: killed at random moments and resumed, stopped by its own errors, packed inputs from the command line."""

import gzip
import json
import random
import signal
import subprocess
import time
import unittest

import harness as h


def records(count, seed):
    draws = h.Draws(seed)
    return "".join(json.dumps({"id": i, "text": h.sentences(draws, 1 + draws.below(8))}) + "\n" for i in range(count))


def files(store):
    """Bytes of everything that counts; dataset.json holds neither time nor command line."""
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


class IngestCase(unittest.TestCase):
    def folder(self):
        folder = h.ROOT / "ingest" / self.id().rsplit(".", 1)[1]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def arguments(self, inputs, store, *more):
        return ["data", "ingest", "--input", *inputs, "--tokenizer", "bytes", "--name", "set", "--to", store, *more]

    def refuse(self, arguments, code, *texts):
        result = h.run(arguments)
        self.assertEqual(result.code, code, result)
        self.assertEqual(len(result.error_lines), 1, result)
        for text in texts:
            self.assertIn(str(text), result.error_lines[0])


class Killed(IngestCase):
    def test_kill_at_random_moments_and_resume_gives_the_same_bytes(self):
        folder = self.folder()
        plain = folder / "a.jsonl"
        plain.write_text(records(6000, 1) + "broken\n" + records(3000, 2))
        packed = folder / "b.jsonl.gz"
        packed.write_bytes(gzip.compress(records(4000, 3).encode()))
        texts = folder / "texts"
        texts.mkdir()
        for i in range(40):
            (texts / f"{i:02}.txt").write_text(h.sentences(h.Draws(i), 20))
        options = ["--rule", "not_json=skip", "--dedup", "--shard-tokens", "600000", "--piece-bytes", "40000"]
        inputs = [plain, packed, texts]
        straight = folder / "straight"
        begin = time.monotonic()
        h.succeed(self.arguments(inputs, straight, *options, "--workers", "3"))
        seconds = time.monotonic() - begin
        draws = random.Random(7)
        killed = folder / "killed"
        kills = 0
        while True:
            job = h.Job(self.arguments(inputs, killed, *options, "--resume", "--workers", str(1 + kills % 4)))
            # The first kills come early, later ones anywhere, so that the ingest gets done.
            time.sleep(draws.uniform(0, seconds * (0.3 if kills < 3 else 1.1)))
            if job.running():
                job.process.send_signal(signal.SIGKILL)
            result = job.result()
            if result.code == 0:
                break
            self.assertEqual(result.code, -signal.SIGKILL, result)
            self.assertFalse((killed / "dataset.json").exists() and not (killed / "ingest.pieces").exists())
            kills += 1
            self.assertLess(kills, 60)
        self.assertGreaterEqual(kills, 3)
        self.assertEqual(files(killed), files(straight))
        h.succeed(["data", "verify", killed, "--full"])

    def test_an_unfinished_ingest_is_neither_overwritten_nor_mixed(self):
        folder = self.folder()
        source = folder / "a.jsonl"
        source.write_text(records(200, 1))
        store = folder / "store"
        pieces = store / "ingest.pieces"
        # What a kill leaves: the plan and some pieces. A full disk leaves the same.
        h.succeed(self.arguments([source], store))
        whole = files(store)
        job = None
        for path in store.iterdir():
            path.unlink()
        for _ in range(50):
            job = h.Job(self.arguments([source], store, "--resume", "--piece-bytes", "500"))
            job.wait_for(lambda: (pieces / "plan.json").exists(), "the plan")
            job.process.kill()
            job.result()
            if pieces.exists():
                break
        self.assertTrue(pieces.exists())
        self.refuse(self.arguments([source], store), 74, "ING-UNFINISHED", "--resume", store)
        self.refuse(self.arguments([source], store, "--resume", "--dedup", "--piece-bytes", "500"), 78, "ING-CHANGED", "dedup")
        source.write_text(records(201, 1))
        self.refuse(self.arguments([source], store, "--resume", "--piece-bytes", "500"), 78, "ING-CHANGED", source)
        self.assertTrue(pieces.exists())
        source.write_text(records(200, 1))
        for path in pieces.iterdir():
            path.unlink()
        pieces.rmdir()
        h.succeed(self.arguments([source], store, "--resume"))
        self.assertEqual(files(store), whole)

    def test_too_many_rejects_can_be_allowed_afterwards(self):
        folder = self.folder()
        source = folder / "a.jsonl"
        source.write_text(records(100, 1) + "broken\n" * 5)
        store = folder / "store"
        skip = ["--rule", "not_json=skip"]
        self.refuse(self.arguments([source], store, *skip), 65, "ING-REJECTS", "5 malformed records of 105", "at most 0", "--resume")
        self.assertEqual(len((store / "ingest.log.jsonl").read_text().splitlines()), 5)
        h.succeed(self.arguments([source], store, *skip, "--resume", "--max-rejects", "10%"))
        self.assertEqual(len((store / "ingest.log.jsonl").read_text().splitlines()), 5)


class Inputs(IngestCase):
    def test_every_format_gives_the_same_documents(self):
        folder = self.folder()
        text = records(300, 5)
        array = "[" + ",\n".join(text.splitlines()) + "]\n"
        (folder / "a.jsonl").write_text(text)
        (folder / "a.ndjson.gz").write_bytes(gzip.compress(text.encode()))
        (folder / "a.json").write_text(array)
        (folder / "a.json.gz").write_bytes(gzip.compress(array.encode()))
        names = ["a.jsonl", "a.ndjson.gz", "a.json", "a.json.gz"]
        if subprocess.run(["zstd", "-q", folder / "a.jsonl"], check=False).returncode == 0:
            names.append("a.jsonl.zst")
        shards = set()
        for name in names:
            store = folder / (name + ".store")
            h.succeed(self.arguments([folder / name], store))
            shards.add((store / "tokens-00000.h5").read_bytes())
        self.assertEqual(len(shards), 1)

    def test_formats_that_are_not_read_are_named_with_a_conversion(self):
        folder = self.folder()
        for name, words in {"a.parquet": ["Parquet", "read_parquet"], "b.mds": ["MDS", "LocalDataset"], "c.tar": ["WebDataset", "tar -xf"]}.items():
            (folder / name).write_bytes(b"x")
            self.refuse(self.arguments([folder / name], folder / "store"), 65, "ING-FORMAT", name, *words)
            # Nor is it passed over in a directory.
            self.refuse(self.arguments([folder], folder / "store"), 65, "ING-FORMAT")
            (folder / name).unlink()

    def test_wrong_numbers_on_the_command_line(self):
        source = self.folder() / "a.txt"
        source.write_text("text")
        for value in ("many", "101%", "-1", "5x"):
            self.refuse(self.arguments([source], self.folder() / "store", f"--max-rejects={value}"), 64, "USAGE", value)


if __name__ == "__main__":
    h.main()
