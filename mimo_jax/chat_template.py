"""Conversations as prompt text: a checkpoint's own Jinja template, or the family's ChatML where it has none."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import resources
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]


class ChatTemplateError(ValueError):
    """A conversation or a template that cannot be rendered; says which message or line is to blame."""


def default_chat_template() -> str:
    """The family's ChatML template, for checkpoints without one (also written into synthetic checkpoints)."""
    return resources.files("mimo_jax").joinpath("chat_template.jinja").read_text(encoding="utf-8")


class ChatTemplate:
    """A compiled template, run in a sandbox with what Hugging Face templates may rely on.

    Args:
        source: Jinja source.
        name: What errors call it, usually the file it came from.
        variables: Constants the template may use, such as `eos_token`.

    Raises:
        ChatTemplateError: The source is no valid Jinja.
    """

    def __init__(self, source: str, name: str = "chat template", variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.name = source, name
        self._variables = dict(variables or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"{name}, line {error.lineno}: {error.message}") from error

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """Text of a conversation.

        Args:
            messages: Role and content each, perhaps `reasoning_content` and `tool_calls`, as OpenAI clients send them.
            tools: Function descriptions (JSON schema), with or without the `{"type": "function"}` wrapper.
            enable_thinking: None leaves it to the template's own default.
            add_generation_prompt: End with the opening of the assistant's turn.

        Raises:
            ChatTemplateError: A malformed message, content other than text, or the template's own refusal.
        """
        settings = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        try:
            return self._template.render(
                self._variables,
                messages=plain_messages(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=add_generation_prompt,
                **settings,
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template is a program that came with the checkpoint: it may raise anything
            raise ChatTemplateError(f"{self.name} cannot render this conversation: {error}") from error


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as templates expect them: text parts joined, a call's arguments parsed from JSON text.

    Raises:
        ChatTemplateError: A message without role, content that is not text, arguments that are no JSON object.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise ChatTemplateError("messages is empty: give at least one message")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _plain_message(message: Message, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"{where} must be an object with role and content, not {type(message).__name__}")
    if not isinstance(message.get("role"), str):
        raise ChatTemplateError(f"{where}.role must be a string such as 'user', not {message.get('role')!r}")
    plain = dict(message)
    calls = plain.get("tool_calls")
    if calls is not None and not isinstance(calls, list | tuple):
        raise ChatTemplateError(f"{where}.tool_calls must be a list, not {type(calls).__name__}")
    if calls:
        plain["tool_calls"] = [_plain_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    if plain.get("content") is None and (calls or isinstance(plain.get("reasoning_content"), str)):
        plain["content"] = ""
    plain["content"] = _text(plain.get("content"), f"{where}.content")
    return plain


def _text(content: Any, where: str) -> str:
    """A content's text: a string, or a list of text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise ChatTemplateError(f"{where} must be text or a list of text parts, not {type(content).__name__}")
    parts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        text = part.get("text") if isinstance(part, Mapping) else part
        if kind != "text":
            raise ChatTemplateError(
                f"{where}[{i}] is of type {kind!r}: this is the text backbone, which takes text parts only"
            )
        if not isinstance(text, str):
            raise ChatTemplateError(f"{where}[{i}] holds no text: expected {{'type': 'text', 'text': '...'}}")
        parts.append(text)
    return "".join(parts)


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    """One tool call with its arguments as a mapping; OpenAI clients send them as JSON text."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ChatTemplateError(f"{where} must be an object with a function's name and arguments")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments.strip() else {}
        except json.JSONDecodeError as error:
            raise ChatTemplateError(f"{where}: arguments are no valid JSON: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise ChatTemplateError(f"{where}: arguments must be a JSON object, not {type(arguments).__name__}")
    named = {**function, "arguments": arguments or {}}
    return {**call, "function": named} if "function" in call else named


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes HTML, which a prompt must not; same arguments as in transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the chat template refuses this conversation: {message}")
