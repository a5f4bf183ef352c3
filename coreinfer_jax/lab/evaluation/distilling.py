"""Distillation of linear neurons: after their fit they learn to make a narrowed model foretell what the full one does.

A fit makes what each layer loses small, as if all others lost nothing. What counts is what the whole model loses. So
the directions, slopes and constants of all layers are trained together on the KL divergence from the full model, over
continuations of texts at many keep ratios. No other weight changes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.lab.evaluation.fitting import halved, made, unexplained_over
from coreinfer_jax.lab.evaluation.measure import ranked_neurons
from coreinfer_jax.lab.evaluation.passes import Reading, read, with_fixed_sets
from coreinfer_jax.model.weights import Params
from coreinfer_jax.progress import progress
from coreinfer_jax.sparsity.calibration import Explained
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.narrow import linear_worth
from coreinfer_jax.sparsity.rules import Contribution
from coreinfer_jax.text.corpus import Beginnings

# Tokens of a continuation, and the shortest prompt that a text is cut to.
CONTINUATION, LEAST_PROMPT = 128, 32
# Texts of a step, and how often each is read in it, every time at another keep ratio: the full model reads it once.
TEXTS, READINGS = 4, 2
# In how many steps a text of documents comes, where these are as long as is wanted.
REUSED = 5
# Keep ratios are drawn between these, linear neurons counted in, and each layer's apart by up to this factor, so that
# what is learnt holds however a keep ratio is shared out.
KEEPS, APART = (0.15, 0.85), 1.3
# Of Adam, as a share of each array's root mean square; it rises for some steps, then falls to 0 along a line. Three
# times as much was worse on SmolLM2-135M over 16 steps.
RATE, RISING_STEPS, DECAY = 4e-3, 8, 0.98
# Of the texts, tokens over which neurons beside trained linear ones are summed up.
SUMMED_TOKENS = 1 << 14
# Below it a divergence is rounding.
LEAST_KL = 1e-4


@dataclass(frozen=True)
class Lesson:
    """Texts to learn from.

    Attributes:
        rows: int32 [n, W], of each its prompt, its continuation, and zeros.
        prompts: int32 [n], tokens of each prompt.
        lengths: int32 [n], tokens of each prompt and its continuation.
    """

    rows: np.ndarray
    prompts: np.ndarray
    lengths: np.ndarray


@struct.dataclass
class Student:
    """What is trained, of every layer, in float32.

    Attributes:
        directions: [r, D].
        slopes: [r, F].
        constants: [F].
    """

    directions: list[Array]
    slopes: list[Array]
    constants: list[Array]

    def fits(self) -> tuple[LinearFit, ...]:
        """As fits that are asked for what they expect, not for what they write."""
        layers = zip(self.directions, self.slopes, self.constants, strict=True)
        return tuple(LinearFit(*own, written=jnp.zeros((0, 0))) for own in layers)


def wanted(steps: int) -> int:
    """How many texts so many steps should have to learn from, of a prompt and a continuation each."""
    return steps * TEXTS // REUSED


def lesson(texts: Sequence[list[int]], prompts: Sequence[int], seed: int) -> Lesson:
    """Texts cut to prompts and continuations.

    Args:
        texts: tokens of each, of any length.
        prompts: how long a prompt each begins with, 0 where any beginning may be one.
        seed: of the lengths of prompts, where they are drawn.

    Raises:
        CoreInferError: no text that is long enough.
    """
    rng = np.random.default_rng(seed)
    cut: list[tuple[list[int], int]] = []
    for tokens, begun in zip(texts, prompts, strict=True):
        if begun:
            cut.append((tokens[: begun + CONTINUATION], begun))
            continue
        for first in range(0, len(tokens), 2 * CONTINUATION):
            prompt = int(rng.integers(LEAST_PROMPT, CONTINUATION + 1))
            cut.append((tokens[first : first + prompt + CONTINUATION], prompt))
    cut = [(tokens, prompt) for tokens, prompt in cut if len(tokens) > prompt]
    if not cut:
        raise CoreInferError(
            f"texts of more than {LEAST_PROMPT} tokens are needed to train linear neurons; give longer"
        )
    known = Beginnings.of([tokens for tokens, _ in cut])
    cut_to = np.array([prompt for _, prompt in cut], np.int32)
    width = int(cut_to.max()) + CONTINUATION
    return Lesson(np.pad(known.rows, ((0, 0), (0, width - known.rows.shape[1]))), cut_to, known.lengths)


def distil(params: Params, explained: Explained, texts: Beginnings, of: Lesson, steps: int, seed: int) -> Explained:
    """Linear neurons that have learnt on.

    Args:
        params: dense weights.
        explained: the linear neurons to begin with.
        texts: some of them, of `SUMMED_TOKENS` tokens or more, are read again when they are done: for what they leave.
        of: what they learn from.
        steps: how long; each reads `TEXTS` texts at `READINGS` keep ratios each.
        seed: of the order of texts, and of keep ratios.

    Returns:
        As many as before, their directions and slopes rounded to 16 bits again.

    Raises:
        CoreInferError: losses that are NaN or infinite, or results too large for 16 bits.
    """
    weights, rng = params.weights, np.random.default_rng(seed)
    student = Student(
        # Copies: what a step is given it takes over.
        directions=[jnp.array(fit.directions, jnp.float32) for fit in explained.fits],
        slopes=[jnp.array(fit.slopes, jnp.float32) for fit in explained.fits],
        constants=[jnp.array(fit.constants) for fit in explained.fits],
    )
    state = _adam().init(student)
    with progress([], total=steps, desc="training linear neurons", unit="step") as bar:
        for step, chosen in zip(range(steps), _drawn(len(of.rows), rng), strict=False):
            kept = _kept(params, linear_worth(params), rng)
            reading, places = _read(weights, explained, of, chosen)
            rate = np.float32(RATE * min(1, (step + 1) / RISING_STEPS) * (1 - step / steps))
            own = (of.rows[chosen], of.prompts[chosen], of.lengths[chosen])
            student, state, loss = _step(weights, student, state, reading, places, kept, own, rate)
            if not np.isfinite(found := float(loss)):
                raise CoreInferError(
                    f"the loss of step {step + 1} of training linear neurons is {found}; train for none"
                )
            bar.set_postfix_str(f"log KL {found:.2f}", refresh=False)
            bar.update()
    downs = [np.asarray(layer.mlp.down.weight, np.float32) for layer in params.layers]
    fits = tuple(
        made(*halved(np.asarray(fit.directions), np.asarray(fit.slopes)), np.asarray(fit.constants), down)
        for fit, down in zip(student.fits(), downs, strict=True)
    )
    every = max(1, int(texts.lengths.sum()) // SUMMED_TOKENS)
    some = Beginnings(texts.rows[::every], texts.lengths[::every])
    return Explained(fits, unexplained_over(params, some, fits), explained.up_to)


def _adam() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(b2=DECAY), optax.scale_by_param_block_rms())


def _drawn(texts: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Numbers of texts for one step after another; each comes once before any comes again, or nearly so."""
    while True:
        order = rng.permutation(max(texts, TEXTS)) % texts
        yield from (order[first : first + TEXTS] for first in range(0, len(order) - TEXTS + 1, TEXTS))


def _kept(params: Params, worth: int, rng: np.random.Generator) -> np.ndarray:
    """How many neurons each reading keeps in each layer beside linear ones: int32 [L, TEXTS * READINGS]."""
    L, F = params.config.num_layers, params.config.mlp_size
    shares = rng.uniform(*KEEPS, TEXTS * READINGS) * APART ** rng.uniform(-1, 1, (L, TEXTS * READINGS))
    return np.clip(shares * F - worth, 1, F).astype(np.int32)


def _read(params: Params, explained: Explained, of: Lesson, chosen: np.ndarray) -> tuple[Reading, list[Array]]:
    """The full model over the chosen texts, and each neuron's place in the order of every layer, [TEXTS, F]."""
    rows, prompts = of.rows[chosen], of.prompts[chosen]
    counted = np.arange(rows.shape[1])[None, :] < prompts[:, None]
    rule = Contribution()
    observer = rule.observer(counted, params.config.mlp_size, explained.fits)
    reading = read(params, jnp.asarray(rows), jnp.asarray(prompts), [(observer, observer)], scored=CONTINUATION)
    own = [layer[0][0] for layer in reading.sums]
    downs = [layer.mlp.down for layer in params.layers]
    shares = np.float32(rule.prior_tokens), np.float32(0)
    places, _ = ranked_neurons(own, list(explained.prior), downs, *shares, rule=Contribution)
    return replace(reading, sums=[]), places


@partial(jax.jit, donate_argnames=("student", "state"))
def _step(
    params: Params,
    student: Student,
    state: optax.OptState,
    reading: Reading,
    places: list[Array],
    kept: Array,
    texts: tuple[Array, Array, Array],
    rate: Array,
) -> tuple[Student, optax.OptState, Array]:
    """One step of Adam.

    Args:
        params: dense weights, which stay.
        student: what is trained.
        state: of Adam.
        reading: of TEXTS texts.
        places: per layer, [TEXTS, F], each neuron's place; the first are kept.
        kept: int32 [L, TEXTS * READINGS], how many.
        texts: rows [TEXTS, W], prompts [TEXTS] and lengths [TEXTS], as of a `Lesson`.
        rate: of learning, [].

    Returns:
        What is trained, the state, and the mean logarithm of a reading's KL divergence, [].
    """
    rows, prompts, lengths = texts
    at = prompts[:, None] + jnp.arange(CONTINUATION)[None, :]
    rest = _repeated(jnp.take_along_axis(rows, at, axis=1))
    scored = _repeated((at < lengths[:, None]).astype(jnp.float32))
    reading = jax.tree.map(lambda array: _repeated(array) if array.ndim else array, reading)
    masks = [_repeated(place) < most[:, None] for place, most in zip(places, kept, strict=True)]
    nothing = [jnp.zeros(mask.shape) for mask in masks]
    everywhere = jnp.ones(len(masks), bool)

    def loss(student: Student) -> Array:
        found = with_fixed_sets(params, reading, rest, rest, masks, nothing, (student.fits(), everywhere))
        of_rows = (found.kl * scored).sum(axis=1) / scored.sum(axis=1)
        # By logarithms a tenth less counts as much at a high keep ratio as at a low one.
        return jnp.log(of_rows + LEAST_KL).mean()

    value, gradients = jax.value_and_grad(loss)(student)
    updates, state = _adam().update(gradients, state, student)
    return jax.tree.map(lambda own, update: own - rate * update, student, updates), state, value


def _repeated(array: Array) -> Array:
    return jnp.repeat(array, READINGS, axis=0)
