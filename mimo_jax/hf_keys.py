"""Typed reading of Hugging Face JSON: every value is checked, every error names its file and key."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A `config.json` that cannot be run, with the key that says so."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConfigError: The file is missing, unreadable, not JSON, or not an object; the message names it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected a model folder in Hugging Face layout") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Keys:
    """Typed access to a JSON object that remembers which keys were asked for."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where
        self.known: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether a key is there and not null."""
        self.known.add(key)
        return self.values.get(key) is not None

    def get(self, key: str) -> Any:
        """A value that must be there."""
        if not self.has(key):
            raise ConfigError(f"{self.where}: {key} is missing")
        return self.values[key]

    def _wrong(self, key: str, expected: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key} must be {expected}, not {self.values[key]!r}")

    def integer(self, key: str, at_least: int = 1) -> int:
        """A required integer, at least so large and below 2**31."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not at_least <= value < 2**31:
            raise self._wrong(key, f"an integer of at least {at_least}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """An integer or a list of integers, as a tuple; empty where the key is absent."""
        if not self.has(key):
            return ()
        value = self.values[key]
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            raise self._wrong(key, "an integer or a list of integers")
        return tuple(values)

    def number(self, key: str, above: float = -math.inf, at_most: float = math.inf) -> float:
        """A required finite number, above one bound and at most another."""
        value = self.get(key)
        good = isinstance(value, int | float) and not isinstance(value, bool)
        if not good or not abs(value) <= sys.float_info.max or not above < value <= at_most:
            bound = "" if at_most == math.inf else f" and at most {at_most:g}"
            raise self._wrong(key, f"a number above {above:g}{bound}")
        return float(value)

    def boolean(self, key: str) -> bool:
        """A required true or false."""
        value = self.get(key)
        if not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def optional_boolean(self, key: str, default: bool) -> bool:
        """True or false, or the default where the key is absent."""
        return self.boolean(key) if self.has(key) else default

    def choice(self, key: str, *allowed: str, default: str) -> str:
        """One of the allowed strings, or the default where the key is absent."""
        if not self.has(key):
            return default
        if self.values[key] not in allowed:
            raise self._wrong(key, " or ".join(allowed))
        return self.values[key]

    def require(self, key: str, *allowed: Any) -> None:
        """Refuse any value but the allowed ones."""
        value = self.get(key)
        if not any(value is a or (type(value) is type(a) and value == a) for a in allowed):
            raise self._wrong(key, " or ".join(json.dumps(a) for a in allowed))

    def log_unknown(self) -> None:
        """Tell of keys that nobody asked for."""
        unknown = sorted(set(self.values) - self.known)
        if unknown:
            logger.info("%s: keys not used by this model: %s", self.where, ", ".join(unknown))


class LayeredKeys(Keys):
    """Keys that may stand at the top level or inside `rope_parameters`; both must agree."""

    def __init__(self, keys: Keys, inner: Mapping[str, Any]):
        for key in ("rope_theta", "partial_rotary_factor"):
            if keys.has(key) and inner.get(key) is not None and keys.values[key] != inner[key]:
                raise ConfigError(
                    f"{keys.where}: {key} is {keys.values[key]!r} but rope_parameters.{key} is {inner[key]!r}"
                )
        present = {k: v for k, v in keys.values.items() if v is not None}
        super().__init__({**inner, **present}, keys.where)
