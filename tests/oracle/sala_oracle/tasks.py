"""One request, as the driver of the trainer gets it: the same inputs in, loss, logits, hidden states and gradients out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from . import config as configs
from . import losses, model

REQUEST_DEFAULTS = {
    "sparse_attention": False,
    "grad_scale": 1.0,
    "ce_weight": 0.0,
    "temperature": 1.0,
    "alignment_loss": "mse",
}


@dataclasses.dataclass
class Batch:
    tokens: np.ndarray  # [T]
    labels: np.ndarray  # [T], -1: none
    borders: np.ndarray  # cu_seqlens

    @property
    def documents(self):
        return [(int(a), int(b)) for a, b in zip(self.borders[:-1], self.borders[1:])]


@dataclasses.dataclass
class Model:
    config: dict  # config.json
    weights: dict  # {name: float32 array}


def widened(weights):
    return {name: jnp.asarray(np.asarray(w, dtype=np.float64)) for name, w in weights.items()}


def loss_function(request, student, batch, teacher=None):
    """loss(weights, teacher's weights) -> (loss, {"logits", "hidden"}), a function that JAX can differentiate."""
    request = REQUEST_DEFAULTS | request
    spec = configs.read(student.config)
    teacher_spec = configs.read(teacher.config) if teacher else None
    documents, tokens, labels = batch.documents, np.asarray(batch.tokens), np.asarray(batch.labels)

    def head(weights, spec, sparse_attention):
        hidden = model.forward(weights, spec, tokens, documents, sparse_attention)
        return hidden, model.logits_of(weights, spec, hidden)

    def cross_entropy(weights, _):
        hidden, logits = head(weights, spec, request["sparse_attention"])
        return losses.cross_entropy_sum(logits, labels), {"hidden": hidden, "logits": logits}

    def distillation(weights, teacher_weights):
        hidden, logits = head(weights, spec, request["sparse_attention"])
        _, teacher_logits = head(teacher_weights, teacher_spec, False)
        loss = losses.kl_sum(teacher_logits, logits, request["temperature"])
        if request["ce_weight"]:
            loss = loss + request["ce_weight"] * losses.cross_entropy_sum(logits, labels)
        return loss, {"hidden": hidden, "logits": logits}

    def alignment(weights, teacher_weights):
        mixers = []
        model.forward(teacher_weights, teacher_spec, tokens, documents, mixers=mixers)
        pairs = [
            (target, model.mixer(layer, n, weights, spec, documents, False, model.Exact))
            for layer, (n, target) in enumerate(mixers)
        ]
        return losses.alignment_mean(pairs, spec.hidden, request["alignment_loss"]), {}

    return {"cross_entropy": cross_entropy, "distillation": distillation, "alignment": alignment}[request["task"]]


def trained_weights(request, student):
    """Those that the task has gradients of."""
    weights = widened(student.weights)
    return {name: w for name, w in weights.items() if request["task"] != "alignment" or ".self_attn." in name}


def run(request, student, batch, teacher=None):
    """{"loss", "logits", "hidden", "grad/NAME"} as float64 arrays. Gradients are of grad_scale * loss. Alignment has neither logits nor
    hidden states, and gradients of mixer tensors only."""
    function = loss_function(request, student, batch, teacher)
    scale = (REQUEST_DEFAULTS | request)["grad_scale"]

    def scaled(weights, teacher_weights):
        loss, outputs = function(weights, teacher_weights)
        return scale * loss, {"loss": loss.reshape(1), **outputs}

    teacher_weights = widened(teacher.weights) if teacher else {}
    gradients, outputs = jax.jit(jax.grad(scaled, has_aux=True))(trained_weights(request, student), teacher_weights)
    outputs |= {f"grad/{name}": value for name, value in gradients.items()}
    return {name: np.asarray(value) for name, value in outputs.items()}


def run_forward(request, student, batch, arithmetic=model.Exact):
    """{"loss", "logits", "hidden"} of a cross-entropy request, in the given arithmetic; the loss is not rounded."""
    request = REQUEST_DEFAULTS | request
    spec = configs.read(student.config)

    def outputs(weights):
        hidden = model.forward(weights, spec, np.asarray(batch.tokens), batch.documents, request["sparse_attention"], arithmetic)
        logits = model.logits_of(weights, spec, hidden, arithmetic)
        return {"loss": losses.cross_entropy_sum(logits, np.asarray(batch.labels)).reshape(1), "hidden": hidden, "logits": logits}

    return {name: np.asarray(value) for name, value in jax.jit(outputs)(widened(student.weights)).items()}


def queries_and_keys(request, student, batch):
    """[(q, k)] of every softmax layer and every document that goes through block selection, for a look at how clear it is."""
    request = REQUEST_DEFAULTS | request
    spec = configs.read(student.config)
    if not request["sparse_attention"]:
        return []
    long = [(begin, end) for begin, end in batch.documents if end - begin >= spec.sparse.dense_len]

    def pairs(weights):
        mixers, found = [], []
        model.forward(weights, spec, np.asarray(batch.tokens), batch.documents, True, mixers=mixers)
        for layer, (n, _) in enumerate(mixers):
            if not spec.linear[layer]:
                parts = model.layer_weights(weights, layer, "self_attn")
                q, k, _ = model.queries_keys_values(n, parts, spec, batch.documents, model.Exact)
                found += [(q[begin:end], k[begin:end]) for begin, end in long]
        return found

    return jax.jit(pairs)(widened(student.weights))
