"""What a run shows: TensorBoard events, Prometheus text, traces and the report, live, killed, resumed and finished."""

import fcntl
import html.parser
import json
import re
import shutil
import socket
import struct
import unittest

import harness as h

STEPS = 12


def varint(content, at):
    value = shift = 0
    while True:
        byte = content[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def fields(content):
    """(field, value) of a protobuf message; values are numbers or bytes as they lie there."""
    at = 0
    while at < len(content):
        key, at = varint(content, at)
        if key & 7 == 0:
            value, at = varint(content, at)
        else:
            if key & 7 == 2:
                size, at = varint(content, at)
            else:
                size = {1: 8, 5: 4}[key & 7]
            value, at = content[at:at + size], at + size
        yield key >> 3, value


def masked_crc(content):
    crc = h.crc32c(content)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(path):
    """The events of a file, checksums checked; a record that was cut by a kill ends it, as for TensorBoard."""
    content, at = path.read_bytes(), 0
    while at + 12 <= len(content):
        size, crc = struct.unpack_from("<QI", content, at)
        if at + 16 + size > len(content):
            return
        event = content[at + 12:at + 12 + size]
        assert crc == masked_crc(content[at:at + 8]), path
        assert struct.unpack_from("<I", content, at + 12 + size)[0] == masked_crc(event), path
        yield dict(fields(event))
        at += 16 + size


def scalars(folder):
    """{tag: {step: value}} as TensorBoard shows it: a start purges what came before it and is not of an earlier step."""
    found = {}
    for path in sorted(folder.iterdir()):
        for number, event in enumerate(events(path)):
            if number == 0:
                assert event[3] == b"brain.Event:2", path
            if 7 in event:
                for values in found.values():
                    for step in [step for step in values if step >= event.get(2, 0)]:
                        del values[step]
            for _, value in fields(event.get(5, b"")):
                parts = dict(fields(value))
                found.setdefault(parts[1].decode(), {})[event[2]] = struct.unpack("<f", parts[2])[0]
    return found


def float32(value):
    return struct.unpack("<f", struct.pack("<f", value))[0]


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order and nothing is loaded from anywhere."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], set(), []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert tag not in ("link", "img", "iframe", "object", "image", "use"), tag
        for name, value in attributes:
            assert name not in ("src", "href", "xlink:href", "action"), (tag, name)
            assert "http:" not in (value or "") and "https:" not in (value or ""), (tag, name, value)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag != "meta":
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, text):
        self.text.append(text)


def report(run, *more):
    h.succeed(["report", run, *more])
    text = (run / "report.html").read_text()
    return Page(text), text


class Report(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.run_directory = run = h.ROOT / "runs" / "seen"
        base = h.pretrain("base", STEPS, first=True, model=h.model(attn_use_output_gate=True), validation={"every_steps": 4})
        cls.config = h.write_pipeline(h.ROOT / "seen", [base, h.halo("halo", 4, 4)])
        cls.arguments = h.train(cls.config, run, "run.trace.ranks=[0,1]") + ["--trace-steps", "2,10-11"]
        job = h.Job(cls.arguments, ranks=2, env={"OMPI_MCA_odls_base_sigkill_timeout": "0"})
        assert job.wait_for(lambda: len(h.metrics(run)) >= 4, "steps")
        job.signal_rank(1, h.SIGKILL)
        job.result()
        # As the kill may leave it: half a line, and steps that the next start does again.
        with open(run / "metrics" / "train.jsonl", "a") as file:
            file.write('{"step": 99, "sta')
        cls.live_page, cls.live_text = report(run)
        h.succeed(cls.arguments, ranks=2)
        cls.page, cls.text = report(run)

    def test_the_report_of_a_killed_run_and_of_a_finished_one(self):
        self.assertIn("training", self.live_text)
        self.assertNotIn("HALO conversion", self.live_text)
        for heading in ("Loss", "Training", "Where a step's time goes", "HALO conversion", "Output gates", "Checkpoints", "Environment",
                        "Configuration"):
            self.assertIn(f"<h2>{heading}</h2>", self.text)
        self.assertIn('<span class="state done">', self.text)
        self.assertNotIn("http-equiv", self.text)
        self.assertIn("svg", self.page.tags)
        # The half line became a whole one when the next start went on behind it.
        self.assertIn("metrics/train.jsonl: 1 line is no JSON object; left out", self.text)

    def test_tensorboard_shows_the_numbers_of_the_metrics(self):
        self.assertEqual(len(list((self.run_directory / "tb").iterdir())), 2)
        found = scalars(self.run_directory / "tb")
        lines = h.metrics(self.run_directory)
        self.assertEqual(set(found["base/loss"]), set(range(1, STEPS + 1)))
        for (step, stage, phase), line in lines.items():
            place = stage if phase == "train" else f"{stage}/{phase}"
            for key in ("loss", "lr", "grad_norm", "tokens_per_s", "padding_share"):
                self.assertEqual(found[f"{place}/{key}"][step], float32(line[key]), (step, key))
        for (step, stage, phase), line in h.metrics(self.run_directory, "valid").items():
            if phase == "train":
                self.assertEqual(found[f"{stage}/validation/loss"][step], float32(line["loss"]), step)

    def test_prometheus_text(self):
        text = (self.run_directory / "metrics.prom").read_text()
        sample = re.compile(r'^(sala_[a-z_]+)\{run="seen"(?:,[a-z]+="[^"\\]*")*\} (\S+)$')
        named, values = set(), {}
        for line in text.splitlines():
            if line.startswith("# "):
                named.add(line.split()[2])
                continue
            match = sample.match(line)
            self.assertIsNotNone(match, line)
            self.assertIn(match.group(1), named)
            values[match.group(1)] = float(match.group(2))
        last = max(h.metrics(self.run_directory).items())[1]
        self.assertEqual(values["sala_loss"], last["loss"])
        self.assertIn('state="done"', text)

    def test_traces_are_nested_events_of_both_threads(self):
        folder = self.run_directory / "traces"
        self.assertLessEqual({f"step-{step:06d}-rank-{rank:04d}.json" for step in (10, 11) for rank in (0, 1)},
                             {path.name for path in folder.iterdir()})
        trace = json.loads((folder / "step-000010-rank-0001.json").read_text())
        complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
        names = {event["name"] for event in complete}
        self.assertLessEqual({"data", "forward", "layer 0", "layer backward 3", "mlp", "softmax mixer", "loss", "backward", "optimizer",
                              "save", "world.all_reduce"}, names)
        self.assertEqual({event["tid"] for event in complete}, {0, 1})
        for thread in (0, 1):
            ends = []
            for event in sorted((e for e in complete if e["tid"] == thread), key=lambda e: (e["ts"], -e["dur"])):
                end = event["ts"] + event["dur"]
                while ends and ends[-1] <= event["ts"]:
                    ends.pop()
                # Seconds of a clock that counts from the machine's start have some 1e-10 of a second: 1e-3 microseconds.
                self.assertTrue(not ends or end <= ends[-1] + 1e-3, event)
                ends.append(end)

    def test_metrics_say_where_the_time_went(self):
        for line in h.metrics(self.run_directory).values():
            parts = sum(line[key] for key in ("data_ms", "forward_ms", "loss_ms", "backward_ms", "optim_ms"))
            self.assertLess(0, line["forward_ms"])
            self.assertLessEqual(parts, line["step_ms"])
            self.assertGreaterEqual(line["eta_s"], 0)
        gates = [json.loads(line) for line in (self.run_directory / "metrics" / "gates.jsonl").read_text().splitlines()]
        self.assertEqual([line["stage"] for line in gates][-2:], ["base", "halo"])
        for line in gates:
            self.assertTrue(all(0 < mean < 1 for mean in line["means"]), line)

    def test_traces_change_no_bit(self):
        plain = h.ROOT / "runs" / "plain"
        h.succeed(h.train(self.config, plain, "run.tensorboard=false", "run.prometheus=false"), ranks=2)
        self.assertEqual(h.differences(plain, self.run_directory), [])
        for name in ("tb", "metrics.prom", "traces"):
            self.assertFalse((plain / name).exists(), name)

    def test_watching_ends_with_a_run_that_was_killed(self):
        run = h.ROOT / "runs" / "killed"
        shutil.copytree(self.run_directory, run)
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": "training"}))
        job = h.Job(["--version"])
        job.result()
        (run / "RUN.lock").write_text(f"host {socket.gethostname()}\npid {job.process.pid}\nstarted 2026-01-01T00:00:00Z\n")
        result = h.succeed(["report", run, "--watch", "3600"])
        self.assertIn(f"the run was killed: process {job.process.pid} on", result.err)
        text = (run / "report.html").read_text()
        self.assertIn("training, killed", text)
        self.assertNotIn("http-equiv", text)
        # One that lives is watched on.
        with open(run / "RUN.lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            job = h.Job(["report", run, "--watch", "1"])
            (run / "report.html").unlink()
            self.assertTrue(job.wait_for(lambda: (run / "report.html").exists(), "the page"))
            (run / "report.html").unlink()
            self.assertTrue(job.wait_for(lambda: (run / "report.html").exists(), "the page again"))
            fcntl.flock(lock, fcntl.LOCK_UN)
        self.assertIn("the run was killed", job.result().err)

    def test_what_cannot_be_done(self):
        for arguments, code, word in (
                (["report", h.ROOT / "nowhere"], 66, "FILE-MISSING"),
                (["report", h.ROOT / "corpus"], 66, "RUN-NONE"),
                (["report", self.run_directory, "--watch", "0"], 64, "USAGE"),
                (["report", self.run_directory, "--to", h.ROOT / "no" / "folder" / "page.html"], 74, "FILE-WRITE"),
                (self.arguments[:-1] + ["5-3"], 64, "USAGE"),
                (self.arguments[:-1] + ["1-5000"], 64, "USAGE"),
                (self.arguments, 78, "CFG-CONFLICT")):  # rank 1 of one
            result = h.run(arguments)
            self.assertEqual(result.code, code, result)
            self.assertEqual(len(result.error_lines), 1, result)
            self.assertIn(word, result.error_lines[0])


if __name__ == "__main__":
    h.main()
