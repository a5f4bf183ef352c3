"""The recipe: which small models, how their weights begin, the loss, the optimizer, one compiled step."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.training.trainable import TRAINABLE
from coreinfer_jax.model import extend, observe_nothing, unembed
from coreinfer_jax.model.cache import KVCache
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import Params, named_leaves, with_leaves

# A window is read in pieces of this many positions, each attending to the cache so far, so that scores beyond the
# diagonal blocks are never computed: a third less time per token at 1024 positions.
PIECE = 256
# Rates and bounds below it are refused: far smaller ones are 0 in float32.
LEAST_RATE = 1e-30


@dataclass(frozen=True)
class Recipe:
    """What decides the trained weights, besides the text. Hashable: it is a static argument of the compiled step.

    Attributes:
        family: one of `TRAINABLE`: `opt` (ReLU, learned positions) or `llama` (SwiGLU, RoPE).
        vocab_size: V; the tokenizer is trained to this size.
        hidden_size: D, the width between layers.
        mlp_size: F, the number of MLP neurons per layer.
        num_layers: L, the number of layers.
        num_heads: N; the head size is D / N.
        sequence: tokens per window, and the model's positions.
        batch: windows per step.
        steps: optimizer steps; the learning rate's schedule spans them.
        warmup: steps of linear warm-up.
        learning_rate: at the peak; it falls to zero along a cosine.
        weight_decay: decoupled, of matrices.
        clip: largest global norm of the gradient.
        dtype: of weights and activations inside a step; the optimizer's copy stays float32.
        seed: of initial weights and of the order of windows.

    Raises:
        CoreInferError: values that make no model or no schedule; one error names them all.
    """

    family: str
    vocab_size: int = 4096
    hidden_size: int = 192
    mlp_size: int = 768
    num_layers: int = 8
    num_heads: int = 3
    sequence: int = 1024
    batch: int = 4
    steps: int = 1800
    warmup: int = 100
    learning_rate: float = 5e-3
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        # What sizes have to do with each other is only asked of values that are sizes.
        problems = [*self._bad_names(), *self._bad_counts(), *self._bad_rates()] or self._bad_sizes()
        if problems:
            raise CoreInferError("recipe: " + "; ".join(problems))

    def _bad_names(self) -> list[str]:
        known = {"family": tuple(TRAINABLE), "dtype": ("float32", "bfloat16")}
        given = {name: getattr(self, name) for name in known}
        return [
            f"{name}={value!r} (give {' or '.join(known[name])})"
            for name, value in given.items()
            if not isinstance(value, str) or value not in known[name]
        ]

    def _bad_counts(self) -> list[str]:
        named = [own for name, own in TRAINABLE.items() if name == self.family] or TRAINABLE.values()
        smallest = min(own.smallest_vocabulary for own in named)
        ranges = {
            "vocab_size": (smallest, 2**16),  # ids are stored as uint16
            **dict.fromkeys(("hidden_size", "mlp_size", "num_layers", "num_heads"), (1, 2**20)),
            **dict.fromkeys(("sequence", "batch", "steps"), (1, 2**31 - 1)),
            "warmup": (0, 2**31 - 1),
            "seed": (0, 2**32 - 1),
        }
        given = {name: getattr(self, name) for name in ranges}
        return [
            f"{name}={value!r} (give a whole number from {ranges[name][0]} to {ranges[name][1]})"
            for name, value in given.items()
            if type(value) is not int or not ranges[name][0] <= value <= ranges[name][1]
        ]

    def _bad_rates(self) -> list[str]:
        least = {"learning_rate": LEAST_RATE, "weight_decay": 0.0, "clip": LEAST_RATE}
        given = {name: getattr(self, name) for name in least}
        return [
            f"{name}={value!r} (give a finite number of at least {least[name]:g})"
            for name, value in given.items()
            if type(value) not in (int, float)
            or not least[name] <= value <= 3e38  # the range of float32; NaN compares false
        ]

    def _bad_sizes(self) -> list[str]:
        D, F, N = self.hidden_size, self.mlp_size, self.num_heads
        wrong = []
        if D % N:
            wrong.append(f"hidden_size={D} is not a multiple of num_heads={N}")
        elif TRAINABLE[self.family].rope is not None and (D // N) % 2:
            wrong.append(f"hidden_size={D} / num_heads={N} is odd; rotary positions need an even head size")
        if self.warmup >= self.steps:
            wrong.append(f"warmup={self.warmup} leaves none of steps={self.steps}; give less of it")
        weights = (self.vocab_size + self.sequence) * D + self.num_layers * D * (4 * D + 3 * F)
        if weights > 10**9:
            wrong.append(f"{weights:.1e} weights (this trains small models, up to 1e9; give smaller sizes)")
        if self.batch * self.sequence > 2**20:
            wrong.append(f"batch={self.batch} windows of sequence={self.sequence} exceed {2**20} tokens a step")
        elif self.batch * self.sequence * self.vocab_size > 2**31:
            wrong.append(
                f"batch={self.batch} windows of sequence={self.sequence} over vocab_size={self.vocab_size} need more "
                "than 8 GiB for the logits of a step (give a smaller batch)"
            )
        return wrong


@struct.dataclass
class TrainState:
    """What a step changes: float32 weights, the optimizer's moments, and the number of steps taken, int32 []."""

    params: Params
    moments: optax.OptState
    step: Array


def model_config(recipe: Recipe) -> ModelConfig:
    """The model `recipe` trains; input and output embeddings are tied."""
    own = TRAINABLE[recipe.family]
    return ModelConfig(
        family=recipe.family,
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        embed_size=recipe.hidden_size,
        mlp_size=recipe.mlp_size,
        num_layers=recipe.num_layers,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_heads,
        head_size=recipe.hidden_size // recipe.num_heads,
        max_positions=recipe.sequence,
        activation=own.activation,
        norm_eps=1e-5,
        attention_bias=own.biases,
        mlp_bias=own.biases,
        tied=True,
        rope=own.rope,
        bos_id=own.bos_id,
        eos_ids=(own.eos_id,),
        pad_id=own.pad_id,
    )


def initial_state(recipe: Recipe, params: Params) -> TrainState:
    """The state before the first step, which starts from float32 `params`."""
    return TrainState(params=params, moments=_optimizer(recipe).init(params), step=jnp.int32(0))


def initial_params(config: ModelConfig, seed: int) -> Params:
    """Normal float32 weights that keep the size of activations; what is added to the residual stream starts small."""
    shapes = abstract_params(config, jnp.dtype(jnp.float32))
    named = dict(named_leaves(shapes))
    keys = dict(zip(named, jax.random.split(jax.random.key(seed), len(named)), strict=True))

    def leaf(name: str) -> Array:
        shape = named[name].shape
        if name.endswith("norm.scale"):
            return jnp.ones(shape, jnp.float32)
        if name.endswith("bias"):
            return jnp.zeros(shape, jnp.float32)
        if name.endswith("embedding"):
            return 0.02 * jax.random.normal(keys[name], shape, jnp.float32)
        spread = shape[1] ** -0.5
        if name.endswith(("attention.out.weight", "mlp.down.weight")):
            spread *= (2 * config.num_layers) ** -0.5
        return spread * jax.random.normal(keys[name], shape, jnp.float32)

    return with_leaves(shapes, leaf)


def learning_rate(recipe: Recipe) -> optax.Schedule:
    """Linear warm-up, then a cosine down to zero at the last step."""
    return optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, recipe.warmup, recipe.steps)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon (orthogonalised momentum) for the matrices inside layers, Adam for embeddings, norms and biases.

    Muon's updates are scaled to the size of Adam's (arXiv 2502.16982), so that both share one learning rate.
    """
    schedule = learning_rate(recipe)
    muon = optax.contrib.muon(
        schedule,
        weight_decay=recipe.weight_decay,
        adam_b2=0.95,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrices,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), muon)


def _matrices(params: Params) -> Params:
    """For each leaf its (in, out) axes where it is a matrix of a layer, None where it is not."""
    axes = optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0)
    named = dict(named_leaves(params))

    def leaf(name: str) -> object:
        return axes if name.startswith("layers") and name.endswith("weight") and named[name].ndim == 2 else None

    return with_leaves(params, leaf)  # type: ignore[arg-type]


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def train_step(state: TrainState, windows: Array, recipe: Recipe) -> tuple[TrainState, Array]:
    """One optimizer step on windows int32 [B, T + 1]: the new state, and the mean loss in nats, float32 []."""
    loss, gradients = jax.value_and_grad(_mean_loss)(state.params, windows, recipe)
    updates, moments = _optimizer(recipe).update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params=params, moments=moments, step=state.step + 1), loss


@partial(jax.jit, static_argnames="recipe")
def held_out_loss(params: Params, windows: Array, recipe: Recipe) -> Array:
    """Mean loss in nats per token of windows int32 [B, T + 1], float32 []."""
    return _mean_loss(params, windows, recipe)


def _mean_loss(params: Params, windows: Array, recipe: Recipe) -> Array:
    computed = jax.tree.map(lambda leaf: leaf.astype(recipe.dtype), params)
    logits = unembed(computed, _read(computed, windows[:, :-1]))
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


def _read(params: Params, tokens: Array) -> Array:
    """Hidden states [B, T, D] of tokens [B, T], read piece by piece."""
    B, T = tokens.shape
    config = params.config
    nothing = jnp.zeros((B, config.num_kv_heads, 0, config.head_size), params.dtype)
    cache = KVCache(keys=(nothing,) * config.num_layers, values=(nothing,) * config.num_layers)
    pieces = []
    for start in range(0, T, PIECE):
        piece = tokens[:, start : start + PIECE]
        added = ((0, 0), (0, 0), (0, piece.shape[1]), (0, 0))
        cache = jax.tree.map(lambda array, added=added: jnp.pad(array, added), cache)
        hidden, cache, _ = extend(params, piece, cache, jnp.full(B, start, jnp.int32), observe_nothing)
        pieces.append(hidden)
    return jnp.concatenate(pieces, axis=1)
