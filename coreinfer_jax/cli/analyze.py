"""`coreinfer analyze`."""

import argparse
from pathlib import Path

from coreinfer_jax.cli import arguments
from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.files import to_path
from coreinfer_jax.lab.analysis import Pairs, analyze, read_pairs
from coreinfer_jax.lab.analysis.parts import ALPHA, BETA, TEXTS, check_settings
from coreinfer_jax.text.documents import Documents, read_documents

HELP = "measure what the paper says of core neurons, as pictures and numbers"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    arguments.add_model(parser)
    arguments.add_documents(parser)
    parser.add_argument("--topics", metavar="FILE", help="labelled texts: csv, tsv or jsonl")
    parser.add_argument("--topic-text", type=arguments.column, metavar="COL", help="of --topics")
    parser.add_argument("--topic-label", type=arguments.column, metavar="COL", help="of --topics")
    parser.add_argument(
        "--pairs",
        action="append",
        default=[],
        metavar="FILE:A,B,SCORE",
        help="pairs of sentences and how alike people found them, by columns; csv, or tabs; may be repeated",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new directory, or one to go on with")
    parser.add_argument(
        "--texts", type=int, default=TEXTS, metavar="N", help="documents per part, and per label (%(default)s)"
    )
    parser.add_argument("--alpha", type=float, default=ALPHA, help="token-wise share, (0, 1] (%(default)s)")
    parser.add_argument("--beta", type=float, default=BETA, help="share of neurons kept, (0, 1] (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of documents, and of k-means (%(default)s)")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    documents = read_documents(to_path(options.data), options.text_column)
    topics = _topics(options)
    pairs = [_pairs(value) for value in options.pairs]
    check_settings(options.out, pairs, options.texts, options.alpha, options.beta, options.seed)
    params, tokenizer = arguments.load_model(options)
    directory = analyze(
        options.out,
        params,
        tokenizer,
        documents,
        topics=topics,
        pairs=pairs,
        texts=options.texts,
        alpha=options.alpha,
        beta=options.beta,
        seed=options.seed,
    )
    print(directory)


def _topics(options: argparse.Namespace) -> Documents | None:
    columns = (options.topic_text, options.topic_label)
    if options.topics is None:
        if columns != (None, None):
            raise CoreInferError("--topic-text and --topic-label are columns of --topics FILE: give that too")
        return None
    if None in columns:
        raise CoreInferError(f"--topics {options.topics}: name its columns with --topic-text and --topic-label")
    return read_documents(to_path(options.topics), *columns)


def _pairs(value: str) -> Pairs:
    name, _, columns = value.rpartition(":")
    names = columns.split(",")
    if not name or len(names) != 3 or "" in names:
        raise CoreInferError(f"--pairs {value}: give FILE:A,B,SCORE, the three columns by name or number from 0")
    return read_pairs(Path(to_path(name)), [arguments.column(column) for column in names])
