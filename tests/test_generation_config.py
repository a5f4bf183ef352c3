"""generation_config.json: every field that transformers knows is honoured, of no effect, or named."""

import json
from pathlib import Path

import pytest
import transformers

import coreinfer_jax as ci
from coreinfer_jax.io.generation_config import Recommended, read_recommended
from tests.support import OPT

# What each field may say that is far from its default.
OTHER = {
    "typical_p": 0.5,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "top_h": 0.4,
    "num_beams": 4,
    "num_return_sequences": 2,
    "num_beam_groups": 2,
    "min_length": 5,
    "min_new_tokens": 5,
    "max_time": 2.0,
    "stop_strings": ["stop"],
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[5]],
    "suppress_tokens": [5],
    "begin_suppress_tokens": [5],
    "sequence_bias": [[[5], 2.0]],
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 5,
    "exponential_decay_length_penalty": [5, 1.2],
    "constraints": [5],
    "force_words_ids": [[5]],
    "guidance_scale": 1.5,
    "watermarking_config": {"bias": 2.0},
    "token_healing": True,
    "penalty_alpha": 0.6,
    "dola_layers": "high",
    "diversity_penalty": 0.5,
}
HONOURED = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "repetition_penalty": 1.05,
    "no_repeat_ngram_size": 4,
}
NEUTRAL = {"temperature": 1.0, "top_k": 50, "top_p": None, "min_p": None}


@pytest.fixture
def read(tmp_path: Path):
    def read(**fields: object) -> Recommended:
        (tmp_path / "generation_config.json").write_text(json.dumps(fields))
        return read_recommended(tmp_path, OPT)

    return read


def test_defaults_are_those_of_transformers(read):
    usual = transformers.GenerationConfig._get_default_generation_params()
    assert usual["do_sample"] is False
    assert read().sampling == {}
    assert read(do_sample=True).sampling == NEUTRAL
    assert {name: usual.get(name) for name in ("temperature", "top_k")} == {"temperature": 1.0, "top_k": 50}
    assert (usual["top_p"], usual["repetition_penalty"], usual["no_repeat_ngram_size"]) == (1.0, 1.0, 0)
    assert read(**dict.fromkeys(HONOURED), do_sample=True).sampling == NEUTRAL
    assert read(**usual).not_honoured == ()
    assert read(**usual | {"do_sample": True}).not_honoured == ()


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_honoured(read, name):
    assert read(do_sample=True, **{name: HONOURED[name]}).sampling == NEUTRAL | {name: HONOURED[name]}
    always = {name: HONOURED[name]} if name in ("repetition_penalty", "no_repeat_ngram_size") else {}
    assert read(**{name: HONOURED[name]}).sampling == always


def test_a_top_k_of_0_is_no_limit(read):
    assert read(do_sample=True, top_k=0).sampling["top_k"] is None


def test_every_field_of_transformers_is_accounted_for(read):
    """A field that is neither honoured nor of no effect is named, whatever its name; a new one as well."""
    for name in transformers.GenerationConfig().to_dict():
        value = OTHER.get(name, "something")
        if name in (*HONOURED, "do_sample"):
            continue
        named = read(do_sample=True, **{name: value}).not_honoured
        assert bool(named) == (name in OTHER), name
        assert all(line.startswith(f"{name}=") for line in named)
    assert read(a_field_to_come=1).not_honoured == ("a_field_to_come=1",)


def test_what_only_acts_on_draws_is_not_named_without_them(read):
    assert read(typical_p=0.5, epsilon_cutoff=0.1).not_honoured == ()
    assert read(typical_p=0.5, bad_words_ids=[[5]]).not_honoured == ("bad_words_ids=[[5]]",)


@pytest.mark.parametrize(
    "fields",
    [
        *[{name: value, "do_sample": True} for name in HONOURED for value in ("much", -1, [1])],
        *[{"do_sample": value} for value in ("yes", 1, [])],
        {"do_sample": True, "top_k": 1.5},
        {"do_sample": True, "top_p": 1.5},
        {"do_sample": True, "temperature": 1e300},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_an_error_names_the_file_and_the_field(read, tmp_path, fields):
    with pytest.raises(ci.CoreInferError) as caught:
        read(**fields)
    *_, name = [name for name in fields if name != "do_sample"] or ["do_sample"]
    assert str(caught.value).startswith(f"{tmp_path / 'generation_config.json'}: {name}={fields[name]!r}")
    assert "\n" not in str(caught.value)
