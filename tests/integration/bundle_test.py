"""`cmake --install` makes a folder that works wherever it is moved."""

import os
import pathlib
import re
import shutil
import subprocess
import unittest

import harness as h

# What the target machine has: the C and C++ runtime, and MPI with what only it needs.
OF_THE_MACHINE = re.compile(r"(linux-vdso|ld-linux|lib(c|m|dl|rt|pthread|util|resolv)|libgcc_s|libstdc\+\+|libmpi|libopen-(rte|pal)|"
                            r"libhwloc|libevent_(core|pthreads)[-\d.]*|libudev)\.so|linux-vdso|ld-linux")


class Bundle(unittest.TestCase):
    def test_the_folder_works_where_it_is_moved(self):
        build = pathlib.Path(h.SALA).parents[1]
        first = h.ROOT / "installed"
        done = subprocess.run(["cmake", "--install", build, "--prefix", first], capture_output=True, text=True, check=False)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        moved = h.ROOT / "some where else" / "sala"
        moved.parent.mkdir()
        os.rename(first, moved)

        linked = subprocess.run(["ldd", moved / "bin" / "sala"], capture_output=True, text=True, check=True,
                                env={"PATH": os.environ["PATH"]}).stdout
        self.assertNotIn("not found", linked)
        inside = 0
        for line in linked.splitlines():
            name, _, path = line.strip().partition(" => ")
            if path.startswith(str(moved)):
                inside += 1
            else:
                self.assertRegex(os.path.basename(name), OF_THE_MACHINE, f"comes from outside of the folder: {line}")
        self.assertGreater(inside, 10)
        self.assertEqual([p.name for p in (moved / "lib").iterdir() if re.match(r"lib(c|mpi|stdc\+\+)\.", p.name)], [])

        for path in ("configs/tiny/pipeline.yaml", "share/launch/mpirun", "share/launch/slurm.sbatch", "share/doc/sala/operations.md"):
            self.assertTrue((moved / path).is_file(), path)
        config = h.write_stage(h.ROOT / "bundle.yaml", h.pretrain("only", 2, first=True))
        built, h.SALA = h.SALA, str(moved / "bin" / "sala")
        try:
            self.assertIn("computes with", h.succeed(["doctor"]).out)
            h.succeed(h.train(config, h.ROOT / "runs" / "alone"))
            h.succeed(h.train(config, h.ROOT / "runs" / "two"), ranks=2)
            wrapped = subprocess.run([moved / "share" / "launch" / "mpirun", "-np", "2", "--", "train", config, "--run", h.ROOT / "runs" / "wrapped"],
                                     capture_output=True, text=True, check=False)
            self.assertEqual(wrapped.returncode, 0, wrapped.stderr)
        finally:
            h.SALA = built
        h.succeed(h.train(config, h.ROOT / "runs" / "built"))
        self.assertEqual(h.differences(h.ROOT / "runs" / "built", h.ROOT / "runs" / "alone"), [])
        self.assertEqual(h.differences(h.ROOT / "runs" / "two", h.ROOT / "runs" / "wrapped"), [])
        shutil.rmtree(moved)


if __name__ == "__main__":
    h.main()
