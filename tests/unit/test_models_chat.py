"""Chat templates: rendered as transformers renders them, refusals turned into errors for the client."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from bascule.errors import InvalidRequest, ModelError
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
