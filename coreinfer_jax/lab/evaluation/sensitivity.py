"""How much a model's output depends on each layer's neurons, and up to where linear neurons are worth their bytes."""

from dataclasses import replace

import numpy as np

from coreinfer_jax.lab.evaluation.comparison import Excerpts
from coreinfer_jax.lab.evaluation.measure import measure
from coreinfer_jax.lab.evaluation.settings import Prior
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import PARTS
from coreinfer_jax.sparsity.calibration import Calibration, Explained
from coreinfer_jax.sparsity.stability import CoreConfig

# Keep ratios at which each layer is narrowed alone; between them the logarithm of the divergence is nearly a line.
SHARES = (0.1, 0.2, 0.4, 0.6, 0.8)
# Keep ratios at which linear neurons are tried against none, at equal bytes.
LINEAR_TRIED = (0.2, 0.35, 0.5, 0.65, 0.8, 0.9)
# Below what is no more than rounding.
LEAST_KL = 1e-9


def layer_gains(params: Params, rows: np.ndarray, context: int | np.ndarray, prior: Prior) -> np.ndarray:
    """What each further part of a layer's neurons takes away from the KL divergence when that layer alone is narrowed.

    Args:
        params: dense weights.
        rows: texts int32 [n, W], as `measure` takes them.
        context: tokens that the full model reads, of all texts or of each.
        prior: sums over a corpus by the default rule.

    Returns:
        Float32 [L, PARTS] in nats per token, never rising along a layer: the slopes of the convex curve below the
        measured one, so that parts may be handed out one by one, the most valuable first.

    Raises:
        CoreInferError: logits that are NaN or infinite.
    """
    L = params.config.num_layers
    settings = [
        CoreConfig(beta=share, layers=(l / L, (l + 1) / L), allocation="equal") for l in range(L) for share in SHARES
    ]
    _, measured = measure(params, rows, context, settings, prior=prior, name="narrowing layer by layer")
    kl = np.array([one.kl.mean() for one in measured], np.float64).reshape(L, len(SHARES))
    return np.stack([_falling(_lost(layer)) for layer in kl]).astype(np.float32)


def _lost(kl: np.ndarray) -> np.ndarray:
    """The divergence with 0, 1, ... PARTS parts kept, [PARTS + 1], from that at `SHARES` [S]."""
    kept, known = np.arange(PARTS + 1) / PARTS, np.log(np.maximum(kl, LEAST_KL))
    slope = (known[1] - known[0]) / (SHARES[1] - SHARES[0])
    lost = np.exp(np.where(kept < SHARES[0], known[0] + slope * (kept - SHARES[0]), np.interp(kept, SHARES, known)))
    # All neurons lose nothing, which has no logarithm: a line to 0.
    to_all = (1 - kept) / (1 - SHARES[-1])
    return np.where(kept > SHARES[-1], np.exp(known[-1]) * to_all, lost)


def _falling(lost: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression  # takes a second to import, which other commands need not wait for

    return np.asarray(isotonic_regression(-np.diff(lost), increasing=False).x)


def linear_up_to(params: Params, explained: Explained, excerpts: Excerpts, prior: Prior) -> Explained:
    """`explained` with the largest share of its neurons at which a layer still gains by linear ones at equal bytes.

    Args:
        params: dense weights.
        explained: linear neurons of theirs.
        excerpts: texts to try it on, all layers keeping the same share.
        prior: sums over a corpus by the default rule, of the texts that the linear neurons were fitted to.

    Returns:
        The same with `up_to`, one of `LINEAR_TRIED`, or 0 where they never pay.

    Raises:
        CoreInferError: logits that are NaN or infinite.
    """
    [sums] = prior.values()
    known = replace(params, calibration=Calibration(sums, None, None, replace(explained, up_to=1.0)))
    settings = [CoreConfig(beta=keep, allocation="equal", linear=own) for keep in LINEAR_TRIED for own in (False, True)]
    _, found = measure(known, excerpts.rows, excerpts.context, settings, prior=prior, name="trying linear neurons")
    lost = np.array([own.kl.mean() for own in found]).reshape(-1, 2)
    worth = np.cumprod(lost[:, 1] < lost[:, 0])  # 1 up to the first keep ratio at which they are not
    return replace(explained, up_to=(0.0, *LINEAR_TRIED)[worth.sum()])
