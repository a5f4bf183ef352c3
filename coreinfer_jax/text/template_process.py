"""Run as a program: render a chat template that may have no end, in a process whose time and memory are limited.

Reads a JSON object from standard input and writes another to standard output: `text`, or `error`, a line.
"""

import json
import resource
import sys
from typing import Any

# Of the processor; of memory, the libraries' included; of what is rendered.
SECONDS, BYTES, CHARACTERS = 5, 1 << 30, 1 << 24
# For the environment of such a process: the stacks of threads count as memory.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def main() -> None:
    """Render what standard input asks for."""
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # templates need none, and importing it takes seconds
    from transformers import PreTrainedTokenizerBase

    asked = json.load(sys.stdin)
    used = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
    resource.setrlimit(resource.RLIMIT_CPU, (used + SECONDS, used + SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    try:
        tokenizer = PreTrainedTokenizerBase(chat_template=asked["template"], **asked["named"])
        text = tokenizer.apply_chat_template(asked["messages"], tokenize=False, **asked["options"])
        told = {"text": text} if len(text) <= CHARACTERS else {"error": f"it makes {len(text)} characters"}
    except MemoryError:
        told = {"error": f"it takes more than {BYTES >> 20} MiB"}
    except Exception as error:  # templates are programs, and fail in as many ways
        told = {"error": str(error) or type(error).__name__}
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
