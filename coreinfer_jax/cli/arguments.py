"""Options that several subcommands take, and what they mean."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.sharding import Mesh

from coreinfer_jax.checks import check_fraction, parse_bytes
from coreinfer_jax.cli import processes
from coreinfer_jax.device import cap_allocator
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.io import load
from coreinfer_jax.io.embedded import DEFAULT
from coreinfer_jax.io.loading import load_params, load_uncalibrated, model_path, unloaded
from coreinfer_jax.io.mapping import DTYPES
from coreinfer_jax.lab.clustering import load_clusters
from coreinfer_jax.lab.evaluation.comparison import Texts
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.shards import AXIS, make_mesh
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.allocate import ALLOCATIONS
from coreinfer_jax.sparsity.calibration import PRIOR_RULE, calibration_of
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import CHOOSERS, Recommended, chooser_of, settings_of
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.rules import RULES, Votes
from coreinfer_jax.sparsity.similarity import Auto, Fused, Similarity, prepare_groups
from coreinfer_jax.sparsity.stability import CoreConfig
from coreinfer_jax.sparsity.votes import BUDGETS
from coreinfer_jax.text import Tokenizer

PRESETS = ("default", "paper")

# What `add_core` asks for, by the names that files and results have.
SETTINGS = (
    *("alpha", "beta", "budget", "layers", "method", "gamma", "least_stability", "least_tokens", "group_tokens"),
    *("prior_tokens", "rule", "compensation", "linear", "allocation"),
)
# Options that change nothing with any other method.
OF_METHODS = {
    "compensation": "stability",
    "allocation": "stability",
    "prior_tokens": "stability",
    "group_tokens": "fused",
    "least_stability": "auto",
    "least_tokens": "auto",
}


MODELS = "Hugging Face directory, hub id (org/name, org/name:FILE.gguf), FILE.gguf, package:NAME"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and where it runs."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        default=DEFAULT,
        help=f"converted directory, {MODELS}, embedded:llama or embedded:opt (default)",
    )
    add_place(parser)


def add_place(parser: argparse.ArgumentParser) -> None:
    """In which type, and on which device."""
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)}; default float32 on CPU, bfloat16 on GPU and TPU")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the fastest there is")


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Over which devices."""
    parser.add_argument(
        "--mesh", metavar="tensor=N", help="spread heads and neurons over N devices (docs/guides/several-devices.md)"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Over which devices, of which processes."""
    add_mesh(parser)
    processes.add_distributed(parser)


def mesh_of(options: argparse.Namespace) -> Mesh | None:
    """The devices of `--mesh`; None for the default one."""
    asked = getattr(options, "mesh", None)
    if asked is None:
        return None
    name, _, size = asked.partition("=")
    if name != AXIS or not (size.isascii() and size.isdigit()):
        raise CoreInferError(f"--mesh {shown(asked)}: give tensor=N, N devices to spread heads and neurons over")
    return make_mesh(int(size))


def add_documents(parser: argparse.ArgumentParser, required: bool = True, default: str = "") -> None:
    """Which texts; `default` says what is read where none are named."""
    otherwise = f"; default: {default}" if default else ""
    parser.add_argument(
        "--data",
        required=required,
        metavar="FILE",
        help=f"text: one document per line or ended by <|endoftext|>; jsonl, csv{otherwise}",
    )
    parser.add_argument("--text-column", type=column, metavar="COL", help="name, or number from 0")


def add_texts(parser: argparse.ArgumentParser, default: Texts = Texts()) -> None:
    """How much of which texts."""
    lengths = " ".join(map(str, default.prompt_tokens))
    parser.add_argument(
        "--prompt-tokens",
        nargs="+",
        type=int,
        default=default.prompt_tokens,
        metavar="N",
        help=f"of contexts ({lengths})",
    )
    parser.add_argument(
        "--continuation",
        type=int,
        default=default.continuation,
        metavar="N",
        help="tokens scored of each text (%(default)s)",
    )
    parser.add_argument(
        "--texts", type=int, default=default.texts, metavar="N", help="documents, at most (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the order of documents (%(default)s)")


def texts(options: argparse.Namespace) -> Texts:
    """What `add_texts` asked for."""
    return Texts(tuple(options.prompt_tokens), options.continuation, options.texts, seed=options.seed)


def add_core(parser: argparse.ArgumentParser) -> None:
    """How core neurons are chosen; without any of these options as calibrated, and not at all without a calibration."""
    default, votes, auto = CoreConfig(), Votes(), Auto()
    parser.add_argument(
        "--method",
        choices=("dense", *CHOOSERS),
        help=f"default: as calibrated, dense without a calibration; {default.method} with any option below",
    )
    parser.add_argument("--rule", choices=tuple(RULES), help="what ranks neurons (contribution; votes where groups do)")
    parser.add_argument("--alpha", type=float, help=f"votes: token-wise share, (0, 1] ({votes.alpha})")
    parser.add_argument("--beta", type=float, help=f"share of neurons kept, (0, 1] (as calibrated or {default.beta})")
    parser.add_argument(
        "--compensation",
        type=float,
        help=f"share of its mean at which a dropped neuron stands ({default.compensation})",
    )
    parser.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        help=f"how the kept share is divided among layers: by need, or equal ({default.allocation})",
    )
    parser.add_argument(
        "--no-linear",
        dest="linear",
        action="store_const",
        const=False,
        help="without linear neurons for those that are dropped, where a calibration has them",
    )
    parser.add_argument("--gamma", type=float, help="share of a group's neurons kept, (0, 1] (default: --beta)")
    parser.add_argument("--clusters", metavar="DIR", help="groups for similarity, fused and auto (coreinfer clusters)")
    parser.add_argument("--budget", choices=BUDGETS, help=f"votes: of a token ({votes.budget})")
    parser.add_argument(
        "--layers",
        type=float,
        nargs=2,
        metavar=("FROM", "TO"),
        help="which layers are narrowed, as fractions of depth (default 0 1)",
    )
    parser.add_argument("--least-stability", type=float, help=f"auto: of a stable prompt ({auto.least_stability})")
    parser.add_argument("--least-tokens", type=int, help=f"auto: of a stable prompt ({auto.least_tokens})")
    parser.add_argument(
        "--group-tokens",
        type=float,
        help=f"fused: how many tokens of the prompt the group counts as ({Fused().group_tokens:g})",
    )
    parser.add_argument(
        "--prior-tokens",
        type=float,
        help=f"how many tokens of the prompt a calibration counts as ({default.ranking.prior_tokens:g})",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """`rows` for a terminal, columns one under the other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def column(value: str) -> str | int:
    """A column of a table: a number from 0, or a name."""
    return int(value) if value.isascii() and value.isdigit() else value


def add_device_memory(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """How much of the device a model may take that need not fit it."""
    parser.add_argument(
        "--device-memory",
        required=required,
        metavar="BYTES",
        help="of the device, such as 12GiB: MLPs stay on the host and are moved when they are needed",
    )


def add_lossless(parser: argparse.ArgumentParser) -> None:
    """Whether the full model decides."""
    parser.add_argument(
        "--lossless",
        action="store_true",
        help="make the full model's own tokens: core neurons and earlier words only draft (docs/guides/lossless.md)",
    )


def add_regathering(parser: argparse.ArgumentParser) -> None:
    """Whether core neurons that draft follow the text."""
    parser.add_argument(
        "--regather-at",
        type=float,
        metavar="SHARE",
        help="with --lossless: choose core neurons anew from the text so far, where so many would be replaced "
        "(default: those of the prompt stay)",
    )


def device_memory(options: argparse.Namespace) -> int | None:
    """The bytes of `--device-memory`, beyond which JAX then takes none of a GPU; before anything else asks for one."""
    if options.device_memory is None:
        return None
    size = parse_bytes("--device-memory", options.device_memory)
    if options.device != "cpu":
        cap_allocator(size)
    return size


def unloaded_model(options: argparse.Namespace) -> tuple[Params, Tokenizer]:
    """`load_model` with all weights where they are, to plan with."""
    choose_device(options.device)
    if getattr(options, "mesh", None) is not None:
        raise CoreInferError(f"--mesh {options.mesh}: is of models that fit their devices; leave out --device-memory")
    return _with_tokenizer(options, *unloaded(options.model, options.dtype))


def planned_model(options: argparse.Namespace) -> Params:
    """The model that `unloaded_model` stood for, its MLPs on the host."""
    return load_params(options.model, options.dtype, mlps_on_host=True)


def load_model(options: argparse.Namespace, calibrated: bool = True) -> tuple[Params, Tokenizer]:
    """The model and tokenizer that the options name, with the calibration beside them or whatever lies there."""
    processes.join(options)
    choose_device(options.device)
    mesh = mesh_of(options)
    if calibrated:
        params, tokenizer = load(options.model, options.dtype, mesh=mesh)
    else:
        params, tokenizer = load_uncalibrated(model_path(options.model), options.dtype, mesh)
    return _with_tokenizer(options, params, tokenizer)


def _with_tokenizer(
    options: argparse.Namespace, params: Params, tokenizer: Tokenizer | None
) -> tuple[Params, Tokenizer]:
    if tokenizer is None:
        raise CoreInferError(
            f"{options.model}: has no tokenizer; add tokenizer.json or tokenizer.model beside the weights of a "
            "directory, or take a GGUF file that holds one"
        )
    return params, tokenizer


def choose_device(name: str | None) -> None:
    """Make `name` the device JAX uses in this process."""
    if name == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif name is not None:
        try:
            jax.config.update("jax_default_device", jax.local_devices(backend=name)[0])
        except RuntimeError as error:
            raise CoreInferError(
                f"--device {name}: JAX finds none here; install its plugin or leave the option out"
            ) from error


def preset(options: argparse.Namespace, params: Params | None = None) -> CoreConfig:
    """What `--preset` names, for `params` where they are loaded."""
    return CoreConfig.paper() if options.preset == "paper" else starting_point(params)


def starting_point(params: Params | None) -> CoreConfig:
    """What options of core neurons start from: what was calibrated, if that is not all neurons, else `CoreConfig()`."""
    known = None if params is None else calibration_of(params)
    return known.core if known is not None and isinstance(known.core, CoreConfig) else CoreConfig()


def core_config(options: argparse.Namespace, params: Params | None = None) -> Chooser | Recommended | None:
    """How core neurons are to be chosen: None for the full model; what is not named as is recommended for `params`.

    Without `params`, to refuse what can be refused before they are loaded.
    """
    if options.clusters is not None and options.method not in ("similarity", "fused", "auto"):
        raise CoreInferError(
            f"--clusters: --method {options.method or 'stability'} uses none; take similarity, fused or auto"
        )
    if options.clusters is None and options.method in ("similarity", "fused"):
        raise CoreInferError(f"--method {options.method}: needs --clusters DIR, made by 'coreinfer clusters build'")
    if options.clusters is None and options.gamma is not None:
        raise CoreInferError(f"--gamma {options.gamma}: is of groups; add --clusters DIR, or give --beta")
    named = {name: value for name in SETTINGS if (value := getattr(options, name)) is not None}
    if options.method == "dense":
        if unused := [name for name in named if name != "method"]:
            raise CoreInferError(
                f"{_option(unused[0], named[unused[0]])}: is of core neurons, which --method dense has none of"
            )
        return None
    if not named:
        return "recommended"
    usual = starting_point(params)
    if named.get("rule", usual.ranking.name) != usual.ranking.name:
        usual = replace(usual, rule=named["rule"])  # what was set for its rule is nothing to another
    core = chooser_of(settings_of(usual) | named)
    _refuse_unused(named, core, calibrated=params is None or params.calibration is not None)
    return core


def _refuse_unused(named: Mapping[str, Any], core: Chooser, calibrated: bool) -> None:
    """Refuse what was asked for and would change nothing."""
    if "alpha" in named:
        check_fraction("alpha", named["alpha"])
    rule = settings_of(core)["rule"]
    if named.get("rule", rule) != rule:
        raise CoreInferError(
            f"rule={named['rule']!r}: groups are made of votes; with method={core.method!r} leave it out"
        )
    for name, method in OF_METHODS.items():
        if name in named and core.method != method:
            raise CoreInferError(f"{_option(name, named[name])}: is of --method {method}; leave it out")
    if "prior_tokens" in named and rule != PRIOR_RULE:
        raise CoreInferError(
            f"--prior-tokens {named['prior_tokens']:g}: is of --rule {PRIOR_RULE}; take that, or leave it out"
        )
    if "prior_tokens" in named and not calibrated:
        raise CoreInferError(
            f"--prior-tokens {named['prior_tokens']:g}: is of a calibration, and the model has none; "
            "make one with 'coreinfer calibrate', or leave it out"
        )
    for name in ("alpha", "budget"):
        if name in named and "votes" not in rule:
            raise CoreInferError(f"--{name} {named[name]}: is of votes; add --rule votes, or leave it out")


def _option(name: str, value: Any) -> str:
    """A setting as the command line has it."""
    return f"--no-{name}" if value is False else f"--{name.replace('_', '-')} {value}"


def labels(cores: Sequence[Mapping[str, Any] | None]) -> list[str]:
    """What tells settings of core neurons apart, of each its keep ratio; None is all neurons."""
    named = ("allocation", "compensation", "linear", "alpha", "layers", "prior_tokens")
    chosen = [core for core in cores if core is not None]
    differing = [name for name in named if len({str(core[name]) for core in chosen if name in core}) > 1]
    rules = len({core["rule"] for core in chosen}) > 1
    return [
        "all neurons"
        if core is None
        else ", ".join(
            [*([core["rule"]] if rules else []), f"keep {core['beta']:g}"]
            + [f"{name.replace('_', ' ')} {core[name]}" for name in differing if name in core]
        )
        for core in cores
    ]


def core_and_groups(options: argparse.Namespace, params: Params) -> tuple[Chooser | Recommended | None, Groups | None]:
    """`core_config` and `load_groups` of `params`."""
    core = core_config(options, params)
    return core, load_groups(options, params, core)


def load_groups(options: argparse.Namespace, params: Params, core: Chooser | Recommended | None) -> Groups | None:
    """The groups that the options name, None where they name none; a prompt's group is gathered when it is used."""
    if options.clusters is None or not isinstance(core, Similarity | Fused | Auto):
        return None
    return prepare_groups(params, load_clusters(options.clusters), core, compacted=False)


def most_new_tokens(config: ModelConfig, prompt_tokens: int) -> int:
    """New tokens that fit behind a prompt; 1 where none does, which is refused with an explanation."""
    return max(1, config.max_positions - prompt_tokens)


def check_text(name: str, text: str) -> None:
    """Refuse text that is empty, or bytes of the command line that are none in the terminal's encoding."""
    if not text:
        raise CoreInferError(f"the {name} is empty; give some text to continue")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # Python smuggles undecodable bytes in as surrogates
        raise CoreInferError(f"the {name} {text!r} is not valid text in the terminal's encoding") from error
