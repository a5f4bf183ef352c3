"""`coreinfer generate`."""

import argparse
import json
import sys
from dataclasses import asdict

from coreinfer_jax.cli import arguments, drawing, processes
from coreinfer_jax.cli.reply import Reply, facts
from coreinfer_jax.engine.generation import make_request, stream
from coreinfer_jax.engine.options import GenerateOptions
from coreinfer_jax.errors import CoreInferError, shown_name
from coreinfer_jax.files import read_bytes, to_path
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.text import Tokenizer

HELP = "continue a prompt"
NEW_TOKENS = 128
# Of a prompt: more than any model has positions for.
MOST_CHARACTERS = 2**26


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the text to continue; - reads standard input")
    parser.add_argument("--file", metavar="FILE", help="read the prompt from a text file")
    parser.add_argument("--chat", action="store_true", help="the prompt is a question: apply the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the template puts before the question")
    arguments.add_model(parser)
    arguments.add_processes(parser)
    arguments.add_device_memory(parser)
    arguments.add_core(parser)
    drawing.add_sampling(parser, temperature=0.0, new_tokens=NEW_TOKENS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    text = _prompt(options)
    arguments.check_text("prompt", text)
    messages = _messages(options, text)
    arguments.core_config(options)
    drawing.check_stops(options)
    budget = arguments.device_memory(options)
    open_model = arguments.load_model if budget is None else arguments.unloaded_model
    params, tokenizer = open_model(options)
    core, groups = arguments.core_and_groups(options, params)
    prompt, settings = _call(options, params.config, tokenizer, text, messages)
    if budget is not None:
        # On standard error, before anything is loaded.
        make_request(params, [prompt], core, settings | {"groups": groups, "device_memory": budget})
        params = arguments.planned_model(options)
        core, groups = arguments.core_and_groups(options, params)
    settings["groups"] = groups
    chunks = stream(params, [prompt], core, **settings)

    def show(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True)

    show("" if options.chat else text)
    reply = Reply(tokenizer, prompt, options.stop)
    for chunk in chunks:
        show(reply.add(chunk))
        if reply.stopped:
            break
    show(reply.finish())
    stats = chunk.stats
    if options.json:
        print(json.dumps({"text": reply.text, "tokens": reply.tokens, "method": stats.method, "stats": asdict(stats)}))
    else:
        print(flush=True)
    processes.say(facts(stats, len(reply.tokens), groups))


def _call(
    options: argparse.Namespace, config: ModelConfig, tokenizer: Tokenizer, text: str, messages: list[dict[str, str]]
) -> tuple[list[int], GenerateOptions]:
    """What `stream` is given besides model and core neurons: the prompt, and the options."""
    prompt = tokenizer.encode_chat(messages) if options.chat else tokenizer.encode(text)
    asked = options.max_new_tokens
    new = min(NEW_TOKENS, arguments.most_new_tokens(config, len(prompt))) if asked is None else asked
    drawn = drawing.sampling(options, config, tokenizer, options.chat)
    return prompt, drawn | {"max_new_tokens": new}


def _prompt(options: argparse.Namespace) -> str:
    """The prompt, from wherever it is to come; a line break at the end of a file is the file's, not the text's."""
    if (options.prompt is None) == (options.file is None):
        raise CoreInferError("generate: give either PROMPT, which may be - for standard input, or --file FILE")
    if options.file is not None:
        return _of_file(options.file).removesuffix("\n")
    if options.prompt != "-":
        return str(options.prompt)
    text = sys.stdin.read(MOST_CHARACTERS + 1)
    if len(text) > MOST_CHARACTERS:
        raise CoreInferError(f"standard input: more than {MOST_CHARACTERS} characters; give a shorter prompt")
    return text.removesuffix("\n")


def _of_file(name: str) -> str:
    try:
        return read_bytes(to_path(name), MOST_CHARACTERS).decode("utf-8")
    except OSError as error:
        raise CoreInferError(f"--file {shown_name(name)}: {error.strerror or error}; name a readable file") from error
    except UnicodeDecodeError as error:
        raise CoreInferError(f"--file {shown_name(name)}: not UTF-8 text; save it as UTF-8") from error


def _messages(options: argparse.Namespace, question: str) -> list[dict[str, str]]:
    """The conversation that the chat template is given."""
    asked = {"role": "user", "content": question}
    if options.system is None:
        return [asked]
    if not options.chat:
        raise CoreInferError("--system: is of --chat; add that, or leave it out")
    arguments.check_text("system message", options.system)
    return [{"role": "system", "content": options.system}, asked]
