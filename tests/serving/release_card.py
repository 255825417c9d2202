"""The release card's SGLang command, word for word, as a shell would hand it to a server on one of two nodes."""

import shlex
from string import Template

COMMAND = r"""
python3 -m sglang.launch_server \
--model MiMo-V2.5-Pro-FP4-DFlash \
--speculative-algorithm DFLASH \
--speculative-draft-model-path MiMo-V2.5-Pro-FP4-DFlash/dflash \
--speculative-num-draft-tokens 8 \
--ep-size 16 \
--tensor-parallel-size 16 \
--data-parallel-size 2 \
--enable-dp-attention \
--enable-dp-lm-head \
--quantization fp8 \
--attention-backend fa3 \
--moe-dense-tp-size 1 \
--dtype bfloat16 \
--mem-fraction-static 0.65 \
--context-length 65536 \
--page-size 1 \
--trust-remote-code \
--disable-overlap-schedule \
--skip-server-warmup \
--dist-init-addr ${MASTER_ADDR}:20000 \
--nnodes ${WORLD_SIZE} \
--node-rank ${RANK} \
--host 0.0.0.0 \
--port 29999
"""


def flags(rank: int) -> list[str]:
    """What follows the module's name."""
    said = Template(COMMAND).substitute(MASTER_ADDR="10.0.0.1", WORLD_SIZE="2", RANK=str(rank))
    words = shlex.split(said.replace("\\\n", ""))
    assert words[:3] == ["python3", "-m", "sglang.launch_server"]
    return words[3:]
