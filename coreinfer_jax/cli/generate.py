"""`coreinfer generate`."""

import argparse
import json
import sys
from dataclasses import asdict

from coreinfer_jax.cli import arguments, drawing
from coreinfer_jax.cli.reply import Reply, facts
from coreinfer_jax.engine.generation import stream

HELP = "continue a prompt"
NEW_TOKENS = 128


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument("--chat", action="store_true", help="PROMPT is a question: apply the model's chat template")
    arguments.add_model(parser)
    arguments.add_core(parser)
    drawing.add_sampling(parser, temperature=0.0, new_tokens=NEW_TOKENS)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    arguments.check_text("prompt", options.prompt)
    arguments.core_config(options)
    drawing.check_stops(options)
    params, tokenizer = arguments.load_model(options)
    core = arguments.core_config(options, params)
    groups = arguments.load_groups(options, params, core)
    if options.chat:
        prompt = tokenizer.encode_chat([{"role": "user", "content": options.prompt}])
    else:
        prompt = tokenizer.encode(options.prompt)
    asked = options.max_new_tokens
    new = min(NEW_TOKENS, arguments.most_new_tokens(params.config, len(prompt))) if asked is None else asked
    drawn = drawing.sampling(options, params.config, tokenizer, options.chat)
    chunks = stream(params, [prompt], core, **drawn | {"groups": groups, "max_new_tokens": new})

    def show(text: str) -> None:
        if not options.json:
            print(text, end="", flush=True)

    show("" if options.chat else options.prompt)
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
    print(facts(stats, len(reply.tokens), groups), file=sys.stderr)
