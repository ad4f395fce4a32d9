#!/usr/bin/env python3
"""Ingest at size: a packed input with broken records of ten kinds, each found again in the log; speed; damage; kill and resume.

    tests/integration/ingest_large.py --sala build/release/bin/sala [--megabytes 200] [--folder DIR] [--tokenizer bytes]

Not part of ctest: it writes some 700 MB for --megabytes 200 and takes a minute or two. It needs the program `zstd`.
The rate is megabytes of unpacked text per second of processor time (user and system, all threads), which is what one core does.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time

TARGET = 20  # MB per second and core, unpacked text to token store

# kind -> (rule in the log, action); the text of a record of that kind is made by `broken`.
KINDS = {
    "cut": ("not_json", "skip"),
    "no quotes": ("not_json", "skip"),
    "trailing": ("not_json", "skip"),
    "list": ("not_object", "skip"),
    "no field": ("field_missing", "skip"),
    "number": ("wrong_type", "skip"),
    "bad byte": ("invalid_utf8", "skip"),
    "surrogate": ("lone_surrogate", "skip"),
    "nul": ("nul", "fix"),
    "empty": ("empty", "skip"),
}


def broken(kind, number):
    name = f"broken-{number}"
    return {
        "cut": b'{"id": "%s", "text": "cut off he',
        "no quotes": b'{"id": "%s", text: no quotes}',
        "trailing": b'{"id": "%s", "text": "whole", "n": 1,}',
        "list": b'["%s", "a record is an object"]',
        "no field": b'{"id": "%s", "body": "another name"}',
        "number": b'{"id": "%s", "text": 17}',
        "bad byte": b'{"id": "%s", "text": "byte \xff here"}',
        "surrogate": b'{"id": "%s", "text": "half \\ud83d pair"}',
        "nul": b'{"id": "%s", "text": "a \\u0000 in it"}',
        "empty": b'{"id": "%s", "text": ""}',
    }[kind] % name.encode()


def make_input(path, megabytes, count, draws):
    """Text of many words and some escapes and other scripts; `count` broken records on random lines. Returns {line: kind}, bytes."""
    letters = "etaoinshrdlucmfwypvbgk"
    words = ["".join(draws.choice(letters) for _ in range(draws.randint(2, 9))) for _ in range(20000)]
    words += ["naïve", "日本語", "Ωmega", "\n", "\t", "“quoted”", '"', "\\"] * 40
    lines, size = [], 0
    while size < megabytes * 1_000_000:
        text = " ".join(draws.choices(words, k=draws.randint(20, 900)))
        line = json.dumps({"id": f"r{len(lines)}", "text": text, "meta": {"n": len(lines)}}, ensure_ascii=draws.random() < 0.5).encode()
        lines.append(line)
        size += len(line) + 1
    places = sorted(draws.sample(range(len(lines)), count))
    kinds = list(KINDS)
    wanted = {}
    for number, place in enumerate(places):
        kind = kinds[number % len(kinds)]
        lines[place] = broken(kind, number)
        wanted[place + 1] = kind
    path.write_bytes(b"\n".join(lines) + b"\n")
    return wanted, path.stat().st_size


def run(arguments):
    """Exit code, error text, seconds, seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begin = time.monotonic()
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    seconds = time.monotonic() - begin
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.returncode, done.stderr, seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def files(store):
    return {path.name: path.read_bytes() for path in sorted(store.iterdir())}


def expect(condition, text):
    print(("ok    " if condition else "FAIL  ") + text, flush=True)
    if not condition:
        sys.exit(1)


def hardware():
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


class Ingest:
    def __init__(self, options, folder):
        self.sala, self.folder, self.tokenizer = options.sala, folder, options.tokenizer

    def words(self, source, store, *more):
        rules = [w for rule in ("not_json", "not_object", "field_missing", "wrong_type", "invalid_utf8") for w in ("--rule", f"{rule}=skip")]
        return [self.sala, "data", "ingest", "--input", str(source), "--tokenizer", self.tokenizer, "--name", "large", "--to", str(store),
                *rules, "--max-rejects", "5%", *more]


def check_log(store, wanted):
    found = {}
    for text in (store / "ingest.log.jsonl").read_text().splitlines():
        line = json.loads(text)
        found.setdefault(line["line"], []).append((line["rule"], line["action"]))
    missing = {line: kind for line, kind in wanted.items() if found.get(line) != [KINDS[kind]]}
    expect(not missing, f"{len(wanted)} broken records of {len(KINDS)} kinds: each in the log with line and reason" + (f"; not {missing}" if missing else ""))
    expect(found.keys() == wanted.keys(), "no other record is in the log")


def check_speed(name, size, result):
    code, err, seconds, processor = result
    expect(code == 0, f"{name}: ingested {err}")
    rate = size / 1e6 / processor
    expect(rate >= TARGET, f"{name}: {size / 1e6:.0f} MB in {seconds:.2f} s, {processor:.2f} s of processor time: {rate:.1f} MB/s per core (target {TARGET})")


def check_damage(ingest, packed, draws):
    bytes_ = packed.read_bytes()
    target = ingest.folder / ("damaged" + "".join(packed.suffixes))
    for what in ("cut", "flipped"):
        for _ in range(4):
            at = draws.randrange(len(bytes_) // 8, len(bytes_) - 8)
            damaged = bytes_[:at] if what == "cut" else bytes_[:at] + bytes([bytes_[at] ^ 1 << draws.randrange(8)]) + bytes_[at + 1:]
            target.write_bytes(damaged)
            store = ingest.folder / "damaged.store"
            code, err, _, _ = run(ingest.words(target, store))
            whole = (store / "dataset.json").exists()
            shutil.rmtree(store, ignore_errors=True)
            named = "ING-TRUNCATED" in err or ("ING-CRC" in err and what == "flipped")
            expect(code == 65 and named and not whole, f"{packed.name} {what} at byte {at}: {err.strip()[:150]}")


def check_kill(ingest, packed, straight, seconds, draws):
    store = ingest.folder / "killed"
    kills = 0
    while True:
        process = subprocess.Popen(ingest.words(packed, store, "--resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=draws.uniform(0.05, 0.5) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if process.returncode == 0:
            break
        if kills == 6:  # enough; now it may end
            expect(run(ingest.words(packed, store, "--resume"))[0] == 0, "the last run ends")
            break
    expect(kills > 0 and files(store) == files(straight), f"killed {kills} times and resumed: the same bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sala", required=True)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--broken", type=int, default=1000)
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    parser.add_argument("--tokenizer", default="bytes")
    options = parser.parse_args()
    draws = random.Random(20)
    with tempfile.TemporaryDirectory(prefix="sala-ingest-", dir=options.folder) as name:
        folder = pathlib.Path(name)
        ingest = Ingest(options, folder)
        plain = folder / "large.jsonl"
        wanted, size = make_input(plain, options.megabytes, options.broken, draws)
        subprocess.run(["zstd", "-q", "-3", str(plain)], check=True)
        packed = folder / "large.jsonl.zst"
        print(f"{hardware()}; {size} bytes of text, {packed.stat().st_size} packed, {plain.read_bytes().count(10)} records")
        print("command:", " ".join(ingest.words(packed.name, "store", "--workers", "1")))
        straight = folder / "straight"
        result = run(ingest.words(packed, straight, "--workers", "1"))
        check_speed(f"zstd, tokenizer {options.tokenizer}, 1 worker", size, result)
        check_log(straight, wanted)
        several = folder / "several"
        check_speed(f"plain, tokenizer {options.tokenizer}, all cores", size, run(ingest.words(plain, several)))
        same = [name for name, value in files(several).items() if name.endswith(".h5") and value != files(straight)[name]]
        expect(not same, "plain with all cores: the same token files as zstd with one worker")
        shutil.rmtree(several)
        check_damage(ingest, packed, draws)
        check_kill(ingest, packed, straight, result[2], draws)


if __name__ == "__main__":
    main()
