"""Accelerators by name: what their makers say of memory, speed and links. Figures are in `devices.json`."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Device:
    """One accelerator. Speeds are peaks; a GB is 1e9 bytes, as data sheets count."""

    name: str
    memory_bytes: float
    hbm_bytes_per_s: float
    bf16_flops: float
    """FLOP/s of dense matrices, float32 accumulation."""
    fp8_flops: float | None
    """The same for FP8 operands; not used by floors, as FP8 and MXFP4 weights are decoded to bfloat16."""
    link: str
    """What joins devices of one server or rack."""
    link_bytes_per_s: float
    """Of one device, in each direction."""
    linked_devices: int
    """Devices that the link joins."""
    network_bytes_per_s: float | None
    """Of one device, in each direction, beyond the link; None: not known, counted as fast as the link."""
    source: str

    @classmethod
    def from_json(cls, name: str, entry: Any, where: str) -> "Device":
        """An entry of a device file; raises `ValueError` with the key that is missing, unknown or no number."""
        keys = {field.name: field.type for field in fields(cls) if field.name != "name"}
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where}: {name} must be an object with {', '.join(keys)}")
        for key in (*keys, *entry):
            if key not in keys or key not in entry:
                raise ValueError(f"{where}: {name} {'lacks' if key in keys else 'has an unknown key,'} {key}")
            value, kind = entry[key], keys[key]
            if kind is str and isinstance(value, str):
                continue
            if value is None and kind == float | None:
                continue
            if kind is str or isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                wanted = "a text" if kind is str else "a number above 0" + (" or null" if kind == float | None else "")
                raise ValueError(f"{where}: {name}: {key} must be {wanted}, not {value!r}")
            if kind is int and value != int(value):
                raise ValueError(f"{where}: {name}: {key} must be a whole number, not {value!r}")
        return cls(name, **entry)


def known_devices(more: Path | None = None) -> dict[str, Device]:
    """All devices by name; those of the file `more` are added, or stand in for ours.

    Raises:
        ValueError: The file is not as `devices.json`.
    """
    text = resources.files("mimo_jax").joinpath("devices.json").read_text(encoding="utf-8")
    return _read(text, "devices.json") | ({} if more is None else _read(more.read_text(encoding="utf-8"), str(more)))


def _read(text: str, where: str) -> dict[str, Device]:
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: expected an object of devices by name")
    return {name: Device.from_json(name, entry, where) for name, entry in entries.items()}


def parse_devices(text: str, known: Mapping[str, Device]) -> tuple[int, Device]:
    """`8xH200` as a count and a device; case does not matter.

    Raises:
        ValueError: It is not COUNTxNAME, or no device has that name.
    """
    match = re.fullmatch(r"([1-9]\d*)\s*[xX]\s*(\S+)", text.strip())
    if match is None:
        raise ValueError(f"--devices takes COUNTxNAME, such as 8xH200, not {text!r}")
    by_name = {name.lower(): device for name, device in known.items()}
    device = by_name.get(match[2].lower())
    if device is None:
        raise ValueError(
            f"no device {match[2]!r} is known; there are {', '.join(sorted(known))}, and --device-file adds others"
        )
    return int(match[1]), device
