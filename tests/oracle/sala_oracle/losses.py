"""The losses of the training stages, as sums or means like the trainer's, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np


def cross_entropy_sum(logits, labels):
    """Sum of -log p[label] over the tokens that have a label (>= 0)."""
    counted = np.flatnonzero(labels >= 0)
    return -jax.nn.log_softmax(logits, axis=-1)[counted, labels[counted]].sum()


def kl_sum(teacher_logits, logits, temperature):
    """Sum over all tokens of temperature^2 KL(teacher || student), both softened by the temperature."""
    teacher = jax.nn.log_softmax(teacher_logits / temperature, axis=-1)
    student = jax.nn.log_softmax(logits / temperature, axis=-1)
    return temperature**2 * (jnp.exp(teacher) * (teacher - student)).sum()


def alignment_mean(pairs, hidden, form):
    """Mean over layers of the mean over tokens of (teacher's mixer - student's mixer): "mse" squared and averaged over features,
    "l2_norm" Euclidean norm / sqrt(hidden). `pairs` has both outputs [T, hidden] of each layer."""
    if form == "mse":
        layers = [((teacher - student) ** 2).mean() for teacher, student in pairs]
    elif form == "l2_norm":
        layers = [jnp.sqrt(((teacher - student) ** 2).sum(axis=-1)).mean() / np.sqrt(hidden) for teacher, student in pairs]
    else:
        raise ValueError(f"alignment_loss {form}: expected mse or l2_norm")
    return sum(layers) / len(layers)
