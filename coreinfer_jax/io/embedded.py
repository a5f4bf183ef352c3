"""The models that come with the package."""

from pathlib import Path

from coreinfer_jax.errors import CoreInferError

PREFIX = "embedded:"
DEFAULT = "embedded:opt"
_ASSETS = Path(__file__).resolve().parents[1] / "assets"


def locate(model: str) -> Path | None:
    """The directory of `embedded:NAME`; None for any other model.

    Raises:
        CoreInferError: there is no such embedded model.
    """
    if not model.startswith(PREFIX):
        return None
    names = sorted(path.parent.name for path in _ASSETS.glob("*/config.json"))
    name = model.removeprefix(PREFIX)
    if name not in names:
        raise CoreInferError(f"{model}: no such embedded model; there are {', '.join(PREFIX + n for n in names)}")
    return _ASSETS / name
