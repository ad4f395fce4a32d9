"""Tests of cmake/unity_groups.py: what may share a unit and what must not."""

import os
import sys
import tempfile
import unittest

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "cmake"))
import unity_groups  # noqa: E402 # pylint: disable=wrong-import-position


def source(body, includes=""):
    return f"{includes}namespace sala {{\nnamespace {{\n\n{body}\n\n}}  // namespace\n}}  // namespace sala\n"


class Groups(unittest.TestCase):
    def groups(self, *bodies, headers=None, size=10):
        with tempfile.TemporaryDirectory() as root:
            for name, text in (headers or {}).items():
                with open(os.path.join(root, name), "w", encoding="utf-8") as file:
                    file.write(text)
            texts = {f"{i}.cc": body for i, body in enumerate(bodies)}
            return unity_groups.groups(texts, size, unity_groups.Headers(root))

    def test_files_without_a_common_name_share_a_unit(self):
        self.assertEqual(self.groups(source("int One() { return 1; }"), source("struct Two {};")), [["0.cc", "1.cc"]])

    def test_one_name_with_two_meanings_keeps_files_apart(self):
        for one, other in (("int Name() { return 1; }", "double Name() { return 2; }"), ("struct Name {};", "class Name {};"),
                           ("constexpr int kName = 1;", "constexpr int kName = 2;"), ("using Name = int;", "using Name = float;")):
            self.assertEqual(self.groups(source(one), source(other)), [], one)

    def test_the_same_alias_twice_is_no_clash(self):
        self.assertEqual(self.groups(source("using Json = nlohmann::json;"), source("using Json = nlohmann::json;")), [["0.cc", "1.cc"]])

    def test_a_name_that_a_header_of_the_other_declares_keeps_files_apart(self):
        headers = {"a.h": '#include "b.h"\n', "b.h": "namespace sala {\nstruct Name {};\n}\n"}
        self.assertEqual(self.groups(source("struct Name {};"), source("int Other();", '#include "a.h"\n'), headers=headers), [])
        self.assertEqual(self.groups(source("int Other();", '#include "a.h"\n'), source("struct Name {};"), headers=headers), [])

    def test_what_reaches_beyond_its_file_stays_alone(self):
        plain = source("int F() { return 1; }")
        for line in ("using namespace std;", "#pragma GCC diagnostic ignored \"-Wall\"", "bool operator==(const A& a, const A& b) { return true; }",
                     '#include "kernel.inc"'):
            self.assertEqual(self.groups(line + "\n", plain), [], line)
        self.assertEqual(self.groups("A& A::operator=(const A& other) {\n", plain), [["0.cc", "1.cc"]])

    def test_macros_keep_a_file_alone_and_units_have_a_size(self):
        plain = [source(f"int F{i}() {{ return 1; }}") for i in range(5)]
        self.assertEqual(self.groups("#define NAME 1\n" + plain[0], *plain[1:], size=2), [["1.cc", "2.cc"], ["3.cc", "4.cc"]])


if __name__ == "__main__":
    unittest.main()
