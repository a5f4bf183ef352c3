"""The `coreinfer` command."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import NoReturn

import jax
import numpy as np

from coreinfer_jax.checkpoint import convert, load
from coreinfer_jax.checkpoint.mapping import DTYPES
from coreinfer_jax.config import CoreConfig
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.generation import Stats, stream
from coreinfer_jax.params import Params
from coreinfer_jax.text import Tokenizer, continuation, settled

DEFAULT_NEW_TOKENS = 128


class _Parser(argparse.ArgumentParser):
    """argparse with mistakes reported like all others: one line, status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, or 2 for a user's mistake, reported in one line."""
    options = _parser().parse_args(arguments)
    # transformers is only asked for tokenizers, so its advice to install PyTorch would be noise.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        options.run(options)
    except CoreInferError as error:
        print(f"coreinfer: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader went away, as `head` does; without a new stdout Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="coreinfer", description="Generate with only the MLP neurons a prompt needs.")
    parser.add_argument("--version", action="version", version=f"coreinfer {version('coreinfer_jax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    _add_generate(commands.add_parser("generate", help="continue a prompt", allow_abbrev=False))
    _add_convert(commands.add_parser("convert", help="convert a Hugging Face checkpoint", allow_abbrev=False))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    default = CoreConfig()
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--model", metavar="DIR", required=True, help="converted or Hugging Face directory")
    parser.add_argument("--method", choices=("dense", "stability"), default="stability")
    parser.add_argument("--alpha", type=float, default=default.alpha, help="token-wise share, (0, 1] (%(default)s)")
    parser.add_argument("--beta", type=float, default=default.beta, help="share of neurons kept, (0, 1] (%(default)s)")
    parser.add_argument("--budget", choices=("per_token", "mean"), default=default.budget)
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help=f"default {DEFAULT_NEW_TOKENS}, if there is room"
    )
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token (%(default)s)")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, help="for temperatures above 0 (default 0)", default=0)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT; may be repeated")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default float32 on CPU, bfloat16 on GPU and TPU")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the fastest there is")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_generate)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="Hugging Face directory, or hub id if there is a network")
    parser.add_argument("destination", metavar="DST", help="new directory")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default: the checkpoint's")
    parser.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    print(convert(options.source, options.destination, options.dtype))


def _generate(options: argparse.Namespace) -> None:
    if not options.prompt:
        raise CoreInferError("the prompt is empty; give some text to continue")
    try:
        options.prompt.encode()
    except UnicodeEncodeError as error:  # Python smuggles undecodable bytes of the command line in as surrogates
        raise CoreInferError(f"the prompt {options.prompt!r} is not valid text in the terminal's encoding") from error
    if "" in options.stop:
        raise CoreInferError("--stop '': give text to stop at")
    _choose_device(options.device)
    params, tokenizer = load(options.model, options.dtype)
    if tokenizer is None:
        raise CoreInferError(
            f"{options.model}: has no tokenizer; add tokenizer.json or tokenizer.model beside the weights"
        )
    prompt = tokenizer.encode(options.prompt)
    text, new, stats = _stream_text(options, params, tokenizer, prompt)
    if options.json:
        print(json.dumps({"text": text, "tokens": new, "method": stats.method, "stats": asdict(stats)}))
    else:
        print(flush=True)
    print(_facts(stats, len(new)), file=sys.stderr)


def _stream_text(
    options: argparse.Namespace, params: Params, tokenizer: Tokenizer, prompt: list[int]
) -> tuple[str, list[int], Stats]:
    """Generate, printing what is settled as it comes unless --json: the continuation, its tokens and the costs."""
    room = params.config.max_positions - len(prompt)
    core = None
    if options.method == "stability":
        core = CoreConfig(alpha=options.alpha, beta=options.beta, budget=options.budget)
    chunks = stream(
        params,
        [prompt],
        core,
        max_new_tokens=options.max_new_tokens
        if options.max_new_tokens is not None
        else max(1, min(DEFAULT_NEW_TOKENS, room)),
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        eos_ids=params.config.eos_ids,
        key=options.seed,
    )
    if not options.json:
        print(options.prompt, end="", flush=True)
    new: list[int] = []
    printed = text = ""
    stopped = False
    for chunk in chunks:
        new += chunk.tokens[0, : chunk.lengths[0]].tolist()
        text = continuation(tokenizer, prompt, new)
        ready, stopped = settled(text, options.stop)
        if not options.json:
            print(ready[len(printed) :], end="", flush=True)
        printed = ready
        if stopped:
            break
    if not stopped:
        # What was held back for a character or a stop string that never came.
        if not options.json:
            print(text[len(printed) :], end="", flush=True)
        printed = text
    return printed, new, chunk.stats


def _choose_device(name: str | None) -> None:
    """Make `name` the device JAX uses in this process."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif name is not None:
        try:
            jax.config.update("jax_default_device", jax.devices(name)[0])
        except RuntimeError as error:
            raise CoreInferError(
                f"--device {name}: JAX finds none here; install its plugin or leave the option out"
            ) from error


def _facts(stats: Stats, new_tokens: int) -> str:
    """One line for people."""
    kept = np.mean(stats.kept_neurons) / stats.mlp_size
    decode = f"{1000 * stats.decode_seconds / stats.decode_steps:.1f} ms/token" if stats.decode_steps else "no steps"
    return (
        f"[{stats.method}: {kept:.0%} of {stats.mlp_size} MLP neurons in {len(stats.kept_neurons)} layers; "
        f"{stats.prompt_tokens[0]} prompt + {new_tokens} new tokens; prefill {stats.prefill_seconds:.2f} s, "
        f"selection {stats.selection_seconds:.2f} s, compaction {stats.compaction_seconds:.2f} s, decode {decode} "
        f"(compiling included); {stats.bytes_read_per_token / 1e6:.1f} MB read per token]"
    )
