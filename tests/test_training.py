"""Training: interruption changes nothing, nothing held out is trained on, and what is written is what was trained."""

import hashlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from sentencepiece import SentencePieceTrainer

import coreinfer_jax as ci
from coreinfer_jax.files import locked, new_file
from coreinfer_jax.io.config_json import hugging_face_fields, model_config, read_model_config
from coreinfer_jax.io.export import write_hugging_face
from coreinfer_jax.lab.training import Recipe, checkpoints, curve, outcome, preparation, recipe, train, trainer, windows
from coreinfer_jax.model import unembed
from coreinfer_jax.model.config import ModelConfig, Rope
from coreinfer_jax.model.fingerprint import fingerprint
from coreinfer_jax.text import load_tokenizer
from tests.support import LLAMA, MODELS, first_quick, random_model

plots = pytest.importorskip("matplotlib.image", reason="train draws with matplotlib")

SIZES = {"vocab_size": 320, "hidden_size": 32, "mlp_size": 64, "num_heads": 2}
SCHEDULE = {"sequence": 40, "batch": 4, "steps": 12, "warmup": 3, "learning_rate": 2e-2}
RECIPES = {
    "opt": Recipe(family="opt", num_layers=2, **SIZES, **SCHEDULE),
    "llama": Recipe(family="llama", num_layers=1, **SIZES, **SCHEDULE),
}
FAMILIES = pytest.mark.parametrize("family", first_quick(RECIPES))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file takes more than this many bytes, which the system says by an error, as of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@FAMILIES
@pytest.mark.parametrize("size", [0, 1000])
def test_a_tokenizer_that_cannot_be_written_is_told_of_in_one_line(family, size, tmp_path):
    text = write_text(tmp_path / "text.txt", 60, 0)
    with room_for(size), pytest.raises(ci.CoreInferError, match="File too large; nothing was written"):
        train(tmp_path / "run", [text], RECIPES[family])
    assert list(tmp_path.iterdir()) == [text]


def write_text(path: Path, documents: int, seed: int) -> Path:
    """English-like text: invented words, a few of them frequent, in numbered documents of two lines."""
    random = np.random.default_rng(seed)
    syllables = ["ka", "ri", "to", "men", "sol", "ba", "dur", "el", "in", "ost"]
    words = ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(200)]
    shares = 1 / np.arange(1, 201)
    lines = [" ".join(random.choice(words, 12, p=shares / shares.sum())) + "." for _ in range(2 * documents)]
    told = [f"Tale {i}: {lines[2 * i]}\n{lines[2 * i + 1]}" for i in range(documents)]
    path.write_text("".join(f"{document}\n{windows.SEPARATOR}\n" for document in told))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("texts")
    return [write_text(folder / "long.txt", 210, seed=1), write_text(folder / "short.txt", 50, seed=2)]


@pytest.fixture(scope="module", autouse=True)
def training() -> Iterator[None]:
    """Frequent checkpoints; optax relies on JAX's promotion, which the other tests forbid."""
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        patch.setattr(trainer, "CHECKPOINT_EVERY", 3)
        patch.setattr(trainer, "MEASURE_EVERY", 5)
        yield


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of one uninterrupted run per family, made when they are asked for."""
    folder = tmp_path_factory.mktemp("runs")

    class Runs(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = train(folder / family, texts, RECIPES[family]).parent
            return self[family]

    return Runs()


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*.*"))}


def assert_same_run(directory: Path, expected: Path) -> None:
    """All files are equal, but for the seconds that were measured."""
    assert {str(path.relative_to(directory)) for path in directory.rglob("*")} == {
        str(path.relative_to(expected)) for path in expected.rglob("*")
    }
    for name in ("tokens.safetensors", "checkpoint.safetensors", "model/model.safetensors"):
        ours, theirs = load_file(directory / name), load_file(expected / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[leaf].tobytes() == theirs[leaf].tobytes() for leaf in theirs), name
    for name in ("loss.json", "model/training.json"):
        ours, theirs = (json.loads((folder / name).read_text()) for folder in (directory, expected))
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def interrupt(function: Callable, at: int, before: bool = False) -> Callable:
    """`function`, whose call number `at`, from 0, ends in Ctrl-C: after its work, or before."""
    calls = iter(range(1_000_000))

    def interrupted(*arguments, **options):
        last = next(calls) == at
        if last and before:
            raise KeyboardInterrupt
        result = function(*arguments, **options)
        if last:
            raise KeyboardInterrupt
        return result

    return interrupted


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        (SentencePieceTrainer, "train", 0),
        (preparation, "save_file", 0),
        (trainer, "train_step", 7),
        pytest.param(trainer, "train_step", 0, marks=pytest.mark.slow),
        pytest.param(trainer, "train_step", 11, marks=pytest.mark.slow),
        (curve, "draw_curve", 1),
        (checkpoints, "save_file", 2),
        (trainer, "save_state", 3),
        (outcome, "write_hugging_face", 0),
    ],
)
def test_an_interrupted_run_ends_in_the_same_weights(texts, trained, tmp_path, module, name, at):
    family = "opt" if at % 2 else "llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, interrupt(getattr(module, name), at))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", texts, RECIPES[family])
    assert not (tmp_path / "run" / "model").exists()
    assert not list(tmp_path.rglob(".*"))
    model = train(tmp_path / "run", texts, RECIPES[family])
    assert model == tmp_path / "run" / "model"
    assert_same_run(model.parent, trained[family])


def test_a_run_interrupted_again_and_again_ends_in_the_same_weights(texts, trained, tmp_path):
    for at in (4, 0, 3, 5, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "train_step", interrupt(trainer.train_step, at, before=True))
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "run", texts, RECIPES["opt"])
    assert_same_run(train(tmp_path / "run", texts, RECIPES["opt"]).parent, trained["opt"])


def test_a_finished_run_is_left_alone(texts, trained):
    before = files_of(trained["opt"])
    train(trained["opt"], texts, RECIPES["opt"])
    assert files_of(trained["opt"]) == before


@FAMILIES
def test_losses(trained, family):
    history = json.loads((trained[family] / "loss.json").read_text())
    losses = history["losses"]
    assert len(losses) == 12
    assert abs(losses[0] - np.log(320)) < 0.5  # a new model knows nothing
    assert losses[-1] < losses[0] - 1
    assert [record["step"] for record in history["records"]] == [5, 10, 12]
    for name in ("long.txt", "short.txt"):
        measured = [record["held_out"][name] for record in history["records"]]
        assert measured[-1] < measured[0]
    assert history["seconds"] > 0


FURTHER = replace(RECIPES["opt"], steps=6, seed=3, dtype="float32")


@pytest.fixture(scope="module")
def further(texts, trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that goes on from the OPT model."""
    return train(tmp_path_factory.mktemp("further") / "run", texts, FURTHER, trained["opt"] / "model").parent


def test_training_further_starts_from_the_model(texts, trained, further):
    """The first step's loss is that of the model it began from, softmax in NumPy over the logits of `forward`."""
    tokens = load_file(further / "tokens.safetensors")
    rows = windows.batch([tokens[f"{text.name}/train"] for text in texts], 0, FURTHER, bos_id=2)
    params, _ = ci.load(trained["opt"] / "model", "float32")
    logits = np.asarray(ci.forward(params, rows[:, :-1]), np.float64)
    chosen = np.take_along_axis(logits, rows[:, 1:, None], axis=2)[:, :, 0]
    losses = json.loads((further / "loss.json").read_text())["losses"]
    assert losses[0] == pytest.approx((np.log(np.exp(logits).sum(axis=2)) - chosen).mean(), abs=1e-5)
    before, after = (
        json.loads((folder / "model" / "training.json").read_text())["held_out"] for folder in (trained["opt"], further)
    )
    assert all(after[name]["nats_per_token"] < before[name]["nats_per_token"] for name in before)


def test_training_further_keeps_tokenizer_and_history(trained, further):
    model = trained["opt"] / "model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (further / "model" / name).read_bytes() == (model / name).read_bytes()
    before, after = (json.loads((folder / "training.json").read_text()) for folder in (model, further / "model"))
    params, _ = ci.load(model, "float32")
    assert after["init_from"] == {"fingerprint": fingerprint(params), "training": before}
    assert before["init_from"] is None
    assert after["tokens_seen"] == 6 * 4 * 40


@pytest.mark.parametrize("at", [0, 4])
def test_training_further_survives_interruption(texts, trained, further, tmp_path, at):
    model = trained["opt"] / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", interrupt(trainer.train_step, at))
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", texts, FURTHER, model)
    assert_same_run(train(tmp_path / "run", texts, FURTHER, model).parent, further)


def test_training_further_without_its_checkpoint_begins_from_the_model_again(texts, trained, further, tmp_path):
    shutil.copytree(further, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    assert_same_run(train(tmp_path / "run", texts, FURTHER, trained["opt"] / "model").parent, further)


def test_two_processes_do_not_train_in_one_directory(texts, trained):
    with locked(trained["opt"]), pytest.raises(ci.CoreInferError, match="another training is at work here"):
        train(trained["opt"], texts, RECIPES["opt"])


def test_what_a_killed_process_left_of_a_file_goes(tmp_path):
    """safetensors writes into a hidden file of its own first, which only a directory around it can hold."""
    left = tmp_path / ".loss.json.partial-abcd"
    left.mkdir()
    (left / ".tmpXYZ").write_text("half")
    with new_file(tmp_path / "loss.json") as partial:
        partial.write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.json"]


def test_windows_line_ends_and_a_byte_order_mark(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffone\r\ntwo\r\n<|endoftext|>\r\nthree\r\n<|endoftext|>\r\n".encode())
    text = windows.read_text(file)
    assert text.documents == ("one\ntwo",)
    assert text.held_out == ((1, "three"),)


def test_other_first_weights_are_refused(texts, trained, further, tmp_path):
    """Of other sizes, without a tokenizer, or not those the run began with."""
    model = trained["opt"] / "model"
    for changes, told in (({"mlp_size": 72}, "mlp_size 64 instead of 72"), ({"family": "llama"}, "family opt instead")):
        with pytest.raises(ci.CoreInferError, match=told):
            train(tmp_path / "run", texts, replace(FURTHER, **changes), model)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (bare / name).write_bytes((model / name).read_bytes())
    with pytest.raises(ci.CoreInferError, match="has no tokenizer"):
        train(tmp_path / "run", texts, FURTHER, bare)
    assert not (tmp_path / "run").exists()
    for begun, other in ((further, None), (further, further / "model"), (trained["opt"], model)):
        recipe = FURTHER if begun == further else RECIPES["opt"]
        with pytest.raises(ci.CoreInferError, match=r"begun with other settings .*init_from"):
            train(begun, texts, recipe, other)


@FAMILIES
def test_the_curve_is_drawn(trained, family):
    pixels = plots.imread(trained[family] / "loss.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 500
    colours = np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)
    assert len(colours) > 50  # two held-out curves, one of each step, antialiased


@FAMILIES
def test_the_loss_of_a_record_is_that_of_the_written_model(trained, family):
    """Softmax in NumPy over the logits of `forward`; the written weights are rounded to bfloat16."""
    params, _ = ci.load(trained[family] / "model", "float32")
    tokens = load_file(trained[family] / "tokens.safetensors")["long.txt/held_out"].astype(np.int64)
    sequence, bos = RECIPES[family].sequence, params.config.bos_id
    rows = tokens[: len(tokens) // sequence * sequence].reshape(-1, sequence)[:32]
    read = np.concatenate([np.full((len(rows), 1), bos), rows[:, :-1]], axis=1)
    logits = np.asarray(ci.forward(params, read), np.float64)
    chosen = np.take_along_axis(logits, rows[:, :, None], axis=2)[:, :, 0]
    loss = (np.log(np.exp(logits).sum(axis=2)) - chosen).mean()
    facts = json.loads((trained[family] / "model" / "training.json").read_text())
    assert facts["held_out"]["long.txt"]["nats_per_token"] == pytest.approx(loss, abs=0.02)


@FAMILIES
def test_facts(trained, texts, family):
    facts = json.loads((trained[family] / "model" / "training.json").read_text())
    assert facts["tokens_seen"] == 12 * 4 * 40
    params, _ = ci.load(trained[family] / "model")
    assert facts["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert Recipe(**facts["recipe"]) == RECIPES[family]
    described = {text["file"]: text for text in facts["texts"]}
    assert list(described) == ["long.txt", "short.txt"]
    for text in texts:
        assert described[text.name]["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest()
    assert [held["document"] for held in described["long.txt"]["held_out"]] == [99, 199]
    assert [held["document"] for held in described["short.txt"]["held_out"]] == [49]
    assert described["long.txt"]["held_out"][0]["begins"].startswith("Tale 99: ")


@FAMILIES
def test_no_path_of_this_machine_is_written(trained, texts, family):
    for file in trained[family].rglob("*.json"):
        content = file.read_text()
        assert str(trained[family].parent) not in content
        assert str(texts[0].parent) not in content
    assert "/" not in (trained[family] / "model" / "training.json").read_text()


def documents_of(tokens: np.ndarray, bos: int, eos: int, tokenizer: object) -> list[str]:
    """Texts between a BOS and the next end."""
    starts = np.flatnonzero(tokens == bos)
    parts = np.split(tokens, starts)[1:]
    return [tokenizer.decode([int(i) for i in part if i not in (bos, eos)]) for part in parts]


@FAMILIES
def test_held_out_documents_are_not_trained_on(trained, texts, family):
    tokens = load_file(trained[family] / "tokens.safetensors")
    tokenizer = load_tokenizer(trained[family])
    bos, eos = (2, 2) if family == "opt" else (1, 2)
    for text in texts:
        told = [part.strip("\n") for part in text.read_text().split(windows.SEPARATOR)][:-1]
        held = told[99::100] or told[-1:]
        assert documents_of(tokens[f"{text.name}/held_out"], bos, eos, tokenizer) == held
        learnt = documents_of(tokens[f"{text.name}/train"], bos, eos, tokenizer)
        assert learnt == [document for document in told if document not in held]
        assert len(learnt) == len(told) - len(held)


@pytest.mark.parametrize("ending", ["\n", ""])
def test_separators_end_documents(tmp_path, ending):
    """Several in a row hold nothing between them, and the last one needs no line end."""
    mark = windows.SEPARATOR
    file = tmp_path / "text.txt"
    file.write_text(f"{mark}\none\n\ntwo {mark} three\n{mark}\n{mark}\n\n{mark}\n four\n{mark}{ending}")
    text = windows.read_text(file)
    assert text.documents == (f"one\n\ntwo {mark} three",)
    assert text.held_out == ((1, " four"),)


def small_recipe(**changes) -> Recipe:
    return replace(RECIPES["opt"], **{"sequence": 7, "batch": 5, "steps": 1000} | changes)


def test_every_token_is_predicted_once_per_epoch():
    """Tokens are their own positions here; the last 3 fill no window."""
    tokens = np.arange(7 * 20 + 3, dtype=np.uint16)
    epochs = []
    for epoch in range(3):
        rows = [windows.batch([tokens], step, small_recipe(), bos_id=9999) for step in range(4 * epoch, 4 * epoch + 4)]
        read = np.concatenate(rows)
        assert read.dtype == np.int32
        assert (read[:, 0] == 9999).all()
        assert sorted(read[:, 1:].ravel()) == list(range(7 * 20))
        assert (np.diff(read[:, 1:], axis=1) == 1).all()
        epochs.append(read[:, 1].tolist())
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_follow_from_seed_and_step_alone():
    files = [np.arange(300, dtype=np.uint16), np.arange(500, 900, dtype=np.uint16)]
    forwards = [windows.batch(files, step, small_recipe(), 2) for step in range(30)]
    backwards = [windows.batch(files, step, small_recipe(), 2) for step in reversed(range(30))]
    np.testing.assert_array_equal(forwards, backwards[::-1])
    assert not np.array_equal(forwards[0], windows.batch(files, 0, small_recipe(seed=1), 2))


def test_files_are_read_equally_often():
    """Whatever their length: the file of one window is read 40 times."""
    files = [np.arange(start, start + size, dtype=np.uint16) for start, size in ((0, 700), (1000, 7), (2000, 99))]
    read = np.concatenate([windows.batch(files, step, small_recipe(), 2) for step in range(24)])
    assert np.unique(read[:, 1] // 1000, return_counts=True)[1].tolist() == [40, 40, 40]


def test_held_out_windows_are_spread_over_all_held_out_tokens():
    tokens = np.arange(10 * 100 + 5, dtype=np.uint16)
    held_out = windows.held_out_windows(tokens, 10, bos_id=9999)
    assert held_out.shape == (windows.HELD_OUT_WINDOWS, 11)
    assert held_out[0, 1] == 0
    assert held_out[-1, -1] == 999
    assert set(np.diff(held_out[:, 1])) == {30, 40}
    np.testing.assert_array_equal(windows.held_out_windows(tokens[:25], 10, 9999)[:, 1], [0, 10])


@pytest.mark.parametrize("warmup", [0, 1, 3, 11])
def test_learning_rate(warmup):
    steps, peak = 12, 2e-2
    schedule = recipe.learning_rate(replace(RECIPES["opt"], warmup=warmup))
    step = np.arange(steps + 1)
    rising = peak * step / max(warmup, 1)
    falling = peak * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))) / 2
    expected = np.where(step < warmup, rising, falling)
    np.testing.assert_allclose([float(schedule(i)) for i in step], expected, rtol=1e-5, atol=1e-9)
    assert schedule(steps) == 0


@pytest.mark.torch
@FAMILIES
def test_the_written_model_equals_transformers(trained, family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained[family] / "model", dtype=torch.float32).eval()
    params, tokenizer = ci.load(trained[family] / "model", "float32")
    tokens = np.array([tokenizer.encode("Tale 7: ka rito mensol. ba durel")])
    assert tokens[0, 0] == params.config.bos_id
    assert tokens.shape[1] > 10
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(np.asarray(ci.forward(params, tokens)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", [MODELS["opt-350m-style"], LLAMA], ids=["opt-350m-style", "llama"])
def test_reading_in_pieces_equals_reading_at_once(monkeypatch, config):
    """Two pieces, the last of them incomplete."""
    monkeypatch.setattr(recipe, "PIECE", 64)
    params = random_model(replace(config, num_layers=1))
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (2, 101))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        hidden = jax.jit(recipe._read)(params, jnp.asarray(tokens, jnp.int32))
    logits = np.asarray(unembed(params, hidden))
    np.testing.assert_allclose(logits, np.asarray(ci.forward(params, tokens)), rtol=0, atol=1e-4)


ROPES = {
    "plain": Rope(theta=5e5),
    "linear": Rope(theta=1e4, scaling="linear", factor=4.0),
    "llama3": Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192),
}
EXPORTED = (
    MODELS
    | {f"llama, {name} positions": replace(LLAMA, rope=rope) for name, rope in ROPES.items()}
    | {
        "llama with biases": replace(LLAMA, attention_bias=True, mlp_bias=True),
        "llama tied, wide heads": replace(LLAMA, tied=True, head_size=16),
        "opt untied without biases": replace(MODELS["opt"], tied=False, attention_bias=False, mlp_bias=False),
        "opt without a last norm": replace(MODELS["opt"], final_norm=False),
        "several ends": replace(LLAMA, eos_ids=(2, 7)),
        "no special ids": replace(LLAMA, bos_id=None, eos_ids=()),
    }
)


@pytest.mark.parametrize("config", EXPORTED.values(), ids=EXPORTED)
def test_exported_models_read_back(config: ModelConfig, tmp_path: Path):
    fields = json.loads(json.dumps(hugging_face_fields(config)))
    assert model_config(fields) == replace(config, bos_id=None, eos_ids=(), pad_id=None)
    params = random_model(config)
    write_hugging_face(tmp_path, params, np.dtype(np.float32))
    assert read_model_config(tmp_path) == config
    read, tokenizer = ci.load(tmp_path, "float32")
    assert tokenizer is None
    assert jax.tree.structure(read) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, read, params))
