"""`evaluate_tasks`: tasks of lm-evaluation-harness, on the full model and on core neurons side by side."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from coreinfer_jax.errors import CoreInferError, one_line, shown
from coreinfer_jax.files import is_directory, to_path
from coreinfer_jax.lab.evaluation.harness import BATCH_SIZE, CoreInferLM
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import settings_of
from coreinfer_jax.text import Tokenizer
from coreinfer_jax.text.tokenizer_files import reason

# After the package that says how to get the harness where it is missing.
import lm_eval  # isort: skip
from lm_eval.tasks import TaskManager  # isort: skip

HERE = Path(__file__).parent
LOCAL = tuple(sorted(path.stem for path in HERE.glob("*.yaml")))
VERSIONS = ("coreinfer_jax", "lm_eval", "jax", "jaxlib")


class Tasks:
    """Tasks that are known to load.

    Args:
        names: of tasks, groups or tags.
        task_data: directories with the files of the tasks that are described beside this module.
        limit: documents per task, at most.
        num_fewshot: examples shown before each question; None for what a task says.

    Raises:
        CoreInferError: a name, directory or number that cannot be used; a task whose data cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        task_data: Sequence[str] = (),
        *,
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        _check_number("limit", limit, 1)
        _check_number("num_fewshot", num_fewshot, 0)
        for directory in task_data:
            if not is_directory(to_path(directory)):
                raise CoreInferError(f"{directory}: no such directory; name one with the files of the tasks")
        self.names, self.task_data, self.limit, self.num_fewshot = list(names), list(task_data), limit, num_fewshot
        with _quiet():
            # Reading the descriptions of all published tasks takes seconds.
            self._manager = TaskManager(
                include_path=str(HERE),
                include_defaults=not set(names) <= {*LOCAL},
                metadata={"task_data": self.task_data},
            )
            for name in names:
                self._check(name)

    def _check(self, name: str) -> None:
        known = self._manager.all_tasks
        if name not in known:
            close = get_close_matches(name, known, n=3) or LOCAL
            raise CoreInferError(f"task {name!r}: lm-evaluation-harness knows none; did you mean {', '.join(close)}?")
        try:
            loaded = self._manager.load([name])["tasks"]
        except CoreInferError:
            raise
        except Exception as error:  # data sets are fetched and prepared by code of their own
            raise CoreInferError(
                f"task {name!r}: its data cannot be had ({one_line(reason(error))}); fetch it where there is a "
                f"network, or take one of {', '.join(LOCAL)}, which read --task-data"
            ) from error
        for own, task in loaded.items():
            lent = task.fewshot_docs() if self.num_fewshot else None
            if lent is not None and len(lent) < (self.num_fewshot or 0):
                raise CoreInferError(
                    f"num_fewshot={self.num_fewshot}: {own} has {len(lent)} examples to show; take no more"
                )

    def run(self, model: CoreInferLM, *, chat: bool, seed: int) -> dict[str, Any]:
        """What `lm_eval.simple_evaluate` says of a model."""
        with _quiet():
            found: dict[str, Any] = lm_eval.simple_evaluate(
                model=model,
                tasks=self.names,
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                task_manager=self._manager,
                apply_chat_template=chat,
                fewshot_random_seed=seed,
                log_samples=False,
            )
        return found


def evaluate_tasks(
    params: Params,
    tokenizer: Tokenizer,
    tasks: Tasks,
    cores: Sequence[Chooser | None],
    *,
    model: str = "coreinfer_jax",
    batch_size: int = BATCH_SIZE,
    chat: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of tasks, for several choices of core neurons.

    Args:
        params: dense weights.
        tokenizer: of the model.
        tasks: what is asked.
        cores: how core neurons are chosen; None is the full model.
        model: its name, in the results.
        batch_size: rows per batch.
        chat: put contexts into the model's chat template.
        seed: of the choice of examples, and of tasks that draw tokens.

    Returns:
        The configuration; per task `tasks` with `version`, `num_fewshot` and the number of `documents`; per choice
        `settings` with `core`, `truncated` (requests whose context exceeds the model's positions and lost its first
        tokens) and `scores`, task to metric to `value` and `stderr` (None where there is none).

    Raises:
        CoreInferError: a batch size below 1, a model without a chat template if `chat`; what `CoreInferLM` refuses.
    """
    if chat and not tokenizer.has_chat_template:
        raise CoreInferError(f"{model}: has no chat template; leave --chat out, or take a chat-tuned model")
    settings, about = [], dict[str, Any]()
    for core in cores:
        adapter = CoreInferLM(params, tokenizer, core, batch_size=batch_size, name=model, seed=seed)
        found = tasks.run(adapter, chat=chat, seed=seed)
        about = {name: _about(name, found) for name in found["n-samples"]}
        scores = {name: _metrics(own) for name, own in found["results"].items() if name in about}
        chosen = None if core is None else settings_of(core)
        settings.append({"core": chosen, "truncated": adapter.truncated, "scores": scores})
    return {
        "model": model,
        "dtype": str(params.dtype),
        "versions": {name: version(name) for name in VERSIONS},
        "task_data": tasks.task_data,
        "limit": tasks.limit,
        "num_fewshot": tasks.num_fewshot,
        "batch_size": batch_size,
        "chat": chat,
        "seed": seed,
        "tasks": about,
        "settings": settings,
    }


def _about(name: str, found: dict[str, Any]) -> dict[str, Any]:
    return {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "documents": found["n-samples"][name]["effective"],
    }


def _metrics(result: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Metrics by name; that of a filter other than `none` follows after a comma."""
    metrics = {}
    for key, value in result.items():
        metric, comma, kind = key.partition(",")
        if comma and not metric.endswith("_stderr") and not isinstance(value, str):
            error = result.get(f"{metric}_stderr,{kind}")
            name = metric if kind == "none" else key
            metrics[name] = {"value": float(value), "stderr": error if isinstance(error, float) else None}
    return metrics


def _check_number(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise CoreInferError(f"{name}={shown(value)}: give a whole number of at least {least}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness from telling on the terminal what its results say, and what it makes of every setting."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
