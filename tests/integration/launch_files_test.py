"""What can be checked of the launch files without their clusters: the fields that the schema of the MPIJob asks for, and the
scripts' own answers to wrong use."""

import os
import pathlib
import subprocess
import unittest

import harness as h

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


class Kubernetes(unittest.TestCase):
    """kubeflow.org/v2beta1, as its CustomResourceDefinition and the operator's validation have it."""

    def setUp(self):
        try:
            import yaml as reader  # not in the standard library
        except ImportError:
            self.skipTest("the Python package yaml is not installed (python3-yaml)")
        self.job = reader.safe_load((LAUNCH / "kubernetes-mpijob.yaml").read_text())

    def test_the_job_has_what_the_schema_asks_for(self):
        job = self.job
        self.assertEqual((job["apiVersion"], job["kind"]), ("kubeflow.org/v2beta1", "MPIJob"))
        self.assertRegex(job["metadata"]["name"], r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
        spec = job["spec"]
        known = {"slotsPerWorker", "runPolicy", "mpiReplicaSpecs", "sshAuthMountPath", "launcherCreationPolicy", "mpiImplementation",
                 "runLauncherAsWorker"}
        self.assertLessEqual(set(spec), known)
        self.assertIn(spec["mpiImplementation"], ("OpenMPI", "Intel", "MPICH"))
        self.assertIn(spec["launcherCreationPolicy"], ("AtStartup", "WaitForWorkersReady"))
        self.assertIsInstance(spec["slotsPerWorker"], int)
        policy = spec["runPolicy"]
        self.assertLessEqual(set(policy), {"cleanPodPolicy", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "backoffLimit",
                                           "schedulingPolicy", "suspend", "managedBy"})
        self.assertIn(policy["cleanPodPolicy"], ("None", "Running", "All"))
        self.assertEqual(set(spec["mpiReplicaSpecs"]), {"Launcher", "Worker"})
        for name, replicas in spec["mpiReplicaSpecs"].items():
            self.assertLessEqual(set(replicas), {"replicas", "restartPolicy", "template"})
            self.assertIn(replicas.get("restartPolicy", "Never"), ("Never", "OnFailure"))
            self.assertGreaterEqual(replicas["replicas"], 1)
            pod = replicas["template"]["spec"]
            volumes = {volume["name"] for volume in pod["volumes"]}
            for container in pod["containers"]:
                self.assertTrue(container["name"] and container["image"], name)
                self.assertLessEqual({mount["name"] for mount in container["volumeMounts"]}, volumes)
        self.assertEqual(spec["mpiReplicaSpecs"]["Launcher"]["replicas"], 1)

    def test_ranks_and_slots_agree(self):
        spec = self.job["spec"]
        command = spec["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]["command"]
        workers = spec["mpiReplicaSpecs"]["Worker"]["replicas"]
        self.assertEqual(int(command[command.index("-np") + 1]), workers * spec["slotsPerWorker"])
        self.assertEqual(command[command.index("--") + 1], "train")
        self.assertTrue((LAUNCH / pathlib.PurePath(command[0]).name).is_file())


class Wrapper(unittest.TestCase):
    def start(self, *arguments):
        return subprocess.run([LAUNCH / "mpirun", *arguments], env={**os.environ, "SALA_PROGRAM": h.SALA, "SALA_MPIRUN": h.MPIRUN},
                              capture_output=True, text=True, check=False)

    def test_help(self):
        done = self.start("--help")
        self.assertEqual(done.returncode, 0)
        self.assertIn("SALA_RETRIES", done.stdout)

    def test_wrong_use_is_said_before_anything_starts(self):
        self.assertEqual(self.start("-np", "2", "train", "x.yaml").returncode, 64)
        self.assertEqual(self.start("-np", "2", "--", "doctor").returncode, 64)

    def test_a_wrong_configuration_is_said_once(self):
        path = h.write_stage(h.ROOT / "wrong.yaml", h.pretrain("only", 2, first=True))
        done = self.start("-np", "2", "--", "train", path, "--set", "batch.stepz=3")
        self.assertEqual(done.returncode, 78, done.stderr)
        self.assertEqual(done.stderr.count("CFG-KEY"), 1, done.stderr)


if __name__ == "__main__":
    h.main()
