"""The files of a checkout and how the checks of this folder read them."""

import os
import re
import subprocess

SOURCE_SUFFIXES = (".h", ".cc", ".inc", ".cu")
IGNORED_FOLDERS = {"build", "runs", "corpus", ".git", "__pycache__"}
ARCHITECTURE = "docs/architecture.md"


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


LITERAL_OR_BRACKET = re.compile(r'R"(\w*)\((?P<raw>.*?)\)\1"|"(?P<text>(?:\\.|[^"\\\n])*)"|\'(?:\\.|[^\'\\\n])*\'|[()\[\]{}]', re.DOTALL)


def string_literals(text):
    """(position, content, names of the functions in whose arguments it stands, outermost first) of each literal of a C++ text
    without comments."""
    open_brackets = []
    for match in LITERAL_OR_BRACKET.finditer(text):
        piece = match.group()
        if piece in ("(", "[", "{"):
            name = re.search(r"(\w+)\s*$", text[max(0, match.start() - 80):match.start()]) if piece == "(" else None
            open_brackets.append(name.group(1) if name else "")
        elif piece in (")", "]", "}"):
            if open_brackets:
                open_brackets.pop()
        else:
            content = match.group("raw") if match.group("raw") is not None else match.group("text")
            if content is not None:
                yield match.start(), content, [name for name in open_brackets if name]
