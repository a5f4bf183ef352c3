"""`coreinfer clusters build`, `import` and `inspect`."""

import argparse
import json
from typing import Any

import numpy as np

from coreinfer_jax.cli import arguments
from coreinfer_jax.errors import one_line
from coreinfer_jax.lab.clustering import build_clusters, import_published, inspect_clusters
from coreinfer_jax.lab.clustering.build import TOKENS_PER_DOCUMENT, VECTORS
from coreinfer_jax.lab.clustering.grouping import DEPTH
from coreinfer_jax.lab.clustering.inspection import Inspection
from coreinfer_jax.sparsity.groups import TextVectors
from coreinfer_jax.sparsity.rules import Votes
from coreinfer_jax.sparsity.similarity import Similarity
from coreinfer_jax.sparsity.votes import BUDGETS, kept_neurons
from coreinfer_jax.text.documents import read_documents

HELP = "group texts by the neurons they activate, for --method similarity"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes: a command of its own for each thing there is to do."""
    commands = parser.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=type(parser))
    _add_build(commands.add_parser("build", help="from a file of texts", allow_abbrev=False))
    _add_import(commands.add_parser("import", help="from published lists of neurons (.npz)", allow_abbrev=False))
    _add_inspect(commands.add_parser("inspect", help="say what groups there are", allow_abbrev=False))


def _add_build(parser: argparse.ArgumentParser) -> None:
    arguments.add_model(parser)
    arguments.add_mesh(parser)
    arguments.add_documents(parser)
    parser.add_argument(
        "--label-column", type=arguments.column, metavar="COL", help="group by these topics, not k-means"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory")
    parser.add_argument("--k", type=int, help="number of groups (default: by the elbow)")
    _add_vectors(parser)
    parser.add_argument(
        "--alpha", type=float, default=VECTORS.votes.alpha, help="token-wise share, (0, 1] (%(default)s)"
    )
    parser.add_argument("--budget", choices=BUDGETS, default=VECTORS.votes.budget)
    parser.add_argument(
        "--max-tokens", type=int, default=TOKENS_PER_DOCUMENT, metavar="N", help="read of each document (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of k-means (%(default)s)")
    parser.set_defaults(run=_build)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("lists", metavar="FILE", help=".npz with an array L{layer}_C{group} per layer and group")
    parser.add_argument("--model", required=True, metavar="DIR", help="the checkpoint the lists belong to")
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory")
    _add_vectors(parser)
    parser.set_defaults(run=_import)


def _add_vectors(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--depth", type=float, default=DEPTH, help="of the layer that decides on a text's group, [0, 1) (%(default)s)"
    )
    parser.add_argument(
        "--beta", type=float, default=VECTORS.beta, help="share of its neurons that do, (0, 1] (%(default)s)"
    )


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("clusters", metavar="DIR")
    parser.add_argument(
        "--gamma",
        type=float,
        help=f"share of neurons to compare, (0, 1] (default {Similarity().gamma:g}, or what published lists "
        "are long enough for)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_inspect)


def _build(options: argparse.Namespace) -> None:
    vectors = TextVectors(votes=Votes(alpha=options.alpha, budget=options.budget), beta=options.beta)
    documents = read_documents(options.data, options.text_column, options.label_column)
    params, tokenizer = arguments.load_model(options)
    build_clusters(
        options.out,
        params,
        tokenizer,
        documents,
        vectors,
        k=options.k,
        depth=options.depth,
        seed=options.seed,
        max_tokens=options.max_tokens,
    )
    _show(inspect_clusters(options.out), as_json=False)


def _import(options: argparse.Namespace) -> None:
    import_published(options.lists, options.out, options.model, depth=options.depth, beta=options.beta)
    print(options.out)


def _inspect(options: argparse.Namespace) -> None:
    _show(inspect_clusters(options.clusters, options.gamma), as_json=options.json)


def _show(inspection: Inspection, *, as_json: bool) -> None:
    print(json.dumps(_facts(inspection), ensure_ascii=False) if as_json else "\n".join(_lines(inspection)))


def _facts(inspection: Inspection) -> dict[str, object]:
    clusters = inspection.clusters
    return {
        "origin": clusters.origin,
        "model": clusters.fingerprint,
        "layer": clusters.layer,
        "names": clusters.names,
        "sizes": clusters.sizes,
        "gamma": inspection.gamma,
        "overlaps": inspection.overlaps.tolist(),
        **inspection.facts,
    }


def _lines(inspection: Inspection) -> list[str]:
    clusters, facts = inspection.clusters, inspection.facts
    L = clusters.frequencies.shape[1]
    lines = [
        f"{len(clusters.names)} groups of {facts['data']['name']} by {clusters.origin}, for the model "
        f"{clusters.fingerprint}; decided in layer {clusters.layer} of {L}"
    ]
    for c, name in enumerate(clusters.names):
        size = f"{clusters.sizes[c]} documents" if clusters.sizes[c] else "a published list"
        lines += ["", f"{one_line(name)}: {size}"]
        if "nearest" in facts:
            lines.append("  distance to the centroid, number and beginning of the nearest documents:")
            lines += [_document(near) for near in facts["nearest"][c]]
    gamma = inspection.gamma
    if len(clusters.names) > 1:
        lines += ["", f"share of neurons that two groups have in common at gamma={gamma:g}: mean, least .. most"]
        lines += [f"  layer {l:3d}  {_pairs(layer)}" for l, layer in enumerate(inspection.overlaps)]
    voted, kept = (clusters.frequencies > 0).sum(axis=-1).min(), kept_neurons(gamma, clusters.frequencies.shape[-1])
    if voted < kept:
        lines += [
            "",
            f"a group has a layer in which only {voted} neurons ever got a vote, but gamma={gamma:g} asks for {kept}:",
            "the others are taken in the order of their numbers; give it more text, or take a smaller gamma",
        ]
    return lines


def _document(near: dict[str, Any]) -> str:
    return f"  {near['distance']:7.2f}  {near['document']:6d}  {one_line(near['text'][:90])}"


def _pairs(overlap: np.ndarray) -> str:
    pairs = overlap[np.triu_indices(len(overlap), 1)]
    return f"{pairs.mean():.3f}  {pairs.min():.3f} .. {pairs.max():.3f}"
