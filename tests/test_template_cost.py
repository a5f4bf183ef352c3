"""Chat templates of checkpoints: those that may have no end are rendered within limits, to the same text."""

from pathlib import Path

import pytest

import coreinfer_jax as ci
from coreinfer_jax.text import with_transformers
from coreinfer_jax.text.template_cost import is_plain
from coreinfer_jax.text.with_transformers import TransformersTokenizer, render_chat
from tests.test_bad_input import refusal

MESSAGES = [{"role": "user", "content": "One two"}, {"role": "assistant", "content": "three."}]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou "
    "help.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + "
    "'\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]"
    "['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}{% for message in "
    "loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}"
    "{% endif %}{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>' + system + message['content'] "
    "%}{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + "
    "'[INST] ' + content.strip() + ' [/INST]' }}{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
PARTS = (
    "{% set ns = namespace(text='') %}{% for message in messages %}{% for part in message.content %}"
    "{% set ns.text = ns.text ~ part %}{% endfor %}{% endfor %}{{ ns.text | trim }}"
)
PLAIN = {"ChatML": CHATML, "LLaMA 2": LLAMA2, "parts of messages": PARTS}

DOUBLED = "{% set x = 'aa' %}" + "{% set x = x ~ x %}" * 40
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over all messages": "{% for m in messages %}{% for n in messages %}{% endfor %}{% endfor %}",
    "loops three deep": "{% for m in messages %}{% for n in m %}{% for o in n %}{% endfor %}{% endfor %}{% endfor %}",
    "a recursive loop": "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "repetition": "{{ 'a' * 10**10 }}",
    "a format's width": "{{ '%1000000000d' % 1 }}",
    "a format's width, by a filter": "{{ '%1000000000d' | format(1) }}",
    "a format's width, by a method": "{{ '{:1000000000}'.format(1) }}",
    "centring": "{{ 'a' | center(10**9) }}",
    "indentation": "{{ messages | tojson(indent=1000000000) }}",
    "replacing": "{{ 'aaaa'.replace('', messages[0].content) }}",
    "doubling": DOUBLED,
    "doubling a list": "{% set x = ['aa'] %}" + "{% set x = [x, x] %}" * 40 + "{{ x | tojson }}",
    "doubling in a namespace": "{% set n = namespace(x='aa') %}" + "{% set n.x = n.x ~ n.x %}" * 40,
    "growing in loops over itself": "{% set x = 'a' ~ 'a' %}"
    + "{% for a in x %}{% set x = x ~ 'aa' %}{% endfor %}" * 40,
    "doubling by a macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{{ m(m(m('a'))) }}",
    "a block": "{% set x %}a{% endset %}",
    "what jinja cannot read": "{% for %}",
}


@pytest.mark.parametrize("template", PLAIN.values(), ids=PLAIN)
def test_ordinary_templates_are_rendered_at_once(template):
    assert is_plain(template)


@pytest.mark.parametrize("template", ENDLESS.values(), ids=ENDLESS)
def test_templates_that_may_have_no_end_are_known(template):
    assert not is_plain(template)


@pytest.mark.parametrize(
    "name", ["repetition", "doubling", pytest.param("nested loops", marks=pytest.mark.slow), "a format's width"]
)
def test_a_template_without_end_is_refused_in_one_line(name):
    told = refusal(lambda: render_chat(ENDLESS[name], NAMED, MESSAGES, Path("model"), True))
    assert "model: its chat template cannot be applied to this conversation (it takes more than" in told


@pytest.mark.parametrize("begin_answer", [True, False])
def test_a_process_of_its_own_renders_the_same(begin_answer, monkeypatch):
    here = render_chat(CHATML, NAMED, MESSAGES, Path("model"), begin_answer)
    monkeypatch.setattr(with_transformers, "is_plain", lambda template: False)
    assert render_chat(CHATML, NAMED, MESSAGES, Path("model"), begin_answer) == here


def test_python_does_not_warn_of_what_a_template_is_compiled_to():
    """Warnings are errors in tests, and lines on the terminal for users."""
    odd = "{% if messages %}b{% else %}{{ false[messages:] }}{% endif %}"
    assert is_plain(odd)
    assert render_chat(odd, NAMED, MESSAGES, Path("model"), True) == "b"


class Panic(BaseException):
    """As those of Rust code reach Python."""


def test_a_tokenizer_that_panics_in_use_is_told_of_in_one_line(data, monkeypatch):
    tokenizer = TransformersTokenizer(data / "models" / "tinystories-656k")

    def panic(*arguments, **named):
        raise Panic("index out of bounds\nnote: run with RUST_BACKTRACE=1")

    monkeypatch.setattr(tokenizer, "_tokenizer", panic)
    with pytest.raises(ci.CoreInferError, match=r"tokenizer.json: .* not use it .index out of bounds."):
        tokenizer.encode("a")
