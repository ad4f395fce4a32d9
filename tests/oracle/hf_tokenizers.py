#!/usr/bin/env python3
"""Compares the ids of tokenizer.json files with those of the Hugging Face `tokenizers` package, over all of Unicode and 50 MB of text.

    python tests/oracle/hf_tokenizers.py --build build/release [--megabytes N] [--keep DIR] [--tokenizer DIR ...]

Trains small tokenizers with the package: one of the Llama-2 and MiniCPM shape (byte fallback, no pre-tokenizer), and two on bytes, with
the patterns of Qwen and Llama 3. Writes texts with the package's ids as JSON lines; `sala tokenizer verify` reads them and compares
every id. The texts are prose, code and headers of this machine with added tokens glued in, every assigned and unassigned code point
between letters, all kinds of white space, long runs, 10 MB without a space and 1 MB of one character. --tokenizer names real ones, which
are compared on the same texts. Prints a table; exits 1 when an id differs.
"""

import argparse
import glob
import gzip
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Unicode is a moving table. The libraries here (PCRE2 10.42, utf8proc 2.8) know version 14, the package a newer one: characters that
# were assigned later are not compared.
SEED = 7
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
               "\u180e\u200b\u200c\u200d\ufeff\x1c\x1d\x1e\x1f")
MARKERS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>", "<|wide|>", "<|left|>", "<|right|>", "word", "Norm"]


def added_tokens():
    """Every flag once."""
    return [AddedToken("<|im_end|>", special=True, normalized=False), AddedToken("<|im_start|>", special=True, normalized=False),
            AddedToken("<|im_start|>x", special=True, normalized=False), AddedToken("<|left|>", lstrip=True, normalized=False),
            AddedToken("<|right|>", rstrip=True, normalized=False), AddedToken("<|wide|>", lstrip=True, rstrip=True, normalized=False),
            AddedToken("word", single_word=True, normalized=False), AddedToken("Norm", normalized=True)]


def byte_fallback(texts):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    # Training wants words; the model that is saved has none, as those of this shape.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, special_tokens=special, limit_alphabet=500,
                                                             show_progress=False))
    made = json.loads(tokenizer.to_str())
    made["pre_tokenizer"] = None
    made["added_tokens"] = [token for token in made["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.add_tokens(added_tokens())
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def byte_level(texts, pattern, form, ignore_merges):
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.normalizer = form
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=4000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                             show_progress=False))
    tokenizer.add_tokens(added_tokens())
    return tokenizer


def machine_texts(limit):
    """Prose and code that are on every machine the tests run on."""
    texts, total = [], 0
    patterns = ["/usr/share/common-licenses/*", "/usr/include/**/*.h", "/usr/share/perl/**/*.pod", "/usr/share/perl/**/*.pm",
                "/usr/lib/python3*/**/*.py", "/usr/share/doc/**/*.gz"]
    for pattern in patterns:
        used = 0
        for name in sorted(glob.glob(pattern, recursive=True)):
            if used > limit // 3 or total > limit:
                break
            try:
                raw = gzip.open(name).read() if name.endswith(".gz") else pathlib.Path(name).read_bytes()
                text = raw.decode()
            except (OSError, UnicodeDecodeError, EOFError):
                continue
            texts.append(text)
            used += len(raw)
            total += len(raw)
    return texts


def code_points():
    """Every code point of Unicode 14: among letters, doubled, before and after spaces, under a combining mark."""
    known = known_code_points()
    for begin in range(0, 0x110000, 256):
        block = [chr(c) for c in range(begin, begin + 256) if not 0xD800 <= c < 0xE000 and c in known]
        if block:
            yield "".join(f"a{c}b {c}{c} {c}1{c}'{c} \n{c}e\u0301{c}\u0301" for c in block)


def known_code_points():
    """Python 3.11 has Unicode 14."""
    import unicodedata  # pylint: disable=import-outside-toplevel
    if unicodedata.unidata_version > "14.0.0":
        unassigned_later = {c for c in range(0x110000) if unicodedata.category(chr(c)) != "Cn"}
        print(f"Python has Unicode {unicodedata.unidata_version}; only its unassigned characters are left out")
        return unassigned_later
    return {c for c in range(0x110000) if unicodedata.category(chr(c)) != "Cn"}


def odd_texts(draw):
    yield ""
    yield " "
    for _ in range(400):
        yield "".join(draw.choice(WHITE_SPACE) for _ in range(draw.randrange(1, 12))) + draw.choice(["", "x", "1", "'s", "<s>"])
    for _ in range(2000):
        parts = [draw.choice(MARKERS + ["a", " ", "  ", "\n", "words", "\u00e9", "e\u0301", "\u4e2d\u6587", "\U0001f600\U0001f3fd", "\u2581",
                                        "_", "'S", "'\u017f", "don't", "12345", "<0x0A>", "\u200d", "\u0130"])
                 for _ in range(draw.randrange(1, 15))]
        yield "".join(parts)
    for c in " \n\ta1'-\u2581\u4e2d\u0301\U0001f600":
        for n in (2, 3, 31, 63, 64, 65, 100, 1000, 4097):
            yield c * n
            yield f"x{c * n}y"
    yield "a" * 1_000_000
    yield " " * 1_000_000
    yield "".join(draw.choice("abcdefghijklmnopqrstuvwxyz\u4e2d\u6587\u00e9") for _ in range(9_000_000))


def mixed(texts, size, draw):
    """Documents of cut and shuffled text with added tokens glued in."""
    total = 0
    while total < size:
        text = draw.choice(texts)
        begin = draw.randrange(max(1, len(text) - 3000))
        piece = text[begin:begin + draw.randrange(200, 60_000)]
        for _ in range(len(piece) // 4000):
            at = draw.randrange(len(piece))
            piece = piece[:at] + draw.choice(MARKERS) + piece[at:]
        total += len(piece.encode())
        yield piece


def write_records(tokenizer, texts, path):
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for begin in range(0, len(texts), 256):
            batch = texts[begin:begin + 256]
            for text, encoding in zip(batch, tokenizer.encode_batch_fast(batch, add_special_tokens=False)):
                file.write('{"text":' + json.dumps(text, ensure_ascii=False) + ',"ids":' + str(encoding.ids) + "}\n")
                written += len(text.encode())
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True)
    parser.add_argument("--keep")
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--tokenizer", action="append", default=[], help="a folder with a tokenizer.json, to be compared too")
    arguments = parser.parse_args()
    sala = pathlib.Path(arguments.build) / "bin" / "sala"
    draw = random.Random(SEED)
    folder = pathlib.Path(arguments.keep or tempfile.mkdtemp(prefix="sala-tokenizers-"))
    start = time.time()

    machine = machine_texts(6_000_000)
    training = [text[:100_000] for text in machine[:60]] + ["\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e caf\u00e9 na\u00efve \u043f\u0440\u0438\u0432\u0435\u0442"] * 30
    made = {"byte-fallback": byte_fallback([text.replace(" ", "\u2581") for text in training]),
            "bytes, Qwen": byte_level(training, QWEN, normalizers.NFC(), False),
            "bytes, Llama 3": byte_level(training, LLAMA3, None, True)}
    for path in arguments.tokenizer:
        made[path] = Tokenizer.from_file(f"{path}/tokenizer.json")
    print(f"{len(made)} tokenizers, {time.time() - start:.0f} s")

    odd = list(odd_texts(draw)) + list(code_points())
    share = arguments.megabytes * 1e6 - sum(len(text.encode()) for text in odd)
    texts = odd + list(mixed(machine, share, draw))
    failed = False
    for number, (name, tokenizer) in enumerate(made.items()):
        place = folder / str(number)
        place.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(place / "tokenizer.json"))
        records = place / "records.jsonl"
        begin = time.time()
        # All texts for the first one; the others share them out, so that the whole takes little more than one.
        chosen = odd + texts[len(odd) + number::len(made)]
        size = write_records(tokenizer, chosen, records)
        theirs = time.time() - begin
        begin = time.time()
        result = subprocess.run([sala, "tokenizer", "verify", place, "--against", records], capture_output=True, text=True, check=False)
        print(f"{name:16} {size / 1e6:6.1f} MB  package {theirs:5.1f} s  sala {time.time() - begin:5.1f} s  exit {result.returncode}  "
              f"{(result.stdout + result.stderr).strip()}")
        failed |= result.returncode != 0
        if not arguments.keep:
            records.unlink()
    print(f"{time.time() - start:.0f} s in all")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
