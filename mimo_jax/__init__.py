"""MiMo-V2.5-Pro-FP4-DFlash in JAX: MXFP4 experts, hybrid attention, block-diffusion speculative decoding."""

from mimo_jax.config import BackboneConfig, ConfigError, DrafterConfig
from mimo_jax.generate import Completion, Generator
from mimo_jax.model import LoadOptions, Model, load_model
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding, Session
from sharding.topology import Topology, TopologyError

__all__ = [
    "BackboneConfig",
    "Completion",
    "ConfigError",
    "Decoding",
    "DrafterConfig",
    "Generator",
    "LoadOptions",
    "Model",
    "SamplingParams",
    "Session",
    "Topology",
    "TopologyError",
    "load_model",
]
