"""The test bench itself: devices, promotion, golden folders."""

import hashlib

import jax
import jax.numpy as jnp
import pytest

from tests.conftest import DEVICE_COUNT, golden_folders, golden_id, golden_roots


def test_eight_cpu_devices():
    assert [d.platform for d in jax.devices()] == ["cpu"] * DEVICE_COUNT


def test_promotion_is_strict():
    with pytest.raises(Exception, match="strict"):
        _ = jnp.zeros(2, jnp.float32) + jnp.zeros(2, jnp.bfloat16)


@pytest.mark.parametrize("root", golden_roots(), ids=lambda r: golden_id(r / "root"))
def test_golden_files_are_whole(root):
    lines = (root / "SHA256SUMS").read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((root / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize(
    "kind",
    [
        "backbone_tiny_bf16",
        "backbone_tiny_f32",
        "backbone_tiny_fused_qkv",
        "backbone_tiny_mxfp4",
        "dflash_tiny",
        "mxfp4_codec",
        "router_cases",
        "verify_sampling",
    ],
)
def test_repository_holds_every_kind_of_golden(golden_dir, kind):
    assert (golden_dir / kind / "README.txt").is_file()
    assert len({folder.name for folder in golden_folders(kind)}) == len(golden_folders(kind))  # none is run twice


def test_golden_copy_stays_small(golden_dir):
    assert sum(path.stat().st_size for path in golden_dir.rglob("*") if path.is_file()) <= 20_000_000
