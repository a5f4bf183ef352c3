"""What the README's first command prints, on core neurons and dense."""

import io
from contextlib import redirect_stdout
from typing import Any

import coreinfer_jax as ci
from benchmarks.environment import environment
from coreinfer_jax.cli import main
from coreinfer_jax.model.fingerprint import fingerprint

PROMPT = "Once upon a time, there was a little"


def measure() -> dict[str, Any]:
    """The output of `coreinfer generate PROMPT`, as it is and with `--method dense`, for both embedded models."""
    return environment() | {"prompt": PROMPT, "models": {name: _texts(f"embedded:{name}") for name in ("opt", "llama")}}


def _texts(model: str) -> dict[str, str]:
    params, _ = ci.load(model, "float32")
    printed = {"dense": _printed(model, "--method", "dense"), "core": _printed(model)}
    return {"fingerprint": fingerprint(params)} | printed


def _printed(model: str, *options: str) -> str:
    output = io.StringIO()
    with redirect_stdout(output):
        status = main(["generate", PROMPT, "--model", model, *options])
    assert status == 0, "the command works"
    return output.getvalue()
