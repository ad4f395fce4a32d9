"""What the tests of layouts share: layouts, and whether two runs of the same step learn the same.

A layout is dp x cp x tp ranks and a ZeRO stage. Gradients are compared through the first moments of the checkpoint after the
first update, without clipping: from moments of zero, exp_avg = (1 - beta1) * gradient, so relative differences are those of
the gradients.
"""

import itertools
import shutil
import typing

import harness as h

# Layouts add the same numbers in another order. A gradient is a float32 sum over some hundred tokens; a partial sum is rounded
# with a relative error of at most 2^-24 = 6e-8, and errors of n additions add up like sqrt(n) * 6e-8 for sums without much
# cancellation: about 1e-6 for n = 300. Compared as ||a - b|| / ||a|| over a tensor. Gradients of norm weights of queries and keys
# cancel more; with very few tokens they pass this bound by rounding alone, so the cases here have a few hundred.
TOLERANCE = 1e-6


class Layout(typing.NamedTuple):
    dp: int = 1
    cp: int = 1
    tp: int = 1
    zero: int = 1

    @property
    def ranks(self):
        return self.dp * self.cp * self.tp

    def __str__(self):
        return f"dp {self.dp} cp {self.cp} tp {self.tp} zero {self.zero}"

    def section(self):
        """Of a stage's configuration."""
        return {"dp": self.dp, "cp": self.cp, "tp": self.tp, "zero_stage": self.zero}

    def sets(self, stage):
        """Values of --set for one stage of a pipeline."""
        return [f"{stage}.parallel.{key}={value}" for key, value in self.section().items()]


ONE = Layout()


def all_layouts(most_ranks):
    sizes = (1, 2, 3, 4, 8)
    return [Layout(*drawn) for drawn in itertools.product(sizes, sizes, sizes, range(4)) if Layout(*drawn).ranks <= most_ranks]


def measured_checkpoint(run, stage, phase="train"):
    """After the first update of the phase."""
    for checkpoint in h.checkpoints(run):
        saved = h.manifest(checkpoint)["stage"]
        if (saved["name"], saved["phase"], saved["step"]) == (stage, phase, 1):
            return checkpoint
    raise AssertionError(f"{run}: no checkpoint after the first step of {stage} {phase}")


def first_line(run, stage, phase="train"):
    found = [line for (_, name, of), line in h.metrics(run).items() if (name, of) == (stage, phase) and line["stage_step"] == 1]
    if len(found) != 1:
        raise AssertionError(f"{run}: {len(found)} lines of metrics for the first step of {stage} {phase}")
    return found[0]


def relative(a, b):
    return abs(a - b) / abs(a) if a != b else 0.0


def largest_differences(run_a, run_b, stage, phase="train"):
    """Relative, of the first step: {"loss": ..., "grad_norm": ..., tensor: ...}, without tensors of equal bits. AssertionError
    when the two have other data or other tensors."""
    a, b = first_line(run_a, stage, phase), first_line(run_b, stage, phase)
    for field in ("data_crc", "tokens", "target_tokens", "lr"):
        if a[field] != b[field]:
            raise AssertionError(f"{stage} {phase}: {field} is {a[field]} and {b[field]}")
    found = {field: relative(a[field], b[field]) for field in ("loss", "grad_norm")}
    checkpoints = [measured_checkpoint(run, stage, phase) for run in (run_a, run_b)]
    found.update(h.relative_differences(*checkpoints, "exp_avg"))
    return found


def too_different(run_a, run_b, stage, phase="train", tolerance=TOLERANCE):
    """Lines that say what differs by more than the tolerance."""
    return [f"{stage} {phase}: {name} differs by {value:.2e} of its size"
            for name, value in largest_differences(run_a, run_b, stage, phase).items() if not value < tolerance]


class Case:
    """A pipeline whose last stage is measured: run on one rank, and that stage again on layouts."""

    def __init__(self, name, stages, phases=("train",)):
        self.name, self.stage, self.phases = name, stages[-1]["name"], phases
        self.index = len(stages) - 1
        self.config = h.write_pipeline(h.ROOT / "cases" / name, stages)
        self.one = h.ROOT / "runs" / name / "one"
        h.succeed(h.train(self.config, self.one))

    def directory(self, layout, *sets):
        return h.ROOT / "runs" / self.name / "-".join(str(word) for word in (*layout, *sets)).replace("/", "")

    def start(self, layout, *sets):
        """Result and run directory of the measured stage on a layout, from the same checkpoint before it as the one rank's."""
        run = self.directory(layout, *sets)
        if self.index > 0:
            h.copy_run(self.one, run)
            for checkpoint in h.checkpoints(run):
                if h.manifest(checkpoint)["stage"]["index"] == self.index:
                    shutil.rmtree(checkpoint)
            shutil.rmtree(run / "metrics")
            shutil.rmtree(run / "halo", ignore_errors=True)
        return h.run(h.train(self.config, run, *layout.sets(self.stage), *sets), ranks=layout.ranks), run

    def run(self, layout, *sets):
        result, run = self.start(layout, *sets)
        if result.code != 0:
            raise AssertionError(f"{self.name} on {layout}: {result}")
        return run

    def problems(self, layout, *sets):
        """Lines that say where the layout learns something else; the run directory goes when there are none."""
        run = self.run(layout, *sets)
        found = []
        for phase in self.phases:
            found += too_different(self.one, run, self.stage, phase)
        saved = h.manifest(measured_checkpoint(run, self.stage, self.phases[0]))["topology"]
        if saved["world"] != layout.ranks:
            found.append(f"the run had {saved['world']} ranks, not {layout.ranks}")
        if not found:
            shutil.rmtree(run)
        return [f"{self.name} on {layout}: {line}" for line in found]
