"""What a new token takes on core neurons and without, measured in turns."""

from collections.abc import Mapping, Sequence

from coreinfer_jax.engine.generation import generate
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choosers import Core


def milliseconds_per_token(
    params: Params, prompt: Sequence[int], ways: Mapping[str, Core], new_tokens: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of a decode step after `prompt`, for each way of choosing and round.

    Args:
        params: dense weights, with the calibration that the ways go by.
        prompt: ids.
        ways: what to compare, by name; each takes its turn in every round, after one round that compiles.
        new_tokens: of each generation, at least 2.
        rounds: how many.

    Raises:
        CoreInferError: as `generate`.
    """
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1 + rounds):
        for name, core in ways.items():
            stats = generate(params, [prompt], core, max_new_tokens=new_tokens).stats
            if turn:
                taken[name].append(1000 * stats.decode_seconds / stats.decode_steps)
    return taken
