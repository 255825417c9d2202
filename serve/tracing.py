"""OpenTelemetry spans of requests: queue, prefill, decode. Needs the `otel` extra, which nothing else imports."""

import time
from collections.abc import Mapping
from typing import Any

from serve.generation import Finished


class Tracer:
    """Makes a `RequestTrace` a request and sends its spans to a collector in the background.

    The standard variables hold, such as `OTEL_TRACES_SAMPLER` and `OTEL_EXPORTER_OTLP_HEADERS`.

    Args:
        endpoint: Of the collector's OTLP over gRPC, such as `http://localhost:4317`; https for TLS.
        model: Name that is served.

    Raises:
        ValueError: The packages are not there.
    """

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError:
            raise ValueError("tracing needs OpenTelemetry: pip install 'mimo-jax[otel]'") from None
        self._provider = TracerProvider(resource=Resource.create({"service.name": "mimo-serve"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("mimo-serve")
        self._propagator, self._model = TraceContextTextMapPropagator(), model

    def request(self, request_id: str, metadata: Mapping[str, str]) -> "RequestTrace":
        """The trace of a request that has just come; it joins the caller's if the metadata hold a `traceparent`."""
        span = self._tracer.start_span(
            "generate",
            context=self._propagator.extract(metadata),
            attributes={"gen_ai.request.model": self._model, "mimo.request_id": request_id},
        )
        return RequestTrace(self._tracer, span)

    def shutdown(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request. Any thread may call any method; `close` is the last and must be called."""

    def __init__(self, tracer: Any, span: Any) -> None:
        self._tracer, self._span = tracer, span
        self._came = time.time_ns()
        self._prefill: int | None = None
        self._decode: int | None = None

    def read(self, prompt_tokens: int) -> None:
        """Its prompt is known."""
        self._span.set_attribute("gen_ai.usage.input_tokens", prompt_tokens)

    def prefilling(self) -> None:
        """It left the queue; only the first time counts, as it may be sent back."""
        if self._prefill is None:
            self._prefill = time.time_ns()
            self._child("queue", self._came, self._prefill)

    def first_token(self) -> None:
        """The prompt is through; only the first time counts."""
        if self._decode is None:
            self._decode = time.time_ns()
            self._child("prefill", self._prefill or self._came, self._decode)

    def finished(self, end: Finished) -> None:
        """One of its samples ended."""
        usage = end.usage
        attributes = {
            "gen_ai.response.finish_reasons": [end.reason],
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "mimo.sample": end.index,
            "mimo.cached_tokens": usage.cached_tokens,
            "mimo.rounds": usage.rounds,
            "mimo.drafted": usage.drafted,
            "mimo.accepted": usage.accepted,
        }
        self._child("decode", self._decode or self._prefill or self._came, time.time_ns(), attributes)

    def close(self, error: str = "") -> None:
        """It is over; with an error if it was refused or the engine failed."""
        if error:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, error))
        self._span.end()

    def _child(self, name: str, begin: int, end: int, attributes: Mapping[str, Any] | None = None) -> None:
        from opentelemetry.trace import set_span_in_context

        within = set_span_in_context(self._span)
        self._tracer.start_span(name, context=within, start_time=begin, attributes=attributes).end(end)
