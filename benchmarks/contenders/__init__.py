"""What is measured side by side. Each contender runs in a process of its own: see `benchmarks.worker`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """Where a contender is, and what it is made of.

    Attributes:
        module: in this package; imported where it runs, so that none needs what another is made of.
        compiles: whether it compiles programs; where not, its first generation costs more for other reasons.
        imports: packages it needs besides ours.
        packages: their distributions whose versions are recorded.
        extra: of this project, which installs them.
    """

    module: str
    compiles: bool = True
    imports: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    extra: str = ""


CONTENDERS: dict[str, Contender] = {
    "coreinfer": Contender("coreinfer"),
    "predictor": Contender("predictor"),
    "gather": Contender("predictor"),
    "transformers-eager": Contender("hugging_face", False, ("torch",), ("transformers", "torch"), "torch"),
    "transformers-compiled": Contender("hugging_face", True, ("torch",), ("transformers", "torch"), "torch"),
    "llama.cpp": Contender("llama_cpp", False, ("llama_cpp", "gguf"), ("llama_cpp_python",), "llama-cpp"),
}
