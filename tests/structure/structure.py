#!/usr/bin/env python3
"""Checks what the compiler does not: that the tree keeps the rules of docs/architecture.md.

    python3 tests/structure/structure.py [--root DIR] [CHECK ...]
    python3 tests/structure/structure.py --codes          # every error code of the sources and where it is raised

Prints one line per violation, "file:line: text", and exits 1 when there is any. The checks are the functions in CHECKS;
structure_test.py plants a violation of each rule in a small tree and asks for exactly that line.
"""

import argparse
import os
import re
import subprocess
import sys

SOURCE_SUFFIXES = (".h", ".cc", ".inc", ".cu")
TEXT_SUFFIXES = SOURCE_SUFFIXES + (".py", ".md", ".txt", ".yaml", ".yml", ".json", ".cmake", ".sh", "")
IGNORED_FOLDERS = {"build", "runs", "corpus", ".git", "__pycache__"}
ARCHITECTURE = "docs/architecture.md"
ERRORS = "docs/errors.md"


class Tree:
    """The files of a checkout: those git knows or would add, or all files where there is no git."""

    def __init__(self, root):
        self.root = root
        self.files = sorted(self._from_git() or self._from_walk())
        self._text = {}

    def _from_git(self):
        if not os.path.exists(os.path.join(self.root, ".git")):
            return []
        command = ["git", "-c", "safe.directory=*", "-C", self.root, "ls-files", "--cached", "--others", "--exclude-standard"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        names = result.stdout.splitlines() if result.returncode == 0 else []
        return [name for name in names if os.path.isfile(os.path.join(self.root, name))]

    def _from_walk(self):
        found = []
        for folder, folders, names in os.walk(self.root):
            folders[:] = [name for name in folders if name not in IGNORED_FOLDERS]
            found += [os.path.relpath(os.path.join(folder, name), self.root) for name in names]
        return found

    def text(self, name):
        if name not in self._text:
            with open(os.path.join(self.root, name), encoding="utf-8", errors="replace") as file:
                self._text[name] = file.read()
        return self._text[name]

    def lines(self, name):
        return list(enumerate(self.text(name).splitlines(), start=1))

    def has(self, name):
        return name in self.files

    def sources(self, *folders):
        return [name for name in self.files if name.endswith(SOURCE_SUFFIXES) and name.split("/")[0] in folders]


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def without_comments(text):
    """The text with C++ comments blanked out; positions and line numbers stay. String literals are kept."""
    pattern = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|/\*.*?\*/', re.DOTALL)

    def blank(match):
        piece = match.group()
        return re.sub(r"[^\n]", " ", piece) if piece.startswith("/") else piece

    return pattern.sub(blank, text)


def table_cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.lstrip().startswith("|") else []


def rooms_of(tree):
    """{room: rooms it may use}, from the table in docs/architecture.md whose first two columns are `room` and `may use`."""
    rooms, inside = {}, False
    for _, line in tree.lines(ARCHITECTURE) if tree.has(ARCHITECTURE) else []:
        cells = table_cells(line)
        if cells[:2] == ["room", "may use"]:
            inside = True
        elif inside and len(cells) < 2:
            inside = False
        elif inside and cells[0].startswith("`"):
            rooms[cells[0].strip("`/")] = set(re.findall(r"`(\w+)`", cells[1]))
    return rooms


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
            continue  # a room that is a program, not a library: launch
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


CODE = r"[A-Z][A-Z0-9]*(?:-[A-Z][A-Z0-9]*)+"  # at least one dash, each part beginning with a letter: not UTF-8


def arguments(text, start):
    """The arguments of the call whose opening bracket is at `start`, as texts with their positions."""
    depth, begin, position, quoted = 0, start + 1, start, False
    while position < len(text):
        c = text[position]
        if quoted:
            if c == "\\":
                position += 1
            elif c == '"':
                quoted = False
        elif c == '"':
            quoted = True
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
            if depth == 0:
                yield begin, text[begin:position]
                return
        elif c == "," and depth == 1:
            yield begin, text[begin:position]
            begin = position + 1
        position += 1


def error_codes(tree, rooms):
    """(code, file, line) of every code in the sources: literals in the second argument of MakeError, and every other
    literal that has the form of a code (they reach MakeError through helper functions)."""
    for name in tree.sources(*rooms):
        text = without_comments(tree.text(name))
        found = {}
        for call in re.finditer(r"\bMakeError\s*\(", text):
            second = list(arguments(text, call.end() - 1))[1:2]
            for begin, argument in second:
                for literal in re.finditer(r'"([A-Z][A-Z0-9-]*)"', argument):
                    found[begin + literal.start()] = literal.group(1)
        for literal in re.finditer(rf'"({CODE})"', text):
            found[literal.start()] = literal.group(1)
        for position, code in sorted(found.items()):
            yield code, name, line_of(text, position)


def check_errors(tree):
    """docs/errors.md lists the codes of the sources, no fewer and no more."""
    if not tree.has(ERRORS):
        yield f"{ERRORS}:1: missing: the catalogue of error codes"
        return
    listed = {}
    for number, line in tree.lines(ERRORS):
        for cell in table_cells(line)[:1]:
            for code in re.findall(rf"`({CODE}|[A-Z]{{4,}})`", cell):
                listed.setdefault(code, number)
    used = set()
    for code, name, number in error_codes(tree, rooms_of(tree)):
        used.add(code)
        if code not in listed:
            yield f"{name}:{number}: error code {code} is not listed in {ERRORS}"
    for code, number in listed.items():
        if code not in used:
            yield f"{ERRORS}:{number}: error code {code} is raised nowhere"


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
    "errors": check_errors,
    "kernels": check_kernels,
    "headers": check_headers,
    "elementary": check_elementary,
    "words": check_words,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    parser.add_argument("--root", default=os.path.normpath(default_root))
    parser.add_argument("--codes", action="store_true", help="list the error codes of the sources instead")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="of " + ", ".join(CHECKS) + "; default: all")
    options = parser.parse_args()
    unknown = [name for name in options.checks if name not in CHECKS]
    if unknown:
        parser.error(f"no check {unknown[0]}; there are {', '.join(CHECKS)}")
    tree = Tree(options.root)
    if options.codes:
        for code, name, number in sorted(error_codes(tree, rooms_of(tree))):
            print(f"{code} {name}:{number}")
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
