"""What a message of SGLang's scheduler service asks for."""

from typing import Any

from google.protobuf.struct_pb2 import Struct
from smg_grpc_proto.generated import sglang_scheduler_pb2 as pb

from mimo_jax.request import SamplingParams
from serve.generation import EngineInfo, GenerationRequest, InvalidRequest, Unsupported
from serve.services.constraints import Compiler, compiled
from serve.services.limits import check_limits
from serve.services.seeds import derived_seed

CONSTRAINTS = {
    "regex": "regex",
    "json_schema": "json_schema",
    "ebnf_grammar": "ebnf",
    "structural_tag": "structural_tag",
}
"""Kinds of constraint, by the field that asks for one."""


def read_request(
    message: pb.GenerateRequest, info: EngineInfo, compiler: Compiler | None, seed: int, deadline: float | None
) -> GenerationRequest:
    """The request of a message.

    Zeros of proto3 stand for "not set" wherever zero means nothing else.

    Args:
        message: As it came.
        info: Of the engine.
        compiler: Makes constraints; None: there can be none.
        seed: Of the server, for requests that bring none.
        deadline: See `GenerationRequest`.

    Raises:
        Refused: It asks for what cannot be, or what this server does not do.
    """
    _refuse_unsupported(message)
    given = message.sampling_params
    kind = given.WhichOneof("constraint")
    grammar = getattr(given, kind) if kind else None
    prompt = list(message.tokenized.input_ids)
    if not prompt:
        raise InvalidRequest("tokenized.input_ids is empty: there must be at least one token to continue")
    biases = _biases(given.logit_bias)
    check_limits(
        samples=given.n or 1,
        stop=given.stop,
        stop_ids=given.stop_token_ids,
        logit_bias=biases,
        grammar=grammar,
        top_logprobs=message.top_logprobs_num,
        eos_ids=info.eos_ids,
    )
    room = info.context_length - len(prompt)
    try:
        sampling = SamplingParams(
            max_new_tokens=given.max_new_tokens if given.HasField("max_new_tokens") else max(room, 1),
            temperature=given.temperature,
            top_k=max(given.top_k, 0),
            top_p=given.top_p or 1.0,
            min_p=given.min_p,
            repetition_penalty=given.repetition_penalty or 1.0,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
            logit_bias=biases,
            seed=_seed(given.custom_params, message.request_id, seed),
            stop=tuple(given.stop),
            stop_token_ids=tuple(given.stop_token_ids),
            ignore_eos=given.ignore_eos,
        )
    except ValueError as error:
        raise InvalidRequest(f"sampling_params: {error}") from None
    return GenerationRequest(
        request_id=message.request_id,
        prompt_ids=prompt,
        sampling=sampling,
        n=given.n or 1,
        logprobs=message.return_logprob,
        top_logprobs=message.top_logprobs_num if message.return_logprob else 0,
        constraint=compiled(compiler, CONSTRAINTS[kind] if kind else None, grammar),
        deadline=deadline,
        text=message.tokenized.original_text or None,
    )


def _refuse_unsupported(message: pb.GenerateRequest) -> None:
    asked = {
        "mm_inputs": message.HasField("mm_inputs") and message.mm_inputs.ByteSize() > 0,
        "disaggregated_params": message.HasField("disaggregated_params"),
        "custom_logit_processor": bool(message.custom_logit_processor),
        "input_embeds": bool(message.input_embeds),
        "lora_id": bool(message.lora_id),
        "return_hidden_states": message.return_hidden_states,
        "token_ids_logprob": bool(message.token_ids_logprob),
        "sampling_params.min_new_tokens": message.sampling_params.min_new_tokens > 0,
        "logprob_start_len (log-probabilities of the prompt)": message.return_logprob
        and 0 < message.logprob_start_len < len(message.tokenized.input_ids) - 1,
    }
    for name, given in asked.items():
        if given:
            raise Unsupported(f"{name} is not supported by this server; leave it out")
    if message.top_logprobs_num < 0:
        raise InvalidRequest(f"top_logprobs_num must be 0 or more, not {message.top_logprobs_num}")


def _biases(given: Any) -> dict[int, float]:
    try:
        return {int(token): value for token, value in given.items()}
    except ValueError:
        raise InvalidRequest("logit_bias must be keyed by token ids, written as whole numbers") from None


def _seed(custom: Struct, request_id: str, seed: int) -> int:
    """A request's own seed, or one that its id and the server's decide, so that a run can be repeated."""
    given = dict(custom).get("seed")
    if given is None:
        return derived_seed(seed, request_id)
    if not isinstance(given, int | float) or not 0 <= given < 1 << 32 or given != int(given):
        raise InvalidRequest(f"custom_params.seed must be a whole number from 0 to 4294967295, not {given!r}")
    return int(given)
