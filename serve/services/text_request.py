"""From a message of our own protocol to a request of the engine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mimo_jax.chat_template import ChatTemplateError
from mimo_jax.request import SamplingParams, check_requests
from mimo_jax.tokenizer import Tokenizer
from serve.generation import (
    EngineInfo,
    GenerationRequest,
    InvalidRequest,
)
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.services.constraints import Compiler, compiled
from serve.services.limits import check_limits
from serve.text.reasoning import OPEN, Thinking, thinking_of_prompt
from serve.text.required_calls import calls_grammar
from serve.text.thinking_constraint import AfterThinking

CONSTRAINTS = ("json_schema", "regex", "lark", "choices")
"""Fields of a request that ask for a constraint, and what compilers call their kinds."""


@dataclass(frozen=True)
class Prompt:
    """What to continue, and how to read what comes."""

    ids: Sequence[int]
    thinking: Thinking | None = None
    """Of a conversation: where the prompt leaves the answer."""
    functions: Mapping[str, Mapping[str, Any]] | None = None
    """Of a conversation with tools: the schema of each function's parameters."""


def read_request(
    message: pb.GenerateRequest,
    request_id: str,
    tokenizer: Tokenizer,
    info: EngineInfo,
    defaults: SamplingParams,
    compiler: Compiler | None,
    deadline: float | None,
) -> tuple[GenerationRequest, Prompt]:
    """The engine's request, and its prompt. Takes a while: rendering, tokenising, compiling.

    Args:
        message: As it came.
        request_id: Of the request.
        tokenizer: Of the model.
        info: Of the engine.
        defaults: Used where the message says nothing, but for the length, which is then what the context has room for.
        compiler: Makes constraints; None: there can be none.
        deadline: See `GenerationRequest`.

    Raises:
        Refused: It asks for what cannot be, or what this server does not do.
    """
    n = message.n if message.HasField("n") else 1
    grammar = _grammar(message)
    check_limits(
        samples=n,
        stop=message.sampling.stop,
        stop_ids=message.sampling.stop_token_ids,
        logit_bias=message.sampling.logit_bias,
        grammar=grammar,
        top_logprobs=message.top_logprobs,
        eos_ids=info.eos_ids,
    )
    if message.top_logprobs and not message.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs: set both")
    prompt = _prompt(message, tokenizer)
    kind = message.WhichOneof("constraint")
    if message.HasField("chat") and message.chat.tool_choice == pb.TOOL_CHOICE_REQUIRED:
        if kind:
            raise InvalidRequest(f"{kind} and TOOL_CHOICE_REQUIRED both constrain the answer: ask for one of them")
        kind, grammar = "lark", _required_calls(message.chat.required_tool, prompt.functions or {})
    sampling = _sampling(message.sampling, defaults, info.context_length - len(prompt.ids))
    try:
        check_requests([prompt.ids], [sampling], info.vocab_size, info.context_length)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    constraint = compiled(compiler, kind, grammar)
    if constraint and prompt.thinking not in (None, Thinking.AFTER) and tokenizer.token_id(OPEN) is not None:
        constraint = AfterThinking(constraint, prompt.thinking, tokenizer, info.eos_ids)
    request = GenerationRequest(
        request_id,
        prompt.ids,
        sampling,
        n,
        message.logprobs,
        message.top_logprobs,
        constraint,
        deadline,
        message.text.text if message.HasField("text") else None,
    )
    return request, prompt


def read_text(text: pb.Text, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text."""
    return tokenizer.encode(text.text, parse_special=text.parse_special)


def read_chat(chat: pb.Chat, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a conversation. Raises `InvalidRequest` if it is malformed."""
    thinking = chat.enable_thinking if chat.HasField("enable_thinking") else None
    tools = [{"type": "function", "function": _function(tool)} for tool in _tools(chat)]
    try:
        return tokenizer.encode_chat([_turn(message) for message in chat.messages], tools, thinking)
    except ChatTemplateError as error:
        raise InvalidRequest(str(error)) from error


def _grammar(message: pb.GenerateRequest) -> str | None:
    """The text of the constraint that is asked for."""
    kind = message.WhichOneof("constraint")
    if kind == "choices":
        return json.dumps(list(message.choices.choices))
    return getattr(message, kind) if kind else None


def _prompt(message: pb.GenerateRequest, tokenizer: Tokenizer) -> Prompt:
    match message.WhichOneof("prompt"):
        case "text":
            return Prompt(read_text(message.text, tokenizer))
        case "token_ids":
            return Prompt(list(message.token_ids.ids))
        case "chat":
            ids = read_chat(message.chat, tokenizer)
            functions = {tool.name: _parameters(tool) for tool in _tools(message.chat)}
            return Prompt(ids, thinking_of_prompt(tokenizer, ids), functions)
    raise InvalidRequest("there is no prompt: give text, token_ids or chat")


def _tools(chat: pb.Chat) -> Sequence[pb.Tool]:
    """Those that the answer may call."""
    if chat.required_tool and chat.tool_choice != pb.TOOL_CHOICE_REQUIRED:
        raise InvalidRequest(f"required_tool {chat.required_tool!r} goes with TOOL_CHOICE_REQUIRED alone")
    return () if chat.tool_choice == pb.TOOL_CHOICE_NONE else chat.tools


def _required_calls(name: str, functions: Mapping[str, Mapping[str, Any]]) -> str:
    """The grammar of an answer that must call one of these functions, or the one that is named."""
    if not functions:
        raise InvalidRequest("TOOL_CHOICE_REQUIRED needs tools")
    if name and name not in functions:
        raise InvalidRequest(f"there is no tool {name!r} to be required; there are {', '.join(functions)}")
    return calls_grammar({name: functions[name]} if name else functions, once=bool(name))


def _turn(message: pb.ChatMessage) -> dict[str, Any]:
    """A message as templates know it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.HasField("reasoning"):
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    if message.tool_call_id:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _function(tool: pb.Tool) -> dict[str, Any]:
    """A tool as templates know it."""
    if not tool.name:
        raise InvalidRequest("a tool has no name")
    described = {"description": tool.description} if tool.description else {}
    return {"name": tool.name, **described, "parameters": _parameters(tool)}


def _parameters(tool: pb.Tool) -> dict[str, Any]:
    if not tool.parameters:
        return {}
    try:
        schema = json.loads(tool.parameters)
    except ValueError as error:
        raise InvalidRequest(f"parameters of tool {tool.name} are no valid JSON: {error}") from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f"parameters of tool {tool.name} must be a JSON schema, which is an object")
    return schema


_SCALARS = [field.name for field in pb.Sampling.DESCRIPTOR.fields if field.has_presence]


def _sampling(given: pb.Sampling, defaults: SamplingParams, room: int) -> SamplingParams:
    settings: dict[str, Any] = {"max_new_tokens": max(1, room)}
    settings |= {name: getattr(given, name) for name in _SCALARS if given.HasField(name)}
    if given.logit_bias:
        settings["logit_bias"] = dict(given.logit_bias)
    if given.stop:
        settings["stop"] = tuple(given.stop)
    if given.stop_token_ids:
        settings["stop_token_ids"] = tuple(given.stop_token_ids)
    if given.ignore_eos:
        settings["ignore_eos"] = True
    try:
        return replace(defaults, **settings)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
