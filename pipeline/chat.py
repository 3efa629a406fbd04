"""Chat templates and tokenizers, light: `tokenizers` and jinja2, neither transformers nor torch.

Behaves as transformers' `apply_chat_template` and `__call__` do (5.12), and as SGLang 0.5.21 where SGLang
adds rules of its own: how content parts are joined (srt/parser/jinja_template_utils.py) and which old
tokenizer classes add BOS to a text prompt (srt/utils/hf_transformers/tokenizer.py).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from pipeline.chat_options import template_calls, template_tools, template_words
from pipeline.errors import EngineStartError, InvalidRequest
from pipeline.request_options import prompts_of
from subjects.codec import TokenIds
from subjects.messages import ChatMessage, Embedding, Request

_SPECIAL_TOKENS: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_CONTEXT_KEYS: Final = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)
_CONTEXT_TOKENS_DEFAULT: Final = 2048
_CLASSES_THAT_ADD_BOS: Final = frozenset(
    {
        "LlamaTokenizer",
        "LlamaTokenizerFast",
        "CodeLlamaTokenizer",
        "CodeLlamaTokenizerFast",
        "GemmaTokenizer",
        "GemmaTokenizerFast",
        "CohereTokenizerFast",
    }
)
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
_MEDIA_WORDS: Final = ("image", "audio", "video", "vision")
_TEMPLATES_KEPT: Final = 32
_REASON_CHARS_MAX: Final = 300

# A template is the model's own program: whatever it raises on a conversation is a fact about that conversation.
_TEMPLATE_REFUSALS: Final = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what the assistant said. Only training reads the marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own type)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


_ENVIRONMENT: Final = _environment()


class ChatTemplate:
    """A compiled template that knows in which form it wants a message's content."""

    def __init__(self, source: str) -> None:
        """Raises jinja2.TemplateError where the source is no template."""
        self._template = _ENVIRONMENT.from_string(source)
        self._takes_parts = any(word in source for word in _MEDIA_WORDS) or _loops_over_content(source)

    def render(
        self,
        messages: Sequence[ChatMessage],
        special_tokens: Mapping[str, str],
        tools: Sequence[Mapping[str, Any]] | None = None,
        words: Mapping[str, Any] = NOTHING,
    ) -> str:
        """The prompt, up to where the assistant begins to speak. Raises what a template may raise.

        `tools` as OpenAI's API has them; a template that wants the functions alone gets those at its first complaint.
        `words`: what else it is told.
        """
        given = {
            **special_tokens,
            **words,
            "messages": [self._plain(message) for message in messages],
            "documents": None,
            "add_generation_prompt": True,
        }
        if tools is None:
            return self._template.render(given, tools=None)
        try:
            return self._template.render(given, tools=tools)
        except _TEMPLATE_REFUSALS:
            return self._template.render(given, tools=[tool["function"] for tool in tools])

    def _plain(self, message: ChatMessage) -> dict[str, Any]:
        """A message as templates take it: text parts as a list, or joined by spaces as SGLang does."""
        content: Any = message.content
        if content is None:
            content = ""
        elif not isinstance(content, str):
            if self._takes_parts and message.role != "tool":
                content = [{"type": "text", "text": part.text} for part in content]
            else:
                content = " ".join(part.text for part in content)
        plain = {"role": message.role, "content": content}
        if message.name is not None:
            plain["name"] = message.name
        if message.tool_call_id is not None:
            plain["tool_call_id"] = message.tool_call_id
        if message.reasoning_content is not None:
            plain["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            plain["tool_calls"] = template_calls(message.tool_calls)
        return plain


def _loops_over_content(source: str) -> bool:
    """True for a template with a loop such as `{% for part in message['content'] %}`."""
    loops = _ENVIRONMENT.parse(source).find_all(jinja2.nodes.For)
    return any(_is_content(loop.iter) for loop in loops)


def _is_content(node: jinja2.nodes.Node | None) -> bool:
    """True for `message.content`, `message['content']`, or a filter, test or slice of it."""
    match node:
        case jinja2.nodes.Filter() | jinja2.nodes.Test():
            return _is_content(node.node)
        case jinja2.nodes.Getitem(arg=jinja2.nodes.Slice()):
            return _is_content(node.node)
        case jinja2.nodes.Getitem(node=jinja2.nodes.Name(name=name), arg=jinja2.nodes.Const(value="content")):
            return name in ("message", "msg", "m")
        case jinja2.nodes.Getattr(node=jinja2.nodes.Name(name=name), attr="content"):
            return name in ("message", "msg", "m")
        case _:
            return False


@lru_cache(_TEMPLATES_KEPT)
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)


class ChatTokenizer:
    """A model's tokenizer and chat template. Immutable and safe to use from several threads."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None,
        special_tokens: Mapping[str, str],
        eos_ids: frozenset[int],
        vocab_size: int,
        context_len_tokens: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = dict(special_tokens)
        self.chat_template = chat_template
        """The model's own template as jinja source; None for a model without one."""
        self.bos_id = self._id_of("bos_token")
        self.eos_ids = eos_ids
        """Every token at which the model ends its output."""
        self.vocab_size = vocab_size
        """Token ids are in [0, vocab_size): the width of the model's output, not the tokenizer's entries."""
        self.context_len_tokens = context_len_tokens

    @classmethod
    def load(cls, path: Path | str) -> "ChatTokenizer":
        """From a Hugging Face folder: tokenizer.json and what else of tokenizer_config.json, config.json,
        generation_config.json, special_tokens_map.json and chat_template.jinja is there.

        Raises EngineStartError with a sentence that names the file.
        """
        folder = Path(path)
        config = _read_json(folder / "config.json")
        settings = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
        tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(settings.get(name)))}
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        if settings.get("tokenizer_class") in _CLASSES_THAT_ADD_BOS:
            _set_bos(tokenizer, tokens.get("bos_token") if settings.get("add_bos_token") is not False else None)
        text_config = config.get("text_config") or config
        self = cls(
            tokenizer,
            chat_template=_read_template(folder, settings),
            special_tokens=tokens,
            eos_ids=frozenset(
                {
                    *_ids(config.get("eos_token_id")),
                    *_ids(text_config.get("eos_token_id")),
                    *_ids(_read_json(folder / "generation_config.json").get("eos_token_id")),
                    *_ids(tokenizer.token_to_id(tokens.get("eos_token", ""))),
                }
            ),
            vocab_size=text_config.get("vocab_size") or tokenizer.get_vocab_size(),
            context_len_tokens=_context_len_tokens(text_config),
        )
        if self.chat_template is not None:
            _check_template(self.chat_template, folder)
        return self

    def render(
        self,
        messages: Sequence[ChatMessage],
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        words: Mapping[str, Any] = NOTHING,
    ) -> str:
        """The conversation as the text that the model continues; `chat_template` replaces the model's own.

        `tools`, `words`: see `ChatTemplate.render`.

        Raises InvalidRequest where there is no template, or the template refuses the conversation.
        """
        source = chat_template or self.chat_template
        if source is None:
            raise InvalidRequest("messages: this model has no chat template; send `prompt` instead", field="messages")
        try:
            return _compiled(source).render(messages, self._special_tokens, tools, words)
        except _TEMPLATE_REFUSALS as error:
            reason = (str(error) or type(error).__name__)[:_REASON_CHARS_MAX]
            raise InvalidRequest(
                f"messages: the model's chat template refuses them: {reason}", field="messages"
            ) from error

    def encode(self, text: str, add_special_tokens: bool) -> TokenIds:
        """u32[num_tokens]. False for a rendered chat, whose template wrote the special tokens; True for a
        text prompt, as SGLang does.

        Lets other threads run meanwhile: `encode_batch_fast` releases the interpreter's lock, `encode` does not.
        """
        return TokenIds.of(self._tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)

    def encode_each(self, texts: Sequence[str]) -> tuple[TokenIds, ...]:
        """Each text with the special tokens that the model puts around one: u32[num_tokens]."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return tuple(TokenIds.of(one.ids) for one in found)

    def decode(self, token_ids: TokenIds, skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(token_ids.tolist(), skip_special_tokens=skip_special_tokens)

    def _id_of(self, name: str) -> int | None:
        text = self._special_tokens.get(name)
        return None if text is None else self._tokenizer.token_to_id(text)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedModel:
    """A served model, as preprocess needs it."""

    name: str
    tokenizer: ChatTokenizer
    context_len_tokens: int  # of the workers that serve it: may be less than the model's own
    chat_template: str | None = None  # replaces the tokenizer's own
    embedding: Embedding | None = None  # of one that is asked for vectors

    def tokenize(self, request: Request) -> TokenIds:
        """The prompt, u32[num_prompt_tokens]; the first of several. Raises as `tokenize_all` does."""
        return self.tokenize_all(request)[0]

    def tokenize_all(self, request: Request) -> tuple[TokenIds, ...]:
        """Each prompt, u32[num_prompt_tokens]. Raises InvalidRequest where the chat template refuses the messages."""
        if request.messages is not None:
            tools, words = template_tools(request), template_words(request)
            text = self.tokenizer.render(request.messages, self.chat_template, tools, words)
            return (self.tokenizer.encode(text, add_special_tokens=False),)
        prompts = prompts_of(request)
        assert prompts, "parse_request lets no request pass without messages or prompt"
        return tuple(
            self.tokenizer.encode(one, add_special_tokens=True) if isinstance(one, str) else TokenIds.of(one)
            for one in prompts
        )

    def prompt_texts(self, request: Request) -> tuple[str, ...]:
        """What `echo` sends back: texts as they came, token ids as the text that they stand for."""
        return tuple(
            one if isinstance(one, str) else self.tokenizer.decode(TokenIds.of(one)) for one in prompts_of(request)
        )

    def tokenize_inputs(self, inputs: Sequence[str] | Sequence[Sequence[int]]) -> tuple[TokenIds, ...]:
        """What is to be embedded, each u32[num_tokens]; token ids stay as they are."""
        texts = [one for one in inputs if isinstance(one, str)]
        return self.tokenizer.encode_each(texts) if texts else tuple(TokenIds.of(one) for one in inputs)


def _read_json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file. Raises EngineStartError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as problem:
        raise EngineStartError(f"cannot read {file}: {problem}") from problem
    if not isinstance(content, dict):
        raise EngineStartError(f"{file} holds a {type(content).__name__}, not an object")
    return content


def _read_tokenizer(file: Path) -> Tokenizer:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as problem:
        raise EngineStartError(
            f"cannot read {file}: {problem.strerror}; a model needs a tokenizer.json (a fast tokenizer)"
        ) from problem
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as problem:  # tokenizers raises bare Exception for a file that it cannot parse
        raise EngineStartError(f"{file} is not a tokenizer: {problem}") from problem
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _token_text(value: Any) -> str | None:
    """A special token, written as a string or as a serialized AddedToken."""
    return value.get("content") if isinstance(value, dict) else value


def _ids(value: Any) -> Iterator[int]:
    """A configuration's token id or ids; none for null."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list):
        yield from value


def _set_bos(tokenizer: Tokenizer, bos: str | None) -> None:
    """Begin every text prompt with `bos`, or with nothing."""
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    if bos_id is None:
        tokenizer.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    else:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )


def _read_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default chat template: a file of its own, else in tokenizer_config.json, alone or named "default"."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = _read_json(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):
        return next((entry["template"] for entry in found if entry.get("name") == "default"), None)
    return found


def _check_template(source: str, folder: Path) -> None:
    try:
        _compiled(source)
    except jinja2.TemplateError as problem:
        raise EngineStartError(f"the chat template in {folder} does not compile: {problem}") from problem


def _context_len_tokens(config: Mapping[str, Any]) -> int:
    """As SGLang derives it: positions times the RoPE scaling, where the positions do not include it already."""
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}  # transformers 5 renamed it
    scaled_already = "original_max_position_embeddings" in scaling or scaling.get("rope_type") == "llama3"
    factor = 1 if scaled_already else scaling.get("factor", 1)
    for key in _CONTEXT_KEYS:
        if (tokens := config.get(key)) is not None:
            return int(factor * tokens)
    return _CONTEXT_TOKENS_DEFAULT
