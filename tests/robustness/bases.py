"""What is damaged: whole checkpoints, tokenizers and other files, real ones and small ones made for the trials."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import coreinfer_jax
from tests.conftest import DATA

ASSETS = Path(coreinfer_jax.__file__).parent / "assets"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def write_bases(folder: Path) -> None:
    """folder/KIND/NAME: a directory of files that are whole."""
    from coreinfer_jax import convert

    write_models(folder / "config")
    shutil.copytree(folder / "config", folder / "safetensors")
    for directory in (folder / "safetensors").iterdir():
        header = (directory / "model.safetensors").read_bytes()
        names = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        index = {"weight_map": {name: "model.safetensors" for name in names if name != "__metadata__"}}
        if directory.name != "llama":  # one without an index
            (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "manifest").mkdir()
    for directory in (folder / "config").iterdir():
        convert(directory, folder / "manifest" / directory.name)
    write_tokenizers(folder / "tokenizer")
    write_ggufs(folder / "gguf")
    write_bins(folder / "bin", folder / "config")
    write_calibrations(folder / "calibration")
    write_clusters_and_lists(folder)
    write_documents(folder / "documents")
    write_templates(folder / "template")
    write_swaps(folder / "swap", folder)
    shutil.copytree(folder / "lists", folder / "race")


def write_ggufs(folder: Path) -> None:
    from tests.test_gguf import byte_pairs, pieces, quantised_tensors, write

    for name in ("plain", "pairs", "pieces", "quantised"):
        (folder / name).mkdir(parents=True)
    write(folder / "plain" / "model.gguf")
    write(folder / "pairs" / "model.gguf", lambda writer: byte_pairs(writer, "gpt-2"))
    write(folder / "pieces" / "model.gguf", pieces)
    write(folder / "quantised" / "model.gguf", weights=quantised_tensors, theta=500_000.0)


def write_models(folder: Path) -> None:
    import numpy as np

    from coreinfer_jax.io.export import write_hugging_face
    from coreinfer_jax.model.config import Rope
    from coreinfer_jax.model.structure import abstract_params
    from coreinfer_jax.model.weights import named_leaves, with_leaves
    from tests.support import LLAMA, MODELS

    scaled = {"llama3": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 64), "linear": Rope(1e4, "linear", 2.0)}
    for name, config in (MODELS | {name: replace(LLAMA, rope=rope) for name, rope in scaled.items()}).items():
        (folder / name).mkdir(parents=True)
        params = abstract_params(replace(config, num_layers=2), np.dtype(np.float32))
        shapes = {leaf: shape.shape for leaf, shape in named_leaves(params)}
        draw = np.random.default_rng(0).standard_normal
        weights = with_leaves(params, lambda leaf, shapes=shapes, draw=draw: draw(shapes[leaf], np.float32))
        write_hugging_face(folder / name, weights, np.dtype(np.float32))
    real = DATA / "models" / "tinystories-656k"
    (folder / real.name).mkdir()
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(real / file, folder / real.name / file)


def write_tokenizers(folder: Path) -> None:
    real = DATA / "models" / "tinystories-656k"
    bases = {name: folder / name for name in ("fast", "sentencepiece", "both", "bytes")}
    for base in bases.values():
        base.mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        for name in ("fast", "both"):
            shutil.copyfile(real / file, bases[name] / file)
    pieces = first_pieces((DATA / "tokenizers" / "llama2.model").read_bytes(), 1200)
    for name in ("sentencepiece", "both"):
        (bases[name] / "tokenizer.model").write_bytes(pieces)
    write_first_merges(DATA / "tokenizers" / "opt", bases["bytes"], 800)


def first_pieces(model: bytes, count: int) -> bytes:
    """A sentencepiece model with the first `count` pieces of another: fields number 1 of its protocol buffer."""
    kept, position, pieces = b"", 0, 0
    while position < len(model):
        tag = model[position]
        assert tag & 7 == 2, "every field of the model has a length"
        size, shift, end = 0, 0, position + 1
        while True:
            size |= (model[end] & 127) << shift
            shift += 7
            end += 1
            if model[end - 1] < 128:
                break
        if tag != 10 or pieces < count:
            kept += model[position : end + size]
        pieces += tag == 10
        position = end + size
    return kept


def write_first_merges(source: Path, target: Path, count: int) -> None:
    """A byte-level BPE tokenizer with the first `count` merges of another."""
    lines = (source / "merges.txt").read_text().splitlines()[: count + 1]
    merged = {line.replace(" ", "") for line in lines[1:]}
    vocabulary = json.loads((source / "vocab.json").read_text())
    kept = [token for token in vocabulary if len(token) == 1 or token in merged or token.startswith("<")]
    (target / "merges.txt").write_text("\n".join(lines) + "\n")
    (target / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(kept)}))
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(source / file, target / file)


def write_bins(folder: Path, models: Path) -> None:
    """PyTorch's form of two models: a zip archive, and what PyTorch wrote before there were any."""
    import torch
    from safetensors.torch import load_file

    for name, zipped in (("llama", True), ("opt", False)):
        base = folder / f"{name}-{'zip' if zipped else 'pickle'}"
        base.mkdir(parents=True)
        shutil.copyfile(models / name / "config.json", base / "config.json")
        tensors = load_file(models / name / "model.safetensors")
        torch.save(tensors, base / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def write_calibrations(folder: Path) -> None:
    """What lies beside the embedded models' weights, which reading their calibrations does not take."""
    for name in ("llama", "opt"):
        (folder / name).mkdir(parents=True)
        for file in ("config.json", "coreinfer-calibration.safetensors", "tokenizer.json", "tokenizer.model"):
            if (ASSETS / name / file).is_file():
                shutil.copyfile(ASSETS / name / file, folder / name / file)


def write_clusters_and_lists(folder: Path) -> None:
    """Published lists of neurons, plain and compressed, and the directory of clusters that is made of them."""
    import numpy as np

    import coreinfer_jax as ci

    (folder / "clusters").mkdir()
    lists = {f"L{l}_C{c}": np.random.default_rng(l).permutation(96)[:80] for l in range(2) for c in range(3)}
    for name, save in (("plain", np.savez), ("compressed", np.savez_compressed)):
        base = folder / "lists" / name
        shutil.copytree(folder / "config" / "opt", base)
        save(base / "lists.npz", **lists)
        ci.import_published(base / "lists.npz", folder / "clusters" / name, base)


def write_swaps(folder: Path, bases: Path) -> None:
    """Models, each with other weights of the same shapes beside its own, as `other`."""
    import torch
    from safetensors import torch as safetensors

    for base in (bases / "config" / "llama", bases / "config" / "opt", *sorted((bases / "bin").iterdir())):
        directory = shutil.copytree(base, folder / f"{base.parent.name}-{base.name}")
        file = next(directory / name for name in WEIGHTS if (directory / name).is_file())
        if file.suffix == ".bin":
            others = {name: tensor + 1 for name, tensor in torch.load(file, weights_only=True).items()}
            torch.save(others, directory / "other", _use_new_zipfile_serialization="zip" in base.name)
        else:
            others = {name: tensor + 1 for name, tensor in safetensors.load_file(file).items()}
            safetensors.save_file(others, directory / "other")


def write_documents(folder: Path) -> None:
    """A few documents in each form that is read."""
    stories = [
        "Once upon a time, there was a king.",
        'He said: "Go, \N{GRINNING FACE}"',
        "They went away, caf\xe9.",
    ] * 5
    forms = {
        "lines.txt": "\n".join(stories),
        "separated.txt": "\n<|endoftext|>\n".join(stories),
        "table.tsv": "".join(f"{text}\t{number}\n" for number, text in enumerate(stories)),
        "lines.jsonl": "".join(json.dumps({"text": text, "label": i}) + "\n" for i, text in enumerate(stories)),
        "table.csv": "text,label\n" + "".join(f'"{text.replace(chr(34), 2 * chr(34))}",a\n' for text in stories),
    }
    for name, content in forms.items():
        (folder / name).mkdir(parents=True)
        (folder / name / name).write_text(content)


def write_templates(folder: Path) -> None:
    """Chat templates of known models."""
    from tests.test_template_cost import PLAIN

    for number, template in enumerate(PLAIN.values()):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "chat_template.jinja").write_text(template)
