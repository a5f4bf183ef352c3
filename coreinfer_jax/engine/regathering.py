"""Core neurons that follow a text: chosen anew from its prompt and what was made since, gathered where they drifted.

The full model reads every token of a lossless generation, and what its neurons did is kept (`verification.Watched`).
Between two dispatches it is added to the sums over the prompt, and what chose the prompt's core neurons chooses again.
"""

from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from coreinfer_jax.engine.drafting import LOOK_EVERY
from coreinfer_jax.engine.request import Request
from coreinfer_jax.engine.rows import Rows
from coreinfer_jax.engine.verification import Watched, watched_places
from coreinfer_jax.model import MlpPass
from coreinfer_jax.model.shards import agreed, constrained, over_shards, specs
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choice import Chosen
from coreinfer_jax.sparsity.rules import Observer, Summed


@dataclass(frozen=True)
class Regathering:
    """How core neurons have followed the texts of a request's rows so far.

    Attributes:
        request: by which they are chosen.
        sums: of each observed layer, over the prompts and the tokens since.
        first: int32 [B], how many tokens of each row the sums held at first.
        summed: int32 [B], up to which position all tokens are in them, but for those that there was no time to sum up.
        chosen: the neurons in use.
        drift: the share of them that the last look would have replaced; None before the first.
        times: how often they were gathered anew.
        sum_seconds: what summing up took the last time, None before the first.
        look_seconds: what the last look took, None before the first.
        gather_seconds: what the last gather took, None before the first.
        seconds: what summing up, looking and gathering took in all.
    """

    request: Request
    sums: list[Any]
    first: np.ndarray
    summed: np.ndarray
    chosen: Chosen
    drift: float | None = None
    times: int = 0
    sum_seconds: float | None = None
    look_seconds: float | None = None
    gather_seconds: float | None = None
    seconds: float = 0.0

    def is_due(self, rows: Rows) -> bool:
        """Whether some row has so many new tokens that it may have drifted, and some as many to make."""
        left = np.where(np.array(rows.done), 0, np.array(rows.sampling.budget) - np.array(rows.length))
        return min((np.array(rows.position) - self.summed).max(), left.max()) >= LOOK_EVERY

    @property
    def has_drifted(self) -> bool:
        """Whether the last look found more neurons to replace than the request lets pass."""
        least = self.request.regather_at
        return self.drift is not None and least is not None and self.drift > least

    def summed_up(self, watched: Watched, rows: Rows) -> "Regathering":
        """With all tokens of `rows` that the full model has read."""
        params, position = self.request.params, np.array(rows.position)
        counted = np.arange(watched.inputs.shape[2])[None, :] < (position - self.summed)[:, None]
        observer = self.request.chooser.observer(counted, params)
        assert observer is not None, "something is observed"
        # The first turn may have compiled.
        turns = 2 if self.sum_seconds is None else 1
        taken, sums = [], self.sums
        for _ in range(turns):
            began = perf_counter()
            sums = jax.block_until_ready(with_watched(params.weights, observer, watched, self.sums))
            taken.append(self._since(began))
        seconds = self.seconds + turns * min(taken)
        return replace(self, sums=sums, summed=position, sum_seconds=min(taken), seconds=seconds)

    def skipped(self, rows: Rows) -> "Regathering":
        """Without the tokens of `rows` that are not summed up yet: their places are needed."""
        return replace(self, summed=np.array(rows.position))

    def looked(self) -> tuple["Regathering", Chosen]:
        """What is chosen of the sums, and how far it is from the neurons in use."""
        began, seen = perf_counter(), self.request.seen(self.sums)
        found = self.request.chooser.choose(replace(seen, counted=seen.counted + self.summed - self.first))
        assert self.chosen.core is not None, "some neurons are left out"
        assert found.core is not None, "by the same chooser"
        drift, taken = self.chosen.core.replaced_by(found.core), self._since(began)
        return replace(self, drift=drift, look_seconds=taken, seconds=self.seconds + taken), found

    def gathered(self, chosen: Chosen) -> tuple["Regathering", Params]:
        """With `chosen` in use, and the weights narrowed to them."""
        began = perf_counter()
        narrow = jax.block_until_ready(chosen.weights(self.request.params))
        taken, times = self._since(began), self.times + 1
        known = replace(self, chosen=chosen, times=times, gather_seconds=taken, seconds=self.seconds + taken)
        return known, narrow

    def _since(self, began: float) -> float:
        """Seconds since then, the same in all processes."""
        return float(agreed(jnp.float32(perf_counter() - began), self.request.params.mesh))


def regathering(request: Request, sums: list[Any], chosen: Chosen) -> Regathering | None:
    """How core neurons are to follow a request's texts, from the `sums` over its prompts on; None where they stay."""
    if not request.regathers or chosen.core is None or all(own is None for own in chosen.core.layers):
        return None
    first = request.cached + request.prompts.lengths
    return Regathering(request, sums, first, first, chosen)


def nothing_watched(regathering: Regathering, size: int) -> Watched:
    """Room for what is read between two looks, up to `size` (n) drafted tokens at a time."""
    request = regathering.request
    start, places = jnp.asarray(regathering.first), watched_places(size)
    return no_passes(request.params, start, places=places, layers=request.observed)


@partial(jax.jit, static_argnames=("places", "layers"))
def no_passes(params: Params, start: Array, *, places: int, layers: tuple[int, ...]) -> Watched:
    """Room for `places` (W) tokens of each row, the first of them at positions `start` int32 [B]."""
    shape, config = (len(start), len(layers), places), params.config
    inputs, activations = (jnp.zeros((*shape, size), params.dtype) for size in (config.hidden_size, config.mlp_size))
    # A copy: the state is donated.
    watched: Watched = constrained(Watched(inputs, activations, start.copy(), jnp.float32(0), layers), params.mesh)
    return watched


@jax.jit
def with_watched(params: Params, observer: Observer, watched: Watched, sums: list[Any]) -> list[Any]:
    """`sums` of each layer with those of the tokens that the observer counts of what was watched."""
    added: Summed = over_shards(_added, params.mesh, results=specs(Summed(sums)))(
        params, observer, watched, Summed(sums)
    )
    made: list[Any] = added.sums
    return made


def _added(params: Params, observer: Observer, watched: Watched, summed: Summed) -> Summed:
    def one(i: int, l: int) -> Any:
        activations = watched.activations[:, i]
        # No observer looks at what the activation function gave.
        return observer(l, params.layers[l], MlpPass(watched.inputs[:, i], activations, activations))

    new = [one(i, l) for i, l in enumerate(watched.layers)]
    return Summed(jax.tree.map(jnp.add, summed.sums, new))
