#!/usr/bin/env python3
"""What the Hugging Face `tokenizers` package makes of tiny tokenizer.json files, one for each thing the reader knows.

    python tests/oracle/tokenizer_goldens.py          # compares with tests/data/tokenizer_goldens.json
    python tests/oracle/tokenizer_goldens.py --make   # writes it again

tests/data/hf_golden_test.cc reads the result, so the reader is held against the package where the package is not. A case is a
tokenizer.json as text, a few texts, their ids, the text of these ids, and the ids with the post-processor where they are others.
"""

import argparse
import json
import pathlib
import sys

import tokenizers

PATH = pathlib.Path(__file__).resolve().parents[1] / "data" / "tokenizer_goldens.json"
MARK = "\u2581"
PIECES = ["<unk>", "<s>", "</s>"]
CHARACTERS = sorted(set(" \n\t-_'.!#12345aAbBcdehnostxyI" + MARK + "\u00e9\u00c9\u0301\u0307\u03a3\u03c3\u03c2\u4e2d\u6587\u2168\u00b2\ufb01"))
MERGES = [("a", "b"), ("ab", "c"), (MARK, "a"), ("t", "h"), ("th", "e"), ("h", "e"), ("1", "2"), ("12", "3"), (" ", "a"), (" ", " "),
          (MARK, MARK), ("e", "\u0301"), ("\u4e2d", "\u6587"), ("#", "#"), ("!", "!")]
TEXTS = ["abc the a", " abc  abc ", "a12345 b\n\n\tthe", "\u00e9e\u0301\u4e2d\u6587!", ""]


def bpe(merges=None, characters=CHARACTERS, **changes):
    """A model over characters."""
    merges = MERGES if merges is None else merges
    words = PIECES + list(characters) + [left + right for left, right in merges]
    return {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, "vocab": {word: i for i, word in enumerate(words)},
            "merges": [f"{left} {right}" for left, right in merges] if all(" " not in pair for merge in merges for pair in merge)
            else [list(pair) for pair in merges]} | changes


def fallback(drop="", **changes):
    """Bytes of some characters, without the characters of `drop`."""
    model = bpe(**{"fuse_unk": True, "byte_fallback": True} | changes)
    words = [word for word in model["vocab"] if not set(word) & set(drop)]
    words += [f"<0x{byte:02X}>" for byte in sorted(set("\u00e9\u4e2d\u6587\U0001f600\n!".encode()))]
    model["vocab"] = {word: i for i, word in enumerate(words)}
    model["merges"] = [pair for pair in model["merges"] if not set("".join(pair)) & set(drop)]
    return model


def byte_level(**changes):
    """A model over the bytes of the texts."""
    spelled = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(CHARACTERS) + "\U0001f600\U0001f3fd\u00a0"
    alphabet = sorted(set(spelled.pre_tokenize_str(text)[0][0]))
    merges = ["\u0120 a", "a b", "ab c", "\u0120a b", "\u0120 \u0120", "h e", "t he", "\u0120 the", "1 2", "12 3", "\u00c3 \u00a9", "\u010a \u010a",
              "' s", "' t"]
    words = PIECES + alphabet + [pair.replace(" ", "") for pair in merges] + ["\u0120abc", "\u0120the12"]
    return bpe([], "") | {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges, "unk_token": None} | changes


def added(content, *flags):
    return {"content": content, **{flag: flag in flags for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}}


def tokenizer(model=None, added_tokens=(), **parts):
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None,
            "post_processor": None, "decoder": {"type": "Fuse"}, "model": model or bpe()}
    vocabulary, free = made["model"]["vocab"], len(made["model"]["vocab"])
    for token in added_tokens:
        known = token["content"] in vocabulary
        made["added_tokens"].append({"id": vocabulary[token["content"]] if known else free} | token)
        free += 0 if known else 1
    return made | parts


def sequence(kind, *parts):
    return {"type": "Sequence", kind: list(parts)}


def replace(pattern, content):
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(behavior, invert, **pattern):
    return {"type": "Split", "pattern": pattern, "behavior": behavior, "invert": invert}


def metaspace(**changes):
    return {"type": "Metaspace", "replacement": MARK, "prepend_scheme": "always", "split": True} | changes


def bytes_of(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True} | changes


def template(before=(), after=(), ids=None):
    names = dict.fromkeys([*before, *after])
    known = {"<s>": [1], "</s>": [2]} | (ids or {})
    token = lambda name: {"SpecialToken": {"id": name, "type_id": 0}}  # noqa: E731
    text = lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}  # noqa: E731
    return {"type": "TemplateProcessing", "single": [*map(token, before), text("A", 0), *map(token, after)],
            "pair": [text("A", 0), text("B", 1)],
            "special_tokens": {name: {"id": name, "ids": known[name], "tokens": [name] * len(known[name])} for name in names}}


def model_cases():
    odd = ["xQQb", "QQ", "a\U0001f600\u00e9\u4e2db!", "\nQ\u00e9Q"]
    for fuse in (False, True):
        yield f"fuse_unk {fuse}", tokenizer(bpe(fuse_unk=fuse)), [*TEXTS, *odd]
        yield f"byte_fallback, fuse_unk {fuse}", tokenizer(fallback("\u00e9\u4e2d!", fuse_unk=fuse)), [*TEXTS, *odd]
    yield "no unk", tokenizer(bpe(unk_token=None)), odd
    yield "byte_fallback without unk", tokenizer(fallback("\u00e9\u4e2d!", unk_token=None)), odd
    # A piece that no merge makes is found only where merges are ignored; one that merges would make otherwise, too.
    words = bpe()["vocab"] | {"within": 900, "thea": 901, "abc12": 902}
    for ignore in (False, True):
        yield (f"ignore_merges {ignore}", tokenizer(bpe(vocab=words, ignore_merges=ignore), pre_tokenizer=split("Isolated", False, String=" ")),
               ["within thea abc12", "within! thea", "thea"])
        yield (f"ignore_merges {ignore} on bytes", tokenizer(byte_level(ignore_merges=ignore), pre_tokenizer=bytes_of(use_regex=False),
                                                            decoder=bytes_of()), [" abc", " the12", " the123", "x abc"])
    yield "merges as pairs", tokenizer(bpe([("a", "b"), ("b", "c"), ("ab", "c")], "abc")), ["abc", "bcab", "abcbc"]
    yield "merges as texts", tokenizer(bpe([("b", "c"), ("a", "b"), ("a", "bc")], "abc")), ["abc", "bcab", "abcbc"]
    yield "equal neighbours", tokenizer(bpe([("a", "a"), ("aa", "a"), ("aa", "aa")], "a")), ["a" * n for n in range(1, 9)]


def normalizer_cases():
    texts = ["e\u0301A\ufb01\u00b2 the", "  \u2168\u0301 Abc\t\n", "\u0130I\u03a3\u03c3", "a\u0301\u0301e\u0301", " ", "", "Q \u00c9"]
    each = {"NFC": {"type": "NFC"}, "NFKC": {"type": "NFKC"}, "Lowercase": {"type": "Lowercase"},
            "Prepend": {"type": "Prepend", "prepend": MARK}, "Prepend two": {"type": "Prepend", "prepend": "a "},
            "Replace": replace(" ", MARK), "Replace by nothing": replace("\u0301", ""), "Replace by more": replace("A", "ab"),
            "Replace of two": replace("  ", "-")}
    for left in (False, True):
        for right in (False, True):
            each[f"Strip {left} {right}"] = {"type": "Strip", "strip_left": left, "strip_right": right}
    each["Sequence"] = sequence("normalizers", each["Prepend"], each["Replace"])
    each["Sequence of all"] = sequence("normalizers", each["Strip True True"], each["NFKC"], each["Lowercase"],
                                       sequence("normalizers", replace("the", "abc"), each["Prepend"]), each["Replace"])
    each["Sequence of none"] = sequence("normalizers")
    for name, normalizer in each.items():
        yield f"normalizer {name}", tokenizer(normalizer=normalizer), texts


def pretokenizer_cases():
    # Merges reach over every border, so a missing cut shows.
    merges = [("a", " "), (" ", "b"), ("b", "-"), ("-", "-"), ("--", "a"), ("1", "2"), ("a", "1"), ("a ", "1"), (MARK, "a"), ("a", MARK),
              (MARK, MARK), (" ", " "), ("2", "b"), ("2", "3"), ("23", "4")]
    model, texts = bpe(merges, f" -ab12345\u2168{MARK}"), ["a b--a -b", "--a b", "a--", "--", "b  a", ""]
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            for pattern in ({"String": "-"}, {"Regex": "[\\s-]"}, {"Regex": "a| b|(?=-)"}):
                name = f"Split {behavior} {invert} {next(iter(pattern.values()))}"
                yield name, tokenizer(model, pre_tokenizer=split(behavior, invert, **pattern)), texts
    for individual in (False, True):
        yield (f"Digits {individual}", tokenizer(model, pre_tokenizer={"type": "Digits", "individual_digits": individual}),
               ["a12345b", "12", "a 1a1 2", "\u2168\u00b21"])
    for scheme in ("always", "first", "never"):
        for apart in (True, False):
            part = metaspace(prepend_scheme=scheme, split=apart)
            yield (f"Metaspace {scheme} {apart}", tokenizer(model, [added("<x>"), added("<r>", "rstrip")], pre_tokenizer=part, decoder=part),
                   ["a b  a", " a", f"{MARK}a", "<x>a", "a<x>a <r> a", " <x> a", ""])
    yield ("Metaspace after Split", tokenizer(model, pre_tokenizer=sequence("pretokenizers", split("Isolated", False, String="-"),
                                                                           metaspace(prepend_scheme="first"))), ["a-a b-", "-a"])
    yield ("Sequence", tokenizer(model, pre_tokenizer=sequence(
        "pretokenizers", {"type": "Digits", "individual_digits": True}, sequence("pretokenizers", split("MergedWithNext", False, String=" ")))),
           ["a 12 b", "a1 b  2"])
    texts = ["the abc's  the\n\n a", "abc", " abc \u00e9 don't  12345", "\U0001f600\U0001f3fd\u00a0!!", "a <x> the<x>the", "   ", ""]
    for prefix in (False, True):
        for regex in (False, True):
            yield (f"ByteLevel {prefix} {regex}", tokenizer(byte_level(), [added("<x>")], decoder=bytes_of(), pre_tokenizer=bytes_of(
                add_prefix_space=prefix, use_regex=regex)), texts)
    yield ("ByteLevel after Split", tokenizer(byte_level(), decoder=bytes_of(), pre_tokenizer=sequence(
        "pretokenizers", split("Isolated", False, Regex="(?i:'s|'t)|\\p{N}{1,3}| ?\\p{L}+|\\s+(?!\\S)|\\s+"), bytes_of(use_regex=False))), texts)
    yield ("ByteLevel after Digits", tokenizer(byte_level(), decoder=bytes_of(), pre_tokenizer=sequence(
        "pretokenizers", {"type": "Digits", "individual_digits": True}, bytes_of(add_prefix_space=True))), ["a123 abc", "12"])


def decoder_cases():
    texts = ["abc the a", " abc  a ", "\u00e9\u4e2d\U0001f600!\n", "##a##", ""]
    fuse, strip = {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    each = {"null": None, "Fuse": fuse, "ByteFallback": {"type": "ByteFallback"}, "Replace": replace(MARK, " "), "Replace by two": replace("#", "ab"),
            "Strip of pieces": strip | {"content": "#", "stop": 1}, "Strip of starts": strip | {"content": "#", "start": 2},
            "Llama": sequence("decoders", replace(MARK, " "), {"type": "ByteFallback"}, fuse, strip),
            "ByteLevel on characters": bytes_of()}
    for scheme in ("always", "first", "never"):
        each[f"Metaspace {scheme}"] = metaspace(prepend_scheme=scheme)
    normalizer = sequence("normalizers", {"type": "Prepend", "prepend": MARK}, replace(" ", MARK))
    for name, decoder in each.items():
        yield f"decoder {name}", tokenizer(fallback("\u00e9\u4e2d!"), normalizer=normalizer, decoder=decoder), texts
    # The package panics where the two ends overlap, so no shorter texts.
    yield ("decoder Fuse, Strip", tokenizer(decoder=sequence("decoders", fuse, strip | {"start": 2, "stop": 3})),
           ["   abc    ", " abc  ", "abcabc", "    \u00e9     "])


def added_cases():
    texts = ["a<x>b", "a <x> b", "<x><x>y", " \u00a0\n<x>\t \nthe", "the<x>", "a_<x>", "<x>1 .<x>.", "\u4e2d<x>", "<x>\u0301", "<X>  <x>  <x>", "<x"]
    for flags in ((), ("single_word",), ("lstrip",), ("rstrip",), ("lstrip", "rstrip"), ("normalized",), ("special",),
                  ("single_word", "lstrip", "rstrip"), ("single_word", "normalized"), ("normalized", "lstrip", "rstrip", "special")):
        yield f"added {' '.join(flags)}", tokenizer(added_tokens=[added("<x>", *flags)]), texts
    for flags in ((), ("normalized",), ("normalized", "lstrip", "rstrip")):
        tokens = [added("<x>", *flags), added("<x>y"), added("the", *flags), added("<X>", "special"), added("A B", *flags)]
        for name, normalizer in (("Lowercase", {"type": "Lowercase"}), ("Replace", replace(" ", MARK)),
                                 ("Prepend", {"type": "Prepend", "prepend": MARK}), ("NFC", {"type": "NFC"})):
            yield (f"added {' '.join(flags)} with {name}", tokenizer(added_tokens=tokens, normalizer=normalizer),
                   ["a<x>b<x>y", "A B THE the", "<X>  a <x>", "a b", "e\u0301<x>e\u0301"])
    yield ("added longest and leftmost", tokenizer(added_tokens=[added("aa"), added("aaa"), added("ba", "special"), added("abab")]),
           ["aaaa", "aaba", "babab", "ababab", "aabaaa"])
    yield ("added neighbours", tokenizer(added_tokens=[added("<l>", "lstrip"), added("<r>", "rstrip"), added("<w>", "single_word", "lstrip")]),
           ["a <r> <l> b", "<r>  <w>", "<l><r> <r>a", "a <w> b<w>", "  <l>  <l>  "])
    pieces = [added("abc"), added("e", "single_word"), added("</s>", "special"), added("<s>", "special"), added("new", "special")]
    yield "added pieces of the model", tokenizer(added_tokens=pieces), ["abcabc", "the e", "<s>a</s>", "newab c"]


def template_cases():
    two = {"<s>": [1, 3]}
    each = {"bos": template(["<s>"]), "eos": template(after=["</s>"]), "both": template(["<s>"], ["</s>"]), "none": template(),
            "two ids": template(["<s>"], ["</s>", "</s>"], two), "null": None, "ByteLevel": bytes_of(),
            "Sequence": sequence("processors", bytes_of(), template(["<s>"])), "Sequence of none": sequence("processors"),
            "Sequence in a Sequence": sequence("processors", sequence("processors", template(["<s>"], ["</s>"])), bytes_of())}
    for name, processor in each.items():
        yield f"post-processor {name}", tokenizer(bpe([("a", "b"), ("ab", "c")], "abc the"), post_processor=processor), ["abc", "a the", ""]


def make():
    cases = []
    for name, source, texts in [*model_cases(), *normalizer_cases(), *pretokenizer_cases(), *decoder_cases(), *added_cases(), *template_cases()]:
        text = json.dumps(source, ensure_ascii=False, separators=(",", ":"))
        package = tokenizers.Tokenizer.from_str(text)
        rows = []
        for given in texts:
            ids = package.encode(given, add_special_tokens=False).ids
            row = {"text": given, "ids": ids, "decoded": package.decode(ids, skip_special_tokens=False)}
            special = package.encode(given).ids
            rows.append(row if special == ids else row | {"special": special})
        cases.append({"name": name, "tokenizer": text, "texts": rows})
    names = [case["name"] for case in cases]
    assert len(set(names)) == len(names)
    lines = [json.dumps(case, ensure_ascii=False, separators=(",", ":")) for case in cases]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", action="store_true")
    text = make()
    if parser.parse_args().make:
        PATH.write_text(text, encoding="utf-8")
        print(f"{PATH.name}: {text.count(chr(10)) - 2} tokenizers, {len(text.encode())} bytes, tokenizers {tokenizers.__version__}")
    elif PATH.read_text(encoding="utf-8") != text:
        sys.exit(f"{PATH}: the package gives something else; look at the difference, then run with --make")


if __name__ == "__main__":
    main()
