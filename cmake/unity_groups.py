#!/usr/bin/env python3
"""Which sources of one target can be compiled as one unit, for SALA_UNITY (cmake/SalaUnity.cmake).

    python3 cmake/unity_groups.py --size N FILE...     # prints one line per file that shares a unit: "number FILE"

Files that give one name two meanings do not share a unit: those of unnamed namespaces, and what the headers of the project
declare that the others include. A file stays alone that reaches further in other ways: macros, pragmas of the compiler, using
directives of other namespaces, operators of its own. Names are found by how clang-format leaves them: what a namespace
declares begins at the start of a line.
"""

import argparse
import os
import re

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
NOT_NAMES = {"if", "for", "while", "return", "switch", "static_assert"}

INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
ALONE = re.compile(
    r'^\s*#\s*(?:define|pragma GCC)|^#include "[^"]*\.inc"|^\s*using namespace |^(?!.*::operator)\w.*\boperator\W', re.MULTILINE)
TYPE = re.compile(r"(?:template\s*<.*>\s*)?(?:struct|class|union|enum(?: class| struct)?)\s+(\w+)")
ALIAS = re.compile(r"using\s+(\w+)\s*=\s*(.*);|using\s+([\w:]*::)(\w+);")
FUNCTION = re.compile(r"[\w:<>,&*\s\[\]()]*?(\w+)\(")
VARIABLE = re.compile(r"(?:const|constexpr|static|thread_local|inline)\b[^=({]*?(\w+)(?:\[[^\]]*\])*\s*(?:=|\{|;|$)")


def declared(lines):
    """{name: what it stands for, where that can be the same in two files, else None} of what begins at the start of a line."""
    names = {}
    for line in lines:
        if not re.match(r"[A-Za-z_]", line):
            continue
        if match := ALIAS.match(line):
            name, meaning = (match[1], match[2]) if match[1] else (match[4], match[3] + match[4])
            names[name] = meaning
        elif match := TYPE.match(line) or VARIABLE.match(line) or FUNCTION.match(line):
            if match[1] not in NOT_NAMES and not re.match(r"[A-Z_0-9]{3,}$", match[1]):  # no macro such as TEST
                names[match[1]] = None
    return names


def own_names(text):
    """What a source declares for itself: the names in its unnamed namespaces, and its aliases everywhere."""
    names, inside, rest = {}, False, []
    for line in text.splitlines():
        if line == "namespace {":
            inside = True
        elif inside and re.match(r"}  // namespace$", line):
            inside = False
        elif inside:
            names.update(declared([line]))
        else:
            rest.append(line)
    names.update({name: meaning for name, meaning in declared(rest).items() if meaning})
    return names


class Headers:
    """What the headers of the project declare that a source includes, directly or through others."""

    def __init__(self, root):
        self.root = root
        self.known = {}  # {header: (its names, what it includes)}

    def read(self, header):
        if header not in self.known:
            try:
                with open(os.path.join(self.root, header), encoding="utf-8") as file:
                    text = file.read()
            except FileNotFoundError:  # of a library
                text = ""
            names = {name for name, meaning in declared(text.splitlines()).items() if meaning is None}
            self.known[header] = (names, INCLUDE.findall(text))
        return self.known[header]

    def names(self, text):
        seen, queue, names = set(), INCLUDE.findall(text), set()
        while queue:
            header = queue.pop()
            if header not in seen:
                seen.add(header)
                found, included = self.read(header)
                names |= found
                queue += included
        return names


def groups(texts, size, headers):
    """Lists of names of files that can share a unit; texts: {file: its text}. Files that stay alone are in none."""
    made = []  # (files, {name: meaning}, names of headers)
    for file, text in texts.items():
        if ALONE.search(text):
            continue
        names, public = own_names(text), headers.names(text)
        for files, taken, all_public in made:
            if (len(files) < size
                    and all(name not in taken or (meaning is not None and taken[name] == meaning) for name, meaning in names.items())
                    and not any(meaning is None and name in all_public for name, meaning in names.items())
                    and not any(meaning is None and name in public for name, meaning in taken.items())):
                files.append(file)
                taken.update(names)
                all_public |= public
                break
        else:
            made.append(([file], dict(names), public))
    return [files for files, _, _ in made if len(files) > 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, required=True, help="files of a unit at most")
    parser.add_argument("files", nargs="+", metavar="FILE")
    options = parser.parse_args()
    texts = {}
    for name in options.files:
        with open(name, encoding="utf-8") as file:
            texts[name] = file.read()
    for number, files in enumerate(groups(texts, options.size, Headers(ROOT))):
        for name in files:
            print(f"{number} {name}")


if __name__ == "__main__":
    main()
