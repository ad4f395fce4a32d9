#!/usr/bin/env python3
"""Registers, spills, shared memory and stack of every CUDA kernel, for every architecture, against committed limits.

    python3 tests/cuda/resources.py               # compiles what changed, prints one line per violation, exits 1 if any
    python3 tests/cuda/resources.py --table       # the numbers of all kernels as well
    python3 tests/cuda/resources.py --update      # writes the limits anew from what was compiled

Compiles each .cu of the CUDA module with the module's own flags, which it takes from build/release/compile_commands.json
(warnings are errors there), for four architectures at once, and reads what ptxas says of each kernel. Needs nvcc, no
GPU; without nvcc it says so and ends with 0. A file is compiled again only when it, a header of the project that it
includes, the flags or the compiler changed (build/resources keeps the results).

tests/cuda/resource_limits.txt has one line per kernel: its mark, its name, and for each architecture
registers/spilled bytes/static shared bytes/stack bytes. The marks:
    hot     fails when it spills or exceeds one of its numbers
    spills  a hot kernel that is known to spill; fails when it exceeds one of its numbers, and is named at the end of a run
    cool    runs rarely or touches little; its numbers stand there for the reader
Dynamic shared memory is asked for by the host at launch and is in none of these numbers. The limits are those of one
version of nvcc; with another version only spills are looked at.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

ARCHITECTURES = ("80", "89", "90a", "120")
FIELDS = ("registers", "spill", "shared", "stack")
LIMITS = "tests/cuda/resource_limits.txt"
ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))


# ---- what ptxas says ----


def parse_ptxas(text):
    """{architecture: {mangled name of a kernel: {field: number}}} from the output of `nvcc -Xptxas -v`."""
    found, kernels, entry, function = {}, {}, None, None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '([^']+)' for 'sm_(\w+)'", line):
            entry = match.group(1)
            kernels = found.setdefault(match.group(2), {})
            kernels[entry] = dict.fromkeys(FIELDS, 0)
        elif match := re.search(r"Function properties for (\S+)", line):
            function = match.group(1).strip("'")
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            # Functions that were not inlined report on their own, behind the kernel that was compiled with them: their spills
            # are its spills. Their stack is in the kernel's cumulative stack size.
            if entry is not None:
                kernels[entry]["spill"] += max(int(match.group(2)), int(match.group(3)))
                if function == entry:
                    kernels[entry]["stack"] = max(kernels[entry]["stack"], int(match.group(1)))
        elif match := re.search(r"Used (\d+) registers", line):
            if entry is not None:
                kernels[entry]["registers"] = int(match.group(1))
                if shared := re.search(r"(\d+) bytes smem", line):
                    kernels[entry]["shared"] = int(shared.group(1))
                if stack := re.search(r"(\d+) bytes cumulative stack size", line):
                    kernels[entry]["stack"] = max(kernels[entry]["stack"], int(stack.group(1)))
    return found


def demangle(names):
    result = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, result.stdout.splitlines()))


def short_name(name):
    """'void sala::kernels::(anonymous namespace)::F<(int)64, __nv_bfloat16>(float*)' -> 'F<64, bf16>'."""
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|sala::kernels::", "", name)
    # The argument list is what stands in the last brackets outside of template arguments; casts inside of those stay.
    depth = 0
    for position, c in enumerate(name):
        depth += {"<": 1, ">": -1}.get(c, 0)
        if c == "(" and depth == 0:
            name = name[:position]
            break
    name = re.sub(r"\(bool\)0", "false", name)
    name = re.sub(r"\(bool\)1", "true", name)
    name = re.sub(r"\((?:unsigned |signed )?(?:int|long|short|char)(?: long)?\)", "", name)
    return name.replace("__nv_bfloat16", "bf16").replace("> >", ">>")


def by_short_name(kernels):
    """The numbers under short names; where two kernels share one, the larger of each."""
    names = demangle(list(kernels)) if kernels else {}
    merged = {}
    for mangled, numbers in kernels.items():
        known = merged.setdefault(short_name(names[mangled]), dict.fromkeys(FIELDS, 0))
        for field in FIELDS:
            known[field] = max(known[field], numbers[field])
    return merged


# ---- compiling ----


class Compiler:
    """Compiles a source for all architectures unless nothing changed since the last time."""

    def __init__(self, root, commands, version, folder):
        self.root = root
        self.commands = commands  # {source: arguments without source, output and architecture}
        self.version = version
        self.folder = folder
        self.included = {}

    def includes(self, name):
        """The source and every header of the project that it includes, directly or through others."""
        seen, queue = [], [name]
        while queue:
            file = queue.pop()
            if file in seen:
                continue
            seen.append(file)
            if file not in self.included:
                with open(os.path.join(self.root, file), encoding="utf-8") as text:
                    found = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text.read(), re.MULTILINE)
                self.included[file] = [other for other in found if os.path.isfile(os.path.join(self.root, other))]
            queue += self.included[file]
        return sorted(seen)

    def key(self, name):
        digest = hashlib.sha256()
        digest.update("\0".join([*self.commands[name], *ARCHITECTURES, self.version]).encode())
        for file in self.includes(name):
            with open(os.path.join(self.root, file), "rb") as data:
                digest.update(file.encode() + b"\0" + data.read())
        return digest.hexdigest()

    def compile(self, name):
        """({architecture: kernels by short name}, None), or (None, the compiler's words)."""
        stem = os.path.join(self.folder, name.replace("/", "_"))
        key = self.key(name)
        try:
            with open(stem + ".json", encoding="utf-8") as file:
                kept = json.load(file)
            if kept["key"] == key:
                return kept["kernels"], None
        except (OSError, ValueError, KeyError):
            pass
        # One call: what is done once for all architectures is two fifths of the work.
        command = [*self.commands[name], *(f"--generate-code=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES), "-Xptxas=-v",
                   "-x", "cu", "-c", os.path.join(self.root, name), "-o", stem + ".o"]
        environment = dict(os.environ)
        if shutil.which("ccache"):
            command = ["ccache", *command]
            environment.update(CCACHE_BASEDIR=self.root, CCACHE_NOHASHDIR="1")
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if os.path.exists(stem + ".o"):
            os.remove(stem + ".o")
        if result.returncode != 0:
            return None, (result.stderr + result.stdout).strip()
        kernels = {a: by_short_name(found) for a, found in parse_ptxas(result.stderr + result.stdout).items()}
        with open(stem + ".json", "w", encoding="utf-8") as file:
            json.dump({"key": key, "kernels": kernels}, file)
        return kernels, None


def module_commands(root, database):
    """{source: nvcc and the module's flags}, from a compile database. What names one file, one architecture or one commit
    is left out."""
    commands = {}
    for entry in database:
        words = shlex.split(entry["command"])
        start = next((i for i, word in enumerate(words) if os.path.basename(word) == "nvcc"), None)
        name = os.path.relpath(entry["file"], root)
        if start is None or not name.endswith(".cu") or name.startswith("tests/"):
            continue
        kept, skip = [], False
        for word in words[start:]:
            if skip:
                skip = False
            elif word in ("-o", "-c", "-x", "-MF", "-MT"):
                skip = True
            elif not re.match(r"--generate-code|-gencode|-arch|-MD|-DSALA_CUDA_(BUILD|INTERFACE)=", word):
                kept.append(word)
        commands[name] = kept
    return commands


def nvcc_version(nvcc):
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return (match.group(1) if match else "unknown"), text


# ---- limits ----

HEADER = """\
# Limits of tests/cuda/resources.py, which says what they mean and writes them with --update.
# hot, spills or cool; kernel; then registers/spilled bytes/shared bytes/stack bytes for {architectures}
nvcc {version}
"""


def read_limits(text):
    """(version of nvcc, {(source, kernel): (mark, {architecture: {field: number}})})."""
    version, source, limits = None, None, {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        if match := re.fullmatch(r"nvcc (\S+)", line):
            version = match.group(1)
        elif match := re.fullmatch(r"\[(\S+)\]", line):
            source = match.group(1)
        elif match := re.fullmatch(r"(hot|spills|cool)\s+(\S.*?)((?:\s+\d+/\d+/\d+/\d+)+)", line):
            cells = [dict(zip(FIELDS, map(int, cell.split("/")))) for cell in match.group(3).split()]
            if source is None or len(cells) != len(ARCHITECTURES):
                raise ValueError(f"line {number}: expected {len(ARCHITECTURES)} groups of numbers below a [source]: {line}")
            limits[source, match.group(2)] = (match.group(1), dict(zip(ARCHITECTURES, cells)))
        else:
            raise ValueError(f"line {number}: not understood: {line}")
    return version, limits


def cell(numbers):
    return "/".join(str(numbers[field]) for field in FIELDS)


def limit_line(mark, kernel, numbers):
    cells = "".join(f"{cell(numbers.get(a, dict.fromkeys(FIELDS, 0))):>16}" for a in ARCHITECTURES)
    return f"{mark:<6}  {kernel:<48}{cells}"


def write_limits(version, limits):
    text = HEADER.format(version=version, architectures=", ".join(f"sm_{a}" for a in ARCHITECTURES))
    last = None
    for (source, kernel), (mark, numbers) in sorted(limits.items()):
        if source != last:
            text += f"\n[{source}]\n"
            last = source
        text += limit_line(mark, kernel, numbers) + "\n"
    return text


def violations(found, limits, sources, same_version):
    """Lines for what is wrong. found: {(source, kernel): {architecture: {field: number}}}; sources: those compiled."""
    for (source, kernel), numbers in sorted(found.items()):
        if (source, kernel) not in limits:
            yield (f"{source}: {kernel}: no limit yet; add below [{source}] in {LIMITS} (or run resources.py --update):\n"
                   f"    {limit_line('hot', kernel, numbers)}")
            continue
        mark, limit = limits[source, kernel]
        if mark == "cool":
            continue
        for architecture in sorted(set(limit) - set(numbers)):
            yield f"{source}: {kernel}: sm_{architecture}: the compiler reported nothing of it"
        for architecture, values in numbers.items():
            if values["spill"] > 0 and mark == "hot":
                yield f"{source}: {kernel}: sm_{architecture}: spills {values['spill']} bytes; a hot kernel must not spill"
            fields = ["spill"] if mark == "spills" else []
            for field in fields + (["registers", "shared", "stack"] if same_version else []):
                if values[field] > limit[architecture][field]:
                    yield (f"{source}: {kernel}: sm_{architecture}: {field} {values[field]}, the limit is "
                           f"{limit[architecture][field]}")
    for source, kernel in sorted(limits):
        if source in sources and (source, kernel) not in found:
            yield f"{source}: {kernel}: has a limit, but no such kernel was compiled; remove its line from {LIMITS}"


# ---- command line ----


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", default="build/release", help="build folder whose flags are used (build/release)")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time (2)")
    parser.add_argument("--update", action="store_true", help="write the limits anew; marks stay, new kernels are hot")
    parser.add_argument("--table", action="store_true", help="print the numbers of all kernels")
    parser.add_argument("files", nargs="*", metavar="FILE", help="only these .cu files; default: all of the module")
    options = parser.parse_args()

    database = os.path.join(ROOT, options.build, "compile_commands.json")
    if not os.path.exists(database):
        print(f"{options.build}: not configured; run: cmake --preset release", file=sys.stderr)
        return 2
    with open(database, encoding="utf-8") as file:
        commands = module_commands(ROOT, json.load(file))
    if not commands:
        print("SKIPPED: registers and spills of the CUDA kernels were NOT checked: " + (
            f"{options.build} was configured without nvcc" if shutil.which("nvcc") else "there is no nvcc on this machine"))
        return 0
    unknown = [name for name in options.files if name not in commands]
    if unknown:
        print(f"{unknown[0]}: no .cu of the module in {options.build}", file=sys.stderr)
        return 2
    sources = sorted(options.files or commands)
    version, version_text = nvcc_version(commands[sources[0]][0])
    folder = os.path.join(ROOT, "build", "resources")
    os.makedirs(folder, exist_ok=True)
    compiler = Compiler(ROOT, commands, version_text, folder)

    found, failed = {}, []
    with concurrent.futures.ThreadPoolExecutor(max(1, options.jobs)) as pool:
        for source, (kernels, words) in zip(sources, pool.map(compiler.compile, sources)):
            if kernels is None:
                failed.append(f"{source}: does not compile:\n{words}")
                continue
            for architecture in ARCHITECTURES:
                for kernel, numbers in kernels.get(architecture, {}).items():
                    found.setdefault((source, kernel), {})[architecture] = numbers

    limits_file = os.path.join(ROOT, LIMITS)
    limits_version, limits = None, {}
    if os.path.exists(limits_file):
        with open(limits_file, encoding="utf-8") as file:
            limits_version, limits = read_limits(file.read())
    if options.update and not failed:
        kept = {key: value for key, value in limits.items() if key[0] not in sources and os.path.exists(os.path.join(ROOT, key[0]))}
        new = {key: (limits[key][0] if key in limits else "hot", numbers) for key, numbers in found.items()}
        limits, limits_version = {**kept, **new}, version
        with open(limits_file, "w", encoding="utf-8") as file:
            file.write(write_limits(version, limits))
    if options.table:
        print(write_limits(version, {key: (limits.get(key, ("new",))[0], numbers) for key, numbers in found.items()}))
    if limits_version not in (None, version):
        print(f"the limits are those of nvcc {limits_version}, this is {version}: only spills are compared")
    lines = failed + list(violations(found, limits, [] if failed else sources, limits_version in (None, version)))
    for line in lines:
        print(line)
    known = [f"{kernel} ({'/'.join(str(found[source, kernel][a]['spill']) for a in found[source, kernel])} bytes)"
             for source, kernel in sorted(found) if limits.get((source, kernel), ("",))[0] == "spills"]
    if known:
        print(f"known to spill: {', '.join(known)}")
    print(f"{len(sources)} files, {len(found)} kernels, {', '.join('sm_' + a for a in ARCHITECTURES)}: {len(lines)} violations")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
