"""Chat templates and tokenizers give what transformers gives, without transformers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pipeline.chat import ChatTemplate, ChatTokenizer
from pipeline.config import BUILTIN_MODEL
from pipeline.errors import EngineStartError, InvalidRequest
from pipeline.models import prepare_model
from subjects.messages import ChatMessage, TextContent

CONVERSATIONS = [
    [("user", "hi")],
    [("system", "Be brief."), ("user", "What is the capital of France?")],
    [("user", "a"), ("assistant", "b"), ("user", "c")],
    [("system", ""), ("user", "")],
    [("developer", "d"), ("user", "e")],
    [("user", "f"), ("system", "in the middle"), ("user", "g")],
    [("user", "ends with"), ("assistant", "the assistant")],
    [("user", "  spaces \n\n and lines \t")],
    [("user", "<|im_start|>system\nspecial tokens in the text<|im_end|>")],
    [("user", "{{ messages }} {% raw %} <b>&amp;\"quotes\" 'single'")],
    [("user", "naïve café, 北京, العربية, 🧑‍🚀 e\u0301 \u200b \x00")],
    [("user", "word " * 3000)],
    [("user" if i % 2 == 0 else "assistant", f"turn {i}") for i in range(101)],
]

TEXTS = [conversation[0][1] for conversation in CONVERSATIONS]

TEMPLATES = {
    "white_space": "a\n  {% if messages %}\n  b\n  {% endif %}\n{%- for m in messages -%} {{ m.role }} {%- endfor %}\n",
    "break": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ messages | tojson(sort_keys=true) }}",
    "special_tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}",
    "no_tools": "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "generation": "{% set x = 1 %}{% generation %}{{ messages[0].content }}{% set x = 2 %}{% endgeneration %}{{ x }}",
    "year": "{{ strftime_now('%Y') }}",
    "methods": "{{ messages[0]['content'].split(' ') | length }}{{ messages[0].get('absent') is none }}{{ absent }}",
    "html": "{{ messages[0].content }}<b>{{ '&' }}</b>",
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return prepare_model(BUILTIN_MODEL)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="module")
def reference(folder: Path):
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def messages_of(conversation: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role=role, content=content) for role, content in conversation]


def dicts_of(conversation: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in conversation]


@pytest.mark.parametrize("conversation", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_conversations_become_the_tokens_of_transformers(tokenizer, reference, conversation):
    expected = reference.apply_chat_template(dicts_of(conversation), add_generation_prompt=True, tokenize=False)
    rendered = tokenizer.render(messages_of(conversation))
    assert rendered == expected
    expected_ids = reference.apply_chat_template(
        dicts_of(conversation), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert tokenizer.encode(rendered, add_special_tokens=False).tolist() == expected_ids


@pytest.mark.parametrize("name", TEMPLATES)
def test_any_template_renders_as_in_transformers(tokenizer, reference, name):
    for conversation in CONVERSATIONS:
        expected = reference.apply_chat_template(
            dicts_of(conversation), chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.render(messages_of(conversation), TEMPLATES[name]) == expected


@pytest.mark.parametrize("text", [*TEXTS, "", " "])
def test_a_text_prompt_becomes_the_tokens_of_transformers(tokenizer, reference, text):
    assert tokenizer.encode(text, add_special_tokens=True).tolist() == reference(text)["input_ids"]


def test_facts_of_the_model(tokenizer, reference):
    assert tokenizer.bos_id == reference.bos_token_id
    assert reference.convert_tokens_to_ids("<|im_end|>") in tokenizer.eos_ids
    assert (tokenizer.vocab_size, tokenizer.context_len_tokens) == (49152, 8192)
    ids = tokenizer.encode("The capital of France is", add_special_tokens=True)
    assert tokenizer.decode(ids) == "The capital of France is"


PARTS = [TextContent(text="one"), TextContent(text="two")]


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}{% for part in message['content'] %}[{{ part.text }}]{% endfor %}{% endfor %}",
        "{% for m in messages %}{% for part in m.content[0:] %}[{{ part['text'] }}]{% endfor %}{% endfor %}",
        "{% for msg in messages %}{% for part in msg.content | list %}[{{ part.text }}]{% endfor %}{% endfor %}",
        "{# image #}{% for x in messages %}{% for part in x.content %}[{{ part.text }}]{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_loops_over_the_content_gets_its_parts(template):
    message = ChatMessage(role="user", content=tuple(PARTS))
    assert ChatTemplate(template).render([message], {}) == "[one][two]"


def test_parts_are_joined_by_a_space_for_other_templates_as_in_sglang(tokenizer):
    together = tokenizer.render([ChatMessage(role="user", content="one two")])
    assert tokenizer.render([ChatMessage(role="user", content=tuple(PARTS))]) == together


def test_the_name_of_a_speaker_reaches_the_template(tokenizer):
    template = "{% for m in messages %}{{ m.name if m.name is defined else '-' }}{% endfor %}"
    turns = [ChatMessage(role="user", content="", name="eve"), ChatMessage(role="user", content="")]
    assert tokenizer.render(turns, template) == "eve-"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only users may speak') }}",
        "{{ messages + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{% for x in range(10000000000) %}{% endfor %}",
        "{{ absent.attribute }}",
        "{% if %}",
    ],
)
def test_what_a_template_raises_is_a_refusal_of_the_messages(tokenizer, template):
    with pytest.raises(InvalidRequest) as error:
        tokenizer.render(messages_of(CONVERSATIONS[0]), template)
    assert error.value.field == "messages"
    assert len(str(error.value)) < 500


def small_model(folder: Path, settings: dict, config: dict | None = None) -> Path:
    """A byte-level tokenizer without merges, as a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


@pytest.mark.parametrize(
    ("settings", "begins_with_bos"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True}, True),
        ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}, False),
        ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, False),
        ({}, False),
    ],
)
def test_bos_before_a_text_prompt_follows_sglangs_rule(tmp_path, settings, begins_with_bos):
    folder = small_model(tmp_path, settings | {"bos_token": {"content": "<s>"}, "eos_token": "</s>"})
    tokenizer = ChatTokenizer.load(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (0, {1})
    ids = tokenizer.encode("longer than four", add_special_tokens=True).tolist()
    assert (ids[0] == 0) is begins_with_bos
    assert len(ids) == 16 + begins_with_bos, "truncation of the file does not cut prompts"
    assert len(tokenizer.encode("longer than four", add_special_tokens=False)) == 16


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({}, 2048),
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 512, "vocab_size": 7}}, 512),
        ({"max_position_embeddings": 1000, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 4000),
        ({"max_position_embeddings": 1000, "rope_parameters": {"rope_type": "linear", "factor": 2}}, 2000),
        ({"max_position_embeddings": 1000, "rope_scaling": {"rope_type": "llama3", "factor": 8}}, 1000),
        (
            {
                "max_position_embeddings": 1000,
                "rope_scaling": {"factor": 8, "original_max_position_embeddings": 125},
            },
            1000,
        ),
    ],
)
def test_context_length_is_derived_as_sglang_does(tmp_path, config, tokens):
    assert ChatTokenizer.load(small_model(tmp_path, {}, config)).context_len_tokens == tokens


def test_a_model_without_a_template_takes_prompts_only(tmp_path):
    tokenizer = ChatTokenizer.load(small_model(tmp_path, {}))
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render(messages_of(CONVERSATIONS[0]))
    assert tokenizer.render(messages_of(CONVERSATIONS[0]), "{{ messages[0].content }}") == "hi"


@pytest.mark.parametrize(
    "chat_template",
    ["{{ 'here' }}", [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ 'here' }}"}]],
)
def test_the_template_is_found_in_the_tokenizers_configuration(tmp_path, chat_template):
    tokenizer = ChatTokenizer.load(small_model(tmp_path, {"chat_template": chat_template}))
    assert tokenizer.render([]) == "here"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", None),
        ("tokenizer_config.json", "[]"),
        ("config.json", "not json"),
        ("chat_template.jinja", "{% if %}"),
    ],
)
def test_a_broken_model_folder_is_a_sentence_that_names_the_file(tmp_path, file, content):
    folder = small_model(tmp_path, {})
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(EngineStartError, match="chat template" if "jinja" in file else file):
        ChatTokenizer.load(folder)


def test_a_light_process_stays_light(folder):
    """Under 150 MB, without transformers or torch: preprocess workers are many."""
    program = (
        "import re, sys\n"
        "from stages.preprocess import preprocess\n"
        "from pipeline.chat import ChatTokenizer\n"
        "ChatTokenizer.load(sys.argv[1]).encode('hi ' * 5000, True)\n"
        "assert not {'torch', 'transformers', 'sglang'} & set(sys.modules)\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(done.stdout) / 1024 < 150
