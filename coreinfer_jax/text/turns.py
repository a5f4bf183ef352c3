"""How a chat model ends its turn, by its tokenizer."""

from coreinfer_jax.errors import CoreInferError
from coreinfer_jax.text.tokenizer import Tokenizer

_ANSWER = "What no template holds."
_TALK = ({"role": "user", "content": "question"}, {"role": "assistant", "content": _ANSWER})
# Longer special tokens are none that anybody has.
_LONGEST = 64


def end_of_turn(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a reply: the tokenizer's own EOS, and the special token that its template puts behind one.

    What the model's config calls EOS may be neither. Without a chat template there are no turns: ().
    """
    if not tokenizer.has_chat_template:
        return ()
    return tuple(dict.fromkeys(i for i in (tokenizer.eos_id, _behind_an_answer(tokenizer)) if i is not None))


def _behind_an_answer(tokenizer: Tokenizer) -> int | None:
    try:
        text = tokenizer.render_chat([*_TALK, _TALK[0]], begin_answer=True)
    except CoreInferError:  # a template for other conversations, which says when it is used what it wants
        return None
    behind = text.partition(_ANSWER)[2].lstrip()
    beginnings = (behind[:length] for length in range(min(len(behind), _LONGEST), 0, -1))
    return next((i for i in map(tokenizer.special_id, beginnings) if i is not None), None)
