"""What the README's first command prints, on core neurons and dense."""

from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment
from coreinfer_jax.fingerprint import fingerprint

PROMPT = "Once upon a time, there was a little"
NEW_TOKENS = 128


def measure() -> dict[str, Any]:
    """The texts of `coreinfer generate PROMPT`, as it is and with `--method dense`, for both embedded models."""
    models = {name: _texts(name) for name in ("opt", "llama")}
    return environment() | {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "models": models}


def _texts(name: str) -> dict[str, str]:
    params, tokenizer = ci.load(f"embedded:{name}")
    assert tokenizer is not None
    prompt = tokenizer.encode(PROMPT)
    texts = {"fingerprint": fingerprint(params)}
    for method, core in (("dense", None), ("core", ci.CoreConfig())):
        out = ci.generate(params, [prompt], core, max_new_tokens=NEW_TOKENS, eos_ids=params.config.eos_ids)
        texts[method] = tokenizer.decode([*prompt, *out.tokens[0, : out.lengths[0]].tolist()])
    return texts
