"""The keyword arguments of generating, stated and checked once."""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.checks import check_flag, check_share
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.moving import DeviceRows

# Below it logits / temperature leaves the range of float32.
LEAST_TEMPERATURE = 1e-6
# Above it the reciprocal, by which a compiler may multiply, does.
MOST_TEMPERATURE = 1e30
# Beyond it penalised logits may leave that range, the more so when they are divided by a temperature.
MOST_PENALTY = 1e6


class GenerateOptions(TypedDict, total=False):
    """What `generate`, `stream` and `converse` take besides the model, the tokens and the way of choosing.

    Attributes:
        groups: groups of texts made ready by `prepare_groups`, for the ways of choosing that use them; None.
        max_new_tokens: new tokens per row, at most; 128.
        temperature: 0 takes the most probable token, which is the default; above 0 draws.
        top_k: draw among the k most probable tokens only; None draws among all.
        top_p: draw among the smallest set of tokens with at least this probability only; None draws among all.
        min_p: draw among tokens at least this share as probable as the most probable one only; None draws among all.
        repetition_penalty: logits of tokens that stand in the prompt or were made since are divided by this where
            they are positive, and multiplied where they are negative, also at temperature 0; None changes none.
        no_repeat_ngram_size: no n tokens stand twice in prompt and new tokens together, as far as new tokens decide
            it; None lets all repeat.
        eos_ids: a row ends after any of these, looked for among new tokens only; () never stops, the default.
        key: `jax.random.key` or int seed, needed to draw; row i draws its t-th token with
            fold_in(fold_in(key, i), t).
        device_memory: of params with MLPs on the host, bytes of the device that the call may use, such as `"12GiB"`;
            what cannot work is refused. `generate` and `stream` print a plan of them first, on standard error. None
            plans nothing.
        device_rows: of params with MLPs on the host, what an earlier `Generation` left on the device; it is used up.
        lossless: make the full model's own tokens, greedy or drawn: core neurons, and what followed the same words
            earlier in the text, only draft, and the full model keeps what it agrees with; False.
        regather_at: lossless, let core neurons follow the text: choose them anew now and then, from the prompt and all
            that was made since, and gather them anew where more than this share of those in use would be replaced, in
            [0, 1]. Refused for neurons that the caller gave, for `Auto` and for votes with the budget `mean`, which ask
            for all tokens at once. None keeps the prompt's, the default.
    """

    groups: Groups | None
    max_new_tokens: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    eos_ids: Iterable[int]
    key: Array | int | None
    device_memory: int | str | None
    device_rows: DeviceRows | None
    lossless: bool
    regather_at: float | None


@dataclass(frozen=True)
class Drawing:
    """How the tokens of a request's rows are drawn and where rows end, checked.

    Attributes:
        key: a typed key, None for greedy decoding.
        temperature: above 0 where there is a key, else 0.
        top_k: V keeps every token.
        top_p: 1 keeps every token.
        min_p: 0 keeps every token.
        repetition_penalty: 1 lowers no logit.
        no_repeat_ngram_size: 0 lets every n-gram repeat.
        eos_ids: tokens after which a row is complete.
    """

    key: Array | None = None
    temperature: float = 0.0
    top_k: int = np.iinfo(np.int32).max
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_ids: tuple[int, ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether what a text holds already changes what comes next in it."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


GREEDY = Drawing()


def drawing_of(options: GenerateOptions, config: ModelConfig) -> Drawing:
    """How `options` ask to draw.

    Raises:
        CoreInferError: a setting outside its range, a temperature without a key, an EOS id outside the vocabulary.
        TypeError: an option that there is not.
    """
    if unknown := [name for name in options if name not in GenerateOptions.__annotations__]:
        known = ", ".join(GenerateOptions.__annotations__)
        raise TypeError(f"{unknown[0]} is no option of generating; there are {known}")
    temperature, key = options.get("temperature", 0.0), options.get("key")
    _check_temperature(temperature, key)
    top_k, top_p, min_p = options.get("top_k"), options.get("top_p"), options.get("min_p")
    if top_k is not None and (not is_whole(top_k) or top_k < 1):
        raise CoreInferError(f"top_k={shown(top_k)}: give a whole number of at least 1, or None to keep every token")
    if top_p is not None and not (isinstance(top_p, Real) and 0 < top_p <= 1):
        raise CoreInferError(f"top_p={shown(top_p)}: give a share above 0 and at most 1, or None to keep every token")
    if min_p is not None and not (isinstance(min_p, Real) and 0 <= min_p <= 1):
        raise CoreInferError(f"min_p={shown(min_p)}: give a share from 0 to 1, or None to keep every token")
    penalty, size = options.get("repetition_penalty"), options.get("no_repeat_ngram_size")
    _check_penalties(penalty, size)
    V = config.vocab_size
    return Drawing(
        key=None if temperature == 0 else _typed_key(key),
        temperature=float(temperature),
        top_k=V if top_k is None else min(top_k, V),
        top_p=1.0 if top_p is None else float(top_p),
        min_p=0.0 if min_p is None else float(min_p),
        repetition_penalty=1.0 if penalty is None else float(penalty),
        no_repeat_ngram_size=0 if size is None else min(size, config.max_positions + 1),  # longer than any text
        eos_ids=_checked_eos(options.get("eos_ids", ()), V),
    )


def _check_temperature(temperature: float, key: object) -> None:
    if not isinstance(temperature, Real) or not 0 <= temperature <= MOST_TEMPERATURE:
        raise CoreInferError(
            f"temperature={shown(temperature)}: give 0 for greedy decoding or a number above 0 and up to 1e30"
        )
    if 0 < temperature < LEAST_TEMPERATURE:
        raise CoreInferError(f"temperature={temperature}: give 0 for greedy decoding or at least {LEAST_TEMPERATURE}")
    if temperature > 0 and key is None:
        raise CoreInferError(f"temperature={temperature} draws at random: give key, a jax.random.key or an int seed")


def _check_penalties(penalty: float | None, size: int | None) -> None:
    if penalty is not None and not (isinstance(penalty, Real) and 1 / MOST_PENALTY <= penalty <= MOST_PENALTY):
        raise CoreInferError(
            f"repetition_penalty={shown(penalty)}: give a number from {1 / MOST_PENALTY:g} to {MOST_PENALTY:g}; "
            "1 or None changes nothing"
        )
    if size is not None and not (is_whole(size) and size >= 0):
        raise CoreInferError(
            f"no_repeat_ngram_size={shown(size)}: give a whole number of at least 1; 0 or None lets all repeat"
        )


def _checked_eos(eos_ids: object, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(eos_ids, Iterable) or getattr(eos_ids, "ndim", 1) == 0:
        raise CoreInferError(f"eos_ids={shown(eos_ids)}: give a tuple of token ids")
    checked = tuple(eos_ids)
    for eos in checked:
        if not is_whole(eos) or not 0 <= eos < vocab_size:
            raise CoreInferError(f"eos_ids: {shown(eos)} is outside the vocabulary 0 .. {vocab_size - 1}")
    return checked


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _typed_key(key: Array | int | None) -> Array:
    """A typed key from an int seed, a typed key, or a raw uint32 key."""
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not -(2**63) <= key < 2**63:
            raise CoreInferError(f"key={shown(key)}: give a seed of at most 63 bits")
        with jax.enable_x64(True):  # JAX would otherwise keep the lower 32 bits
            return jax.random.key(key)
    try:
        array = jnp.asarray(key if hasattr(key, "dtype") else "no array")
    except TypeError as error:
        raise CoreInferError(f"key={shown(key)}: give a jax.random.key or an int seed") from error
    if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        if array.dtype != jnp.uint32 or array.shape != jax.random.key_data(jax.random.key(0)).shape:
            raise CoreInferError(f"key of shape {array.shape}, {array.dtype}: give a jax.random.key or an int seed")
        array = jax.random.wrap_key_data(array)
    if array.shape != ():
        raise CoreInferError(f"key of shape {array.shape}: give a single key")
    return array


def lossless_of(options: GenerateOptions) -> tuple[bool, float | None]:
    """Whether `options` ask for the full model's tokens, and for core neurons that follow the text from which drift on.

    Raises:
        CoreInferError: what is no bool, a drift that is no share, or one without `lossless`.
    """
    lossless, regather_at = options.get("lossless", False), options.get("regather_at")
    check_flag("lossless", lossless)
    if regather_at is not None:
        check_share("regather_at", regather_at)
        if not lossless:
            raise CoreInferError(f"regather_at={regather_at}: is of lossless generation; add lossless, or leave it out")
    return lossless, regather_at
