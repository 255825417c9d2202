"""The one table of the server's flags, under SGLang's names where it has one, and what becomes of each.

Beside them stand the flags that `mimo-jax` has, too (topology, hosts, loading), which are all honoured.
"""

from mimo_jax.arguments import positive
from mimo_jax.presets import NANO
from serve.flag_kinds import (
    Flag,
    Not,
    To,
    fraction,
    honoured,
    ignored,
    mapped,
    port,
    rejected,
    seconds,
    switch,
    tokens,
    whole,
)

_OTHER_DRAFTERS = Not("speculation is by DFlash drafters alone; use DFLASH, or NONE for plain decoding")
_NO_FP8_CACHE = Not("caches have the dtype of activations; use auto")
_FIFO = To("fcfs", "requests start in the order they came; no other order is here")
_LLGUIDANCE = To("llguidance", "grammars are llguidance's, which takes the same schemas, regular expressions and EBNF")
_GATEWAY = "the text service reads the family's format by itself; for a gateway with a flag of that name it is "
_ONLY_ONE = "models are cut by --tensor-parallel-size, --ep-size and --dp-size alone"

MODEL = (
    honoured(
        "--model",
        "--model-path",
        default=str(NANO),
        metavar="DIR|REPO",
        help="checkpoint folder or, if there is no such folder, Hugging Face repository (default: the small model that "
        "comes with the package)",
    ),
    honoured("--revision", metavar="NAME", help="branch, tag or commit of the repository"),
    honoured("--download-dir", metavar="DIR", help="where repositories are kept (default: Hugging Face's cache)"),
    honoured("--tokenizer-path", metavar="DIR", help="folder of tokenizer.json (default: the model's)"),
    honoured("--served-model-name", metavar="NAME", help="what clients call it (default: --model as given)"),
    mapped(
        "--dtype",
        values={
            "auto": To(None),
            "bfloat16": To("bfloat16"),
            "float32": To("float32"),
            "float": To("float32"),
            "float16": Not("the model was made for bfloat16, whose range float16 lacks; use bfloat16"),
            "half": Not("the model was made for bfloat16, whose range float16 lacks; use bfloat16"),
        },
        help="of activations and caches (default: auto, float32 on a CPU and bfloat16 elsewhere)",
    ),
    mapped(
        "--quantization",
        values={"auto": To(None), "fp8": To("fp8"), "mxfp4": To("mxfp4")},
        help="what the checkpoint is said to hold; it is checked, and weights are never quantised here",
    ),
    mapped(
        "--load-format",
        values={
            "auto": To(None),
            "safetensors": To(None),
            "dummy": Not("`mimo-jax synthesize` writes a checkpoint with random weights, which can be served"),
        },
        help="safetensors, whichever is said",
    ),
    mapped(
        "--kv-cache-dtype",
        values={
            "auto": To(None),
            "bfloat16": To("bfloat16"),
            "bf16": To("bfloat16"),
            "fp8_e4m3": _NO_FP8_CACHE,
            "fp8_e5m2": _NO_FP8_CACHE,
        },
        help="of keys and values: what --dtype says; it is checked",
    ),
    mapped(
        "--device",
        values={"cuda": To("cuda"), "gpu": To("cuda"), "cpu": To("cpu")},
        help="default: what JAX_PLATFORMS names first, else cuda on a machine with an NVIDIA driver, else cpu",
    ),
)

SPECULATION = (
    mapped(
        "--speculative-algorithm",
        values={
            "dflash": To("DFLASH"),
            "none": To("NONE"),
            **dict.fromkeys(
                ("eagle", "eagle3", "nextn", "standalone", "ngram", "dspark", "uno", "frozen_kv_mtp"), _OTHER_DRAFTERS
            ),
        },
        help="default: DFLASH if there is a drafter",
    ),
    honoured(
        "--speculative-draft-model-path",
        "--speculative-draft-model",
        metavar="DIR|REPO",
        help="drafter's folder, repository, or folder of a repository as OWNER/REPO/FOLDER (default: dflash in the "
        "model's folder)",
    ),
    honoured(
        "--speculative-draft-model-revision", metavar="NAME", help="branch, tag or commit of the drafter's repository"
    ),
    honoured(
        "--speculative-num-draft-tokens",
        type=positive,
        metavar="N",
        help="rows that are verified a round, the anchor included, at most the drafter's block (default)",
    ),
    honoured(
        "--speculative-dflash-block-size",
        type=positive,
        metavar="N",
        help="the same; where both are given they must be equal",
    ),
)

SCHEDULING = (
    honoured(
        "--context-length",
        type=tokens,
        metavar="N",
        help="prompt and output together, as 65536, 64k (64,000), 64Ki (65,536) or 1M (default: the model's)",
    ),
    honoured(
        "--mem-fraction-static",
        type=fraction,
        default=0.8,
        metavar="X",
        help="share of a device's memory for weights and caches together; the rest is for activations (default: 0.8)",
    ),
    honoured(
        "--max-running-requests",
        type=positive,
        metavar="N",
        help="sequences decoded together, over all data-parallel groups (default: 48, on a CPU 8)",
    ),
    honoured(
        "--max-queued-requests",
        type=positive,
        metavar="N",
        help="requests that may wait; others are refused at once (default: 8 times as many as run)",
    ),
    honoured(
        "--max-total-tokens",
        type=tokens,
        metavar="N",
        help="positions in the pages of one data-parallel group (default: what --mem-fraction-static leaves)",
    ),
    honoured(
        "--swa-prefix-tails",
        type=whole(0, 2**31 - 1),
        metavar="N",
        help="snapshots of sliding windows kept for prefix hits, in one data-parallel group (default: what fits)",
    ),
    honoured("--page-size", type=positive, default=64, metavar="N", help="tokens a page, a power of two (default: 64)"),
    honoured(
        "--chunked-prefill-size",
        type=positive,
        metavar="N",
        help="prompt tokens that one step takes, a power of two (default: 512)",
    ),
    honoured(
        "--rounds-per-dispatch",
        "--num-continuous-decode-steps",
        type=positive,
        default=2,
        metavar="N",
        help="rounds the device runs before the host looks at their tokens and new requests may join (default: 2)",
    ),
    mapped(
        "--schedule-policy",
        values={
            "fcfs": To("fcfs"),
            **dict.fromkeys(("lpm", "random", "dfs-weight", "lof", "hrrn", "shortest-prefill-first"), _FIFO),
        },
        help="first come, first served",
    ),
    mapped(
        "--radix-eviction-policy",
        values={"lru": To("lru"), **dict.fromkeys(("lfu", "slru", "tlru"), To("lru", "least recently used it is"))},
        help="least recently used",
    ),
    switch("--disable-radix-cache", help="do not reuse the caches of common prefixes"),
    switch("--disable-overlap-schedule", help="plan a step only once the tokens of the step before are known"),
    honoured(
        "--random-seed",
        type=whole(0, 2**32 - 1),
        default=0,
        metavar="N",
        help="of requests that bring none, together with their id (default: 0)",
    ),
)

NETWORK = (
    honoured("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: 127.0.0.1)"),
    honoured("--port", type=port, default=30000, metavar="N", help="of gRPC; 0: any that is free (default: 30000)"),
    honoured("--grpc-port", type=port, metavar="N", help="the same, and stronger"),
    honoured(
        "--http-port",
        "--smg-http-sidecar-port",
        "--grpc-http-sidecar-port",
        type=port,
        metavar="N",
        help="of /live, /ready and /metrics (default: the one above gRPC's)",
    ),
    honoured(
        "--sampling-defaults",
        choices=("model", "openai"),
        default="model",
        help="how requests in text are sampled that say nothing about it: as generation_config.json recommends, or at "
        "temperature 1 (default: model)",
    ),
    honoured("--stream-interval", type=positive, default=1, metavar="N", help="tokens a message at least (default: 1)"),
    honoured("--api-key", metavar="KEY", help="requests must bring it as `authorization: Bearer KEY`"),
    honoured("--admin-api-key", metavar="KEY", help="flushing, draining and profiling take this one, and only it"),
    honoured("--ssl-certfile", metavar="FILE", help="certificate chain of the server, PEM; gRPC is TLS then"),
    honoured("--ssl-keyfile", metavar="FILE", help="its private key, PEM"),
    honoured("--ssl-ca-certs", metavar="FILE", help="clients must show a certificate that one of these signed"),
)

TEXT = (
    honoured("--chat-template", metavar="FILE", help="Jinja file (default: the checkpoint's, else the family's)"),
    mapped(
        "--grammar-backend",
        values={"llguidance": To("llguidance"), "none": To("none"), "xgrammar": _LLGUIDANCE, "outlines": _LLGUIDANCE},
        default="llguidance",
        help="for JSON schemas, regular expressions and grammars; none: requests with one are refused (default: "
        "llguidance)",
    ),
    mapped(
        "--reasoning-parser",
        values=dict.fromkeys(("auto", "mimo", "qwen3"), To("qwen3", f"{_GATEWAY}qwen3")),
        help="reported to gateways, which parse by themselves",
    ),
    mapped(
        "--tool-call-parser",
        values=dict.fromkeys(("auto", "mimo", "qwen_xml"), To("qwen_xml", f"{_GATEWAY}qwen_xml")),
        help="reported to gateways, which parse by themselves",
    ),
)

LIFE = (
    switch("--dry-run", help="print the resolved configuration as JSON and end; reads no weights"),
    switch("--disable-precompile", help="report ready before programs are compiled; first requests wait for them"),
    honoured(
        "--watchdog-timeout",
        type=seconds,
        default=300.0,
        metavar="S",
        help="seconds without a finished step, while there is work, after which the server counts as stalled "
        "(default: 300)",
    ),
    honoured(
        "--max-request-seconds",
        type=seconds,
        default=3600.0,
        metavar="S",
        help="a request is ended after so long, with what it has (default: 3600)",
    ),
    honoured(
        "--drain-timeout",
        type=seconds,
        default=60.0,
        metavar="S",
        help="on SIGTERM, seconds for requests to finish (default: 60)",
    ),
    honoured(
        "--log-level",
        choices=("debug", "info", "warning", "error", "critical"),
        default="info",
        help="default: info; debug also shows tracebacks",
    ),
    honoured(
        "--log-format",
        "--log-requests-format",
        choices=("text", "json"),
        default="text",
        help="of all lines; json: one object a line (default: text)",
    ),
    switch("--log-requests", help="log prompts and outputs, too; that a request came and how it ended always is"),
    honoured(
        "--otlp-traces-endpoint",
        metavar="URL",
        help="collector of OpenTelemetry spans by gRPC, such as http://localhost:4317 (default: no spans)",
    ),
    honoured(
        "--metrics-prefix",
        choices=("mimo:", "sglang:"),
        default="mimo:",
        help="of Prometheus metrics; sglang: fits dashboards made for SGLang (default: mimo:)",
    ),
)

PARALLEL = (
    honoured(
        "--attn-dp-size",
        "--attention-data-parallel-size",
        type=positive,
        metavar="N",
        help="the same as --data-parallel-size N --enable-dp-attention",
    ),
)

ANSWERED: tuple[Flag, ...] = (
    ignored("--trust-remote-code", why="no code comes from a checkpoint"),
    ignored("--smg-grpc-mode", "--grpc-mode", why="gRPC is what this server speaks"),
    ignored("--enable-metrics", why="metrics are always served"),
    ignored("--enable-trace", why="spans are sent if --otlp-traces-endpoint says where"),
    ignored("--enable-cache-report", why="cached prompt tokens are always reported"),
    ignored("--enable-deterministic-inference", why="samples always depend on seed and position alone"),
    ignored("--speculative-use-rejection-sampling", why="verification is exact already"),
    ignored("--skip-tokenizer-init", why="requests may always bring token ids"),
    ignored("--skip-server-warmup", why="the server answers no request of its own to warm up"),
    ignored("--max-prefill-tokens", "--prefill-max-requests", why="--chunked-prefill-size bounds a step's prompts"),
    ignored("--schedule-conservativeness", why="requests that run out of pages are put back and lose no work"),
    ignored("--swa-full-tokens-ratio", why="sliding windows live in rings of their own; --swa-prefix-tails sets more"),
    ignored("--nccl-port", why="processes meet at --dist-init-addr and the port above it"),
    ignored("--attention-backend", why="attention is compiled for the device; there is none to choose"),
    ignored("--prefill-attention-backend", "--decode-attention-backend", why="as for --attention-backend"),
    ignored("--speculative-attention-mode", "--speculative-draft-attention-backend", why="as for --attention-backend"),
    ignored("--sampling-backend", why="sampling is compiled with the rest of a round"),
    ignored("--moe-runner-backend", "--moe-a2a-backend", "--speculative-moe-*", why="the number of rows decides"),
    ignored("--speculative-num-steps", "--speculative-eagle-topk", why="a DFlash drafter fills its block in one step"),
    ignored(
        "--cuda-graph-*",
        "--disable-cuda-graph*",
        "--disable-prefill-cuda-graph",
        "--disable-decode-cuda-graph",
        "--enable-torch-compile*",
        "--torch-compile-*",
        why="programs are compiled by XLA, before the server reports ready",
    ),
    ignored(
        "--flashinfer-*",
        "--disable-flashinfer-*",
        "--enable-flashinfer-*",
        "--triton-*",
        "--fp8-gemm-*",
        "--fp4-gemm-*",
        "--bf16-gemm-*",
        "--deepep-*",
        "--enable-mixed-chunk",
        why="there is one implementation of each operation here",
    ),
    ignored(
        "--enable-nccl-nvls",
        "--disable-custom-all-reduce",
        "--enable-mscclpp",
        "--enable-symm-mem",
        why="collectives are XLA's; NCCL's variables set them",
    ),
    ignored(
        "--tokenizer-mode",
        "--tokenizer-backend",
        "--tokenizer-worker-num",
        "--detokenizer-worker-num",
        why="text is encoded and decoded in the server's process",
    ),
    ignored(
        "--log-level-http",
        "--log-requests-level",
        "--log-requests-target",
        "--decode-log-interval",
        why="--log-level and --log-requests say what is logged",
    ),
    ignored("--fastapi-root-path", "--enable-http2", "--http2-*", why="HTTP has only /live, /ready and /metrics"),
    rejected(
        "--pipeline-parallel-size",
        "--pp-size",
        "--pp-*",
        "--attn-cp-size",
        "--attention-context-parallel-size",
        "--decode-context-parallel-size",
        "--dcp-*",
        "--moe-dp-size",
        "--moe-data-parallel-size",
        why=_ONLY_ONE,
    ),
    rejected("--enable-lora*", "--lora-*", "--max-lora*", why="there are no LoRA adapters"),
    rejected("--is-embedding", why="models here generate text"),
    rejected(
        "--enable-multimodal", "--mm-*", "--limit-mm-*", "--encoder-*", "--language-only", why="prompts are text alone"
    ),
    rejected("--disaggregation-*", "--enable-pd-*", why="prefill and decode run in one server"),
    rejected(
        "--enable-hierarchical-cache",
        "--enable-hicache",
        "--hicache-*",
        "--enable-lmcache",
        "--enable-flexkv",
        "--cpu-offload-gb",
        "--offload-*",
        why="weights and caches stay in device memory",
    ),
    rejected("--enable-eplb", "--eplb-*", "--ep-num-redundant-experts", why="experts stay where they were placed"),
    rejected("--speculative-accept-threshold-*", why="drafts are never accepted by less than the model's own choice"),
    rejected("--speculative-ngram-*", "--speculative-dspark-*", "--uno-*", why=_OTHER_DRAFTERS.reason),
    rejected("--enable-priority-scheduling", "--priority-*", why="requests start in the order they came"),
    rejected("--json-model-override-args", why="a model is what its config.json says; edit a copy of that"),
    rejected("--ssl-keyfile-password", why="gRPC takes unencrypted keys only; decrypt the file"),
    rejected("--enable-ssl-refresh", why="certificates are read once; start anew for others"),
    rejected("--base-gpu-id", "--gpu-id-step", why="CUDA_VISIBLE_DEVICES says which devices a process has"),
    rejected("--use-ray", why="the same command runs on every node; see --dist-init-addr"),
    rejected("--config", why="flags are given on the command line"),
)

TABLE: dict[str, tuple[Flag, ...]] = {
    "model": MODEL,
    "speculative decoding": SPECULATION,
    "batches, memory and caches": SCHEDULING,
    "network": NETWORK,
    "text": TEXT,
    "life of the server": LIFE,
    "data-parallel attention": PARALLEL,
}
"""Flags with an effect, by the title their help stands under."""
