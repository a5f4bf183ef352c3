"""The model families, one module each, and their registry: nothing else in the package knows their names."""

from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.model.config import ModelConfig
from coreinfer_jax.model.families import bamboo, gemma2, gemma3, llama, mistral, opt, phi3, qwen2, qwen3, smollm3
from coreinfer_jax.model.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        opt.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        qwen3.FAMILY,
        gemma2.FAMILY,
        gemma3.FAMILY,
        smollm3.FAMILY,
        phi3.FAMILY,
        bamboo.FAMILY,
    )
}


def family_of(config: ModelConfig) -> Family:
    """The family of a model.

    Raises:
        CoreInferError: there is none of that name.
    """
    return family_named(config.family, "family")


def family_named(name: object, what: str) -> Family:
    """The family of this name, which an error calls `what`.

    Raises:
        CoreInferError: there is none.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(map(repr, FAMILIES))
        raise CoreInferError(f"{what} {shown(name)} is not implemented; supported are {known}")
    return FAMILIES[name]
