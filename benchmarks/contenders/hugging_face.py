"""Hugging Face transformers on PyTorch: `generate` as it comes, or with a static cache and torch.compile."""

from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.contenders.trial import Report, Trial
from benchmarks.shapes import random_prompts, shape_config
from coreinfer_jax.device import check_memory
from coreinfer_jax.model.structure import abstract_params
from coreinfer_jax.model.weights import params_bytes


class _Clock(StoppingCriteria):
    """Notes when each token is there; never stops anything."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run(trial: Trial) -> Report:
    """Load, generate once, then measure."""
    began = perf_counter()
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"  # all contenders on one device
    fields = dict(trial.fields)
    weights = params_bytes(abstract_params(shape_config(trial.fields), jnp.dtype(trial.dtype)))
    check_memory(weights, f"weights of the model, as {trial.dtype}", "take fewer --layers")
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, trial.dtype))
    model.eval()
    compiled = trial.contender == "transformers-compiled"
    if compiled and device == "cpu":  # on a GPU `generate` itself compiles what has a static cache
        model.forward = torch.compile(model.forward)
    loaded = perf_counter()
    prompts = random_prompts(shape_config(trial.fields), trial.rows, trial.prompt_tokens)
    ids = torch.from_numpy(prompts).long().to(device)
    options: dict[str, Any] = {"cache_implementation": "static"} if compiled else {}
    runs = [generated(model, ids, trial.new_tokens, options) for _ in range(trial.generations + 1)]
    times, made = zip(*runs[1:], strict=True)
    return Report(
        decode_seconds=[t[-1] - t[1] for t in times],
        first_token_seconds=[t[1] - t[0] for t in times],
        made_tokens=[tokens.shape[1] for tokens in made],
        load_seconds=loaded - began,
        first_call_seconds=runs[0][0][-1] - runs[0][0][0],
        bytes_per_token=_bytes_per_token(model, trial),
        device_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


@torch.inference_mode()
def generated(model: Any, ids: torch.Tensor, tokens: int, options: dict[str, Any]) -> tuple[list[float], torch.Tensor]:
    """When the request began and each token came, and the new tokens [B, n] after ids [B, T]."""
    clock = _Clock()
    began = perf_counter()
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return [began, *clock.times], out[:, ids.shape[1] :]


def _bytes_per_token(model: Any, trial: Trial) -> float:
    """Weights but for the tables that are looked up, and a cache as long as the text at its end, per row."""
    config = model.config
    looked_up = [] if config.tie_word_embeddings else [model.get_input_embeddings().weight]
    if hasattr(model.model, "decoder"):  # OPT's positions
        looked_up.append(model.model.decoder.embed_positions.weight)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    size -= sum(table.numel() * table.element_size() for table in looked_up)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    length = trial.prompt_tokens + trial.new_tokens
    cache = 2 * config.num_hidden_layers * heads * head * length * model.dtype.itemsize
    return float(size / trial.rows + cache)
