"""A fault that faults.py plants:

    Fault(
        name        plain words, of the operation first
        kind        the sort of mistake; summaries count by it
        file        the file that is changed
        old, new    its exact text, which must stand there once, and what is put in its place
        tests       Suite.Test, ...: one of them must fail; the quickest that finds it
        program     the test program that has them; cuda_kernels_tests by default
        found_by    plain (default), asan or tsan: the build that finds it
        unit        the source that is compiled, when `file` is a header
        environment variables of the emulator, when only another order or device shows it
        ranks       the program is started by mpirun with as many, when one process cannot show it
        quick       planted in every test run
    )

A fault stands for a class of mistakes that somebody could make in that place: it compiles without a warning, and most of
them leave nearly all numbers right. One that no test finds shows a hole in the tests; the test is to be improved then, not
the fault replaced. Found by a sanitizer means that the plain build lets it pass.
"""

import dataclasses

CUDA_PROGRAM = "cuda_kernels_tests"


@dataclasses.dataclass(frozen=True)
class Fault:
    name: str
    kind: str
    file: str
    old: str
    new: str
    tests: tuple
    program: str = CUDA_PROGRAM
    found_by: str = "plain"
    unit: str = ""
    environment: dict = dataclasses.field(default_factory=dict)
    ranks: int = 0
    quick: bool = False

    def __post_init__(self):
        if not self.unit:
            object.__setattr__(self, "unit", self.file)
        if isinstance(self.tests, str):
            object.__setattr__(self, "tests", (self.tests,))

    @property
    def cuda(self):
        return self.program == CUDA_PROGRAM
