import datetime as dt
import json
import time

import pytest

from server.errors import FailedPrecondition, InvalidRequest, ModelLoadError
from server.text.template import ChatMessage, ChatTemplate, is_prefix_stable

USER = ChatMessage("user", "hi")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_renders_what_hugging_face_renders(smollm_metadata: dict[str, object]) -> None:
    """The model's own template gives the text that the model was trained on."""
    template = ChatTemplate(str(smollm_metadata["tokenizer.chat_template"]))

    assert template.render([USER]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert template.render([ChatMessage("system", "s"), USER], add_generation_prompt=False) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    )


CONVENTIONS = {
    "{{ bos_token }}{{ messages[0].content }}": "<s>hi",
    "{{ strftime_now('%Y-%m-%d') }}": "2024-02-29",
    "{{ {'a': 'é<', 'b': [1, none]} | tojson }}": json.dumps({"a": "é<", "b": [1, None]}, ensure_ascii=False),
    "{{ [1] | tojson(indent=2) }}": "[\n  1\n]",
    "{% if true %}\n  x\n  {% endif %}\ny": "  x\ny",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    "{% generation %}x{% endgeneration %}": "x",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "1",
    "{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f('a') ~ f(1) }}": "<a><1>",
    "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}": "hi",
    "{{ ' a b '.strip().split(' ') | last }}{{ 'xay'.replace('a', '-') }}": "bx-y",
    "{{ '%s!' % 'q' }}{{ '{}'.format(1) }}": "q!1",
    "{{ tools is none }}{{ undefined_name is defined }}": "TrueFalse",
    "{{ messages[1:] | length }}{{ 'a' in ['a', 'b'] }}": "0True",
    "{% for a, b in {'k': 'v'}.items() %}{{ loop.index }}{{ a }}{{ b }}{% endfor %}": "1kv",
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{% else %}none{% endfor %}": "1",
    "{% set a, b = 1, 2 %}{{ b }}{{ 'a' * 3 }}{{ 7 % 4 }}{{ 2 ** 5 }}": "2aaa332",
    "{% set text %}a{{ 1 }}{% endset %}{{ text | trim | upper }}": "A1",
    "{{ 'a\nb' | indent(2) }}": "a\n  b",
}


@pytest.mark.parametrize("source", CONVENTIONS)
def test_conventions_of_the_field(source: str) -> None:
    """What published chat templates use is there and means the same."""
    now = dt.datetime(2024, 2, 29, tzinfo=dt.UTC)
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>"}, now=lambda: now)

    assert template.render([USER]) == CONVENTIONS[source]


def test_a_conversation_that_the_template_refuses_is_the_callers_fault() -> None:
    """raise_exception says what is wrong with the messages."""
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")

    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([USER, USER])
    assert caught.value.violations[0].field == "messages"
    assert caught.value.violations[0].seen == "'user, user'"


@pytest.mark.parametrize("source", ["{% for %}", "{{ 'a' | center(9) }}", "{{ " + "(" * 3000 + ")" * 3000 + " }}"])
def test_a_source_that_is_no_template_is_refused_at_load(source: str) -> None:
    """Syntax errors, filters that no chat template has, and absurd nesting stop the start, not a request."""
    with pytest.raises(ModelLoadError, match="chat template"):
        ChatTemplate(source)


STEP_BOMBS = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
    "nested filtered loops": "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "recursive block": "{% block a %}{{ self.a() }}{% endblock %}",
    "lazy filters": "{% set ns = namespace(x=[1]) %}{% for i in range(40000) %}"
    "{% set ns.x = ns.x | map('string') %}{% endfor %}{{ ns.x | list }}",
}
MANY = "{% set big = 'a' * 900000 %}"
WEIGHT_BOMBS = {
    "string product": "{{ 'a' * 10000000000 }}",
    "product of a string": "{{ 10000000000 * 'a' }}",
    "list product": "{{ [1] * 10000000000 }}",
    "power": "{{ 10 ** 10000000000 }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "doubling by ~": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling by +": "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "lists of the same list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "dicts of the same dict": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "replace filter": MANY + "{{ big | replace('a', big) }}",
    "replace method": MANY + "{{ big.replace('a', big) }}",
    "join filter": MANY + "{{ range(9000) | join(big) }}",
    "join method": MANY + "{{ big.join(range(9000) | map('string')) }}",
    "map of large texts": MANY + "{{ range(90000) | map('replace', '1', big) | list | length }}",
    "wide format": "{{ '{:10000000000}'.format(1) }}",
    "wide % format": "{{ '%10000000000d' % 1 }}",
    "width as argument": "{{ '%*d' % (10000000000, 1) }}{{ '{:{}}'.format(1, 10000000000) }}",
    "many fields": MANY + "{{ ('{0}' * 100000).format(big) }}",
    "indent": "{{ 'a\nb' | indent(10000000000) }}",
    "JSON indent": "{{ [[1]] | tojson(indent=1000000000) }}",
    "slow search": MANY + "{{ big.rfind('b' + big) }}",
    "output of a loop": "{% for i in range(40000) %}" + "x" * 1000 + "{% endfor %}",
    "captured output": "{% set x %}{% for i in range(40000) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
    "time format": "{{ strftime_now('%Y' * 3000000) }}",
    "namespace in a list": "{% set a = namespace(x=1) %}{{ [a, a] }}",
    "forbidden methods": "{{ 'a'.center(10000000000) }}{{ 'a'.zfill(10000000000) }}{{ (1).to_bytes(10000000000) }}",
    "slow rather than many": "{% set a = range(40000) | list %}{% set b = range(40000) | list %}"
    "{% for i in range(40000) %}{% if a == b %}{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", [*STEP_BOMBS, *WEIGHT_BOMBS])
def test_a_template_that_does_too_much_is_stopped(name: str) -> None:
    """Endless loops, recursion and values that would fill the memory end in an error, soon."""
    template = ChatTemplate((STEP_BOMBS | WEIGHT_BOMBS)[name])
    start_s = time.monotonic()

    with pytest.raises(FailedPrecondition, match=r"chat template (was stopped|failed)"):
        template.render([USER])
    assert time.monotonic() - start_s < 10


def test_long_conversations_are_within_the_bounds() -> None:
    """The bounds grow with what the caller sends: ten thousand messages, or megabytes in one."""
    template = ChatTemplate(CHATML)

    many = template.render([USER] * 10_000)
    large = template.render([ChatMessage("user", "x" * 4_000_000)])

    assert many.count("<|im_start|>user\nhi<|im_end|>\n") == 10_000
    assert len(large) > 4_000_000


def test_the_sandbox_keeps_templates_away_from_python() -> None:
    """No way from a value to its class."""
    with pytest.raises(FailedPrecondition, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}").render([USER])
    with pytest.raises(FailedPrecondition):
        ChatTemplate("{% include '/etc/passwd' %}").render([USER])


def test_a_render_leaves_nothing_behind() -> None:
    """A render that was stopped takes nothing from the next one."""
    template = ChatTemplate("{% for a in range(30000) %}{% endfor %}{{ messages[0].content }}")

    assert [template.render([USER]) for _ in range(3)] == ["hi"] * 3


def test_prefix_stability_of_usual_templates() -> None:
    """A template that writes one turn after the other is prefix-stable."""
    assert is_prefix_stable(ChatTemplate(CHATML))


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("message['content'] +", "message['content'].split('</think>')[-1] +").replace(
            "message['role'] +", "(message['role'] if loop.last else 'old') +"
        ),
        "{{ messages | length }}" + CHATML,
        "{% for message in messages | reverse %}{{ message.content }}{% endfor %}",
        "{{ raise_exception('never') }}",
    ],
)
def test_templates_that_rewrite_earlier_turns_are_not_prefix_stable(source: str) -> None:
    """A conversation kept as token ids must not change when it goes on."""
    assert not is_prefix_stable(ChatTemplate(source))
