"""llama.cpp through llama-cpp-python, on GGUF files of random weights."""

from pathlib import Path
from time import perf_counter

import jax
import llama_cpp
import numpy as np

from benchmarks.contenders.trial import Report, Trial
from benchmarks.shapes import random_prompts, shape_config
from coreinfer_jax.device import usable_cores
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.model.cache import cache_bytes


def run(trial: Trial) -> Report:
    """Load, generate once, then measure."""
    assert trial.gguf is not None, "llama.cpp reads its weights from a file"
    began = perf_counter()
    size = trial.prompt_tokens + trial.new_tokens
    threads, on_gpu = usable_cores(), jax.default_backend() == "gpu"
    if on_gpu and not llama_cpp.llama_supports_gpu_offload():
        raise CoreInferError("this llama-cpp-python is built for CPUs only")
    model = llama_cpp.Llama(
        trial.gguf,
        n_ctx=size,
        n_batch=size,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1 if on_gpu else 0,
        verbose=False,
    )
    loaded = perf_counter()
    prompt = [int(token) for token in random_prompts(shape_config(trial.fields), 1, trial.prompt_tokens)[0]]
    runs = [_generate(model, prompt, trial.new_tokens) for _ in range(trial.generations + 1)]
    return Report(
        decode_seconds=[decoding for _, decoding, _ in runs[1:]],
        first_token_seconds=[first for first, _, _ in runs[1:]],
        made_tokens=[made for _, _, made in runs[1:]],
        load_seconds=loaded - began,
        first_call_seconds=runs[0][0] + runs[0][1],
        bytes_per_token=_bytes_per_token(Path(trial.gguf), trial),
    )


def _generate(model: llama_cpp.Llama, prompt: list[int], tokens: int) -> tuple[float, float, int]:
    """Seconds to the first token and of all others, and how many there were."""
    began = perf_counter()
    model.reset()
    model.eval(prompt)
    made = [_greedy(model)]
    first = perf_counter()
    while len(made) < tokens:
        model.eval(made[-1:])
        made.append(_greedy(model))
    return first - began, perf_counter() - first, len(made)


def _greedy(model: llama_cpp.Llama) -> int:
    logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    return int(np.ctypeslib.as_array(logits, shape=(model.n_vocab(),)).argmax())


def _bytes_per_token(path: Path, trial: Trial) -> float:
    """The file but for its token embedding, of which one row is read, and a float16 cache as long as the text."""
    config = shape_config(trial.fields)
    table = config.vocab_size * config.hidden_size * {"F16": 2.0, "Q8_0": 34 / 32, "Q4_0": 18 / 32}[trial.dtype]
    length = trial.prompt_tokens + trial.new_tokens
    return path.stat().st_size - table + cache_bytes(config, 1, length, np.dtype(np.float16))
