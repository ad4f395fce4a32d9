"""Signals ask a run to save or to stop; what is stopped goes on later with the same bits."""

import time
import unittest

import harness as h

STEPS = 400  # more than a run does before the signal arrives; the runs to compare with stop early too


def config():
    path = h.ROOT / "signals" / "stage.yaml"
    if not path.exists():
        # No checkpoint but the last: whatever else is there, a signal asked for.
        h.write_stage(path, h.pretrain("only", STEPS, first=True, batch=h.batch(STEPS, sequences=2),
                                       data=h.data(h.ingest("long", documents=900, seed=3)), checkpoint={"every_steps": 0}))
    return path


def oracle():
    run = h.ROOT / "runs" / "oracle"
    if not run.exists():
        h.succeed(h.train(config(), run), ranks=2)
    return run


class SignalCase(unittest.TestCase):
    def start(self, name, ranks=2):
        self.run_directory = h.ROOT / "runs" / name
        job = h.Job(h.train(config(), self.run_directory), ranks=ranks)
        self.assertTrue(job.wait_for(lambda: len(h.metrics(self.run_directory)) > 2, "steps"))
        return job

    def finish(self, ranks=2):
        h.succeed(h.train(config(), self.run_directory), ranks=ranks)
        reference = oracle()
        if ranks != 2:
            reference = h.ROOT / "runs" / "oracle-alone"
            if not reference.exists():
                h.succeed(h.train(config(), reference))
        self.assertEqual(h.differences(reference, self.run_directory), [])

    def assert_stopped(self, result):
        """One line, exit code 75, and a whole checkpoint of the last step that was done."""
        self.assertEqual(result.code, 75, result)
        self.assertEqual(len(result.error_lines), 1, result)
        self.assertIn("STOPPED: stopped on request after step", result.error_lines[0])
        found = h.checkpoints(self.run_directory)
        self.assertEqual(len(found), 1, found)
        h.succeed(["ckpt", "verify", found[0], "--deep"])
        steps = [line["step"] for line in h.metrics(self.run_directory).values()]
        self.assertEqual(h.manifest(found[0])["global_step"], max(steps))
        self.assertLess(max(steps), STEPS)


class Save(SignalCase):
    def save(self, send, ranks):
        job = self.start(self.id().rsplit(".", 1)[1], ranks)
        send(job)
        self.assertTrue(job.wait_for(lambda: h.checkpoints(self.run_directory), "a checkpoint"))
        saved = h.checkpoints(self.run_directory)[0]
        result = job.result()
        self.assertEqual(result.code, 0, result)
        self.assertLess(h.manifest(saved)["global_step"], STEPS)
        h.succeed(["ckpt", "verify", saved, "--deep"])
        # The last checkpoint is there as well, and the run was not changed by saving.
        self.assertEqual(len(h.checkpoints(self.run_directory)), 2)
        self.finish(ranks)

    def test_usr1_to_the_launcher_saves_and_goes_on(self):
        self.save(lambda job: job.process.send_signal(h.SIGUSR1), 2)

    def test_usr1_to_one_rank_saves_and_goes_on(self):
        self.save(lambda job: job.signal_rank(1, h.SIGUSR1), 2)

    def test_usr1_alone_saves_and_goes_on(self):
        self.save(lambda job: job.process.send_signal(h.SIGUSR1), None)


class Stop(SignalCase):
    def stop(self, send, ranks):
        job = self.start(self.id().rsplit(".", 1)[1], ranks)
        send(job)
        self.assert_stopped(job.result())
        self.finish(ranks)

    def test_usr2_to_the_launcher(self):
        self.stop(lambda job: job.process.send_signal(h.SIGUSR2), 2)

    def test_usr2_to_one_rank(self):
        self.stop(lambda job: job.signal_rank(1, h.SIGUSR2), 2)

    def test_usr2_alone(self):
        self.stop(lambda job: job.process.send_signal(h.SIGUSR2), None)

    def test_usr2_twice_is_as_good_as_once(self):
        def twice(job):
            job.process.send_signal(h.SIGUSR2)
            job.process.send_signal(h.SIGUSR2)

        self.stop(twice, None)

    def test_term_to_one_rank(self):
        self.stop(lambda job: job.signal_rank(0, h.SIGTERM), 2)

    def test_term_alone(self):
        self.stop(lambda job: job.process.send_signal(h.SIGTERM), None)


class SlowNetwork(SignalCase):
    def test_a_stop_waits_for_the_parameters_under_way(self):
        self.run_directory = h.ROOT / "runs" / "slow-network"
        job = h.Job(h.train(config(), self.run_directory, "validation.every_steps=0"), ranks=2, env=h.slow_gathers(1.5))
        # After the handlers are there, before the first step is done: seven units then take longer than any patience for errors.
        self.assertTrue(job.wait_for((self.run_directory / "status.json").exists, "the run's beginning"))
        job.signal_rank(0, h.SIGUSR2)
        self.assert_stopped(job.result())


class Term(SignalCase):
    def test_term_to_the_launcher_leaves_a_run_that_goes_on(self):
        # mpirun passes SIGTERM on and kills what is left soon after, so a checkpoint may or may not be complete; what is
        # there must be whole, and the run goes on to the same bits from it or from the start.
        job = self.start("term-launcher")
        job.process.send_signal(h.SIGTERM)
        result = job.result()
        self.assertNotEqual(result.code, 0, result)
        for checkpoint in h.checkpoints(self.run_directory):
            h.succeed(["ckpt", "verify", checkpoint, "--deep"])
        self.finish()

    def test_a_second_term_ends_at_once(self):
        run = h.ROOT / "runs" / "term-twice"
        # Two ranks, one of them stopped: the other waits for it and cannot save.
        job = h.Job(h.train(config(), run), ranks=2)
        self.assertTrue(job.wait_for(lambda: len(h.metrics(run)) > 2, "steps"))
        job.signal_rank(1, h.signal.SIGSTOP)
        job.signal_rank(0, h.SIGTERM)
        time.sleep(0.3)
        self.assertTrue(job.running())
        job.signal_rank(0, h.SIGTERM)
        result = job.result()
        self.assertEqual(result.code, 143, result)
        self.run_directory = run
        self.finish()


if __name__ == "__main__":
    h.main()
