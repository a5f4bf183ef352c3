"""Bamboo and TurboSparse-Mistral (arXiv 2406.05955): Mistral whose ReLU acts on gate and up projection, dReLU."""

from dataclasses import replace

from coreinfer_jax.errors import shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.config_fields import ConfigFields, Fields
from coreinfer_jax.model.families import mistral

# Published files name the code that came with them, which is what is implemented here.
_CODE = ("configuration_bamboo.BambooConfig", "modeling_bamboo.BambooForCausalLM", "modeling_bamboo.BambooModel")


def code_problems(fields: Fields) -> list[str]:
    """Code of another name."""
    given = fields.get("auto_map", {})
    is_known = isinstance(given, dict) and all(code in _CODE for code in given.values())
    return [] if is_known else [f"auto_map={shown(given)}"]


def read_config(fields: Fields) -> ModelConfig:
    """The model that a checked config.json describes."""
    return replace(mistral.read_config(fields), family="bamboo", activates_up=True)


FAMILY = replace(
    mistral.FAMILY,
    name="bamboo",
    architectures=("BambooForCausalLM",),
    fields=mistral.FIELDS.joined(ConfigFields(checked=("auto_map",), problems=code_problems)),
    read_config=read_config,
    # GGUF files of these models say that they are LLaMA, which has another MLP.
)
