"""What a server is to be: the resolved command line, one frozen value that everything else is built from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mimo_jax.model import LoadOptions
from sharding.hosts import Group

Platform = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class ServerOptions:
    """The resolved configuration of one process of a server."""

    # the model
    model: Path
    """Checkpoint folder."""
    served_model_name: str
    """What clients call it."""
    tokenizer: Path
    """Folder of `tokenizer.json`, where there is one."""
    load: LoadOptions
    """How weights are read and placed; its drafter is a folder or `none`, never `auto`."""
    platform: Platform
    """What JAX computes on."""

    # decoding
    block_size: int
    """Rows the drafter fills; 1 without one."""
    verify_length: int
    """Rows the backbone verifies a round, the anchor included; 1 without a drafter."""
    rounds_per_dispatch: int
    overlap: bool
    """Whether a step is planned while the one before it runs."""
    random_seed: int
    """Of requests that bring none, together with their id."""
    grammar_backend: Literal["llguidance", "none"]

    # batches and memory
    context_length: int
    """Prompt and output together."""
    page_size: int
    """Tokens; also how finely prefixes are shared."""
    max_running_requests: int
    """Over all data-parallel groups; the same number in each."""
    max_queued_requests: int
    chunked_prefill_size: int
    """Prompt tokens a step takes at most; a power of two."""
    mem_fraction_static: float
    """Share of a device's memory for weights and caches together."""
    max_total_tokens: int | None
    """Positions in the pages of one data-parallel group; None: what the memory fraction leaves."""
    max_snapshots: int | None
    """Snapshots of sliding windows in one data-parallel group; None: what fits."""
    disable_radix_cache: bool

    # text
    chat_template: Path | None
    """A Jinja file; None: the checkpoint's, else the family's."""
    reasoning_parser: str | None
    """What a gateway's flag of that name should be; the text service reads the family's format by itself."""
    tool_call_parser: str | None

    # network
    host: str
    grpc_port: int
    """0: any that is free; so is the next."""
    http_port: int
    """Of the sidecar: /live, /ready, /metrics."""
    sampling_defaults: Literal["model", "openai"]
    """Who decides how requests in text are sampled that say nothing about it."""
    stream_interval: int
    """Tokens that a message has at least, but for a sample's last."""
    api_key: str | None = field(repr=False)
    admin_api_key: str | None = field(repr=False)
    ssl_certfile: Path | None
    ssl_keyfile: Path | None
    ssl_ca_certs: Path | None
    """Whose signature clients' certificates must bear; None: clients need none."""

    # processes
    group: Group | None
    """This process among those that run the model together; None: it is alone."""
    dist_timeout: float
    """Seconds for all of them to come."""

    # life
    precompile: bool
    """Whether programs are compiled before the server reports ready."""
    watchdog_timeout: float
    """Seconds without a finished step, while there is work, after which the server counts as stalled."""
    max_request_seconds: float
    drain_timeout: float
    """Seconds that requests have to finish once the server is told to end."""
    log_level: str
    log_format: Literal["text", "json"]
    log_requests: bool
    """Whether prompts and outputs are logged, too."""
    otlp_traces_endpoint: str | None
    """Of a collector of spans; None: there are none."""
    metrics_prefix: Literal["mimo:", "sglang:"]

    @property
    def process(self) -> int:
        """This one's number among those that run the model together; 0 serves."""
        return self.group.process if self.group else 0

    @property
    def drafter(self) -> Path | None:
        """The drafter's folder."""
        return None if self.load.drafter == "none" else Path(self.load.drafter)

    def as_json(self) -> dict[str, Any]:
        """As plain values, without the keys; what SGLang has a name for has that name."""
        topology, load = self.load.topology, self.load
        group = self.group
        skipped = ("model", "load", "group", "api_key", "admin_api_key")
        own = {name: value for name, value in vars(self).items() if name not in skipped}
        named = {
            "model_path": self.model,
            "speculative_algorithm": "DFLASH" if self.drafter else "NONE",
            "speculative_draft_model_path": self.drafter,
            "tp_size": topology.tensor_parallel,
            "dp_size": topology.data_parallel,
            "ep_size": topology.expert_parallel,
            "enable_dp_attention": topology.dp_attention,
            "enable_dp_lm_head": topology.dp_lm_head,
            "moe_dense_tp_size": topology.dense_tensor_parallel,
            "mesh": topology.axes,
            "dtype": load.dtype or "auto",
            "storage": load.storage or "auto",
            "swa_visible_keys": load.swa_visible_keys,
            "router_dtype": load.router_dtype,
            "qkv_layout": load.qkv_layout,
            "draft_rope_theta": load.draft_rope_theta,
            "snapshot": load.snapshot,
            "nnodes": group.processes if group else 1,
            "node_rank": self.process,
            "dist_init_addr": group.address if group else None,
            "api_key": self.api_key is not None,
            "admin_api_key": self.admin_api_key is not None,
        }
        return {name: str(v) if isinstance(v, Path) else v for name, v in (named | own).items()}
