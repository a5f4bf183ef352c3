"""`coreinfer batch --ray`: the same over the machines of a Ray cluster, with a process for each device."""

import argparse
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from typing import Any

from coreinfer_jax.checks import check_whole
from coreinfer_jax.cli.answering import Answer, Common, Model, answers, error_of
from coreinfer_jax.errors import CoreInferError, one_line
from coreinfer_jax.io.batch_input import BadLine, Line

# Of a process, at a time, for each of its rows: what it has answered is written once all of them are.
LINES_PER_ROW = 16
HERE = "local"
# No word to Ray's makers, and none on standard error of how it works.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where the work is done."""
    parser.add_argument(
        "--ray",
        nargs="?",
        const=HERE,
        metavar="ADDRESS",
        help="on the Ray cluster at ADDRESS, or on a new one of this machine (extra ray)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="with --ray: processes (default: one per GPU, else one per machine)"
    )


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be before anything is read.

    Raises:
        CoreInferError: Ray is not installed, or is given options without being asked for.
    """
    if options.workers is not None:
        check_whole("--workers", options.workers, 1)
    if options.ray is None and options.workers is not None:
        raise CoreInferError(f"--workers {options.workers}: are of --ray; add that, or leave it out")
    if options.ray is not None and options.mesh is not None:
        raise CoreInferError(f"--mesh {options.mesh}: is of one process; leave it out, or leave out --ray")
    if options.ray is not None and find_spec("ray") is None:
        raise CoreInferError(f"--ray {options.ray}: pip install 'coreinfer_jax[ray]'")


def begin(options: argparse.Namespace) -> None:
    """Join the cluster, and settle the type of weights that all of its processes take.

    Raises:
        CoreInferError: there is no such cluster.
    """
    set_up()
    import ray

    if not ray.is_initialized():
        try:
            ray.init(address=options.ray, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise CoreInferError(f"--ray {options.ray}: {one_line(str(error))}; name a cluster that runs") from error
    options.dtype = options.dtype or ("bfloat16" if _gpus() and options.device != "cpu" else "float32")


def set_up() -> None:
    """Say what Ray reads when it is imported; what the user has set stays."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)


def _gpus() -> int:
    import ray

    return int(ray.cluster_resources().get("GPU", 0))


def answered(options: argparse.Namespace, common: Common, lines: Iterable[Line | BadLine]) -> Iterator[Answer]:
    """An answer to each line; those of a process come together, once it has done as many as it is given at a time."""
    import ray

    good: list[dict[str, Any]] = []
    for line in lines:
        if isinstance(line, BadLine):
            yield error_of(line)
        else:
            good.append({"line": json.dumps(asdict(line))})
    if not good:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    size = LINES_PER_ROW * common.rows
    asked = ray.data.from_items(good, override_num_blocks=-(-len(good) // size))
    made = asked.map_batches(
        _Worker, fn_constructor_args=(options, common), batch_size=size, batch_format="numpy", **_resources(options)
    )
    try:
        for row in made.iter_rows():
            yield json.loads(row["answer"])
    except ray.exceptions.RayError as error:
        raise _mistake(error) from error


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    """How many processes there are, and what each takes."""
    import ray

    gpus = 0 if options.device == "cpu" else _gpus()
    workers = options.workers or gpus or max(1, sum(node["Alive"] for node in ray.nodes()))
    if gpus:
        return {"compute": ray.data.ActorPoolStrategy(size=min(workers, gpus)), "num_gpus": 1}
    cores = int(ray.cluster_resources().get("CPU", 1))
    # A process cannot have more than the largest machine.
    most = max((int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"]), default=1)
    return {"compute": ray.data.ActorPoolStrategy(size=workers), "num_cpus": max(1, min(cores // workers, most))}


def _mistake(error: Exception) -> Exception:
    """The user's mistake behind what Ray reports, else what Ray says, in one line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, CoreInferError):
            return CoreInferError(str(cause))
        cause = getattr(cause, "cause", None) or cause.__cause__
    return CoreInferError(f"--ray: {one_line(str(error))}")


class _Worker:
    """A process of the cluster: it loads the model once, and answers lines batch by batch.

    It loads at the first batch: of an error before that Ray keeps no more than the text.
    """

    def __init__(self, options: argparse.Namespace, common: Common) -> None:
        self._options, self._common = options, common
        self._model: Model | None = None

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        from coreinfer_jax.cli.batch import load_model

        if self._model is None:
            self._model = load_model(self._options)
        lines = [Line(**json.loads(text)) for text in batch["line"]]
        return {"answer": [json.dumps(answer) for answer in answers(self._model, self._common, lines)]}
