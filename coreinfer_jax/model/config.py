"""What a model is: frozen and hashable."""

from dataclasses import dataclass, field
from typing import Literal

# Of a field that the first release lacked: its default is what that release computed, and is not stored.
LATER = {"later": True}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding (RoPE) and its scaling beyond the trained context.

    Attributes:
        theta: base of the geometric series of wavelengths.
        scaling: `none`; `linear` divides every frequency by `factor`; `llama3` divides only the long wavelengths
            and blends in between (the rule published with Llama 3.1); `longrope` divides each frequency by a factor of
            its own, of one list within the trained context and of another beyond it (Phi-3).
        factor: the divisor of `linear` and `llama3`.
        low_freq_factor: `llama3`: wavelengths above original_max_positions / low_freq_factor are fully scaled.
        high_freq_factor: `llama3`: wavelengths below original_max_positions / high_freq_factor are left alone.
        original_max_positions: `llama3`, `longrope`: context length the unscaled model was trained with.
        part: the share of a head's entries that rotate, the first ones.
        short_factors: `longrope`: divisors where a run has room for no more than original_max_positions.
        long_factors: `longrope`: divisors where it has room for more.
        attention_factor: `longrope`: rotated queries and keys are multiplied by it.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3", "longrope"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    part: float = field(default=1.0, metadata=LATER)
    short_factors: tuple[float, ...] = field(default=(), metadata=LATER)
    long_factors: tuple[float, ...] = field(default=(), metadata=LATER)
    attention_factor: float = field(default=1.0, metadata=LATER)

    def is_long(self, capacity: int) -> bool:
        """Whether a run with room for `capacity` (S) positions rotates in the way for long contexts.

        As in llama.cpp the room decides, and not the length so far: keys in the cache cannot be turned anew.
        """
        return self.scaling == "longrope" and capacity > self.original_max_positions


@dataclass(frozen=True)
class ModelConfig:
    """The static facts of a decoder-only model. Two models with equal configs share compiled programs.

    Attributes:
        family: which of `coreinfer_jax.model.families` computes it.
        vocab_size: V, the number of tokens there are.
        hidden_size: D, the width between layers.
        embed_size: width of the token embedding; differs from D only for OPT-350m, which projects in and out.
        mlp_size: F, the number of MLP neurons per layer before any narrowing.
        num_layers: L, the number of layers.
        num_heads: N, query heads.
        num_kv_heads: G, key/value heads; N for multi-head, 1 for multi-query attention.
        head_size: H, the width of an attention head.
        max_positions: longest sequence (prompt and new tokens together).
        activation: applied to the gate (LLaMA) or to the up projection (OPT); `gelu` is exact, `gelu_tanh` its
            approximation.
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
        windows: per layer, how many tokens a query sees, itself among them; None for all before it. Empty where every
            layer sees all.
        rotated: per layer, whether positions rotate its queries and keys; empty where they do in every layer.
        local_rope: rotary settings of the layers that have a window; None for those of all layers.
        query_scalar: scores of queries and keys are divided by its square root; None for that of H.
        score_cap: scores c are pressed between -cap and cap, as cap tanh(c / cap); None for no cap.
        logit_cap: the same for logits.
        activates_up: the activation function acts on the up projection as well as on the gate (dReLU).
        norm_plus_one: RMSNorm multiplies by its scale plus 1, in float32.
    """

    family: str
    vocab_size: int
    hidden_size: int
    embed_size: int
    mlp_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_positions: int
    activation: Literal["relu", "silu", "gelu", "gelu_tanh"]
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
    windows: tuple[int | None, ...] = field(default=(), metadata=LATER)
    rotated: tuple[bool, ...] = field(default=(), metadata=LATER)
    local_rope: Rope | None = field(default=None, metadata=LATER)
    query_scalar: int | None = field(default=None, metadata=LATER)
    score_cap: float | None = field(default=None, metadata=LATER)
    logit_cap: float | None = field(default=None, metadata=LATER)
    activates_up: bool = field(default=False, metadata=LATER)
    norm_plus_one: bool = field(default=False, metadata=LATER)
