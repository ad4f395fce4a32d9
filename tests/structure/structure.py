#!/usr/bin/env python3
"""Checks what the compiler does not: that the tree keeps the rules of docs/architecture.md.

    python3 tests/structure/structure.py [--root DIR] [CHECK ...]
    python3 tests/structure/structure.py --codes          # every error code, where it is raised and which tests expect it

Prints one line per violation, "file:line: text", and exits 1 when there is any. The checks are the functions in CHECKS;
structure_test.py plants a violation of each rule in a small tree and asks for exactly that line.
"""

import argparse
import os
import re
import sys

import error_catalogue
from tree import ARCHITECTURE, SOURCE_SUFFIXES, Tree, line_of, rooms_of, without_comments

TEXT_SUFFIXES = SOURCE_SUFFIXES + (".py", ".md", ".txt", ".yaml", ".yml", ".json", ".cmake", ".sh", "")
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"')


def includes(tree, name):
    for number, line in tree.lines(name):
        match = INCLUDE.match(line)
        if match:
            yield number, match.group(1)


def check_rooms(tree):
    """The table of rooms has no cycle: a room uses only rooms named before it."""
    rooms = rooms_of(tree)
    if not rooms:
        yield f"{ARCHITECTURE}:1: no table with the columns `room` and `may use`"
    seen = set()
    for room, used in rooms.items():
        for other in sorted(used - seen):
            yield f"{ARCHITECTURE}:1: room {room} may use {other}, which does not stand before it"
        seen.add(room)


def check_includes(tree):
    """A file includes its own room and the rooms it may use, by paths from the root. Tests of a room likewise."""
    rooms = rooms_of(tree)
    for name in tree.sources(*rooms, "tests"):
        parts = name.split("/")
        room = parts[1] if parts[0] == "tests" else parts[0]
        allowed = rooms[room] | {room} if room in rooms else set(rooms)
        if parts[0] == "tests":
            allowed = allowed | {"tests"}
        for number, path in includes(tree, name):
            first = path.split("/")[0]
            if "/" not in path or first in (".", ".."):
                yield f'{name}:{number}: include "{path}" is not a path from the root'
            elif first in set(rooms) | {"tests"} and first not in allowed:
                yield f'{name}:{number}: room {room} must not include "{path}"'


def check_links(tree):
    """USES of each room's CMakeLists.txt is what its files include, and no more than the room may use."""
    rooms = rooms_of(tree)
    for room, may_use in rooms.items():
        build_file = f"{room}/CMakeLists.txt"
        if not tree.has(build_file):
            continue
        call = re.search(r"sala_room\(\s*(\w+)([^)]*)\)", tree.text(build_file))
        if call is None:
            if "add_executable(" not in tree.text(build_file):  # a room that is a program, not a library: launch
                yield f"{build_file}:1: neither sala_room({room} ...) nor a program"
            continue
        number = line_of(tree.text(build_file), call.start())
        uses = re.search(r"\bUSES\b([^A-Z]*)", call.group(2))
        uses = set(uses.group(1).split()) if uses else set()
        included = {path.split("/")[0] for name in tree.sources(room) for _, path in includes(tree, name)}
        included = (included & set(rooms)) - {room}
        if call.group(1) != room:
            yield f"{build_file}:{number}: sala_room names {call.group(1)}, the folder is {room}"
        for other in sorted(uses - may_use):
            yield f"{build_file}:{number}: room {room} must not link {other}"
        for other in sorted(included - uses):
            yield f"{build_file}:{number}: files of {room} include {other}, USES does not name it"
        if tree.sources(room):
            for other in sorted(uses - included):
                yield f"{build_file}:{number}: USES names {other}, no file of {room} includes it"


def check_kernels(tree):
    """An operation is a folder with a contract of the same name and tests of its own."""
    folders = {name.split("/")[1] for name in tree.files if re.match(r"kernels/\w+/", name)} - {"common"}
    for folder in sorted(folders):
        header = f"kernels/{folder}/{folder}.h"
        if not tree.has(header):
            yield f"kernels/{folder}:1: no contract {header}"
        if not any(re.match(rf"tests/kernels/{folder}/.*_test\.cc$", name) for name in tree.files):
            yield f"kernels/{folder}:1: no test tests/kernels/{folder}/*_test.cc"


def check_headers(tree):
    """Every header opens with a comment that says what it is for."""
    for name in tree.files:
        if name.endswith(".h") and not tree.text(name).startswith("//"):
            yield f"{name}:1: header does not open with an overview comment"


# Written so that this file does not match itself.
MACHINE_PATH = re.compile(r"(?<![\w.~$}{*/-])/(?:home|root|Users|work|mnt|scratch)/\w")
LEFT_OVER = re.compile(r"\b(?:TO" r"DO|FIX" r"ME)\b|^(?:<{7}|>{7})(?: |$)")


def check_words(tree):
    """No paths of one machine, no left-over notes, no merge marks."""
    for name in tree.files:
        if os.path.splitext(name)[1] not in TEXT_SUFFIXES:
            continue
        for number, line in tree.lines(name):
            for kind, pattern in (("path of one machine", MACHINE_PATH), ("left-over note", LEFT_OVER)):
                match = pattern.search(line)
                if match:
                    yield f"{name}:{number}: {kind}: {match.group().strip()}"


ELEMENTARY = re.compile(r"\b(?:std::|::)((?:exp|exp2|expm1|log|log2|log10|log1p|pow|sin|cos|tan|tanh|sinh|cosh|erf|cbrt|hypot)f?)\s*\(")


def check_elementary(tree):
    """No function whose last bits are the C library's choice: core/elementary.h has them. References have number types it lacks,
    and CUDA sources their own."""
    for name in tree.sources("core", "kernels", "parallel", "model", "data", "recipes"):
        if "reference" in name or "cuda" in name or name.endswith(".cu"):
            continue
        text = without_comments(tree.text(name))
        for match in ELEMENTARY.finditer(text):
            yield f"{name}:{line_of(text, match.start())}: {match.group(1)}: its bits differ between machines; use core/elementary.h"


CHECKS = {
    "rooms": check_rooms,
    "includes": check_includes,
    "links": check_links,
    "errors": error_catalogue.check_errors,
    "exits": error_catalogue.check_exits,
    "tests": error_catalogue.check_tests,
    "kernels": check_kernels,
    "headers": check_headers,
    "elementary": check_elementary,
    "words": check_words,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    parser.add_argument("--root", default=os.path.normpath(default_root))
    parser.add_argument("--codes", action="store_true", help="list the error codes instead")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="of " + ", ".join(CHECKS) + "; default: all")
    options = parser.parse_args()
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]}; there are {', '.join(CHECKS)}")
    tree = Tree(options.root)
    if options.codes:
        for line in error_catalogue.inventory(tree):
            print(line)
        return 0
    violations = 0
    for name in options.checks or CHECKS:
        for line in CHECKS[name](tree):
            print(f"{line} [{name}]")
            violations += 1
    print(f"{len(tree.files)} files, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
