# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A server and its clients
#
# The server runs beside the notebook and serves the model in the package. First its own gRPC service: streams that
# tell what each round gave, and a request that is given up half-way. Then the OpenAI client, through a gateway that
# speaks SGLang's protocol to the same server.

# %%
import atexit
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import matplotlib.pyplot as plt
import openai

from mimo_jax.evaluation.prompts import load
from serve.protos.mimo.serve.v1 import generation_pb2 as pb
from serve.protos.mimo.serve.v1.generation_pb2_grpc import GenerationStub

commands, logs = Path(sys.executable).parent, Path(tempfile.mkdtemp())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def start(name: str, *flags: str) -> subprocess.Popen:
    """A command of this environment, ended with the notebook; what it says goes to a file."""
    with (logs / name).open("w") as log:
        process = subprocess.Popen([commands / name, *flags], stdout=log, stderr=subprocess.STDOUT)
    atexit.register(process.kill)
    return process


def answers(url: str) -> bool:
    """Whether a page is there."""
    try:
        return urllib.request.urlopen(url).status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def wait(process: subprocess.Popen, url: str) -> None:
    """Wait until a page is there, and say so if it will never be."""
    while not answers(url):
        if process.poll() is not None:
            raise RuntimeError("\n".join(path.read_text() for path in logs.iterdir()))
        time.sleep(0.2)


# %% [markdown]
# ## Start it
#
# Every program is compiled before the server says that it is ready, and none afterwards: that is what this cell waits
# for. Few slots and a short context make it quick. gRPC is on `--port`, `/ready` and `/metrics` on `--http-port`.

# %%
port, http = free_port(), free_port()
small = ("--max-running-requests", "4", "--context-length", "1024", "--chunked-prefill-size", "64")
server = start("mimo-serve", "--port", str(port), "--http-port", str(http), *small)
began = time.monotonic()
wait(server, f"http://127.0.0.1:{http}/ready")
print(f"ready after {time.monotonic() - began:.0f} s")

stub = GenerationStub(grpc.insecure_channel(f"127.0.0.1:{port}"))
info = stub.GetServerInfo(pb.GetServerInfoRequest())
print(
    f"{info.model}: {info.max_running} requests at a time, blocks of {info.block_size}, {info.context_length} positions"
)

# %% [markdown]
# ## A stream
#
# A message a round: its tokens, the text that is certain by now, and how many of its drafts stood. The first message
# is the prefill's, which drafts nothing; the last has no tokens and tells the counts.


# %%
def request(text: str, most: int, **sampling: float) -> pb.GenerateRequest:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=text)], enable_thinking=False)
    return pb.GenerateRequest(chat=chat, sampling=pb.Sampling(max_new_tokens=most, temperature=0, **sampling))


for message in stub.Generate(request("What is the capital of France?", 60)):
    if message.HasField("round"):
        print(f"{message.round.accepted} of {message.round.drafted} drafts: {message.round.text!r}")
    else:
        usage = message.finished.usage
        print(f"\n{pb.FinishReason.Name(message.finished.reason)} after {usage.completion_tokens} tokens", end=" ")
        print(f"in {usage.rounds} rounds, accepted length {usage.accepted_length:.2f}")

# %% [markdown]
# ## Several at once, one given up
#
# Four requests together; one is cancelled when it has had 60 tokens. Cancelling ends it in the server too: its slot
# and its pages are free at once. The picture has a dot a message, at the time it arrived. Steps are as high as the
# round's accepted length: look for web pages climbing in eights while mathematics takes small ones, in the same batch
# and at the same times.

# %%
began = time.monotonic()


def listen(scenario: str, give_up: int | None = None) -> list[tuple[float, int]]:
    """Seconds and tokens so far, at every message."""
    call, arrived, tokens = stub.Generate(request(load(scenario)[0].messages[-1]["content"], 200)), [], 0
    for message in call:
        tokens += len(message.round.token_ids)
        arrived.append((time.monotonic() - began, tokens))
        if give_up is not None and tokens >= give_up:
            call.cancel()
            break
    return arrived


with ThreadPoolExecutor() as pool:
    tasks = {
        name: pool.submit(listen, name, 60 if name == "edits" else None) for name in ("web", "code", "math", "edits")
    }
streams = {name: task.result() for name, task in tasks.items()}

figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
for name, arrived in streams.items():
    (line,) = axis.step(*zip(*arrived, strict=True), where="post", marker="o", ms=3, label=name)
    if name == "edits":
        axis.plot(*arrived[-1], "x", color=line.get_color(), ms=12, mew=2, label="cancelled")
axis.set(xlabel="seconds since the requests were sent", ylabel="tokens so far", xlim=(0, None), ylim=(0, None))
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# Nothing is left of them in the server:

# %%
for message in stub.WatchLoad(pb.WatchLoadRequest(interval_seconds=0.2)):
    print(f"{message.running} running, {message.waiting} waiting, {message.used_tokens} tokens held")
    if message.running == 0:
        break

# %% [markdown]
# ## The OpenAI client
#
# [smg](https://pypi.org/project/smg/) is a gateway: HTTP as OpenAI's on one side, SGLang's scheduler protocol on the
# other, which our server speaks too. Other gateways that speak it work alike.

# %%
gateway_port = free_port()
flags = f"launch --host 127.0.0.1 --port {gateway_port} --prometheus-port {free_port()} --shutdown-grace-period-secs 1"
parsers = "--reasoning-parser qwen3 --tool-call-parser qwen_xml"
gateway = start("smg", *f"{flags} {parsers} --worker-urls grpc://127.0.0.1:{port}".split())
client = openai.OpenAI(base_url=f"http://127.0.0.1:{gateway_port}/v1", api_key="none")
wait(gateway, f"{client.base_url}models")
while not (models := client.models.list().data):
    time.sleep(0.2)
print([model.id for model in models])

# %%
question = [{"role": "user", "content": "What is the capital of France?"}]
chat = client.chat.completions
for piece in chat.create(model="nano", messages=question, max_tokens=60, temperature=0, stream=True):
    print(piece.choices[0].delta.content or "" if piece.choices else "", end="")

answer = chat.create(model="nano", messages=question, max_tokens=60, temperature=0)
used = answer.usage.completion_tokens_details
print(f"\n{used.accepted_prediction_tokens} drafts accepted, {used.rejected_prediction_tokens} rejected")

# %% [markdown]
# Structured output keeps to its schema however small the model is: of every law it samples from, tokens that would
# break the schema are left out. With a reasoning parser in the gateway, thinking has to be off, or all is taken for
# thoughts.

# %%
pet = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 20}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
answer = chat.create(
    model="nano",
    messages=[{"role": "user", "content": "Describe a pet."}],
    max_tokens=60,
    response_format={"type": "json_schema", "json_schema": {"name": "pet", "schema": pet}},
    extra_body={"chat_template_kwargs": {"enable_thinking": False}},
)
print(json.loads(answer.choices[0].message.content))

# %% [markdown]
# ## What the server counted, and its end
#
# `/metrics` is for Prometheus (a dashboard is in `serve/deploy/`). The first SIGTERM lets requests finish; with none
# inside, the server is gone in a moment.

# %%
metrics = urllib.request.urlopen(f"http://127.0.0.1:{http}/metrics").read().decode()
for line in re.findall(r"^mimo:\w*(?:accept|finish|generat)\w*(?:{[^}]*})? \S+$", metrics, re.MULTILINE)[:12]:
    print(line)

gateway.terminate()
server.terminate()
print("server ended with", server.wait(timeout=60))
gateway.kill()
