#!/usr/bin/env python3
"""Plants one violation at a time in a small tree that keeps all rules, and asks each check for exactly that line."""

import os
import sys
import tempfile
import unittest
import unittest.mock

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import error_catalogue  # pylint: disable=wrong-import-position
import structure  # pylint: disable=wrong-import-position
import tree  # pylint: disable=wrong-import-position

GOOD = {
    "docs/architecture.md": """
| room | may use | holds |
|---|---|---|
| `core/` | | basics |
| `kernels/` | `core` | operations |
| `data/` | `core` | data |
| `launch/` | `core` `kernels` `data` | the program |

| other | table |
|---|---|
| `data` | `launch` |
""",
    "docs/errors.md": """
| exit | meaning |
|---|---|
| 65 | data |
| 70 | a defect |
| 130, 143 | signals |

| code | exit |
|---|---|
| `AB-CODE`, `AB-MORE` | 65 |
| `INTERNAL` | 70 |
""",
    "core/CMakeLists.txt": "sala_room(core\n  LINKS absl::status)\n",
    "core/status.h": "// Errors.\n#pragma once\n#include <string>\nenum class ExitCode : int { kData = 65, kInternal = 70 };\n",
    "core/status.cc": """#include "core/status.h"
// A comment may name "ZZ-OTHER" and MakeError(x, "ZZ-THIRD", y).
Status A() { return MakeError(ExitCode::kData, "AB-CODE", "text, with (brackets)"); }
Status B() {
  return MakeError(ExitCodeOf(status),
                   empty ? "INTERNAL" : code, "UTF-8 text");
}
Status D() { return MakeError(ExitCode::kInternal, "INTERNAL", "a defect"); }
Status helper(const char* code, const char* text) { return MakeError(ExitCode::kData, code, text); }
Status C() { return other == "YY-NOT-RAISED" ? OkStatus() : helper("AB-MORE", "UTF-8"); }
""",
    "tests/core/status_test.cc": """#include "core/status.h"
TEST(Status, Codes) {
  EXPECT_EQ(ErrorCodeOf(A()), "AB-CODE");
  EXPECT_THAT(text, HasSubstr("INTERNAL: a defect"));
}
""",
    "tests/integration/run_test.py": 'def test(self):\n    self.assertIn("AB-MORE", run())\n',
    "kernels/CMakeLists.txt": "sala_room(kernels USES core)\n",
    "kernels/add/add.h": '// Adds.\n#pragma once\n#include "core/status.h"\n',
    "data/CMakeLists.txt": "sala_room(data USES core LINKS PkgConfig::X)\n",
    "data/store.cc": '#include "core/status.h"\n',
    "launch/main.cc": '#include "data/store.h"\n#include "kernels/add/add.h"\n',
    "launch/CMakeLists.txt": "add_executable(sala main.cc)\n",
    "tests/kernels/add/add_test.cc": '#include "kernels/add/add.h"\n#include "tests/kernels/common/k.h"\n',
    "tests/kernels/common/k.h": "// Helpers.\n",
    "launch/run": "#!/usr/bin/env bash\ncat /usr/share/x build/home/a\n",
}


class StructureTest(unittest.TestCase):
    def setUp(self):
        reasons = unittest.mock.patch.dict(error_catalogue.UNTESTED, clear=True)  # of rows that the small tree does not have
        reasons.start()
        self.addCleanup(reasons.stop)

    def violations(self, changes, checks=tuple(structure.CHECKS)):
        """`changes`: file -> new text, or None to leave the file out."""
        files = {**GOOD, **changes}
        with tempfile.TemporaryDirectory() as root:
            for name, text in files.items():
                if text is None:
                    continue
                path = os.path.join(root, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
            planted = tree.Tree(root)
            return [line for check in checks for line in structure.CHECKS[check](planted)]

    def expect_one(self, changes, expected):
        self.assertEqual(self.violations(changes), [expected])

    def test_good_tree_passes(self):
        self.assertEqual(self.violations({}), [])

    def test_rooms_are_read_from_the_document(self):
        with tempfile.TemporaryDirectory() as root:
            os.makedirs(os.path.join(root, "docs"))
            with open(os.path.join(root, "docs/architecture.md"), "w", encoding="utf-8") as file:
                file.write(GOOD["docs/architecture.md"])
            rooms = tree.rooms_of(tree.Tree(root))
        self.assertEqual(rooms, {"core": set(), "kernels": {"core"}, "data": {"core"},
                                 "launch": {"core", "kernels", "data"}})

    def test_missing_room_table(self):
        self.assertIn("docs/architecture.md:1: no table with the columns `room` and `may use`",
                      self.violations({"docs/architecture.md": "nothing"}, ["rooms"]))

    def test_room_order(self):
        table = GOOD["docs/architecture.md"].replace("| `core/` | |", "| `core/` | `data` |")
        self.expect_one({"docs/architecture.md": table},
                        "docs/architecture.md:1: room core may use data, which does not stand before it")

    def test_upward_include(self):
        self.assertIn('core/up.cc:2: room core must not include "kernels/add/add.h"',
                      self.violations({"core/up.cc": '\n#include "kernels/add/add.h"\n'}, ["includes"]))

    def test_sideways_include(self):
        text = '#include "core/status.h"\n#  include "kernels/add/add.h"\n'
        self.assertEqual(self.violations({"data/store.cc": text}, ["includes"]),
                         ['data/store.cc:2: room data must not include "kernels/add/add.h"'])

    def test_include_not_from_root(self):
        self.expect_one({"core/near.cc": '#include "status.h"\n'},
                        'core/near.cc:1: include "status.h" is not a path from the root')
        self.expect_one({"core/near.cc": '#include "../core/status.h"\n'},
                        'core/near.cc:1: include "../core/status.h" is not a path from the root')

    def test_room_includes_tests(self):
        self.expect_one({"core/t.cc": '#include "tests/kernels/common/k.h"\n'},
                        'core/t.cc:1: room core must not include "tests/kernels/common/k.h"')

    def test_test_of_lower_room_includes_higher_room(self):
        self.expect_one({"tests/kernels/add/more.cc": '#include "data/store.h"\n'},
                        'tests/kernels/add/more.cc:1: room kernels must not include "data/store.h"')

    def test_link_to_forbidden_room(self):
        self.assertIn("data/CMakeLists.txt:1: room data must not link kernels",
                      self.violations({"data/CMakeLists.txt": "sala_room(data USES core kernels)\n"}, ["links"]))

    def test_link_missing(self):
        self.expect_one({"kernels/CMakeLists.txt": "\nsala_room(kernels)\n"},
                        "kernels/CMakeLists.txt:2: files of kernels include core, USES does not name it")

    def test_link_unused(self):
        self.expect_one({"data/store.cc": "int x;\n"},
                        "data/CMakeLists.txt:1: USES names core, no file of data includes it")

    def test_link_of_another_name(self):
        self.expect_one({"data/CMakeLists.txt": "sala_room(datum USES core)\n"},
                        "data/CMakeLists.txt:1: sala_room names datum, the folder is data")

    def test_link_of_no_room(self):
        self.expect_one({"data/CMakeLists.txt": "sala_rooms(data USES core)\n"},
                        "data/CMakeLists.txt:1: neither sala_room(data ...) nor a program")

    def test_unlisted_error_code(self):
        self.expect_one({"data/store.cc": '#include "core/status.h"\nauto e = MakeError(f(ExitCode::kData, 2),\n "DS-NEW", "x");\n'},
                        "data/store.cc:3: error code DS-NEW is not listed in docs/errors.md")
        self.expect_one({"data/store.cc": '#include "core/status.h"\nauto e = MakeError(ExitCode::kData, "SINGLE", "x");\n'},
                        "data/store.cc:2: error code SINGLE is not listed in docs/errors.md")
        self.expect_one({"data/store.cc": '#include "core/status.h"\nb.Error("key", "CFG-NEW", "x");\n'},
                        "data/store.cc:2: error code CFG-NEW is not listed in docs/errors.md")

    def test_listed_error_code_nobody_raises(self):
        self.assertEqual(self.violations({"docs/errors.md": GOOD["docs/errors.md"] + "| `AB-OLD` | 65 |\n"}, ["errors"]),
                         ["docs/errors.md:12: error code AB-OLD is raised nowhere"])
        # Asking for a code does not raise it.
        asks = '#include "core/status.h"\nbool b = ErrorCodeOf(s) != "AB-OLD";\n'
        self.assertEqual(self.violations({"docs/errors.md": GOOD["docs/errors.md"] + "| `AB-OLD` | 65 |\n", "data/store.cc": asks}, ["errors"]),
                         ["docs/errors.md:12: error code AB-OLD is raised nowhere"])

    def test_missing_error_catalogue(self):
        self.expect_one({"docs/errors.md": None}, "docs/errors.md:1: missing: the catalogue of error codes")

    def test_exit_codes_of_a_row(self):
        errors = GOOD["docs/errors.md"]
        self.expect_one({"docs/errors.md": errors.replace("| `INTERNAL` | 70 |", "| `INTERNAL` | 65, 70 |")},
                        "docs/errors.md:11: error code INTERNAL is raised nowhere with exit code 65")
        self.expect_one({"docs/errors.md": errors.replace("| `INTERNAL` | 70 |", "| `INTERNAL` | 65 |"),
                         "core/status.cc": GOOD["core/status.cc"].replace("ExitCode::kInternal", "late ? ExitCode::kInternal : ExitCode::kData")},
                        "docs/errors.md:11: error code INTERNAL is raised with exit code 70 at core/status.cc:8, the row does not have it")
        # Through a function of the file, and through a variable.
        self.assertEqual(self.violations({"core/status.cc": GOOD["core/status.cc"].replace("MakeError(ExitCode::kData, code", "MakeError(ExitCode::kInternal, code")}),
                         ["docs/errors.md:10: error code AB-MORE is raised with exit code 70 at core/status.cc:10, the row does not have it",
                          "docs/errors.md:10: error code AB-MORE is raised nowhere with exit code 65"])
        self.expect_one({"data/store.cc": '#include "core/status.h"\nexit = ExitCode::kInternal;\nauto e = MakeError(exit, "AB-CODE", "x");\n'},
                        "docs/errors.md:10: error code AB-CODE is raised with exit code 70 at data/store.cc:3, the row does not have it")

    def test_exit_code_that_cannot_be_read(self):
        for text in ('auto e = elsewhere("AB-CODE", "x");', 'auto e = MakeError(unknown, "AB-CODE", "x");',
                     'auto e = MakeError(unknown.exit, c ? "AB-CODE" : code, "x");', 'auto e = MakeError(Exit(1), "AB-CODE", "x");'):
            self.expect_one({"data/store.cc": f'#include "core/status.h"\n{text}\n'},
                            "data/store.cc:2: error code AB-CODE reaches no MakeError whose exit code can be read here")

    def test_table_of_exit_codes(self):
        self.expect_one({"docs/errors.md": GOOD["docs/errors.md"].replace("| 65 | data |", "| 65, 66 | data |")},
                        "docs/errors.md:4: exit code 66 is not one of core/status.h")
        self.expect_one({"docs/errors.md": GOOD["docs/errors.md"].replace("| 70 | a defect |", "| 143 | a signal |")},
                        "core/status.h:1: exit code 70 (kInternal) has no row in docs/errors.md")

    def test_row_that_no_test_expects(self):
        missing = "docs/errors.md:11: no test expects error code INTERNAL"
        test = GOOD["tests/core/status_test.cc"]
        expectation = 'EXPECT_THAT(text, HasSubstr("INTERNAL: a defect"));'
        self.assertEqual(test.count(expectation), 1)
        for instead in ("// " + expectation, "/* " + expectation + " */", 'EXPECT_THAT(text, Not(HasSubstr("INTERNAL: a defect")));',
                        'EXPECT_NE(ErrorCodeOf(D()), "INTERNAL");', 'EXPECT_TRUE(ErrorCodeOf(D()) != "INTERNAL");',
                        'EXPECT_EQ(ErrorCodeOf(D()), "INTERNAL-OTHER");', 'EXPECT_TRUE(D().ok()) << "INTERNAL";',
                        'EXPECT_TRUE(D().ok()) << what << "INTERNAL";',
                        # The test makes the error it finds.
                        'EXPECT_EQ(Pass(MakeError(ExitCode::kData, "INTERNAL", "x")), "INTERNAL");'):
            with self.subTest(instead):
                self.expect_one({"tests/core/status_test.cc": test.replace(expectation, instead)}, missing)
        self.expect_one({"tests/core/status_test.cc": None, "tests/core/status.cc": test, "tests/core/one_test.cc": test.replace(expectation, "")}, missing)

    def test_row_that_no_python_test_expects(self):
        for text in ("# AB-MORE\n", '"""AB-MORE"""\n', 'def test(self):\n    """AB-MORE"""\n', 'self.assertNotIn("AB-MORE", text)\n',
                     'with self.subTest("AB-MORE"):\n    pass\n', 'with self.subTest(code="AB-MORE"):\n    pass\n', 'assert code != "AB-MORE"\n', 'assert "AB-MORE" not in text\n', 'self.assertIn("AB-MOREOVER", text)\n'):
            with self.subTest(text):
                self.expect_one({"tests/integration/run_test.py": text}, "docs/errors.md:10: no test expects error code AB-MORE")
        for text in ('self.assertIn(f"AB-MORE: {path}", text)\n', 'TABLE = [(1, "AB-MORE")]\n'):
            self.assertEqual(self.violations({"tests/integration/run_test.py": text}), [])

    def test_reasons_for_rows_without_a_test(self):
        with unittest.mock.patch.dict(error_catalogue.UNTESTED, {"AB-MORE": "nothing provokes it"}):
            self.assertEqual(self.violations({"tests/integration/run_test.py": None}), [])
            self.expect_one({}, "docs/errors.md:10: error code AB-MORE needs no reason in UNTESTED, tests/integration/run_test.py expects it")
        with unittest.mock.patch.dict(error_catalogue.UNTESTED, {"AB-GONE": "nothing provokes it"}):
            self.expect_one({}, "docs/errors.md:1: UNTESTED has a reason for AB-GONE, which is no row")

    def test_kernel_without_contract(self):
        self.expect_one({"kernels/sub/cpu.cc": "", "tests/kernels/sub/sub_test.cc": ""},
                        "kernels/sub:1: no contract kernels/sub/sub.h")

    def test_kernel_without_test(self):
        self.expect_one({"tests/kernels/add/add_test.cc": None},
                        "kernels/add:1: no test tests/kernels/add/*_test.cc")

    def test_header_without_overview(self):
        self.expect_one({"core/bare.h": "#pragma once\n"},
                        "core/bare.h:1: header does not open with an overview comment")

    def test_function_of_the_c_library(self):
        self.expect_one({"data/store.cc": '#include "core/status.h"\nfloat y = std::sqrt(x) + std::exp(x);  // std::log(x)\n'},
                        "data/store.cc:2: exp: its bits differ between machines; use core/elementary.h")

    def test_machine_path(self):
        for folder in ("home", "root", "Users", "work"):
            self.expect_one({"launch/run": f"cd\ncp x /{folder}/me/x\n"},
                            f"launch/run:2: path of one machine: /{folder}/m")

    def test_left_over_notes(self):
        for word in ("TO" + "DO", "FIX" + "ME"):
            self.expect_one({"core/more.h": f"// More.\n// {word}: more\n"},
                            f"core/more.h:2: left-over note: {word}")
        self.expect_one({"core/more.h": "// More.\n" + "<" * 7 + " ours\n"},
                        "core/more.h:2: left-over note: " + "<" * 7)


if __name__ == "__main__":
    unittest.main()
