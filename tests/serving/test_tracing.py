"""Spans as a collector receives them."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from serve.generation import Finished, Usage
from serve.tracing import Tracer

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
END = Finished(1, "length", Usage(5, 2, 9, 3, 21, 6))


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self):
        self.spans = []
        self.services = set()
        self.endpoint = ""

    def Export(self, request, context):
        for resource in request.resource_spans:
            self.services |= {a.value.string_value for a in resource.resource.attributes if a.key == "service.name"}
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector():
    servicer = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)
    servicer.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield servicer
    server.stop(0)


def values(span):
    found = {}
    for a in span.attributes:
        kind = a.value.WhichOneof("value")
        value = getattr(a.value, kind)
        found[a.key] = [v.string_value for v in value.values] if kind == "array_value" else value
    return found


def test_spans_of_a_request(collector):
    tracer = Tracer(collector.endpoint, "m")
    trace = tracer.request("r1", {"traceparent": PARENT, "user-agent": "x"})
    trace.read(5)
    trace.prefilling()
    trace.first_token()
    trace.prefilling()  # sent back, and again
    trace.first_token()
    trace.finished(END)
    trace.close()
    tracer.shutdown()
    spans = {span.name: span for span in collector.spans}
    assert len(collector.spans) == len(spans) == 4
    assert collector.services == {"mimo-serve"}
    whole = spans.pop("generate")
    assert {span.trace_id.hex() for span in collector.spans} == {PARENT.split("-")[1]}
    assert whole.parent_span_id.hex() == PARENT.split("-")[2]
    assert all(span.parent_span_id == whole.span_id for span in spans.values())
    queue, prefill, decode = spans["queue"], spans["prefill"], spans["decode"]
    assert queue.end_time_unix_nano == prefill.start_time_unix_nano
    assert prefill.end_time_unix_nano == decode.start_time_unix_nano
    assert decode.end_time_unix_nano <= whole.end_time_unix_nano
    given = {"gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 5, "mimo.request_id": "r1"}
    assert values(whole) == given
    assert values(decode)["gen_ai.response.finish_reasons"] == ["length"]
    assert values(decode)["gen_ai.usage.output_tokens"] == 9
    assert values(decode)["mimo.accepted"] == 6


@pytest.mark.parametrize("metadata", [{}, {"traceparent": "nonsense"}])
def test_a_request_of_nobodys_trace_begins_one(collector, metadata):
    tracer = Tracer(collector.endpoint, "m")
    tracer.request("r1", metadata).close("the server is draining")
    tracer.shutdown()
    (span,) = collector.spans
    assert span.parent_span_id == b""
    assert span.status.code == 2
    assert span.status.message == "the server is draining"


def test_a_caller_that_is_not_sampled_is_not_recorded(collector):
    tracer = Tracer(collector.endpoint, "m")
    trace = tracer.request("r1", {"traceparent": PARENT[:-2] + "00"})
    trace.first_token()
    trace.close()
    tracer.shutdown()
    assert not collector.spans


def test_without_the_packages_it_says_what_to_install():
    code = """
import sys
sys.modules["opentelemetry"] = None
from serve.tracing import Tracer
try:
    Tracer("http://localhost:4317", "m")
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "tracing needs OpenTelemetry: pip install 'mimo-jax[otel]'\n"
