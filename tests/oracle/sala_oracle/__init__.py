"""A second model: MiniCPM-SALA, its teachers and its losses in JAX, float64, with gradients by automatic differentiation.

Written from the published description of the model alone, in another language than the trainer, with other loops (a recurrence over
tokens where the trainer works in chunks, whole score matrices where it works in tiles, documents one after the other) and with
jax.grad in place of backward passes. It is slow and meant for small shapes. tests/oracle/README.md says what is independent of what.
"""

import os

# Every case is compiled once and run once, so compiling counts more than running; and fewer rewritten
# formulas are welcome here. Read when jax is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_platforms", "cpu")
