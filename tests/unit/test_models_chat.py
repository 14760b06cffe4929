"""Chat templates: rendered as transformers renders them, refusals turned into errors for the client."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bascule.errors import InvalidRequest, ModelError
from bascule.models import sandbox
from bascule.models.chat import ChatTemplate, require_template
from bascule.models.gguf_tokenizer import chat_template_from_gguf
from bascule.models.hf_directory import ModelDirectory

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>What's</b> 1 + 1?\n"},
    {"role": "assistant", "content": "2 & that's it"},
    {"role": "user", "content": "  Thanks! \U0001f600 "},
]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TEMPLATES = {
    "blocks": """
    {%- for message in messages %}
        {% if message.role == 'user' %}
{{ bos_token + '[INST] ' + message['content'] | trim + ' [/INST]' }}
        {% else %}
{{ message.content ~ eos_token }}
        {% endif %}
    {%- endfor %}""",
    "controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% break %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ tools | tojson }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "prompt": "{% if add_generation_prompt %}<a>{% endif %}{{ missing }}{% if documents is none %}none{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(name: str, prompt: bool) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "<a> & ö"}}]
    ours = ChatTemplate(TEMPLATES[name], TOKENS).render(CHAT, add_generation_prompt=prompt, tools=tools)
    theirs, _ = render_jinja_template(
        [CHAT], tools=tools, chat_template=TEMPLATES[name], add_generation_prompt=prompt, **TOKENS
    )
    assert ours == theirs[0]


def test_todays_date_is_the_one_passed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {}, now=lambda: datetime(2024, 7, 26))
    assert template.render(CHAT) == "26 Jul 2024"


def test_a_templates_own_switches_are_passed_on() -> None:
    template = ChatTemplate("{{ enable_thinking }} {{ messages | length }}", {})
    assert template.render(CHAT, variables={"enable_thinking": False, "messages": []}) == "False 4"


def test_a_templates_refusal_reaches_the_client_in_its_words() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render(CHAT)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("template", ["{{ messages[0].content + 1 }}", "{{ 1 // 0 }}", "{{ messages[0].a.b }}"])
def test_messages_that_a_template_cannot_take_are_the_clients_mistake(template: str) -> None:
    with pytest.raises(InvalidRequest, match="the model's chat template"):
        ChatTemplate(template, {}).render(CHAT)


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ raise_exception.__globals__['json'] }}"]
)
def test_templates_reach_nothing_outside(template: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(template, {}).render(CHAT)


def test_a_template_that_does_not_compile_is_refused_at_load() -> None:
    with pytest.raises(ModelError, match="line 2"):
        ChatTemplate("a\n{% if %}", {})


def test_a_model_without_template_says_what_to_use() -> None:
    with pytest.raises(InvalidRequest, match=r"tiny has no chat template; use /v1/completions"):
        require_template(None, "tiny")
    assert chat_template_from_gguf({}) is None


def test_gguf_templates_get_the_files_own_tokens() -> None:
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}",
        "tokenizer.ggml.tokens": ["<pad>", "<s>"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 0,
    }
    template = chat_template_from_gguf(metadata)
    assert template is not None
    assert template.render([]) == "<s>||<pad>"


def directory(folder: Path, **files: Any) -> ModelDirectory:
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return ModelDirectory(folder)


def test_a_directorys_template_is_found_in_each_of_its_places(tmp_path: Path) -> None:
    def rendered(model: ModelDirectory) -> str:
        template = model.chat_template()
        assert template is not None
        return template.render([])

    assert ModelDirectory(tmp_path).chat_template() is None
    config: dict[str, Any] = {"bos_token": {"content": "<s>"}, "chat_template": "config {{ bos_token }}"}
    assert rendered(directory(tmp_path, tokenizer_config__json=config)) == "config <s>"
    config["chat_template"] = [{"name": "rag", "template": "r"}, {"name": "default", "template": "default"}]
    assert rendered(directory(tmp_path, tokenizer_config__json=config)) == "default"
    assert rendered(directory(tmp_path, chat_template__json={"chat_template": "json"})) == "json"
    assert rendered(directory(tmp_path, chat_template__jinja="jinja {{ bos_token }}")) == "jinja <s>"


DOUBLE = "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = STEP %}{% endfor %}{{ ns.s | length }}"
GREEDY = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "lists in loops": "{% for a in range(99999) %}{% set x = range(99999) | list %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling by +": DOUBLE.replace("STEP", "ns.s + ns.s"),
    "doubling by ~": DOUBLE.replace("STEP", "ns.s ~ ns.s"),
    "doubling by *": DOUBLE.replace("STEP", "ns.s * 2"),
    "doubling by a format": DOUBLE.replace("STEP", "'%s%s' % (ns.s, ns.s)"),
    "doubling by the filter format": DOUBLE.replace("STEP", "'%s%s' | format(ns.s, ns.s)"),
    "doubling by the method format": DOUBLE.replace("STEP", "'{0}{0}'.format(ns.s)"),
    "doubling by replacing": DOUBLE.replace("STEP", "ns.s | replace('a', ns.s)"),
    "doubling by the method replace": DOUBLE.replace("STEP", "ns.s.replace('a', ns.s)"),
    "doubling by joining": DOUBLE.replace("STEP", "ns.s.join(['', '', ''])"),
    "doubling by the filter join": DOUBLE.replace("STEP", "['', '', ''] | join(ns.s)"),
    "doubling lists": DOUBLE.replace("'ab'", "[1]").replace("STEP", "ns.s + ns.s"),
    "doubling blocks": DOUBLE.replace(
        "{% set ns.s = STEP %}", "{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = t %}"
    ),
    "a long text": "{{ 'a' * 10 ** 10 }}",
    "a long list": "{{ [0] * 10 ** 10 }}",
    "a tower of powers": "{{ 9 ** (9 ** 9) }}",
    "a wide column": "{{ 'a' | center(10 ** 10) }}{{ 'a'.ljust(10 ** 10) }}",
    "a wide format": "{{ '%9999999999d' % 1 }}",
    "a wide new format": "{{ '{:>9999999999}'.format(1) }}",
    "much output": "{% set s = 'a' * 10 ** 7 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "wide JSON": "{{ messages | tojson(indent=10 ** 9) }}",
    "a range": "{{ range(10 ** 12) | list }}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_that_would_never_end_or_fill_the_memory_is_stopped(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.3)
    template = ChatTemplate(GREEDY[name], {})
    with pytest.raises(InvalidRequest, match="the model's chat template"):
        template.render(CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{% include '/etc/passwd' %}",
        "{% import '/etc/passwd' as x %}",
        "{% extends '/etc/passwd' %}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ ('{0.__class__}' | attr('format'))(messages) }}",
        "{{ messages | map(attribute='__class__') | list | first + 1 }}",
        "{{ open('/etc/passwd').read() }}",
    ],
)
def test_a_template_reads_no_file_and_runs_no_program(template: str) -> None:
    try:
        said = ChatTemplate(template, {}).render(CHAT)
    except (InvalidRequest, ModelError):
        return
    assert "root:" not in said and "uid=" not in said and "<class" not in said


def test_a_long_conversation_is_well_within_the_bounds() -> None:
    template = ChatTemplate(TEMPLATES["blocks"] + TEMPLATES["json"] + TEMPLATES["namespace"], TOKENS)
    messages = [{"role": "user", "content": "word " * 2000} for _ in range(1000)]
    assert len(template.render(messages)) > 10_000_000
    assert "{}" in ChatTemplate("{{ '%s {}' % 'a' }}{{ 'b' ~ 1 ~ none }}{{ 'c' | center(9) }}", {}).render(CHAT)
    text = (
        "{{ '{}-{:>4}'.format(1, 2) }}{{ 'a b'.replace(' ', '') }}{{ ', '.join(['x', 'y']) }}{{ 3 ** 4 }}{{ 'c' * 3 }}"
    )
    assert ChatTemplate(text, {}).render(CHAT) == "1-   2abx, y81ccc"
