"""Whether docs/errors.md is what the program does: its rows are the codes that the sources raise, with the exit codes they raise
them with, and a test expects each of them.

What is raised is read from the sources: the code and the ExitCode of a MakeError. Where a code reaches MakeError through another
function, the exit code is that of the MakeError in the same file which is given no code of its own.
What is expected is read from the tests: a literal that holds the code, in a test that does not make such an error itself.
"""

import ast
import re

from tree import arguments, line_of, rooms_of, string_literals, table_cells, without_comments

ERRORS = "docs/errors.md"
STATUS = "core/status.h"
CODE = r"[A-Z][A-Z0-9]*(?:-[A-Z][A-Z0-9]*)+"  # at least one dash, each part beginning with a letter: not UTF-8

# Functions that hand a code on to a MakeError of another file, and the exit code it gets there.
FORWARDERS = {"DeviceError": "kDevice",  # launch/ and core/cuda_module.cc catch it
              "Error": "kConfig"}  # ConfigBinder::Error
# Codes that are written where nothing is raised.
MENTIONS = {("data/plan.cc", "MIX-EPOCHS")}  # the verdict of a view in `data plan`
# Rows that no test expects, with the reason.
UNTESTED = {
    "EXP-FIELD": "a guard against a defect: for every model that can be described, config.json gives the same model back",
}


def catalogue(tree):
    """{code: (line, exit codes)} of the tables with the columns `code` and `exit`, and {exit code: line} of the one before them."""
    rows, exits, kind = {}, {}, ""
    for number, line in tree.lines(ERRORS):
        cells = table_cells(line)
        if len(cells) < 2:
            kind = ""
        elif cells[0] in ("code", "exit"):
            kind = cells[0]
        elif kind == "code":
            for code in re.findall(rf"`({CODE}|[A-Z]{{4,}})`", cells[0]):
                rows.setdefault(code, (number, {int(n) for n in re.findall(r"\d+", cells[1])}))
        elif kind == "exit":
            exits.update({int(n): number for n in re.findall(r"\d+", cells[0])})
    return rows, exits


def exit_codes(tree):
    """{enumerator of ExitCode: number}."""
    body = re.search(r"enum class ExitCode[^{]*\{(.*?)\}", without_comments(tree.text(STATUS)), re.DOTALL) if tree.has(STATUS) else None
    return {name: int(value) for name, value in re.findall(r"(k\w+)\s*=\s*(\d+)", body.group(1))} if body else {}


class Raised:
    """A code in the sources, and the enumerators of ExitCode it is raised with: empty where it only goes on as it is (Annotate),
    None where they are not known."""

    def __init__(self, code, exits, name, number):
        self.code, self.exits, self.name, self.number = code, exits, name, number


def before(text, position):
    """The end of what stands before a place, for patterns that end with it."""
    return text[max(0, position - 40):position]


def assigned_exits(tree, room, variable):
    """What the room assigns to a variable, or a field, of this name."""
    pattern = re.compile(rf"\b{variable}\s*=\s*(?:sala::)?ExitCode::(k\w+)")
    return {value for name in tree.sources(room) for value in pattern.findall(tree.text(name))} - {"kOk"}


def codes_of_make_error(tree, name, text):
    """{position: (code, exits)} of the calls of MakeError with codes of their own, and the exits of those that are given one."""
    found, handed_on = {}, set()
    for call in re.finditer(r"\bMakeError\s*\(", text):
        parts = list(arguments(text, call.end() - 1))
        if len(parts) < 3:
            continue
        (_, first), (begin, second) = parts[:2]
        exits = set(re.findall(r"\bExitCode::(k\w+)", first))
        codes = {begin + literal.start(): literal.group(1) for literal in re.finditer(r'"([A-Z][A-Z0-9-]*)"', second)}
        if not codes:
            handed_on |= exits
        elif not exits and not re.match(r"\s*(?:sala::)?ExitCodeOf\(", first):  # that one goes on as it is
            variable = re.fullmatch(r"\s*(?:\w+(?:\.|->))*(\w+)\s*", first)
            decoded = variable and re.search(rf"\b{variable.group(1)}\s*=\s*static_cast<ExitCode>", text)  # another rank's, as it is
            if not decoded:
                exits = variable and assigned_exits(tree, name.split("/")[0], variable.group(1)) or None
        found.update({position: (code, exits) for position, code in codes.items()})
    return found, handed_on


def raised_codes(tree):
    for name in tree.sources(*rooms_of(tree)):
        text = without_comments(tree.text(name))
        found, handed_on = codes_of_make_error(tree, name, text)
        for position, value, callees in string_literals(text):
            printed = re.match(r"(?:sala: error: )?([A-Z]{4,}): ", value)  # a line that is printed without a Status
            if printed:
                found[position] = (printed.group(1), set())
            if position in found or not re.fullmatch(CODE, value) or (name, value) in MENTIONS:
                continue
            if re.search(r"[!=]=\s*$", before(text, position)):
                continue  # asked for, not raised
            forwarder = next((callee for callee in reversed(callees) if callee in FORWARDERS), None)
            found[position] = (value, {FORWARDERS[forwarder]} if forwarder else handed_on or None)
        for position, (code, exits) in sorted(found.items()):
            yield Raised(code, exits, name, line_of(text, position))


def check_errors(tree):
    """docs/errors.md lists the codes of the sources, no fewer and no more."""
    if not tree.has(ERRORS):
        yield f"{ERRORS}:1: missing: the catalogue of error codes"
        return
    rows, _ = catalogue(tree)
    used = set()
    for raised in raised_codes(tree):
        used.add(raised.code)
        if raised.code not in rows:
            yield f"{raised.name}:{raised.number}: error code {raised.code} is not listed in {ERRORS}"
    for code, (number, _) in rows.items():
        if code not in used:
            yield f"{ERRORS}:{number}: error code {code} is raised nowhere"


def check_exits(tree):
    """The exit codes of docs/errors.md are those of the sources: the table of exits is ExitCode, and a row has what its code is
    raised with."""
    if not tree.has(ERRORS):
        return
    rows, exits = catalogue(tree)
    numbers = exit_codes(tree)
    for name, value in numbers.items():
        if value not in exits:
            yield f"{STATUS}:1: exit code {value} ({name}) has no row in {ERRORS}"
    for value, number in exits.items():
        if value < 128 and value not in numbers.values():  # above: signals
            yield f"{ERRORS}:{number}: exit code {value} is not one of {STATUS}"
    found = {}
    for raised in raised_codes(tree):
        if raised.exits is None:
            yield f"{raised.name}:{raised.number}: error code {raised.code} reaches no MakeError whose exit code can be read here"
            continue
        for exit_code in raised.exits:
            found.setdefault(raised.code, {}).setdefault(numbers.get(exit_code), f"{raised.name}:{raised.number}")
    for code, (number, listed) in rows.items():
        places = found.get(code, {})
        for value in sorted(places.keys() - listed):
            yield f"{ERRORS}:{number}: error code {code} is raised with exit code {value} at {places[value]}, the row does not have it"
        for value in sorted(listed - places.keys()) if places else []:
            yield f"{ERRORS}:{number}: error code {code} is raised nowhere with exit code {value}"


REFUSALS = re.compile(r"(?:assertNot\w+|assertFalse|Not|(?:EXPECT|ASSERT)_(?:NE|FALSE))$")  # what is not there proves nothing
MAKERS = {"MakeError", *FORWARDERS}


def expectations_of_cc(text):
    """(literals that are expected, literals an error is made with in this file)."""
    text = without_comments(text)
    expected, made = [], []
    for position, value, callees in string_literals(text):
        if MAKERS.intersection(callees):
            made.append(value)
        elif not any(REFUSALS.match(callee) for callee in callees) and not re.search(r"(?:!=|<<)\s*$", before(text, position)):
            expected.append(value)
    return expected, made


def expectations_of_py(text):
    expected = []

    def visit(node):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        name = node.func.attr if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""
        if REFUSALS.match(name) or name == "subTest":
            return
        if isinstance(node, ast.Compare) and any(isinstance(operator, (ast.NotEq, ast.NotIn)) for operator in node.ops):
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            expected.append(node.value)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(text))
    return expected, []


def expected_codes(tree, codes):
    """{code: tests that expect it}."""
    word = re.compile(r"(?<![\w-])[A-Z][A-Z0-9-]+(?![\w-])")

    def named(literals):
        return {code for literal in literals for code in word.findall(literal)} & codes

    found = {}
    for name in tree.files:
        if not name.startswith("tests/") or name.startswith("tests/structure/"):
            continue
        if name.endswith("_test.cc"):
            expected, made = expectations_of_cc(tree.text(name))
        elif name.endswith("_test.py"):
            expected, made = expectations_of_py(tree.text(name))
        else:
            continue
        for code in named(expected) - named(made):
            found.setdefault(code, []).append(name)
    return found


def check_tests(tree):
    """A test expects each row of docs/errors.md: one that does not make the error itself."""
    if not tree.has(ERRORS):
        return
    rows, _ = catalogue(tree)
    expected = expected_codes(tree, set(rows))
    for code, (number, _) in rows.items():
        if code not in expected and code not in UNTESTED:
            yield f"{ERRORS}:{number}: no test expects error code {code}"
        if code in expected and code in UNTESTED:
            yield f"{ERRORS}:{number}: error code {code} needs no reason in UNTESTED, {expected[code][0]} expects it"
    for code in UNTESTED.keys() - rows.keys():
        yield f"{ERRORS}:1: UNTESTED has a reason for {code}, which is no row"


def inventory(tree):
    """Each code with its exit codes, the places that raise it and the tests that expect it."""
    rows, _ = catalogue(tree)
    places = {}
    for raised in raised_codes(tree):
        places.setdefault(raised.code, []).append(f"{raised.name}:{raised.number}")
    expected = expected_codes(tree, set(rows))
    for code in sorted(rows.keys() | places.keys()):
        exits = ", ".join(str(value) for value in sorted(rows[code][1])) if code in rows else "not listed"
        yield f"{code} ({exits})"
        for kind, names in (("raised", places.get(code, [])), ("expected", expected.get(code, []))):
            yield f"    {kind}: " + (", ".join(names) or "nowhere")
