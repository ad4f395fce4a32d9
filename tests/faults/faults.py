#!/usr/bin/env python3
"""Plants faults in copies of the sources, one at a time, and asks the tests to find each.

    python3 tests/faults/faults.py --cpu --build build/release [NAME ...]           # of the CPU path
    python3 tests/faults/faults.py --build build/release [--asan build/asan] [--tsan build/tsan] [NAME ...]   # of the CUDA kernels
    python3 tests/faults/faults.py --build build/release --quick                    # those that every test run plants
    python3 tests/faults/faults.py --check                                          # only: does every fault still fit its source?

cuda_faults.py and cpu_faults.py have the faults, fault.py says what they are. For each of them one source is compiled as in the
build folder, with the copy of the changed file in place of the file. On the CUDA side it is linked with the untouched objects
into a module of its own over the emulator, on the CPU side into a copy of the test program. Then the tests that the fault names
run. They must fail, in the way the fault says: in the plain build by an assertion, a broken invariant or a report of the
emulator, in a build with a sanitizer by a report of that sanitizer. The same tests must pass without the fault.

Prints a line per fault and exits 1 when any was not found, does not compile, or no longer fits its source.
"""

import argparse
import concurrent.futures
import fcntl
import itertools
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

from cpu_faults import FAULTS as CPU_FAULTS
from cuda_faults import FAULTS as CUDA_FAULTS
from fault import CUDA_PROGRAM

FAULTS = [*CUDA_FAULTS, *CPU_FAULTS]

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
MODULE = "bin/libsala_cuda_emulated.so"
CUDA_OBJECTS = "tests/cuda/CMakeFiles/sala_cuda_emulated.dir/__/__/"
BUILDS = ("plain", "asan", "tsan")
SECONDS = 300  # of one run of tests: they take one or two; a loaded machine may need many times that


class Problem(Exception):
    """Why a fault cannot be tried."""


# ---- sources ----


def read(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as file:
        return file.read()


def plant(fault):
    """The text of the changed file, and the line of the change."""
    text = read(fault.file)
    count = text.count(fault.old)
    if count != 1:
        raise Problem(f"its old text stands {count} times in {fault.file}, expected once")
    same = len(os.path.commonprefix([fault.old, fault.new]))
    line = text.count("\n", 0, text.index(fault.old) + same) + 1
    return text.replace(fault.old, fault.new), line


# Where the tests of a program stand.
SOURCES_OF_TESTS = {
    CUDA_PROGRAM: ("tests", "_cuda_test.cc"),
    "sharding_tests": ("tests/recipes", "_mpi_test.cc"),
    **{f"{room}_tests": (f"tests/{room}", "_test.cc") for room in ("core", "kernels", "model", "data", "recipes")},
}


def known_tests(program):
    """Suite.Test of every test of a program."""
    under, ending = SOURCES_OF_TESTS[program]
    found = set()
    for folder, _, names in os.walk(os.path.join(ROOT, under)):
        for name in names:
            if name.endswith(ending):
                text = read(os.path.relpath(os.path.join(folder, name), ROOT))
                found |= {f"{suite}.{test}" for suite, test in re.findall(r"^TEST(?:_F|_P)?\((\w+),\s*(\w+)\)", text, re.MULTILINE)}
    return found


def without_parameters(test):
    """Suite.Test of Instance/Suite.Test/Parameter."""
    suite, name = test.split(".")
    return f"{suite.split('/')[-1]}.{name.split('/')[0]}"


def problems_of(fault, tests):
    """What is wrong with the fault as it stands in the list."""
    try:
        plant(fault)
    except (OSError, Problem) as problem:
        yield str(problem)
    if fault.old == fault.new:
        yield "its new text is the old one"
    if fault.found_by not in BUILDS:
        yield f"found_by is {fault.found_by!r}, expected one of {', '.join(BUILDS)}"
    if not os.path.isfile(os.path.join(ROOT, fault.unit)) or not fault.unit.endswith(".cu" if fault.cuda else ".cc"):
        yield f"{fault.unit} is no source that is compiled; a fault in a header names one as its unit"
    if not fault.tests:
        yield "it names no test"
    for test in fault.tests:
        if without_parameters(test) not in tests:
            yield f"there is no test {test}"


def check():
    tests = {program: known_tests(program) for program in SOURCES_OF_TESTS}
    names = [fault.name for fault in FAULTS]
    lines = [f"{name}: the name stands twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for fault in FAULTS:
        lines += [f"{fault.name}: {problem}" for problem in problems_of(fault, tests[fault.program])]
    return lines


# ---- builds ----


class Build:
    """A build folder that has the test programs, and with them the module over the emulator."""

    def __init__(self, kind, folder, programs):
        self.kind = kind
        self.folder = os.path.abspath(folder)
        self.module = os.path.join(self.folder, MODULE)
        for name in [self.program(program) for program in programs] + ([self.module] if CUDA_PROGRAM in programs else []):
            if not os.path.isfile(name):
                raise Problem(f"{name} is missing; build it: ninja -C {folder} {os.path.basename(name).removeprefix('lib').removesuffix('.so')}")
        self.prefix = self.without_randomisation(programs[0]) if kind == "tsan" else []

    def program(self, name):
        return os.path.join(self.folder, "bin", name)

    def ninja(self, *arguments):
        result = subprocess.run(["ninja", "-C", self.folder, "-t", *arguments], capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise Problem(f"ninja -t {' '.join(arguments)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def command(self, target):
        """The command that makes one file of the folder."""
        lines = [line for line in self.ninja("commands", "-s", target).splitlines() if not line.startswith("ninja:")]
        if len(lines) != 1:
            raise Problem(f"found {len(lines)} commands for {target} in {self.folder}, expected one")
        return lines[0]

    def object(self, fault):
        if fault.cuda:
            return CUDA_OBJECTS + fault.unit + ".o"
        room, rest = fault.unit.split("/", 1)
        return f"{room}/CMakeFiles/sala_{room}.dir/{rest}.o"

    def check_object(self, fault):
        """The object is that of the sources as they are, and made from the changed file."""
        made = self.object(fault)
        made_at = os.path.getmtime(os.path.join(self.folder, made))
        sources = [os.path.normpath(os.path.join(self.folder, line.strip()))
                   for line in self.ninja("deps", made).splitlines() if line.startswith(" ")]
        sources = [name for name in sources if name.startswith(ROOT + os.sep)]
        if os.path.join(ROOT, fault.file) not in sources:
            raise Problem(f"{fault.unit} does not include {fault.file}")
        for name in sources:
            if os.path.getmtime(name) > made_at:
                raise Problem(f"{os.path.relpath(name, ROOT)} is newer than its object in {self.folder}; build again")

    def without_randomisation(self, program):
        """gcc 12's ThreadSanitizer does not start where the kernel randomises more than 28 bits of an address."""
        for prefix in ([], ["setarch", os.uname().machine, "-R"]):
            result = subprocess.run([*prefix, self.program(program), "--gtest_list_tests"], capture_output=True, check=False)
            if result.returncode == 0:
                return prefix
        raise Problem(f"{program} does not start, not even without address randomisation (setarch -R)")

    def compile(self, fault, text, work):
        """The module or the test program with the fault, made in the folder `work`."""
        copy = os.path.join(work, fault.file)
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with open(copy, "w", encoding="utf-8") as file:
            file.write(text)
        made = os.path.join(work, "unit.o")
        source = copy if fault.unit == fault.file else os.path.join(ROOT, fault.unit)
        # The folder of the copy comes first among those that includes are looked for in.
        words = shlex.split(self.command(self.object(fault)))
        first = next(i for i, word in enumerate(words) if word.startswith("-I"))
        words.insert(first, "-I" + work)
        for option, value in (("-o", made), ("-MT", made), ("-MF", made + ".d"), ("-c", source)):
            words[words.index(option) + 1] = value
        self.must(words, "does not compile")
        # First among the objects, so that the linker takes its copy of every function: of a header, and of the room's library,
        # whose own object is then left where it is.
        target = MODULE if fault.cuda else "bin/" + fault.program
        linked = os.path.join(work, os.path.basename(target))
        words = [word for word in shlex.split(self.command(target)) if word not in (":", "&&", self.object(fault))]
        at = words.index("-o")
        words[at:at + 2] = ["-o", linked, made]
        self.must(words, "does not link")
        return linked

    def must(self, words, what):
        result = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            errors = [line for line in (result.stderr + result.stdout).splitlines() if "error" in line]
            raise Problem(f"{what}: {(errors or ['no message'])[0]}")

    def run(self, trial, changed=None):
        """(exit code, output) of the tests of a trial, up to the first failure; `changed` stands for the module or the program."""
        variables = {
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0",  # Open MPI's; the tests look after the arena themselves
            "UBSAN_OPTIONS": "halt_on_error=1",
            "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
            **trial.environment,
        }
        program = self.program(trial.program)
        if trial.cuda:
            variables["SALA_CUDA_MODULE"] = changed or self.module
        else:
            program = changed or program
        tests = trial.tests
        launcher = ["mpirun", "-np", str(trial.ranks)] if trial.ranks else []
        command = [*launcher, *self.prefix, program, "--gtest_color=no", "--gtest_break_on_failure", "--gtest_filter=" + ":".join(tests)]
        no_core = lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            result = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                    errors="replace", timeout=SECONDS, check=False, preexec_fn=no_core)
        except subprocess.TimeoutExpired as expired:
            raise Problem(f"its tests did not end within {SECONDS} s") from expired
        if result.returncode == 0 and f"[  PASSED  ] {len(tests)} test" not in result.stdout:
            raise Problem(f"not all of {', '.join(tests)} ran")
        return result.returncode, result.stdout


def how(output, code):
    """(what found it, the first line of the failure)."""
    lines = [re.sub(r"[\w./-]*/(\w+\.(?:cc|cu|h):\d+)", r"\1", line) for line in output.splitlines()]
    test = next((line.split("]")[1].strip() for line in reversed(lines) if line.startswith("[ RUN")), "before the first test")
    for number, line in enumerate(lines):
        if "ERROR: AddressSanitizer" in line or ": runtime error: " in line:
            return "asan", f"{test}: {line.split('ERROR: ')[-1].split(' on address')[0].split('/')[-1]}"
        if "WARNING: ThreadSanitizer" in line:
            places = re.findall(r"#0 .*?([\w.]+\.(?:cu|h):\d+)", "\n".join(lines[number:number + 40]))
            return "tsan", f"{test}: {line.split('ThreadSanitizer: ')[-1].split(' (')[0]}, {' and '.join(dict.fromkeys(places[:2]))}"
        if line.startswith("simt: "):
            return "plain", f"{test}: {line}"
        if line.endswith(": Failure"):
            text = list(itertools.takewhile(lambda part: part and not part.startswith("["), lines[number + 1:number + 8]))
            if len(text) > 3 and text[1].strip() == "Actual: false":
                text = text[3:]  # what the test says in its own words
            return "plain", f"{test}: {line[:-len(': Failure')]}: {' '.join(part.strip() for part in text)}"
        if "check failed" in line.lower():
            return "plain", f"{test}: {line}"
    return "plain", f"{test}: " + (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}")


# ---- the trial of all faults ----


def try_fault(fault, build):
    """(status, line of the change, what found it and how)."""
    work = os.path.join(build.folder, "faults", fault.name)
    os.makedirs(os.path.dirname(work), exist_ok=True)
    line = 0
    with open(work + ".lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of this program share the folder
        try:
            text, line = plant(fault)
            build.check_object(fault)
            code, output = build.run(fault, build.compile(fault, text, work))
        except Problem as problem:
            return "BROKEN", line, str(problem)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    if code == 0:
        return "SURVIVED", line, "all of its tests pass: " + ", ".join(fault.tests)
    by, text = how(output, code)
    if by != build.kind:
        return "BY OTHER MEANS", line, f"found by {by}, not by {build.kind}: {text}"
    return "found", line, text


def try_control(fault, build):
    """The tests of a fault without it."""
    try:
        code, output = build.run(fault)
    except Problem as problem:
        return str(problem)
    return "" if code == 0 else how(output, code)[1]


def short(text, width=150):
    return text if len(text) <= width else text[:width - 3] + "..."


def run_all(faults, builds, jobs):
    """Number of faults that were not found, and of controls that fail."""
    controls = {(fault.program, fault.tests, fault.ranks, tuple(sorted(fault.environment.items())), fault.found_by): fault for fault in faults}
    bad = 0
    seconds = {kind: 0.0 for kind in builds}
    found = {kind: 0 for kind in builds}
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        running = {}
        for fault in faults:
            running[pool.submit(timed, try_fault, fault, builds[fault.found_by])] = fault
        for fault in controls.values():
            running[pool.submit(timed, try_control, fault, builds[fault.found_by])] = (fault,)
        for future in concurrent.futures.as_completed(running):
            subject = running[future]
            took, result = future.result()
            if isinstance(subject, tuple):
                fault, = subject
                seconds[fault.found_by] += took
                if result:
                    bad += 1
                    where = " ".join(f"{name}={value}" for name, value in fault.environment.items())
                    print(f"CONTROL FAILS  {fault.found_by} {where} {':'.join(fault.tests)}: {result}", flush=True)
                continue
            status, line, text = result
            kind = subject.found_by
            seconds[kind] += took
            found[kind] += status == "found"
            bad += status != "found"
            print(f"{status:8} {subject.name:40} {subject.file}:{line}  {subject.kind}  {kind}  {short(text)}", flush=True)
    for kind in builds:
        count = sum(fault.found_by == kind for fault in faults)
        if count:
            print(f"{kind}: {found[kind]} of {count} found, {seconds[kind]:.0f} s of work")
    return bad


def timed(function, *arguments):
    start = time.monotonic()
    return_value = function(*arguments)
    return time.monotonic() - start, return_value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", metavar="DIR", help="build folder without a sanitizer, for the faults found by 'plain'")
    parser.add_argument("--asan", metavar="DIR", help="build folder with AddressSanitizer, for those found by 'asan'")
    parser.add_argument("--tsan", metavar="DIR", help="build folder with ThreadSanitizer, for those found by 'tsan'")
    parser.add_argument("--cpu", action="store_true", help="the faults of the CPU path instead of those of the CUDA kernels")
    parser.add_argument("--quick", action="store_true", help="only the faults that every test run plants")
    parser.add_argument("--check", action="store_true", help="compile nothing, only look whether every fault fits its source")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="faults tried at a time (default 2)")
    parser.add_argument("names", nargs="*", metavar="NAME", help="of faults; default: all")
    options = parser.parse_args()

    listed = CPU_FAULTS if options.cpu else CUDA_FAULTS
    unknown = set(options.names) - {fault.name for fault in listed}
    if unknown:
        parser.error(f"there is no fault {sorted(unknown)[0]}")
    wrong = check()
    for line in wrong:
        print(line)
    if options.check:
        print(f"{len(FAULTS)} faults, {len(wrong)} that do not fit")
    if options.check or wrong:
        return 1 if wrong else 0

    folders = {"plain": options.build, "asan": options.asan, "tsan": options.tsan}
    if not any(folders.values()):
        parser.error("name a build folder: --build, --asan or --tsan")
    faults = [fault for fault in listed if (not options.names or fault.name in options.names)
              and (not options.quick or fault.quick)]
    left_out = [fault for fault in faults if not folders[fault.found_by]]
    faults = [fault for fault in faults if folders[fault.found_by]]
    start = time.monotonic()
    try:
        programs = sorted({fault.program for fault in faults})
        builds = {kind: Build(kind, folders[kind], programs) for kind in BUILDS if folders[kind]}
    except Problem as problem:
        print(problem)
        return 1
    bad = run_all(faults, builds, options.jobs)
    if left_out:
        print(f"{len(left_out)} faults left out, for want of a build folder that finds them")
    print(f"{len(faults)} faults tried in {time.monotonic() - start:.0f} s: "
          + ("all found" if bad == 0 else f"{bad} not found, broken or without a passing control"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
