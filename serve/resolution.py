"""From flags to options: every default is filled in, and everything that can be wrong before the start is found."""

import argparse
import os
import re
from collections.abc import Mapping
from pathlib import Path

from mimo_jax.arguments import load_options
from mimo_jax.chat_template import ChatTemplate
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.placement import check
from mimo_jax.presets import NANO
from mimo_jax.session import MAX_CHUNK
from serve.flag_kinds import FlagError
from serve.model_files import drafter_of, model_folder
from serve.options import Platform, ServerOptions
from sharding.hosts import Group
from sharding.hosts import resolve as resolve_group

ALLOCATOR_FRACTION = 0.92
"""Of a device's memory, for all that JAX allocates; the rest is for CUDA, NCCL and captured graphs."""
ALLOCATOR_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"

_RUNNING, _RUNNING_ON_CPU = 48, 8
_QUEUED_PER_RUNNING = 8
_SMALLEST_CHUNK = 16
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def resolve(
    arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ, *, weights: bool = True
) -> ServerOptions:
    """The options that flags and environment describe. Only configurations are read; repositories may be fetched.

    Args:
        arguments: Of `flags.parse`; notes for the person are added to its `notes`.
        environment: Variables.
        weights: Whether a repository's weights will be needed.

    Raises:
        ValueError: Something cannot be, with what was given and what to do: a `FlagError`, or a `ConfigError`,
            `TopologyError` or `HostsError`.
    """
    notes = arguments.notes
    group = resolve_group(arguments.dist_init_addr, arguments.nnodes, arguments.node_rank, environment)
    platform = arguments.device or default_platform(environment)
    _topology_flags(arguments)
    download_dir = _path(arguments.download_dir)
    if arguments.revision and Path(arguments.model).expanduser().is_dir():
        notes.append(f"--revision has no effect: {arguments.model} is a folder here")
    model = model_folder(arguments.model, arguments.revision, download_dir, weights=weights)
    drafter = _drafter(arguments, model, download_dir, weights)
    arguments.drafter = str(drafter) if drafter else "none"
    load = load_options(arguments)

    config = BackboneConfig.from_folder(model, swa_visible_keys=load.swa_visible_keys, router_dtype=load.router_dtype)
    drafter_config = None
    if drafter is not None:
        drafter_config = DrafterConfig.from_folder(drafter, rope_theta=load.draft_rope_theta)
        drafter_config.check_fits(config)
        if load.topology.dp_attention and load.topology.data_parallel > 1 and not load.topology.dp_lm_head:
            raise FlagError(
                "DFLASH with --enable-dp-attention needs --enable-dp-lm-head: every group drafts and verifies its own "
                "sequences"
            )
    check(load.topology, config, drafter_config)
    _check_quantization(arguments.quantization, config)
    _check_cache_dtype(arguments, platform)
    _check_memory(arguments.mem_fraction_static, platform, environment)
    if group and load.topology.tensor_parallel % group.processes:
        raise FlagError(
            f"--tensor-parallel-size {load.topology.tensor_parallel} counts the devices of all nodes, and does not "
            f"divide by {group.processes} of them"
        )

    block = drafter_config.block_size if drafter_config else 1
    context = _context(arguments.context_length, config, block)
    running = _running(arguments.max_running_requests, platform, load.topology.data_parallel)
    grpc_port, http_port = _ports(arguments, group)
    certificate, key, authorities = _tls(arguments)
    return ServerOptions(
        model=model,
        served_model_name=arguments.served_model_name or _default_name(arguments.model, model),
        tokenizer=_tokenizer(arguments.tokenizer_path, model, download_dir),
        load=load,
        platform=platform,
        block_size=block,
        verify_length=_verify_length(arguments, block, drafter is not None),
        rounds_per_dispatch=arguments.rounds_per_dispatch,
        overlap=not arguments.disable_overlap_schedule,
        random_seed=arguments.random_seed,
        grammar_backend=arguments.grammar_backend,
        context_length=context,
        page_size=_power_of_two("--page-size", arguments.page_size, 1),
        max_running_requests=running,
        max_queued_requests=arguments.max_queued_requests or _QUEUED_PER_RUNNING * running,
        chunked_prefill_size=_chunk(arguments.chunked_prefill_size, context),
        mem_fraction_static=arguments.mem_fraction_static,
        max_total_tokens=_total_tokens(arguments.max_total_tokens, arguments.page_size, block),
        max_snapshots=_snapshots(arguments),
        disable_radix_cache=arguments.disable_radix_cache,
        chat_template=_chat_template(arguments.chat_template),
        reasoning_parser=arguments.reasoning_parser,
        tool_call_parser=arguments.tool_call_parser,
        host=arguments.host,
        grpc_port=grpc_port,
        http_port=http_port,
        sampling_defaults=arguments.sampling_defaults,
        stream_interval=arguments.stream_interval,
        api_key=_key("--api-key", arguments.api_key),
        admin_api_key=_key("--admin-api-key", arguments.admin_api_key),
        ssl_certfile=certificate,
        ssl_keyfile=key,
        ssl_ca_certs=authorities,
        group=group,
        dist_timeout=arguments.dist_timeout,
        precompile=not arguments.disable_precompile,
        watchdog_timeout=arguments.watchdog_timeout,
        max_request_seconds=arguments.max_request_seconds,
        drain_timeout=arguments.drain_timeout,
        log_level=arguments.log_level,
        log_format=arguments.log_format,
        log_requests=arguments.log_requests,
        otlp_traces_endpoint=_collector(arguments.otlp_traces_endpoint),
        metrics_prefix=arguments.metrics_prefix,
    )


def default_platform(environment: Mapping[str, str] = os.environ) -> Platform:
    """What JAX will compute on, told without starting it: it would take device memory, or miss its group.

    Any accelerator counts as cuda.
    """
    if named := environment.get("JAX_PLATFORMS", "").split(",")[0]:
        return "cpu" if named == "cpu" else "cuda"
    return "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists() else "cpu"


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()


def _default_name(given: str, model: Path) -> str:
    return model.name if given == str(NANO) else given


def _topology_flags(arguments: argparse.Namespace) -> None:
    """Bring the two ways to ask for DP attention together; say in flags what `Topology` says in its own words."""
    groups, attention = arguments.data_parallel_size, arguments.attn_dp_size
    if attention is not None:
        if groups not in (1, attention):
            raise FlagError(f"--attn-dp-size {attention} and --data-parallel-size {groups} must be equal")
        arguments.data_parallel_size, arguments.enable_dp_attention = attention, True
    elif groups > 1 and not arguments.enable_dp_attention:
        raise FlagError(
            f"--data-parallel-size {groups} alone means {groups} copies of the model: run {groups} servers behind a "
            f"gateway such as smg, or add --enable-dp-attention"
        )
    if arguments.enable_dp_lm_head and not arguments.enable_dp_attention:
        raise FlagError("--enable-dp-lm-head needs --enable-dp-attention")


def _drafter(arguments: argparse.Namespace, model: Path, download_dir: Path | None, weights: bool) -> Path | None:
    name = arguments.speculative_draft_model_path
    if arguments.speculative_algorithm == "NONE":
        if name is not None:
            raise FlagError(f"--speculative-algorithm NONE and --speculative-draft-model-path {name}: leave one out")
        return None
    revision = arguments.speculative_draft_model_revision
    found = drafter_of(name, arguments.model, model, revision, download_dir, weights=weights)
    if found is None and arguments.speculative_algorithm == "DFLASH":
        raise FlagError(f"DFLASH needs a drafter, and {model} has no folder dflash: --speculative-draft-model-path")
    return found


def _tokenizer(name: str | None, model: Path, download_dir: Path | None) -> Path:
    if name is None:
        return model
    folder = model_folder(name, None, download_dir, weights=False)
    if not (folder / "tokenizer.json").is_file():
        raise FlagError(f"--tokenizer-path {name}: there is no tokenizer.json in {folder}")
    return folder


def _check_quantization(said: str | None, config: BackboneConfig) -> None:
    held = config.quantization
    if said is None or (held is not None and said in ("fp8", held.expert_format)):
        return
    holds = "no quantised weights" if held is None else f"FP8 linears and {held.expert_format.upper()} experts"
    raise FlagError(f"--quantization {said}: this checkpoint holds {holds}, and nothing is quantised here")


def _check_cache_dtype(arguments: argparse.Namespace, platform: Platform) -> None:
    dtype = arguments.dtype or ("float32" if platform == "cpu" else "bfloat16")
    if arguments.kv_cache_dtype not in (None, dtype):
        raise FlagError(
            f"--kv-cache-dtype {arguments.kv_cache_dtype}: keys and values have the dtype of activations, {dtype}; "
            f"change --dtype, or use auto"
        )


def _check_memory(share: float, platform: Platform, environment: Mapping[str, str]) -> None:
    """What weights and caches may take must leave room for activations in what JAX may allocate."""
    given = environment.get(ALLOCATOR_VARIABLE, str(ALLOCATOR_FRACTION))
    try:
        allocator = float(given)
    except ValueError:
        raise FlagError(f"the variable {ALLOCATOR_VARIABLE} must be a number, not {given!r}") from None
    if platform != "cpu" and share >= allocator:
        raise FlagError(
            f"--mem-fraction-static {share:g} leaves nothing for activations: JAX may allocate {allocator:g} of a "
            f"device's memory ({ALLOCATOR_VARIABLE})"
        )


def _context(asked: int | None, config: BackboneConfig, block: int) -> int:
    most = config.max_positions
    if asked is not None and asked > most:
        raise FlagError(f"--context-length {asked} is beyond the model's {most} (max_position_embeddings)")
    context = asked or most
    if context <= block:
        raise FlagError(f"--context-length {context} has no room for a prompt token and a block of {block}")
    return context


def _running(asked: int | None, platform: Platform, groups: int) -> int:
    default = _RUNNING_ON_CPU if platform == "cpu" else _RUNNING
    running = asked or -(-default // groups) * groups
    if running % groups:
        raise FlagError(f"--max-running-requests {running} does not divide by the {groups} data-parallel groups")
    return running


def _verify_length(arguments: argparse.Namespace, block: int, drafter: bool) -> int:
    asked = {
        "--speculative-num-draft-tokens": arguments.speculative_num_draft_tokens,
        "--speculative-dflash-block-size": arguments.speculative_dflash_block_size,
    }
    given = {flag: length for flag, length in asked.items() if length is not None}
    if len(set(given.values())) > 1:
        raise FlagError(" and ".join(f"{flag} {length}" for flag, length in given.items()) + " must be equal")
    for flag, length in given.items():
        if length > block:
            most = f"at most {block}, the block the drafter was trained on" if drafter else "1: there is no drafter"
            raise FlagError(f"{flag} {length} must be {most}")
        return length
    return block


def _power_of_two(flag: str, number: int, least: int) -> int:
    if number < least or number & (number - 1):
        below = max(least, 1 << (number.bit_length() - 1))
        raise FlagError(f"{flag} {number} must be a power of two of at least {least}, such as {below}")
    return number


def _chunk(asked: int | None, context: int) -> int:
    chunk = _power_of_two("--chunked-prefill-size", asked or MAX_CHUNK, _SMALLEST_CHUNK)
    return min(chunk, max(_SMALLEST_CHUNK, 1 << (context - 1).bit_length()))


def _total_tokens(asked: int | None, page_size: int, block: int) -> int | None:
    if asked is not None and asked < page_size + block:
        raise FlagError(f"--max-total-tokens {asked} must be at least {page_size + block}: a page and a block")
    return asked


def _snapshots(arguments: argparse.Namespace) -> int | None:
    if not arguments.disable_radix_cache:
        return arguments.swa_prefix_tails
    if arguments.swa_prefix_tails:
        raise FlagError(f"--swa-prefix-tails {arguments.swa_prefix_tails} and --disable-radix-cache: leave one out")
    return 0


def _chat_template(name: str | None) -> Path | None:
    if (path := _path(name)) is None:
        return None
    if not path.is_file():
        raise FlagError(f"--chat-template {name}: no such file; templates have no names here")
    ChatTemplate(path.read_text(encoding="utf-8"), str(path))
    return path


def _ports(arguments: argparse.Namespace, group: Group | None) -> tuple[int, int]:
    grpc = arguments.port if arguments.grpc_port is None else arguments.grpc_port
    http = arguments.http_port
    if http is None:
        http = grpc + 1 if grpc else 0
        if http > 65535:
            raise FlagError(f"the port above {grpc} is none: --http-port")
    if grpc == http != 0:
        raise FlagError(f"gRPC and HTTP cannot share port {grpc}: --http-port")
    if group is not None:
        meeting = int(group.address.rpartition(":")[2])
        for name, number in (("gRPC", grpc), ("HTTP", http)):
            if number in (meeting, meeting + 1):
                raise FlagError(f"port {number} is to be {name}'s, and processes meet at {meeting} and {meeting + 1}")
    return grpc, http


def _tls(arguments: argparse.Namespace) -> tuple[Path | None, Path | None, Path | None]:
    flags = ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")
    certificate, key, authorities = (_path(getattr(arguments, flag)) for flag in flags)
    if (certificate is None) != (key is None):
        raise FlagError("--ssl-certfile and --ssl-keyfile go together")
    if authorities is not None and certificate is None:
        raise FlagError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile")
    for path in (certificate, key, authorities):
        if path is not None:
            path.read_bytes()  # an error names the file
    if certificate is None and arguments.host not in _LOOPBACK and (arguments.api_key or arguments.admin_api_key):
        arguments.notes.append("keys travel unencrypted without --ssl-certfile, unless the network encrypts")
    return certificate, key, authorities


def _key(flag: str, key: str | None) -> str | None:
    if key is not None and not re.fullmatch(r"[!-~]+", key):
        raise FlagError(f"{flag} must be printable ASCII without spaces, and not empty")  # as gRPC metadata may be
    return key


def _collector(endpoint: str | None) -> str | None:
    """A collector's URL; without http or https it is plain, as SGLang has it."""
    if endpoint is None:
        return None
    url = endpoint if "://" in endpoint else f"http://{endpoint}"
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise FlagError(f"--otlp-traces-endpoint must be such as http://localhost:4317, not {endpoint!r}")
    return url
