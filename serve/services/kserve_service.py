"""KServe's inference protocol, version 2, as Triton serves language models. Needs the `kserve` extra.

A request has the input `text_input` (BYTES, one text) and may have `stream` (BOOL) and `sampling_parameters` (BYTES, a
JSON object); the latter two may also be parameters of the request. The answer is the output `text_output`.
"""

import asyncio
import json
import struct
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from google.protobuf.json_format import ParseDict, ParseError
from grpc.aio import ServicerContext
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceServicer

from serve.generation import EngineFailed, InvalidRequest, NotFound, Refused, Status
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.services.answering import Answering, whole
from serve.services.status import statuses

# The stubs are made at run time: the type checker knows nothing of what is in them.
kserve: Any = service_pb2

SERVICE_NAME = kserve.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

_PLATFORM = "mimo-jax"
_INPUTS = (("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES"))
_ALIASES = {"max_tokens": "max_new_tokens"}
"""Names that clients of other servers use."""


class KServeService(GRPCInferenceServiceServicer):
    """`inference.GRPCInferenceService` over an engine that is asked in text.

    `sampling_parameters` are those of `mimo.serve.v1.Sampling`, by the same names. The last response has the parameter
    `triton_final_response`, and `finish_reason`: stop, length or abort.
    """

    def __init__(self, answering: Answering) -> None:
        self._answering, self._engine = answering, answering.engine

    async def ServerLive(self, request: Any, context: ServicerContext) -> Any:
        """Whether the server is alive."""
        return kserve.ServerLiveResponse(live=self._engine.status is not Status.FAILED)

    async def ServerReady(self, request: Any, context: ServicerContext) -> Any:
        """Whether requests are taken."""
        return kserve.ServerReadyResponse(ready=self._engine.status is Status.READY)

    async def ModelReady(self, request: Any, context: ServicerContext) -> Any:
        """Whether requests to a model are taken."""
        ready = self._engine.status is Status.READY and self._serves(request.name, request.version)
        return kserve.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: ServicerContext) -> Any:
        """What this server is."""
        return kserve.ServerMetadataResponse(name=_PLATFORM, version=version("mimo-jax"), extensions=[])

    async def ModelMetadata(self, request: Any, context: ServicerContext) -> Any:
        """What goes into the model and comes out."""
        tensor = kserve.ModelMetadataResponse.TensorMetadata
        async with statuses(context):
            self._check_model(request.name, request.version)
            return kserve.ModelMetadataResponse(
                name=request.name,
                versions=["1"],
                platform=_PLATFORM,
                inputs=[tensor(name=name, datatype=kind, shape=[1]) for name, kind in _INPUTS],
                outputs=[tensor(name="text_output", datatype="BYTES", shape=[1])],
            )

    async def ModelConfig(self, request: Any, context: ServicerContext) -> Any:
        """The same, as benchmarking clients of Triton ask for it: it streams."""
        config: Any = model_config_pb2
        kinds = {"BYTES": config.TYPE_STRING, "BOOL": config.TYPE_BOOL}
        async with statuses(context):
            self._check_model(request.name, request.version)
            inputs = [
                config.ModelInput(name=name, data_type=kinds[kind], dims=[1], optional=name != "text_input")
                for name, kind in _INPUTS
            ]
            return kserve.ModelConfigResponse(
                config=config.ModelConfig(
                    name=request.name,
                    backend=_PLATFORM,
                    input=inputs,
                    output=[config.ModelOutput(name="text_output", data_type=config.TYPE_STRING, dims=[1])],
                    model_transaction_policy=config.ModelTransactionPolicy(decoupled=True),
                )
            )

    async def ModelInfer(self, request: Any, context: ServicerContext) -> Any:
        """Answer a prompt in one message."""
        async with statuses(context):
            self._check_model(request.model_name, request.model_version)
            message, _ = _read(request)
            return await self._infer(request, message, context)

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: ServicerContext) -> None:
        """Answer prompts as they come, side by side; what is wrong with one is told in its response."""
        writing = asyncio.Lock()

        async def answer(request: Any) -> None:
            async with aclosing(self._stream(request, context)) as responses:
                async for response in responses:
                    async with writing:
                        await context.write(response)

        async with statuses(context), asyncio.TaskGroup() as group:
            async for request in requests:
                group.create_task(answer(request))

    async def _stream(self, request: Any, context: ServicerContext) -> AsyncGenerator[Any, None]:
        try:
            self._check_model(request.model_name, request.model_version)
            message, streams = _read(request)
            if not streams:
                yield _in_stream(await self._infer(request, message, context))
                return
            async with aclosing(self._answering.answer(message, context)) as responses:
                async for response in responses:
                    yield _in_stream(_response(request, response))
        except (Refused, EngineFailed, TimeoutError) as error:
            failed = kserve.ModelStreamInferResponse(error_message=str(error) or type(error).__name__)
            failed.infer_response.id = request.id
            _say(failed.infer_response, "triton_final_response", True)
            yield failed

    async def _infer(self, request: Any, message: pb.GenerateRequest, context: ServicerContext) -> Any:
        async with aclosing(self._answering.answer(message, context)) as responses:
            [sample] = (await whole(responses)).samples
        return _output(request, sample.text, sample.finished)

    def _serves(self, name: str, model_version: str) -> bool:
        return name == self._engine.info.model and model_version in ("", "1")

    def _check_model(self, name: str, model_version: str) -> None:
        if not self._serves(name, model_version):
            asked = f"{name} in version {model_version}" if model_version else name
            raise NotFound(f"there is no model {asked}: this server serves {self._engine.info.model}, version 1")


def _read(request: Any) -> tuple[pb.GenerateRequest, bool]:
    """A request in our own words, and whether it is to be streamed. Raises `InvalidRequest`."""
    tensors = _inputs(request)
    parameters = {name: getattr(p, p.WhichOneof("parameter_choice")) for name, p in request.parameters.items()}
    if "text_input" not in tensors:
        raise InvalidRequest("there is no input text_input: give the prompt there, as one text of type BYTES")
    text = _text(tensors["text_input"], "text_input")
    if "sampling_parameters" in tensors:
        settings = _text(tensors["sampling_parameters"], "sampling_parameters")
    else:
        settings = str(parameters.get("sampling_parameters", ""))
    streams = bool(tensors["stream"][0]) if tensors.get("stream") else bool(parameters.get("stream", False))
    return pb.GenerateRequest(text=pb.Text(text=text), sampling=_sampling(settings)), streams


def _inputs(request: Any) -> dict[str, bytes]:
    """The bytes of each tensor, whichever of the two ways it was sent."""
    known = dict(_INPUTS)
    raw = list(request.raw_input_contents)
    tensors: dict[str, bytes] = {}
    for number, tensor in enumerate(request.inputs):
        if tensor.name not in known:
            raise InvalidRequest(f"there is no input {tensor.name}; there are {', '.join(known)}")
        if tensor.datatype != known[tensor.name]:
            raise InvalidRequest(f"{tensor.name} must be of type {known[tensor.name]}, not {tensor.datatype}")
        if any(extent != 1 for extent in tensor.shape):
            raise InvalidRequest(f"{tensor.name} must hold one value, not a tensor of shape {list(tensor.shape)}")
        if raw:
            if number >= len(raw):
                raise InvalidRequest(f"{tensor.name} has no contents: {len(raw)} were sent for {len(request.inputs)}")
            tensors[tensor.name] = raw[number] if tensor.datatype == "BOOL" else _unpacked(raw[number], tensor.name)
            continue
        values = tensor.contents.bool_contents if tensor.datatype == "BOOL" else tensor.contents.bytes_contents
        if len(values) != 1:
            raise InvalidRequest(f"{tensor.name} must hold one value, not {len(values)}")
        tensors[tensor.name] = bytes([values[0]]) if tensor.datatype == "BOOL" else values[0]
    return tensors


def _unpacked(raw: bytes, name: str) -> bytes:
    """The one element of a BYTES tensor, which stands after its length."""
    if len(raw) < 4 or len(raw) != 4 + struct.unpack_from("<I", raw)[0]:
        raise InvalidRequest(f"{name}: expected one element, its length in four bytes before it")
    return raw[4:]


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{name} is no UTF-8: {error}") from error


def _sampling(text: str) -> pb.Sampling:
    """Sampling parameters from a JSON object's text."""
    if not text.strip():
        return pb.Sampling()
    try:
        given = json.loads(text)
        if not isinstance(given, dict):
            raise InvalidRequest("sampling_parameters must be a JSON object")
        if isinstance(given.get("stop"), str):
            given["stop"] = [given["stop"]]
        for alias in _ALIASES.keys() & given.keys():
            given[_ALIASES[alias]] = given.pop(alias)
        return ParseDict(given, pb.Sampling())
    except (ValueError, ParseError, RecursionError) as error:
        raise InvalidRequest(f"sampling_parameters: {error}") from error


def _response(request: Any, response: pb.GenerateResponse) -> Any:
    if response.HasField("round"):
        return _output(request, response.round.text, None)
    return _output(request, response.finished.text, response.finished)


def _output(request: Any, text: str, finished: pb.Finished | None) -> Any:
    """One response; the last one of a request if it has finished."""
    data = text.encode()
    response = kserve.ModelInferResponse(
        model_name=request.model_name,
        model_version="1",
        id=request.id,
        outputs=[kserve.ModelInferResponse.InferOutputTensor(name="text_output", datatype="BYTES", shape=[1])],
        raw_output_contents=[struct.pack("<I", len(data)) + data],
    )
    _say(response, "triton_final_response", finished is not None)
    if finished is not None:
        reason = pb.FinishReason.Name(finished.reason).removeprefix("FINISH_REASON_").lower()
        response.parameters["finish_reason"].string_param = reason
    return response


def _say(response: Any, parameter: str, value: bool) -> None:
    response.parameters[parameter].bool_param = value


def _in_stream(response: Any) -> Any:
    return kserve.ModelStreamInferResponse(infer_response=response)
