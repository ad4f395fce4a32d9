#!/usr/bin/env python3
"""The parser and the rules of resources.py, on recorded output of ptxas (nvcc 13.0)."""

import os
import sys
import tempfile
import unittest

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import resources  # pylint: disable=wrong-import-position

PREFIX = "_ZN4sala7kernels39_GLOBAL__N__43f690d7_7_cuda_cu_d6de968a"
FORWARD = PREFIX + "13ForwardKernelILi64ELb1EEEvPK13__nv_bfloat16Pf"
TABLE = PREFIX + "11TableKernelEPKiPf"
RECORDED = f"""ptxas info    : 144 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90a'
ptxas info    : Function properties for {FORWARD}
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 233 registers, used 1 barriers, 8 bytes cumulative stack size, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compile time = 396.460 ms
ptxas info    : Compiling entry function '{TABLE}' for 'sm_90a'
ptxas info    : Function properties for {TABLE}
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 40 bytes cumulative stack size
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    0 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads
ptxas info    : 144 bytes gmem
ptxas info    : Compiling entry function '{TABLE}' for 'sm_120'
ptxas info    : Function properties for {TABLE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""
ZERO = {"registers": 0, "spill": 0, "shared": 0, "stack": 0}


def numbers(**changed):
    return {a: {**ZERO, **changed} for a in resources.ARCHITECTURES}


class ResourcesTest(unittest.TestCase):
    def test_parser(self):
        self.assertEqual(
            resources.parse_ptxas(RECORDED),
            {
                "90a": {
                    FORWARD: {"registers": 233, "spill": 16, "shared": 1024, "stack": 8},
                    TABLE: {"registers": 32, "spill": 4, "shared": 0, "stack": 40},
                },
                "120": {TABLE: {"registers": 30, "spill": 0, "shared": 0, "stack": 0}},
            },
        )

    def test_names(self):
        self.assertEqual(sorted(resources.by_short_name(resources.parse_ptxas(RECORDED)["90a"])),
                         ["ForwardKernel<64, true>", "TableKernel"])
        self.assertEqual(
            resources.short_name("void sala::kernels::(anonymous namespace)::F<(bool)0, (unsigned int)3, __nv_bfloat16>"
                                 "(float const*, (anonymous namespace)::S<(int)2>)"),
            "F<false, 3, bf16>")
        self.assertEqual(resources.short_name("sala::kernels::tile::Plain(int)"), "tile::Plain")

    def test_kernels_of_one_name_are_joined(self):
        other = TABLE + "f"  # the same name with another parameter
        kernels = {TABLE: {**ZERO, "registers": 10, "stack": 8}, other: {**ZERO, "registers": 20}}
        self.assertEqual(resources.by_short_name(kernels), {"TableKernel": {**ZERO, "registers": 20, "stack": 8}})

    def test_limits_are_read_as_written(self):
        limits = {("a.cu", "F<64, true>"): ("hot", numbers(registers=128)), ("b.cu", "G"): ("cool", numbers(spill=4)),
                  ("b.cu", "H"): ("spills", numbers(spill=4))}
        self.assertEqual(resources.read_limits(resources.write_limits("13.0", limits)), ("13.0", limits))
        with self.assertRaises(ValueError):
            resources.read_limits("[a.cu]\nhot F 1/2/3/4\n")
        with self.assertRaises(ValueError):
            resources.read_limits("warm F 1/2/3/4\n")

    def violations(self, found, limit, mark="hot", same_version=True):
        limits = {("a.cu", "F"): (mark, limit)}
        return list(resources.violations({("a.cu", "F"): found}, limits, ["a.cu"], same_version))

    def test_rules(self):
        limit = numbers(registers=100, shared=64)
        self.assertEqual(self.violations(numbers(registers=100, shared=64), limit), [])
        self.assertEqual(self.violations(numbers(registers=90), limit), [])
        self.assertEqual(self.violations({**numbers(), "80": {**ZERO, "registers": 101}}, limit),
                         ["a.cu: F: sm_80: registers 101, the limit is 100"])
        self.assertEqual(self.violations({**numbers(), "120": {**ZERO, "shared": 65}}, limit),
                         ["a.cu: F: sm_120: shared 65, the limit is 64"])
        self.assertEqual(self.violations({**numbers(), "89": {**ZERO, "spill": 4}}, numbers(spill=4)),
                         ["a.cu: F: sm_89: spills 4 bytes; a hot kernel must not spill"])
        self.assertEqual(self.violations(numbers(registers=200, spill=4), limit, mark="cool"), [])
        some = {architecture: values for architecture, values in numbers().items() if architecture != "120"}
        self.assertEqual(self.violations(some, limit), ["a.cu: F: sm_120: the compiler reported nothing of it"])
        # Known to spill: no more than it does.
        self.assertEqual(self.violations(numbers(spill=4), numbers(spill=4), "spills"), [])
        self.assertEqual(self.violations({**numbers(), "89": {**ZERO, "spill": 8}}, numbers(spill=4), "spills"),
                         ["a.cu: F: sm_89: spill 8, the limit is 4"])
        # Another compiler: its registers are not comparable, its spills are.
        self.assertEqual(self.violations(numbers(registers=200), limit, same_version=False), [])
        self.assertEqual(len(self.violations(numbers(spill=4), limit, same_version=False)), 4)

    def test_new_and_vanished_kernels(self):
        lines = list(resources.violations({("a.cu", "New"): numbers(registers=8)}, {("a.cu", "Old"): ("hot", numbers())},
                                          ["a.cu"], True))
        self.assertEqual(len(lines), 2)
        self.assertIn("no limit yet", lines[0])
        self.assertIn("hot     New", lines[0])
        self.assertIn("8/0/0/0", lines[0])
        self.assertIn("a.cu: Old: has a limit, but no such kernel", lines[1])
        # A source that was not compiled this time says nothing of its kernels.
        self.assertEqual(list(resources.violations({}, {("b.cu", "Old"): ("hot", numbers())}, ["a.cu"], True)), [])

    def test_flags_of_the_module(self):
        command = ("/opt/nvcc -DX=1 -DSALA_CUDA_BUILD=\"abc\" -DSALA_CUDA_INTERFACE=\"12\" -I/r --generate-code=arch=compute_90a,code=[sm_90a] -O3 "
                   "-x cu -c /r/kernels/a.cu -o out.o")
        database = [{"file": "/r/kernels/a.cu", "command": command},
                    {"file": "/r/kernels/a.cu", "command": "/usr/bin/c++ -xc++ -c /r/kernels/a.cu -o out.o"},
                    {"file": "/r/core/b.cc", "command": "/usr/bin/c++ -c /r/core/b.cc -o out.o"}]
        self.assertEqual(resources.module_commands("/r", database), {"kernels/a.cu": ["/opt/nvcc", "-DX=1", "-I/r", "-O3"]})

    def test_a_change_of_a_header_changes_the_key(self):
        with tempfile.TemporaryDirectory() as root:
            def write(name, text):
                with open(os.path.join(root, name), "w", encoding="utf-8") as file:
                    file.write(text)

            def key(flags="-O3"):
                compiler = resources.Compiler(root, {"a.cu": ["nvcc", flags]}, "13.0", root)
                self.assertEqual(compiler.includes("a.cu"), ["a.cu", "a.h", "b.h"])
                return compiler.key("a.cu")

            write("a.cu", '#include <cuda.h>\n#include "a.h"\n')
            write("a.h", '#include "b.h"\n#include "absent.h"\n')
            write("b.h", "1")
            first = key()
            self.assertEqual(key(), first)
            self.assertNotEqual(key(flags="-O2"), first)
            write("b.h", "2")
            self.assertNotEqual(key(), first)


if __name__ == "__main__":
    unittest.main()
