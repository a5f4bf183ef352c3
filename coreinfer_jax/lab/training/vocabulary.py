"""Tokenizers trained on the text the model is trained on: byte-level BPE for OPT, sentencepiece for LLaMA."""

import io
import json
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer as Pipeline
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from coreinfer_jax.errors import CoreInferError

# Special tokens in the order of their ids, as published models have them.
OPT_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
LLAMA_SPECIALS = ("<unk>", "<s>", "</s>")


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: byte-level BPE that puts `</s>` before a text, as OPT's does.

    Raises:
        CoreInferError: too little text for `vocab_size` entries.
    """
    pipeline = Pipeline(models.BPE())
    pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pipeline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(OPT_SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pipeline.train_from_iterator(texts, trainer)
    entries = pipeline.get_vocab_size()
    if entries != vocab_size:
        raise CoreInferError(
            f"vocab_size={vocab_size}: this text yields {entries} entries; give more text, or vocab_size={entries}"
        )
    pipeline.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", OPT_SPECIALS.index("</s>"))]
    )
    # By Python, whose errors say that a disk is full; tokenizers' own do not.
    (directory / "tokenizer.json").write_text(pipeline.to_str(pretty=True), encoding="utf-8")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def train_sentencepiece(texts: Iterable[str], vocab_size: int, directory: Path) -> None:
    """Write tokenizer.model: sentencepiece BPE with byte fallback and without normalisation, as LLaMA 2's.

    Raises:
        CoreInferError: too little text for `vocab_size` entries.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n") if line),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            unk_id=LLAMA_SPECIALS.index("<unk>"),
            bos_id=LLAMA_SPECIALS.index("<s>"),
            eos_id=LLAMA_SPECIALS.index("</s>"),
            pad_id=-1,
            num_threads=1,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CoreInferError(f"vocab_size={vocab_size}: no such tokenizer from this text ({reason})") from error
    (directory / "tokenizer.model").write_bytes(model.getvalue())
