"""Which blocks of keys a query of a softmax layer sees in a long document.

No gradient flows through any of this.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np


def pooled(k, size, stride):
    """Means of the full windows [stride * i, stride * i + size) of the keys [T, K, D]."""
    count = max(0, (k.shape[0] - size) // stride + 1)
    windows = stride * np.arange(count)[:, None] + np.arange(size)[None, :]
    return k[windows].mean(axis=1)


def fine_scores(q, k, sparse, store):
    """R [K, T, fine windows]: exp(fine score - log sum exp of the visible coarse scores), added over the heads of the group."""
    tokens, heads, dim = q.shape
    groups = k.shape[1]
    fine_size, fine_stride = sparse.kernel_size, sparse.kernel_stride
    coarse_size, coarse_stride = 4 * fine_size, 4 * fine_stride
    fine = store(pooled(k, fine_size, fine_stride))
    coarse = store(pooled(k, coarse_size, coarse_stride))
    q = q.reshape(tokens, groups, heads // groups, dim)
    t = np.arange(tokens)[:, None]
    fine_visible = fine_stride * np.arange(fine.shape[0])[None, :] + fine_size - 1 <= t
    coarse_visible = coarse_stride * np.arange(coarse.shape[0])[None, :] + coarse_size - 1 <= t
    if coarse.shape[0] == 0:
        return jnp.zeros((groups, tokens, fine.shape[0]))
    numerator = jnp.einsum("tghd,igd->ghti", q, fine) / math.sqrt(dim)
    denominator = jnp.einsum("tghd,igd->ghti", q, coarse) / math.sqrt(dim)
    denominator = jax.scipy.special.logsumexp(jnp.where(coarse_visible, denominator, -jnp.inf), axis=-1, keepdims=True)
    counted = fine_visible & coarse_visible.any(axis=1, keepdims=True)
    p = jnp.where(counted, jnp.exp(numerator - jnp.where(jnp.isfinite(denominator), denominator, 0.0)), 0.0)
    return store(p.sum(axis=1))


def block_windows(blocks, per_block, windows):
    """[blocks, per_block + 1] the fine windows that overlap a block, and whether they exist."""
    index = per_block * np.arange(blocks)[:, None] + np.arange(-1, per_block)[None, :]
    return np.clip(index, 0, max(0, windows - 1)), (index >= 0) & (index < windows)


def classes(tokens, sparse):
    """Blocks b of a query t in block c: (forced, possible), both [T, blocks]."""
    blocks = -(-tokens // sparse.block_size)
    c = np.arange(tokens)[:, None] // sparse.block_size
    b = np.arange(blocks)[None, :]
    possible = np.broadcast_to(b <= c, (tokens, blocks))
    return ((b < sparse.init_blocks) | (b >= c - sparse.window_blocks)) & possible, possible


def block_scores(q, k, sparse, store):
    """([K, T, blocks] the best fine score of each block, [K, T, blocks] the window that has it)."""
    tokens = q.shape[0]
    scores = fine_scores(q, k, sparse, store)
    index, exists = block_windows(-(-tokens // sparse.block_size), sparse.block_size // sparse.kernel_stride, scores.shape[-1])
    candidates = jnp.where(exists, scores[:, :, index], -jnp.inf)
    best = candidates.argmax(axis=-1)
    return candidates.max(axis=-1), jnp.asarray(index)[np.arange(index.shape[0]), best]


def selected_blocks(q, k, sparse, store=lambda x: x):
    """[K, T, blocks]: the total_blocks best, forced ones first, ties to the lower block; later blocks than the query's own never."""
    q, k = jax.lax.stop_gradient(q), jax.lax.stop_gradient(k)
    forced, possible = classes(q.shape[0], sparse)
    scores, _ = block_scores(q, k, sparse, store)
    scores = jnp.where(possible, jnp.where(forced, jnp.inf, scores), -jnp.inf)
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < sparse.total_blocks) & possible


def cut_margins(q, k, sparse):
    """How clear the selection of one document is: (queries x groups with a real choice, the least relative distance between a chosen
    and a refused score). Two blocks that share the window of their score are equal in any arithmetic and go by index, so such
    pairs do not count."""
    forced, possible = classes(q.shape[0], sparse)
    exact = functools.partial(block_scores, sparse=sparse, store=lambda x: x)
    scores, windows = (np.asarray(x) for x in jax.jit(exact)(q, k))
    chosen = np.asarray(jax.jit(functools.partial(selected_blocks, sparse=sparse))(q, k))
    cuts, least = 0, math.inf
    for group in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            taken = np.flatnonzero(chosen[group, t] & ~forced[t])
            left = np.flatnonzero(possible[t] & ~chosen[group, t])
            if left.size == 0:
                continue
            cuts += 1
            row, window = scores[group, t], windows[group, t]
            if taken.size == 0:
                continue  # all were forced: nothing depends on a score
            gap = (row[taken][:, None] - row[left][None, :]) / row[taken][:, None]
            gap = gap[window[taken][:, None] != window[left][None, :]]
            least = min(least, gap.min(initial=math.inf))
    return cuts, least
