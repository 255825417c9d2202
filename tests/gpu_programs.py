"""Programs compiled for an H200 by a machine that has none, and what the assembler says of their kernels."""

import ctypes
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import jax
from jax.experimental import topologies


@dataclass(frozen=True)
class Kernel:
    """A Pallas kernel of a program, as ptxas reports it."""

    name: str
    registers: int
    spilled_bytes: int
    """Stored and loaded."""


@dataclass(frozen=True)
class Program:
    """A compiled program."""

    hlo: str
    report: str
    """PTX and machine code of its Pallas kernels, and what ptxas says of them."""
    kernels: list[Kernel]
    temporary_bytes: int

    def loops(self, kernel: str) -> list[Counter[str]]:
        """Instructions, by the first part of their names, of a kernel's loops that have wgmmas, the smallest first."""
        [body] = re.findall(rf"^\.text\.{kernel}\w*:\n(.*?)(?=^//-|\Z)", self.report, re.DOTALL | re.MULTILINE)
        instructions: list[str] = []
        labels: dict[str, int] = {}
        found: list[Counter[str]] = []
        for label, instruction in re.findall(r"^(?:\.(L_x_\d+):|\s+/\*[0-9a-f]{4,}\*/\s+(.*?);)", body, re.MULTILINE):
            if label:
                labels[label] = len(instructions)
                continue
            instructions.append(re.sub(r"^@!?U?P\w+\s+", "", instruction))
            back = re.match(r"BRA\b.*\.(L_x_\d+)", instructions[-1])
            if back and back[1] in labels:
                within = Counter(re.split(r"[.\s]", i)[0] for i in instructions[labels[back[1]] :])
                found += [within] if within["HGMMA"] else []
        return sorted(found, key=Counter.total)


@cache
def h200s(nodes: int = 1, on_each: int = 1) -> list[jax.Device]:
    """H200s to compile for."""
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=(Path(__file__).parent / "targets" / "h200.txtpb").read_text(),
        topology=f"1x{nodes}x{on_each}",
    )
    return list(described.devices)


def compile_for_h200(function: Callable[..., Any], *shapes: tuple[tuple[int, ...], Any] | None) -> Program:
    """Compile a function of arrays of these shapes and dtypes, or None, for one H200."""
    where = jax.sharding.SingleDeviceSharding(h200s()[0])
    arrays = [None if shape is None else jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    with tempfile.TemporaryFile() as file:
        with _printing_to(file, "MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_SASS"):
            # tests compile for speed of compilation, which is not what is looked at here
            done = jax.jit(function).lower(*arrays).compile({"xla_backend_optimization_level": 3})
        file.seek(0)
        printed = file.read().decode(errors="replace")
    kernels = [
        Kernel(name, int(registers), int(stores) + int(loads))
        for name, stores, loads, registers in re.findall(
            r"Function properties for (\S+)\n.*?(\d+) bytes spill stores, (\d+) bytes spill loads\n"
            r"ptxas info\s*: Used (\d+) registers",
            printed,
        )
    ]
    assert kernels, f"no kernel was assembled:\n{printed[-2000:]}"
    memory = done.memory_analysis()
    assert memory is not None
    return Program(done.as_text() or "", printed, kernels, memory.temp_size_in_bytes)


@contextmanager
def _printing_to(file: IO[bytes], *variables: str) -> Iterator[None]:
    """Set environment variables that make the compiler print, and send to a file what the process prints."""
    libc = ctypes.CDLL(None)
    kept = {name: os.environ.get(name) for name in variables}
    streams = {stream: os.dup(stream) for stream in (1, 2)}
    os.environ.update(dict.fromkeys(variables, "1"))
    for stream in streams:
        os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        libc.fflush(None)
        for stream, old in streams.items():
            os.dup2(old, stream)
            os.close(old)
        for name, value in kept.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
