"""What a model is (`ModelConfig`) and how its core neurons are chosen (`CoreConfig`): frozen and hashable."""

from dataclasses import dataclass
from numbers import Real
from typing import Literal, get_args

from coreinfer_jax.errors import CoreInferError, shown

Budget = Literal["per_token", "mean"]
Method = Literal["stability", "similarity", "fused", "auto"]
Allocation = Literal["sensitivity", "equal"]
RuleName = Literal["contribution", "votes", "magnitude-votes", "griffin", "griffin-norm", "energy", "norm", "random"]
MOST_PRIOR_TOKENS = 1e9
# The rule whose sums a calibration holds.
PRIOR_RULE: RuleName = "contribution"
METHODS: tuple[Method, ...] = get_args(Method)
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoPE) and its scaling beyond the trained context.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: `none`; `linear` divides every frequency by `factor`; `llama3` divides only the long wavelengths
            and blends in between (the rule published with Llama 3.1).
        factor: the divisor of both scalings.
        low_freq_factor: `llama3`: wavelengths above original_max_positions / low_freq_factor are fully scaled.
        high_freq_factor: `llama3`: wavelengths below original_max_positions / high_freq_factor are left alone.
        original_max_positions: `llama3`: context length the unscaled model was trained with.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The static facts of a decoder-only model. Two models with equal configs share compiled programs.

    Attributes:
        family: which of `coreinfer_jax.model` computes it.
        vocab_size: V.
        hidden_size: D.
        embed_size: width of the token embedding; differs from D only for OPT-350m, which projects in and out.
        mlp_size: F, the number of MLP neurons per layer before any narrowing.
        num_layers: L.
        num_heads: N, query heads.
        num_kv_heads: G, key/value heads; N for multi-head, 1 for multi-query attention.
        head_size: H.
        max_positions: longest sequence (prompt and new tokens together).
        activation: applied to the gate (LLaMA) or to the up projection (OPT).
        norm_eps: epsilon inside LayerNorm (OPT) or RMSNorm (LLaMA).
        norm_first: normalise before each block; False (OPT-350m) normalises after the residual sum.
        final_norm: whether a last norm precedes the output projection.
        attention_bias: whether the four attention projections have biases.
        mlp_bias: whether the MLP projections have biases.
        tied: whether the output projection is the token embedding.
        rope: rotary settings; None for learned positions (OPT).
        bos_id: id of the beginning-of-sequence token, if any.
        eos_ids: ids after which text is complete; `generate` stops there only when asked to.
        pad_id: padding id, if any.
    """

    family: Literal["opt", "llama"]
    vocab_size: int
    hidden_size: int
    embed_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    activation: Literal["relu", "silu"]
    norm_eps: float
    norm_first: bool = True
    final_norm: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    rope: Rope | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None


@dataclass(frozen=True)
class CoreConfig:
    """How core neurons are predicted from a prompt; `CoreConfig.paper()` is what the paper does (section 3).

    Attributes:
        alpha: `votes`: share of a token's positive neurons that become its token-wise core neurons, in (0, 1].
        beta: keep ratio: share of F kept as sentence-wise core neurons, in (0, 1]; K = max(1, floor(beta F)) in each
            layer, or on average over them (`allocation`). The default is the smallest that raises the perplexity of
            neither embedded model by a fifth, calibrated or not, on prompts of 64 tokens or more
            (benchmarks/results/keep-ratio.jsonl).
        budget: `votes`: `per_token` gives each token alpha times its own count of positive neurons (the paper's text);
            `mean` gives every token alpha times its own prompt's mean count (the authors' code), also where rows
            vote together.
        layers: which layers are narrowed, as fractions of depth: layer l of L when layers[0] <= l / L < layers[1].
        per_row: choose one core set per row of a batch, so that each row equals its single run; every row then
            reads its own narrowed weights. False chooses one set for all rows together: the narrowed weights are
            read once per step for the whole batch.
        count_bos: whether a beginning-of-sequence token at the start of the prompt counts, as in the paper.
        method: `stability` takes the prompt's own core neurons; `similarity` those of the group of texts it is nearest
            to; `fused` the most voted when the group's frequencies count as `group_tokens` more tokens of the prompt;
            `auto` stability for a stable prompt and similarity for others. All but stability need groups, without
            which `auto` stays with stability.
        gamma: keep ratio of a group's neurons, in (0, 1]; None takes `beta`.
        least_stability: `auto`: the stability figure from which a prompt is stable. The default is about where, on the
            embedded models at beta 0.4 and 0.7, the prompt's own neurons begin to foretell those of prompt and
            continuation better than its group's do (docs/core-neurons.md).
        least_tokens: `auto`: the number of voting tokens from which a prompt may be stable, at least 2. The figure of
            a shorter one says little, whatever its value. Where rows share one set the shortest row counts.
        group_tokens: `fused`: how many tokens of the prompt the group's frequencies weigh as much as.
        prior_tokens: `stability`: how many tokens of the prompt a model's calibration weighs as much as; 0 leaves it
            out.
        rule: what ranks neurons, one of `RULE_NAMES` (docs/quality.md). None takes `contribution`, which measured best,
            with `stability`, and the paper's votes with the other methods, whose groups are made of votes.
        compensation: `stability`: the share of its mean activation at which a neuron that is not kept stands, in
            [0, 1]; per layer a constant vector in the MLP's output. A half measured best.
        allocation: `stability`: how `beta` is shared out over the narrowed layers, the total being the same: by
            `sensitivity` each gets what it is worth by the model's calibration, and without one the first gets more;
            `equal` gives all the same, as in the paper.

    Raises:
        CoreInferError: a value outside its range.
    """

    alpha: float = 0.4
    beta: float = 0.5
    budget: Budget = "per_token"
    layers: tuple[float, float] = (0.0, 1.0)
    per_row: bool = True
    count_bos: bool = True
    method: Method = "stability"
    gamma: float | None = None
    least_stability: float = 0.7
    least_tokens: int = 32
    group_tokens: float = 64.0
    prior_tokens: float = 256.0
    rule: RuleName | None = None
    compensation: float = 0.5
    allocation: Allocation = "sensitivity"

    def __post_init__(self) -> None:
        check_fraction("alpha", self.alpha)
        check_fraction("beta", self.beta)
        check_budget(self.budget)
        self._check_layers()
        for name in ("per_row", "count_bos"):
            if not isinstance(getattr(self, name), bool):
                raise CoreInferError(f"{name}={shown(getattr(self, name))}: give True or False")
        self._check_method()
        self._check_rule()

    def _check_layers(self) -> None:
        fractions = self.layers if isinstance(self.layers, tuple) and len(self.layers) == 2 else (None, None)
        numbers = all(isinstance(value, Real) for value in fractions)
        if not numbers or not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise CoreInferError(
                f"layers={shown(self.layers)}: give a tuple of fractions of depth, 0 <= start < stop <= 1"
            )

    def _check_method(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise CoreInferError(f"method={shown(self.method)}: give {', '.join(map(repr, METHODS))}")
        if self.gamma is not None:
            check_fraction("gamma", self.gamma)
        if not isinstance(self.least_stability, Real) or not -1 <= self.least_stability <= 1:
            raise CoreInferError(f"least_stability={shown(self.least_stability)}: give a number from -1 to 1")
        whole = isinstance(self.least_tokens, int) and not isinstance(self.least_tokens, bool)
        if not whole or self.least_tokens < 2:
            raise CoreInferError(f"least_tokens={shown(self.least_tokens)}: give a whole number of at least 2")
        for name in ("group_tokens", "prior_tokens"):
            value = getattr(self, name)
            if not isinstance(value, Real) or not 0 <= value <= MOST_PRIOR_TOKENS:
                raise CoreInferError(f"{name}={shown(value)}: give a number from 0 to 1e9")

    def _check_rule(self) -> None:
        if self.rule is not None and self.rule not in RULE_NAMES:
            raise CoreInferError(f"rule={shown(self.rule)}: give {', '.join(map(repr, RULE_NAMES))}")
        if self.method != "stability" and self.ranking != "votes":
            raise CoreInferError(
                f"rule={self.rule!r}: groups are made of votes; with method={self.method!r} leave it out"
            )
        check_share("compensation", self.compensation)
        if self.allocation not in ALLOCATIONS:
            raise CoreInferError(f"allocation={shown(self.allocation)}: give {', '.join(map(repr, ALLOCATIONS))}")

    @classmethod
    def paper(cls) -> "CoreConfig":
        """The paper's setting for extraction and question answering (section 5): alpha 0.4, beta 0.2.

        For translation the paper takes beta 0.4: `replace(CoreConfig.paper(), beta=0.4)`. Where it predicts by
        similarity it narrows from the fourth layer on: `layers=(3 / L, 1.0)`.
        """
        return cls(
            alpha=0.4,
            beta=0.2,
            budget="per_token",
            layers=(0.0, 1.0),
            count_bos=True,
            rule="votes",
            compensation=0,
            allocation="equal",
        )

    @property
    def ranking(self) -> RuleName:
        """The rule that ranks neurons."""
        if self.rule is not None:
            return self.rule
        return "contribution" if self.method == "stability" else "votes"

    @property
    def group_ratio(self) -> float:
        """The keep ratio of a group's neurons."""
        return self.beta if self.gamma is None else self.gamma

    def narrowed_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those of `num_layers` (L) layers that are cut down to core neurons, ascending.

        Raises:
            CoreInferError: there are none.
        """
        start, stop = self.layers
        narrowed = tuple(l for l in range(num_layers) if start <= l / num_layers < stop)
        if not narrowed:
            raise CoreInferError(f"layers={self.layers} selects none of the model's {num_layers} layers; widen it")
        return narrowed


def check_fraction(name: str, value: float) -> None:
    """Refuse a share outside (0, 1]; `not` catches NaN as well."""
    if not isinstance(value, Real) or not 0 < value <= 1:
        raise CoreInferError(f"{name}={shown(value)}: give a share above 0 and at most 1")


def check_share(name: str, value: float) -> None:
    """Refuse a share outside [0, 1]; `not` catches NaN as well."""
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise CoreInferError(f"{name}={shown(value)}: give a share from 0 to 1")


def check_budget(budget: str) -> None:
    """Refuse an unknown name of a token budget rule."""
    if not isinstance(budget, str) or budget not in ("per_token", "mean"):
        raise CoreInferError(f"budget={shown(budget)}: give 'per_token' or 'mean'")
