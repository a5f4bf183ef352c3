"""Text in and out: tokenizers, conversations, the text of a growing continuation, stop strings."""

from coreinfer_jax.text.gguf_tokenizer import files_of_gguf
from coreinfer_jax.text.streaming import REPLACEMENT, complete, continuation, settled
from coreinfer_jax.text.tokenizer import Tokenizer, load_tokenizer
from coreinfer_jax.text.tokenizer_files import TOKENIZER_FILES
from coreinfer_jax.text.turns import end_of_turn

__all__ = [
    "REPLACEMENT",
    "TOKENIZER_FILES",
    "Tokenizer",
    "complete",
    "continuation",
    "end_of_turn",
    "files_of_gguf",
    "load_tokenizer",
    "settled",
]
