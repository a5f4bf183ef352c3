"""Text in and out: tokenizers, conversations, the text of a growing continuation, stop strings."""

from coreinfer_jax.text.files import TOKENIZER_FILES
from coreinfer_jax.text.loading import Tokenizer, load_tokenizer
from coreinfer_jax.text.streaming import REPLACEMENT, complete, continuation, settled

__all__ = ["REPLACEMENT", "TOKENIZER_FILES", "Tokenizer", "complete", "continuation", "load_tokenizer", "settled"]
