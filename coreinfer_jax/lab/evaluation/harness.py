"""`CoreInferLM`: this package as a model of lm-evaluation-harness.

Whatever a task asks for, the full model reads the context, core neurons are chosen from it, and the narrowed model goes
on: it generates, or it reads the continuation that is to be scored. Scores of tokens that the full model read would be
those of the full model; there is no such mode but `core=None`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coreinfer_jax.engine.generation import stream
from coreinfer_jax.engine.scoring import score_continuations
from coreinfer_jax.errors import CoreInferError, shown
from coreinfer_jax.lab.evaluation.settings import check_rows_apart
from coreinfer_jax.lab.reading import batches
from coreinfer_jax.model.weights import Params
from coreinfer_jax.sparsity.choice import Chooser
from coreinfer_jax.sparsity.choosers import Recommended, resolved
from coreinfer_jax.sparsity.groups import Groups
from coreinfer_jax.sparsity.neurons import CoreNeurons
from coreinfer_jax.text import Tokenizer

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise CoreInferError("tasks need lm-evaluation-harness: pip install 'coreinfer_jax[lm-eval]'") from error

BATCH_SIZE = 8
# New tokens where a task does not say how many.
MAX_NEW_TOKENS = 256
# Tokens at the start of a rolling window that choose core neurons for what follows.
ROLLING_CONTEXT = 64

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("until", *_LENGTHS, "do_sample", "temperature", "top_k", "top_p")

Score = tuple[float, bool]
Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Wanted:
    """What a task asks of a generation.

    Attributes:
        until: texts before which it ends.
        new_tokens: at most.
        sampling: temperature, top_k and top_p, as `generate` takes them.
    """

    until: tuple[str, ...]
    new_tokens: int
    sampling: Mapping[str, Any]


class CoreInferLM(TemplateLM):  # type: ignore[misc] # lm_eval is not typed
    """A model for `lm_eval.simple_evaluate(model=...)`.

    Requests run in batches of rows of similar length, the last one of a kind filled up with copies of a row, so that
    few programs are compiled; results come in the order of requests.

    Args:
        params: dense weights.
        tokenizer: of the model.
        core: how core neurons are chosen; None is the full model.
        groups: for the methods of `core` that use them.
        batch_size: B, rows at a time.
        name: of the model, in results.
        seed: for tasks that draw tokens; what is drawn depends on the rows of a batch.

    Attributes:
        truncated: contexts so far that were too long for the model and lost their first tokens.

    Raises:
        CoreInferError: a batch size below 1, or a `core` by which rows of one batch would depend on each other.
    """

    def __init__(
        self,
        params: Params,
        tokenizer: Tokenizer,
        core: Chooser | Recommended | None = "recommended",
        *,
        groups: Groups | None = None,
        batch_size: int = BATCH_SIZE,
        name: str = "coreinfer_jax",
        seed: int = 0,
    ) -> None:
        super().__init__()
        chosen = resolved(params, core)
        if isinstance(chosen, CoreNeurons):
            raise CoreInferError("core: neurons of one prompt serve no other; give a CoreConfig, or None")
        if batch_size < 1:
            raise CoreInferError(f"batch_size={shown(batch_size)}: give a whole number of at least 1")
        check_rows_apart(chosen)
        self._params, self._text, self._core, self._groups = params, tokenizer, chosen, groups
        self._batch_size, self._name, self._seed = batch_size, name, seed
        self._start = tokenizer.encode("")  # what a text begins with: BOS or nothing
        self.truncated = 0

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self._params.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        if not self._params.config.eos_ids:
            raise CoreInferError("the model has no EOS, which lm-evaluation-harness asks for: add eos_token_id")
        return self._params.config.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: BOS, or EOS in a model without."""
        bos = self._params.config.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What cached requests are filed under."""
        return self._name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether a BOS is put before it; None puts one where the model has one and the text
                does not begin with it.
        """
        ids, start = self._text.encode(string), self._start
        doubled = ids[: 2 * len(start)] == start + start
        return ids[len(start) :] if add_special_tokens is False or (add_special_tokens is None and doubled) else ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The name under which results mention the chat template; empty where none is applied."""
        return self.tokenizer_name if chat_template and self._text.has_chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, with the beginning of an answer if asked for.

        Raises:
            CoreInferError: no chat template, or one that rejects the conversation.
        """
        return self._text.render_chat(chat_history, begin_answer=add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[Score]:
        """Per (context, continuation): the continuation's log-probability, and whether greedy decoding makes it.

        The full model reads the context. All tokens of the continuation but the first, which is foretold by the full
        model as in `generate`, are foretold by the narrowed one. Too long a context loses its first tokens.

        Raises:
            CoreInferError: a continuation without tokens, or with more than the model has positions.
        """
        scores: list[Score] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Score]:
        scores = self._score([(context, continuation) for _, context, continuation in requests], self._core)
        for request, score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], score)
        return scores

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Per text: its log-probability.

        Texts are cut into windows as lm-evaluation-harness does. With core neurons a window starts with 64 tokens or
        more of the one before, which the full model reads to choose by; they count once. The first window has none:
        there the full model foretells the first half, at most 64 tokens, and core neurons chosen from these foretell
        the rest. So differences from the full model lie in what follows, and texts of few tokens show little.
        """
        texts = [text for (text,) in (request.args for request in requests)]
        windows = [self._windows(self.tok_encode(text)) for text in texts]
        totals = [0.0] * len(texts)
        for kind, core in enumerate((None, self._core)):
            pairs = [(i, pair) for i, own in enumerate(windows) for pair in own[kind]]
            for (i, _), (logprob, _) in zip(pairs, self._score([pair for _, pair in pairs], core), strict=True):
                totals[i] += logprob
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def _windows(self, tokens: list[int]) -> tuple[list[Pair], list[Pair]]:
        """Contexts and what follows each: for the full model, and for the narrowed one."""
        carried = 1 if self._core is None else min(ROLLING_CONTEXT, self.max_length // 2)
        cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, carried)
        windows = [make_disjoint_window(pair) for pair in cut]
        if self._core is None or not windows:
            return windows, []
        (prefix, first), *later = windows
        known = min(carried, (len(first) + 1) // 2)
        narrowed = [(prefix + first[:known], first[known:]), *later]
        return [(prefix, first[:known])], [pair for pair in narrowed if pair[1]]

    def _score(self, pairs: Sequence[Pair], core: Chooser | None) -> list[Score]:
        """Log-probabilities of continuations, and whether every token was the most probable."""
        cut = [self._fitting(*pair) for pair in pairs]
        scores: list[Score] = [(0.0, True)] * len(cut)
        groups = None if core is None else self._groups
        order = sorted(range(len(cut)), key=lambda i: (-len(cut[i][0]), -len(cut[i][1])))
        for batch, real in self._batches(order, "scoring"):
            contexts, continuations = zip(*(cut[i] for i in batch), strict=True)
            found = score_continuations(self._params, contexts, continuations, core, groups=groups)
            for i, logprobs, is_best in zip(batch[:real], found.logprobs, found.is_best, strict=False):
                scores[i] = (float(logprobs.sum()), bool(is_best.all()))
        return scores

    def _fitting(self, context: list[int], continuation: list[int]) -> Pair:
        """The same without the first tokens of the context that the model has no positions for."""
        if not 0 < len(continuation) <= self.max_length:
            raise CoreInferError(
                f"a continuation of {len(continuation)} tokens: 1 to {self.max_length} can be scored; "
                "take another task, or a model with more positions"
            )
        return self._last(context, self.max_length + 1 - len(continuation)), continuation

    def _last(self, context: list[int], most: int) -> list[int]:
        self.truncated += len(context) > most
        return context[-most:]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Per (context, settings): the text that `generate` adds, cut before the first of the texts `until`.

        Settings are `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_k` and `top_p`. Too long a context loses
        its first tokens.

        Raises:
            CoreInferError: other settings, or more new tokens than the model has positions.
        """
        arguments = [request.args for request in requests]
        kinds: dict[str, list[int]] = {}
        for i, (_, settings) in enumerate(arguments):
            kinds.setdefault(json.dumps(settings, sort_keys=True), []).append(i)
        made: dict[int, str] = {}
        for members in kinds.values():
            wanted = wanted_of(arguments[members[0]][1])
            prompts = {i: self._prompt(arguments[i][0], wanted) for i in members}
            for batch, real in self._batches(sorted(members, key=lambda i: -len(prompts[i])), "generating"):
                made |= dict(zip(batch[:real], self._generate([prompts[i] for i in batch], wanted), strict=False))
        texts = [made[i] for i in range(len(arguments))]
        for request, text in zip(arguments, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request, text)
        return texts

    def _batches(self, order: Sequence[int], name: str) -> Iterator[tuple[list[int], int]]:
        """Requests, in this order, in batches of one shape, and how many of each batch are real."""
        for places, real in batches(len(order), self._batch_size, name):
            yield [order[place] for place in places], real

    def _prompt(self, context: str, wanted: Wanted) -> list[int]:
        most = self.max_length - wanted.new_tokens
        if most < 1:
            raise CoreInferError(
                f"max_gen_toks={wanted.new_tokens}: leaves no room for a context in the model's {self.max_length} "
                "positions; take a model with more, or a task that asks for fewer"
            )
        return self._last(self.tok_encode(context) or [self.prefix_token_id], most)

    def _generate(self, prompts: list[list[int]], wanted: Wanted) -> list[str]:
        eos_ids = {*self._params.config.eos_ids}
        # A special token leaves no text behind in which it could be found.
        eos_ids |= {i for text in wanted.until if (i := self._text.special_id(text)) is not None}
        made: list[list[int]] = [[] for _ in prompts]
        texts, ended = [""] * len(prompts), [False] * len(prompts)
        chunks = stream(
            self._params,
            prompts,
            self._core,
            groups=self._groups,
            max_new_tokens=wanted.new_tokens,
            eos_ids=eos_ids,
            key=self._seed,
            **wanted.sampling,
        )
        for chunk in chunks:
            for b in (b for b, over in enumerate(ended) if not over):
                made[b] += chunk.tokens[b, : chunk.lengths[b]].tolist()
                over = made[b][-1] in eos_ids
                texts[b], ended[b] = cut_before(self._text.decode(made[b][: -1 if over else None]), wanted.until)
                ended[b] |= over
            if all(ended):
                break
        return texts


def wanted_of(settings: Mapping[str, Any]) -> Wanted:
    """What the generation settings of a task mean.

    Raises:
        CoreInferError: a setting that is not implemented.
    """
    unknown = [name for name in settings if name not in _SETTINGS]
    if unknown:
        raise CoreInferError(
            f"generation setting {unknown[0]}={shown(settings[unknown[0]])}: is not implemented; "
            f"take a task with none but {', '.join(_SETTINGS)}"
        )
    until = settings.get("until") or []
    new_tokens = next((settings[name] for name in _LENGTHS if settings.get(name) is not None), MAX_NEW_TOKENS)
    temperature = settings.get("temperature", 1.0 if settings.get("do_sample") else 0.0)
    sampling = {"temperature": 0.0}
    if settings.get("do_sample", True) and temperature:
        sampling = {"temperature": temperature} | {name: settings.get(name) for name in ("top_k", "top_p")}
    return Wanted(tuple([until] if isinstance(until, str) else until), int(new_tokens), sampling)


def cut_before(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` before the first of `stops`, and whether there is one."""
    cut = text
    for stop in filter(None, stops):
        cut = cut.split(stop)[0]
    return cut, len(cut) < len(text)
