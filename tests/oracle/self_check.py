#!/usr/bin/env python3
"""Checks the oracle against what does not depend on it: published constants, properties of the model, plain loops, differences.

    python tests/oracle/self_check.py [TEST ...]

Where a test has a tolerance, its reason stands beside it; 1e-12 without a word is float64 rounding (1.1e-16) of sums of some hundred
terms of size 1 with room to spare.
"""

import dataclasses
import math
import sys
import unittest

import jax
import jax.numpy as jnp
import numpy as np

import cases
from sala_oracle import config as configs
from sala_oracle import losses, model, selection, tasks


def made(name):
    return cases.all_cases()[name]()


def with_config(case, **changes):
    """The case with another configuration and the same weights."""
    return dataclasses.replace(case, student=tasks.Model(case.student.config | changes, case.student.weights))


def with_batch(case, tokens, labels, borders):
    return dataclasses.replace(case, batch=tasks.Batch(np.asarray(tokens), np.asarray(labels), np.asarray(borders)))


def outputs(case, arithmetic=model.Exact):
    return tasks.run_forward(case.request, case.student, case.batch, arithmetic)


class Constants(unittest.TestCase):
    def test_decay_of_the_released_model(self):
        decay = np.exp(-model.decay_slopes(32))
        self.assertAlmostEqual(decay[0], 0.431323705, delta=5e-10)  # printed digits
        self.assertAlmostEqual(decay[31], 0.996101369, delta=5e-10)

    def test_decay_of_other_powers_of_two(self):
        for heads, first in ((32, 0.43132), (16, 0.49307), (8, 0.60653), (4, 0.77880)):
            decay = np.exp(-model.decay_slopes(heads))
            self.assertEqual(len(decay), heads)
            self.assertAlmostEqual(decay[0], first, delta=5e-6)
            self.assertAlmostEqual(decay[-1], 0.99610, delta=5e-6)

    def test_slopes_of_other_head_counts(self):
        self.assertEqual(model.decay_slopes(3).tolist(), [2**-4, 2**-8, 2**-2])
        self.assertEqual(model.decay_slopes(6).tolist(), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])

    def test_factors_of_the_released_model(self):
        config = configs.read(cases.sala("SLLS" * 8, hidden_size=4096, dim_model_base=256))
        self.assertAlmostEqual(config.residual_factor, 0.2474873734152916, delta=1e-16)
        self.assertEqual((config.embedding_factor, config.logit_divisor), (12.0, 16.0))

    def test_parameters_of_the_released_model(self):
        """9,477,203,968 in 395 tensors."""
        softmax = {0, 9, 16, 17, 22, 29, 30, 31}
        config = cases.sala(
            "".join("S" if layer in softmax else "L" for layer in range(32)),
            **{"vocab_size": 73448, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128},
            **{"lightning_nh": 32, "lightning_head_dim": 128},
        )
        shapes = configs.tensor_shapes(configs.read(config), 16384)
        self.assertEqual(len(shapes), 395)
        self.assertEqual(sum(math.prod(shape) for shape in shapes.values()), 9_477_203_968)

    def test_block_numbers_of_the_released_model(self):
        sparse = configs.read(cases.sala("S")).sparse
        self.assertEqual(sparse.total_blocks, 96)
        forced, possible = selection.classes(6400, sparse)
        self.assertEqual(forced[-1].sum(), 34)
        self.assertEqual(possible[-1].sum(), 100)
        self.assertEqual(forced[64 * 20].sum(), 21)  # all of them while fewer than 34 exist


class LinearAttention(unittest.TestCase):
    def setUp(self):
        rng = np.random.default_rng(1)
        self.q, self.k, self.v = (rng.standard_normal((37, 3, 4)) for _ in range(3))
        self.decay = np.exp(-model.decay_slopes(3))

    def parallel(self, decay):
        """o[t] = sum_{j <= t} decay^(t-j) (q[t].k[j]) v[j] / sqrt(D), loop by loop."""
        o = np.zeros_like(self.v)
        for t in range(37):
            for j in range(t + 1):
                for h in range(3):
                    o[t, h] += decay[h] ** (t - j) * (self.q[t, h] @ self.k[j, h]) * self.v[j, h] / math.sqrt(4)
        return o

    def test_recurrence_is_the_sum(self):
        found = model.recurrence(self.q, self.k, self.v, self.decay)
        np.testing.assert_allclose(found, self.parallel(self.decay), atol=1e-12)

    def test_recurrence_in_chunks(self):
        """Chunks of 8: decay^(i+1) S^T q_i + sum_{j <= i}, S' = decay^C S + sum_j decay^(C-1-j) k_j v_j^T."""
        o = np.zeros_like(self.v)
        for h in range(3):
            state, a = np.zeros((4, 4)), self.decay[h]
            for first in range(0, 37, 8):
                q, k, v = (x[first : first + 8, h] for x in (self.q, self.k, self.v))
                n = len(q)
                powers = np.tril(a ** np.maximum(0, np.arange(n)[:, None] - np.arange(n)[None, :]))
                o[first : first + n, h] = ((a ** np.arange(1, n + 1))[:, None] * (q @ state) + ((q @ k.T) * powers) @ v) / 2
                state = a**n * state + (k * (a ** np.arange(n - 1, -1, -1))[:, None]).T @ v
        np.testing.assert_allclose(model.recurrence(self.q, self.k, self.v, self.decay), o, atol=1e-12)

    def test_no_decay_and_no_memory(self):
        one, zero = np.ones(3), np.zeros(3)
        np.testing.assert_allclose(model.recurrence(self.q, self.k, self.v, one), self.parallel(one), atol=1e-12)
        alone = (self.q * self.k).sum(-1, keepdims=True) * self.v / 2
        np.testing.assert_allclose(model.recurrence(self.q, self.k, self.v, zero), alone, atol=1e-12)


class SoftmaxAttention(unittest.TestCase):
    def test_plain_loops(self):
        rng = np.random.default_rng(2)
        q, k, v = rng.standard_normal((9, 6, 4)), rng.standard_normal((9, 2, 4)), rng.standard_normal((9, 2, 4))
        expected = np.zeros((9, 6, 4))
        for t in range(9):
            for h in range(6):
                weights = np.exp([q[t, h] @ k[j, h // 3] / 2 for j in range(t + 1)])
                expected[t, h] = (weights[:, None] * v[: t + 1, h // 3]).sum(0) / weights.sum()
        np.testing.assert_allclose(model.attention(q, k, v), expected.reshape(9, 24), atol=1e-12)

    def test_pieces_of_queries(self):
        rng = np.random.default_rng(3)
        q, k, v = (rng.standard_normal((50, 2, 4)) for _ in range(3))
        whole = model.attention(q, k, v)
        kept, model.QUERIES_AT_ONCE = model.QUERIES_AT_ONCE, 7
        try:
            np.testing.assert_allclose(model.attention(q, k, v), whole, atol=1e-12)
        finally:
            model.QUERIES_AT_ONCE = kept


class Rotary(unittest.TestCase):
    def test_plain_formula(self):
        """Channel i turns with channel i + D/2; the angle is exact at small positions to float32's 6e-8 of it."""
        rng = np.random.default_rng(4)
        x = rng.standard_normal((5, 1, 6))
        found = model.rotate(jnp.asarray(x), np.arange(5), 100.0, model.Exact)
        for t in range(5):
            for i in range(3):
                turned = complex(x[t, 0, i], x[t, 0, i + 3]) * np.exp(1j * t * 100.0 ** (-2 * i / 6))
                self.assertAlmostEqual(found[t, 0, i], turned.real, delta=2e-6)
                self.assertAlmostEqual(found[t, 0, i + 3], turned.imag, delta=2e-6)

    def test_only_differences_of_positions_matter(self):
        rng = np.random.default_rng(5)
        q, k = (jnp.asarray(rng.standard_normal((20, 1, 8))) for _ in range(2))

        def products(shift):
            turned = [model.rotate(x, np.arange(20) + shift, 10000.0, model.Exact)[:, 0] for x in (q, k)]
            return turned[0] @ turned[1].T

        # Angles up to 1020 are rounded at 3e-5; products are of size 8.
        np.testing.assert_allclose(products(1000), products(0), atol=1e-3)


def selected_by_loops(q, k, sparse):
    """The rule of block selection as it is written down, one query at a time."""
    tokens, heads, dim = q.shape
    groups, scale = k.shape[1], 1 / math.sqrt(dim)
    size, stride, per_block = sparse.kernel_size, sparse.kernel_stride, sparse.block_size // sparse.kernel_stride
    blocks = math.ceil(tokens / sparse.block_size)
    chosen = np.zeros((groups, tokens, blocks), dtype=bool)
    for g in range(groups):
        fine = [k[stride * i : stride * i + size, g].mean(0) for i in range((tokens - size) // stride + 1)]
        coarse = [k[4 * stride * i : 4 * stride * i + 4 * size, g].mean(0) for i in range((tokens - 4 * size) // (4 * stride) + 1)]
        for t in range(tokens):
            own = t // sparse.block_size
            scores = [0.0] * len(fine)
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                sums = [math.exp(scale * q[t, h] @ c) for i, c in enumerate(coarse) if 4 * stride * i + 4 * size - 1 <= t]
                for i, f in enumerate(fine):
                    if sums and stride * i + size - 1 <= t:
                        scores[i] += math.exp(scale * q[t, h] @ f) / sum(sums)
            ranked = []
            for b in range(own + 1):
                if b < sparse.init_blocks or b >= own - sparse.window_size // sparse.block_size:
                    ranked.append((-math.inf, b))
                else:
                    windows = range(per_block * b - 1, per_block * b + per_block)
                    ranked.append((-max(scores[i] for i in windows if 0 <= i < len(fine)), b))
            for _, b in sorted(ranked)[: sparse.topk + sparse.window_size // sparse.block_size]:
                chosen[g, t, b] = True
    return chosen


class BlockSelection(unittest.TestCase):
    def test_plain_loops(self):
        rng = np.random.default_rng(6)
        for blocks in (cases.SMALL_BLOCKS, cases.SMALLEST_BLOCKS):
            sparse = configs.read(cases.sala("S", sparse_config=blocks)).sparse
            q, k = rng.standard_normal((83, 4, 8)) * 2, rng.standard_normal((83, 2, 8)) * 2
            expected = selected_by_loops(q, k, sparse)
            self.assertFalse(expected[:, -1].all())  # something is dropped
            np.testing.assert_array_equal(selection.selected_blocks(q, k, sparse), expected)

    def test_ties_go_to_the_lower_block(self):
        sparse = configs.read(cases.sala("S", sparse_config=cases.SMALL_BLOCKS)).sparse
        chosen = np.asarray(selection.selected_blocks(np.zeros((80, 2, 4)), np.ones((80, 1, 4)), sparse))
        self.assertEqual(np.flatnonzero(chosen[0, -1]).tolist(), [0, 1, 2, 8, 9])

    def test_all_blocks_is_dense(self):
        case = made("hybrid_sparse")
        wide = with_config(case, sparse_config=case.student.config["sparse_config"] | {"topk": 100})
        dense = dataclasses.replace(case, request=case.request | {"sparse_attention": False})
        a, b, c = outputs(wide)["logits"], outputs(dense)["logits"], outputs(case)["logits"]
        np.testing.assert_allclose(a, b, atol=1e-12)
        self.assertGreater(abs(b - c).max(), 1e-2)  # and the case itself is not dense

    def test_short_documents_are_dense(self):
        case = made("hybrid_sparse")
        longer = with_config(case, sparse_config=case.student.config["sparse_config"] | {"dense_len": 101})
        dense = dataclasses.replace(case, request=case.request | {"sparse_attention": False})
        np.testing.assert_array_equal(outputs(longer)["logits"], outputs(dense)["logits"])
        at = with_config(case, sparse_config=case.student.config["sparse_config"] | {"dense_len": 100})
        found = abs(outputs(at)["logits"] - outputs(dense)["logits"]).max(axis=1)
        self.assertGreater(found[:100].max(), 1e-2)
        self.assertEqual(found[100:].max(), 0.0)


class Model(unittest.TestCase):
    def test_causality(self):
        """A token changes its own logits and later ones of its document, nothing else."""
        for name, changed, end in (("hybrid_dense", 20, 34), ("hybrid_sparse", 60, 100)):
            case = made(name)
            tokens = case.batch.tokens.copy()
            tokens[changed] = (tokens[changed] + 1) % 61
            before = outputs(case)["logits"]
            after = outputs(with_batch(case, tokens, case.batch.labels, case.batch.borders))["logits"]
            difference = abs(before - after).max(axis=1)
            self.assertEqual(np.delete(difference, np.arange(changed, end)).max(), 0.0, name)
            self.assertGreater(difference[changed:end].min(), 1e-6, name)

    def test_documents_are_alone(self):
        case = made("hybrid_sparse")
        packed = outputs(case)["logits"]
        for begin, end in case.batch.documents:
            alone = with_batch(case, case.batch.tokens[begin:end], case.batch.labels[begin:end], [0, end - begin])
            np.testing.assert_allclose(outputs(alone)["logits"], packed[begin:end], atol=1e-12)

    def test_size_of_what_is_normed_does_not_matter(self):
        """Queries of one linear head, and all values of a linear layer, may have any factor before their norm. Only eps, 1e-6 of squares of
        about 1, tells the difference."""
        case = made("hybrid_dense")
        weights = dict(case.student.weights)
        prefix = "model.layers.1.self_attn."
        q = weights[f"{prefix}q_proj.weight"].copy()
        q[8:16] *= 4.0
        weights |= {f"{prefix}q_proj.weight": q, f"{prefix}v_proj.weight": weights[f"{prefix}v_proj.weight"] * np.float32(4.0)}
        other = dataclasses.replace(case, student=tasks.Model(case.student.config, weights))
        np.testing.assert_allclose(outputs(other)["logits"], outputs(case)["logits"], atol=2e-4)

    def test_gradients_are_slopes(self):
        """Along a random direction of every tensor. A central difference over h = 1e-5 is off by h^2 times a third derivative and by
        rounding, 1e-16 * loss / h = 1e-9 for losses of some hundred: 1e-6 of the slope's natural size |gradient| |direction|
        holds both."""
        for name in ("teacher_qwen3", "hybrid_heads", "hybrid_sparse_smallest", "distillation_mixed", "alignment_l2_norm"):
            case = made(name)
            request = case.request | {"grad_scale": 1.0}
            weights = tasks.trained_weights(request, case.student)
            teacher = tasks.widened(case.teacher.weights) if case.teacher else {}
            function = jax.jit(tasks.loss_function(request, case.student, case.batch, case.teacher))
            gradients = tasks.run(request, case.student, case.batch, case.teacher)
            rng, h = np.random.default_rng(7), 1e-5
            for tensor, w in weights.items():
                direction = rng.standard_normal(w.shape)
                direction /= np.linalg.norm(direction)
                up, down = (float(function(weights | {tensor: w + sign * h * direction}, teacher)[0]) for sign in (1, -1))
                gradient = gradients[f"grad/{tensor}"]
                slope = float((gradient * direction).sum())
                self.assertLess(abs((up - down) / (2 * h) - slope), 1e-6 * np.linalg.norm(gradient), f"{name} {tensor}")


class Losses(unittest.TestCase):
    def test_cross_entropy_by_loops(self):
        logits = np.random.default_rng(8).standard_normal((4, 5))
        labels = np.asarray([3, -1, 0, 4])
        expected = sum(math.log(sum(math.exp(x) for x in logits[t])) - logits[t, labels[t]] for t in (0, 2, 3))
        self.assertAlmostEqual(losses.cross_entropy_sum(logits, labels), expected, delta=1e-12)

    def test_kl_by_loops(self):
        rng = np.random.default_rng(9)
        teacher, student, tau = rng.standard_normal((3, 5)), rng.standard_normal((3, 5)), 1.7
        expected = 0.0
        for t in range(3):
            p = np.exp(teacher[t] / tau) / np.exp(teacher[t] / tau).sum()
            s = np.exp(student[t] / tau) / np.exp(student[t] / tau).sum()
            expected += tau * tau * (p * np.log(p / s)).sum()
        self.assertAlmostEqual(losses.kl_sum(teacher, student, tau), expected, delta=1e-12)
        self.assertEqual(losses.kl_sum(teacher, teacher, 1.0), 0.0)

    def test_kl_gradient(self):
        """At temperature 1: p_student - p_teacher."""
        rng = np.random.default_rng(10)
        teacher, student = rng.standard_normal((3, 5)), rng.standard_normal((3, 5))
        found = jax.grad(losses.kl_sum, argnums=1)(teacher, student, 1.0)
        np.testing.assert_allclose(found, jax.nn.softmax(student) - jax.nn.softmax(teacher), atol=1e-12)

    def test_alignment_gradient(self):
        """2 (y_s - y_t) / (L T H), and (y_s - y_t) / (|y_s - y_t| L T sqrt(H)); here L = 1."""
        rng = np.random.default_rng(11)
        t, s = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
        square = jax.grad(lambda s: losses.alignment_mean([(t, s)], 4, "mse"))(s)
        np.testing.assert_allclose(square, 2 * (s - t) / 12, atol=1e-12)
        euclidean = jax.grad(lambda s: losses.alignment_mean([(t, s)], 4, "l2_norm"))(s)
        np.testing.assert_allclose(euclidean, (s - t) / np.linalg.norm(s - t, axis=1, keepdims=True) / 6, atol=1e-12)


class PublishedRounding(unittest.TestCase):
    def test_store_is_nearest_even(self):
        x = np.asarray([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -0.1, 3e38])
        found = np.asarray(model.Published.store(jnp.asarray(x)))
        self.assertEqual(found[:4].tolist(), [1.0, 1.0, 1.0 + 2**-6, 1.0 + 2**-7])
        np.testing.assert_array_equal(found[4:], cases.round_bfloat16(x[4:]).astype(np.float64))

    def test_stays_near_the_exact_model(self):
        """bf16 keeps 8 bits, 4e-3 of a value; some hundred roundings one after the other add up to a few of these."""
        case = made("hybrid_dense")
        exact, rounded = outputs(case)["logits"], outputs(case, model.Published)["logits"]
        error = np.sqrt(((exact - rounded) ** 2).mean() / (exact**2).mean())
        self.assertLess(error, 4e-2)
        self.assertGreater(error, 1e-3)
        np.testing.assert_array_equal(rounded, cases.round_bfloat16(rounded))


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[1:]], verbosity=2)
