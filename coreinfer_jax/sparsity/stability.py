"""`CoreConfig`: stability-guided prediction (paper, section 3.3), by the paper's votes or by rules of our own."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from coreinfer_jax.checks import check_fraction, check_name, check_share
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import ALLOCATIONS, LEAST_BESIDE_LINEAR, Allocation, allocate
from coreinfer_jax.sparsity.calibration import PRIOR_RULE, Explained, calibration_of, explained_by, gains_of
from coreinfer_jax.sparsity.choice import Choice, Chooser, Chosen, Ranked, Seen, ToNarrow, by_set, to_gather
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.linear import LinearFit
from coreinfer_jax.sparsity.ranking import rank
from coreinfer_jax.sparsity.rules import Contribution, Observer, Rule, Sums, Votes, rule_named


@dataclass(frozen=True, kw_only=True)
class CoreConfig(Chooser):
    """Stability-guided: the prompt's own neurons. `CoreConfig.paper()` is what the paper does.

    `layers`, `per_row`, `count_bos` and `linear` are those of every `Chooser`; linear neurons stand only where the
    calibration's prior is used.

    Attributes:
        beta: keep ratio: share of F kept as sentence-wise core neurons, in (0, 1]; K = max(1, floor(beta F)) in each
            layer, or on average over them (`allocation`). The default is the smallest that raises the perplexity of
            neither embedded model by a fifth, calibrated or not, on prompts of 64 tokens or more
            (benchmarks/results/keep-ratio.jsonl).
        rule: what ranks neurons: a `Rule`, or the name of one as it is by default (docs/quality.md).
        compensation: the share of its mean activation at which a neuron that is not kept stands, in [0, 1]; per layer a
            constant vector in the MLP's output. A half measured best. It does not count where linear neurons stand.
        allocation: how `beta` is shared out over the narrowed layers, the total being the same: by `sensitivity` each
            gets what it is worth by the model's calibration, and without one the first gets more; `equal` gives all the
            same, as in the paper.

    Raises:
        CoreInferError: a value outside its range.
    """

    beta: float = 0.5
    rule: Rule | str = field(default_factory=Contribution)
    compensation: float = 0.5
    allocation: Allocation = "sensitivity"
    method: ClassVar[str] = "stability"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("beta", self.beta)
        object.__setattr__(self, "rule", rule_named(self.rule))
        check_share("compensation", self.compensation)
        check_name("allocation", self.allocation, ALLOCATIONS)

    @classmethod
    def paper(cls) -> "CoreConfig":
        """The paper's setting for extraction and question answering (section 5): alpha 0.4, beta 0.2.

        For translation the paper takes beta 0.4: `replace(CoreConfig.paper(), beta=0.4)`. Where it predicts by
        similarity it narrows from the fourth layer on: `layers=(3 / L, 1.0)`.
        """
        return cls(beta=0.2, rule=Votes(alpha=0.4, budget="per_token"), compensation=0, allocation="equal")

    @property
    def ranking(self) -> Rule:
        """The rule that ranks neurons, as a value."""
        return rule_named(self.rule)

    @property
    def adds_up(self) -> bool:
        """Whether sums over the parts of a conversation are all that it needs: a mean budget asks for all at once."""
        return getattr(self.ranking, "budget", "per_token") == "per_token"

    def check(self, params: Params, groups: Groups | None, rows: int) -> None:
        """Refuse groups, a prior that no calibration holds, and layers that select none."""
        if groups is not None:
            raise CoreInferError("groups are not used by the method 'stability'; choose Similarity, Fused or Auto")
        if self.ranking.prior_tokens and self.ranking.name != PRIOR_RULE:
            raise CoreInferError(f"rule {self.ranking.name!r}: generates without a prior; give it no prior tokens")
        self.narrowed_layers(params.config.num_layers)

    def observed_layers(self, config: ModelConfig, groups: Groups | None) -> tuple[int, ...]:
        """The narrowed ones."""
        return self.narrowed_layers(config.num_layers)

    @property
    def _knows_texts(self) -> bool:
        """Whether what a calibration read counts beside the prompt."""
        return isinstance(self.ranking, Contribution) and self.ranking.prior_tokens > 0

    def explained(self, params: Params) -> Explained | None:
        """What is known of linear neurons, if they are wanted and stand beside what else is known."""
        return super().explained(params) if self._knows_texts else None

    def _shares(self, params: Params) -> tuple[int, ...]:
        """How many neurons each layer may keep, linear ones counted in by what they cost."""
        least = 0.0 if self.explained(params) is None else LEAST_BESIDE_LINEAR
        return allocate(self, params.config, gains_of(params), least)

    def _widths_and_linear(self, params: Params) -> tuple[tuple[int, ...], tuple[bool, ...]]:
        """Per layer, neurons kept besides linear ones, and whether there are linear ones."""
        return self.beside_linear(self._shares(params), params)

    def linear_layers(self, params: Params) -> tuple[bool, ...]:
        """In which layers linear neurons stand beside those that are kept."""
        return self._widths_and_linear(params)[1]

    def widths(self, params: Params) -> tuple[int, ...]:
        """Neurons kept per layer besides linear ones, F where a layer stays dense."""
        return self._widths_and_linear(params)[0]

    def _prior(self, params: Params, linear: tuple[bool, ...]) -> tuple[Sums, ...] | None:
        """Of each layer, the sums over other texts that count beside the prompt's; None for none."""
        known, left = calibration_of(params), explained_by(params)
        if known is None or not self._knows_texts:
            return None
        of_layers = enumerate(linear)
        return tuple(left.prior[l] if left is not None and beside else known.prior[l] for l, beside in of_layers)

    def observer(self, counted: np.ndarray, params: Params) -> Observer:
        """That of the rule, of what linear neurons leave."""
        rule, F, linear = self.ranking, params.config.mlp_size, self.linear_layers(params)
        if isinstance(rule, Contribution) and any(linear):
            return rule.observer(counted, F, _fits(params, linear))
        return rule.observer(counted, F)

    def gathered(self, params: Params, groups: Groups | None, rows: int) -> tuple[tuple[int, ...], int]:
        """What is kept in layers that do not keep all, linear neurons as so many others."""
        F = params.config.mlp_size
        return tuple(0 if share == F else share for share in self._shares(params)), self.sets(rows)

    def to_narrow(self, params: Params, groups: Groups | None, rows: int) -> ToNarrow:
        """The widths of layers that do not keep all."""
        widths, linear = self._widths_and_linear(params)
        kept = tuple(None if width == params.config.mlp_size else width for width in widths)
        own = zip(kept, linear, strict=True)
        offsets = tuple(width is not None and (self.compensation > 0 or beside) for width, beside in own)
        return ToNarrow(kept, self.sets(rows), offsets, linear)

    def rank_layer(self, seen: Seen, l: int) -> Ranked | None:
        """The best neurons of a layer that does not keep all."""
        return None if seen.narrowing.kept[l] is None else self._ranked(seen, [l])[l]

    def choose(self, seen: Seen) -> Chosen:
        """The neurons that the prompt itself ranks highest, the others at a share of their mean."""
        # A layer that keeps all is read as it is.
        narrowed = [l for l, width in enumerate(seen.narrowing.kept) if width is not None]
        ranked = seen.ranked or self._ranked(seen, narrowed)
        indices, offsets = [ranked[l][0] for l in narrowed], [ranked[l][1] for l in narrowed]
        choices = (Choice("stability"),) * self.sets(len(seen.counted))
        return to_gather(narrowed, indices, offsets, seen.params, choices, seen.narrowing.linear)

    def _ranked(self, seen: Seen, layers: list[int]) -> dict[int, Ranked]:
        """The best neurons of some layers that do not keep all."""
        params, linear = seen.params, seen.narrowing.linear
        fits, prior = _fits(params, linear), self._prior(params, linear)
        sums, _ = by_set(self, seen)
        indices, offsets = rank(
            [sums[l] for l in layers],
            None if prior is None else [prior[l] for l in layers],
            [params.layers[l].mlp.down for l in layers],
            [None if (own := fits[l]) is None else own.constants for l in layers],
            np.float32(self.ranking.prior_tokens),
            np.float32(self.compensation),
            rule=type(self.ranking),
            kept=tuple(width for l in layers if (width := seen.narrowing.kept[l]) is not None),
            compensated=self.compensation > 0,
            shards=self.shards_of(params),
            mesh=params.mesh,
        )
        return dict(zip(layers, zip(indices, offsets, strict=True), strict=True))


def _fits(params: Params, linear: tuple[bool, ...]) -> tuple[LinearFit | None, ...]:
    """The fits of layers with `linear` neurons, None of all others."""
    known = explained_by(params)
    return tuple(known.fits[l] if known is not None and beside else None for l, beside in enumerate(linear))
