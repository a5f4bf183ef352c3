"""`coreinfer info`."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from coreinfer_jax.cli import arguments
from coreinfer_jax.io.summary import Summary, summarise
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.sparsity.stability import CoreConfig

HELP = "say what a checkpoint is and what a token costs"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help=f"converted directory, {arguments.MODELS}, embedded:opt, embedded:llama",
    )
    parser.add_argument(
        "--beta",
        type=float,
        help=f"keep ratio to count bytes for, (0, 1] (as calibrated, without a calibration {CoreConfig().beta})",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    summary = summarise(options.model, options.beta)
    if options.json:
        print(json.dumps(asdict(replace(summary, tokenizer=None)) | {"tokenizer": _tokenizer(summary)}))
        return
    lines = _lines(summary)
    width = max(len(name) for name, _ in lines)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))


def _lines(summary: Summary) -> list[tuple[str, str]]:
    config = summary.config
    heads = f"N {config.num_heads} query, G {config.num_kv_heads} key/value heads of H {config.head_size}"
    saved = summary.bytes_per_token / summary.core_bytes_per_token
    dense, core = _size(summary.bytes_per_token), _size(summary.core_bytes_per_token)
    read = f"{dense} dense"
    if summary.kept_neurons < config.mlp_size:
        read += f"; {core} with {summary.kept_neurons} core neurons per layer on average ({saved:.2f}x less)"
    if summary.read_dtype not in summary.dtype:
        read += f", as {summary.read_dtype}"
    return [
        ("family", f"{config.family}, {config.activation}"),
        ("layers", f"L {config.num_layers}"),
        ("hidden size", f"D {config.hidden_size}"),
        ("MLP neurons", f"F {config.mlp_size} per layer"),
        ("attention", heads),
        ("vocabulary", f"V {config.vocab_size}, {'tied' if config.tied else 'untied'} output projection"),
        ("positions", _positions(config)),
        ("parameters", f"{summary.parameters:,}"),
        ("dtype", summary.dtype),
        ("bytes", ", ".join(f"{part} {_size(size)}" for part, size in summary.bytes_per_part.items())),
        ("read per token", read),
        ("KV cache", f"{_size(summary.cache_bytes_per_position)} per position, read besides"),
        ("tokenizer", _tokenizer(summary)),
        ("fingerprint", summary.fingerprint),
        ("calibration", _calibration(summary)),
    ]


def _positions(config: ModelConfig) -> str:
    kind = "learned" if config.rope is None else "rotary"
    windows = [window for window in config.windows if window is not None]
    seen = f"; {len(windows)} of {config.num_layers} layers see a window of {windows[0]}" if windows else ""
    return f"{config.max_positions}, {kind}{seen}"


def setting_in_words(core: Mapping[str, Any] | None, facts: Mapping[str, Any], mlp_size: int) -> str:
    """What a calibration found: how many neurons are kept, and in which layers how many of them."""
    if core is None:
        return "all neurons"
    shares = ", ".join(f"{kept / mlp_size:.0%}" for kept in facts.get("kept_neurons") or ())
    linear = facts.get("linear_neurons") or ()
    there = sum(map(bool, linear))
    beside = f"; {max(linear)} linear neurons each in {there} of {len(linear)} layers" if there else ""
    return f"keep {core.get('beta', core.get('gamma')):g}" + (f" ({shares}, layer by layer{beside})" if shares else "")


def _calibration(summary: Summary) -> str:
    if summary.calibration is None:
        return "none; all neurons are used ('coreinfer calibrate' finds how many it can spare)"
    core, facts = summary.calibration
    found = f"{setting_in_words(core, facts, summary.config.mlp_size)}, from {facts.get('data', 'texts')}"
    bounds = {name: bound for name, bound in facts.get("bound", {}).items() if bound is not None}
    met = "within" if facts.get("met") else "as no keep ratio is within"
    if bounds:
        found += f", {met} {' and '.join(f'{name} {bound:g}' for name, bound in bounds.items())}"
    speed = facts.get("speed")
    if speed:
        where = f"{speed['dtype']} on {speed['device']}"
        found += f"; {speed['core']:.3g} ms per token instead of {speed['all']:.3g}, {where}"
    return found


def _tokenizer(summary: Summary) -> str:
    if summary.tokenizer is None:
        return "none"
    chat = "with" if summary.tokenizer.has_chat_template else "without"
    return f"{summary.tokenizer.description}, {chat} a chat template"


def _size(size: int) -> str:
    scale, unit = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= pair[0]), (1, "B"))
    return f"{size / scale:.3g} {unit}"
