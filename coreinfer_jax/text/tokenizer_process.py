"""Run as a program: a tokenizer that may have no end, in a process whose time and memory are limited.

Its argument is the directory. It answers lines of JSON from standard input, each a list of what is asked and its
arguments, by lines of JSON: `value`, or `error`, a line. The first answer comes unasked: what the tokenizer is.
"""

import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Of the processor, to read the files and for each answer; of memory, the libraries' included; of an answer's parts.
SECONDS_TO_OPEN, SECONDS, BYTES, MOST_ANSWERED = 30, 5, 1 << 30, 1 << 24


def main() -> None:
    """Answer until standard input ends."""
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # tokenizers need none, and importing it takes seconds
    sys.path.append(str(Path(__file__).parents[2]))  # the package that has started this
    from coreinfer_jax.text.with_transformers import TransformersTokenizer

    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
        resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
        opened: list[TransformersTokenizer] = []

        def about() -> dict[str, Any]:
            opened.append(TransformersTokenizer(Path(sys.argv[1])))
            return {name: getattr(opened[0], name) for name in ("description", "has_chat_template", "eos_id")}

        print(_told(about, SECONDS_TO_OPEN), file=answers, flush=True)
        for line in sys.stdin if opened else ():
            name, *arguments = json.loads(line)
            print(_told(partial(getattr(opened[0], name), *arguments)), file=answers, flush=True)


def _told(ask: Callable[[], Any], seconds: int = SECONDS) -> str:
    """The answer to a question, as a line; the process ends where it takes longer than so many seconds."""
    from coreinfer_jax.errors import CoreInferError

    usage, (_, most) = resource.getrusage(resource.RUSAGE_SELF), resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (int(usage.ru_utime + usage.ru_stime) + 1 + seconds, most))
    try:
        value = ask()
    except CoreInferError as error:
        return json.dumps({"error": str(error)})
    except MemoryError:
        raise  # a limit that is met ends the process
    except Exception as error:  # libraries fail in as many ways as files are odd
        return json.dumps({"error": f"{sys.argv[1]}: its tokenizer fails: {type(error).__name__}: {error}"})
    if isinstance(value, list | str) and len(value) > MOST_ANSWERED:
        return json.dumps({"error": f"{sys.argv[1]}: its tokenizer makes {len(value)} parts of a text; take another"})
    return json.dumps({"value": value})


if __name__ == "__main__":
    main()
