#!/usr/bin/env python3
"""That the comparison finds mistakes: formulas of the oracle are made wrong one at a time, and a case must then break its bound.

    python tests/oracle/planted_test.py --build build/release [TEST ...]

The mistakes are those that ports of this model have made, and the smallest there are. Without one the same case must agree.
"""

import argparse
import os
import pathlib
import sys
import tempfile
import unittest
from unittest import mock

import jax.numpy as jnp
import numpy as np

import cases
import compare
import driver
from sala_oracle import config as configs
from sala_oracle import losses, model, selection, tasks

PROGRAM = ""


def worst_error(case, arithmetic, gradients):
    """The largest relative error between the driver and the oracle as it is now."""
    with tempfile.TemporaryDirectory(prefix="sala-planted-") as folder:
        compare.write_case(pathlib.Path(folder), case)
        found = driver.run_driver(PROGRAM, folder, arithmetic)
    if gradients:
        expected = tasks.run(case.request, case.student, case.batch, case.teacher)
    else:
        expected = tasks.run_forward(case.request, case.student, case.batch)
        found = {name: tensor for name, tensor in found.items() if not name.startswith("grad/")}
    errors, faults = driver.compare(found, compare.flat(expected))
    assert not faults, faults
    return errors[0][0]


def rounded_to_float32(x):
    return x.astype(jnp.float32).astype(jnp.float64)


class Planted(unittest.TestCase):
    def found(self, name, where, attribute, wrong, arithmetic="float64", gradients=False):
        """`wrong` stands for where.attribute while case `name` is computed. How large the error gets."""
        bound = driver.BOUNDS[arithmetic]
        with mock.patch.object(where, attribute, wrong):
            error = worst_error(cases.all_cases()[name](), arithmetic, gradients)
        print(f"relative error {error:.1e}, allowed {bound:g} ... ", end="", file=sys.stderr, flush=True)
        self.assertGreater(error, bound)

    def test_nothing_planted(self):
        for name in ("hybrid_sparse", "hybrid_heads", "hybrid_many_heads"):
            self.assertLess(worst_error(cases.all_cases()[name](), "float64", False), driver.BOUNDS["float64"])

    # ---- block selection ----

    def test_one_local_block_fewer(self):
        fewer = property(lambda sparse: sparse.window_size // sparse.block_size - 1)
        self.found("hybrid_sparse", configs.Sparse, "window_blocks", fewer, "float32")

    def test_topk_without_the_window(self):
        self.found("hybrid_sparse", configs.Sparse, "total_blocks", property(lambda sparse: sparse.topk), "float32")

    def test_window_before_the_block_forgotten(self):
        right = selection.block_windows
        self.found("hybrid_sparse", selection, "block_windows", lambda *a: tuple(x[:, 1:] for x in right(*a)), "float32")

    def test_last_window_of_the_block_forgotten(self):
        right = selection.block_windows
        self.found("hybrid_sparse", selection, "block_windows", lambda *a: tuple(x[:, :-1] for x in right(*a)), "float32")

    def test_heads_normalised_alike(self):
        """exp(fine score) is added over heads without the coarse normaliser."""

        def wrong(q, k, sparse, store):
            fine = selection.pooled(k, sparse.kernel_size, sparse.kernel_stride)
            grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
            visible = sparse.kernel_stride * np.arange(fine.shape[0]) + sparse.kernel_size - 1 <= np.arange(q.shape[0])[:, None]
            scores = jnp.exp(jnp.einsum("tghd,igd->ghti", grouped, fine) / np.sqrt(q.shape[2])).sum(axis=1)
            return jnp.where(visible, scores, 0.0)

        self.found("hybrid_sparse", selection, "fine_scores", wrong, "float32")

    # ---- linear layers ----

    def test_slopes_by_the_formula_for_powers_of_two(self):
        wrong = lambda heads: np.asarray([2.0 ** (-8.0 * h / heads) for h in range(1, heads + 1)])
        self.found("hybrid_heads", model, "decay_slopes", wrong, "float32")

    def test_current_token_decays(self):
        right = model.recurrence
        self.found("hybrid_heads", model, "recurrence", lambda q, k, v, decay: right(q, k * decay[:, None], v, decay), "float32")

    def test_output_norm_per_head(self):
        right = model.rms_norm

        def wrong(x, weight, eps, arithmetic):
            if x.shape[-1] != 48:  # the output norm of this case, 3 heads of 16
                return right(x, weight, eps, arithmetic)
            return right(x.reshape(-1, 3, 16), weight.reshape(3, 16), eps, arithmetic).reshape(-1, 48)

        self.found("hybrid_heads", model, "rms_norm", wrong, "float32")

    # ---- small ones ----

    def test_table_of_slopes_in_float64(self):
        right, slopes = model.recurrence, model.decay_slopes(12)
        exact = lambda q, k, v, decay: right(q, k, v, np.exp(-slopes))
        self.found("hybrid_many_heads", model, "recurrence", exact)

    def test_positions_go_on_over_documents(self):
        """Mathematically the same; the angles round elsewhere."""
        self.found("hybrid_dense", model, "positions_of", lambda documents: np.arange(documents[-1][1]))

    def test_eps_one_percent_larger(self):
        right = model.rms_norm
        self.found("hybrid_dense", model, "rms_norm", lambda x, w, eps, a: right(x, w, 1.01 * eps, a))

    def test_gate_in_float32(self):
        right = model.sigmoid
        self.found("hybrid_dense", model, "sigmoid", lambda x: rounded_to_float32(right(x)))

    # ---- losses ----

    def test_kl_without_the_square_of_the_temperature(self):
        right = losses.kl_sum
        wrong = lambda teacher, student, tau: right(teacher, student, tau) / tau**2
        self.found("golden_distillation", losses, "kl_sum", wrong, "float32", gradients=True)

    def test_kl_of_student_to_teacher(self):
        right = losses.kl_sum
        wrong = lambda teacher, student, tau: right(student, teacher, tau)
        self.found("golden_distillation", losses, "kl_sum", wrong, "float32", gradients=True)

    def test_alignment_summed_over_layers(self):
        right = losses.alignment_mean
        wrong = lambda pairs, hidden, form: len(pairs) * right(pairs, hidden, form)
        self.found("golden_alignment", losses, "alignment_mean", wrong, "float32", gradients=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", required=True)
    known, rest = parser.parse_known_args()
    PROGRAM = os.path.join(os.path.abspath(known.build), "bin", "oracle_driver")
    sys.exit(not unittest.main(argv=[sys.argv[0], *rest], exit=False, verbosity=2).result.wasSuccessful())
