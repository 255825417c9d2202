"""Blocks trained on cut sequences, as `mimo-jax bench signals` times them."""

import json

import pytest

from mimo_jax.cli import main
from mimo_jax.evaluation import signals
from mimo_jax.presets import PRESETS


@pytest.mark.slow
def test_every_case_is_timed_and_its_bytes_counted(tmp_path, capsys, monkeypatch):
    """Window of context there and gradients back; nothing but sums and gradients where edges are skipped."""
    monkeypatch.setattr(signals, "DEVICES", (1, 2))
    monkeypatch.setattr(signals, "MOST", 2)
    out, picture = tmp_path / "signals.json", tmp_path / "signals.png"
    asked = ("--length", "512", "--anchors", "16", "--runs", "1", "--json", str(out), "--picture", str(picture))
    assert main(["bench", "signals", *asked]) == 0
    assert "anchors/s" in capsys.readouterr().out
    assert picture.stat().st_size > 1000
    found = json.loads(out.read_text())["signals"]
    assert [(r["scaling"], r["devices"], r["length"], r["anchors"]) for r in found if r["edges"] == "skip"] == [
        ("weak", 1, 256, 8),
        ("weak", 2, 512, 16),
        ("strong", 1, 512, 16),
        ("strong", 2, 512, 16),
    ]
    drafter = PRESETS["tiny"].configs()[1]
    assert drafter is not None
    attention = drafter.attention
    assert attention.visible_keys is not None
    position = drafter.num_layers * attention.kv_heads * (attention.qk_dim + attention.v_dim) * 4
    for r in found:
        window = (attention.visible_keys - 1) * position if r["devices"] > 1 and r["edges"] == "exchange" else 0
        assert r["context_bytes"] == 2 * window
        assert (r["sums_bytes"] > 0) == (r["gradient_bytes"] > 0) == (r["devices"] > 1)
        assert r["anchors_per_second"] > 0


def test_sequences_that_are_too_short(capsys):
    for asked, said in (
        (("--length", "1001"), "length 1001 and anchors 512 must both be multiples of 8"),
        (("--length", "1024"), "parts have 128 positions, of 136 at least"),
        (("--preset", "mimo-v2-flash"), "has no drafter"),
    ):
        assert main(["bench", "signals", *asked]) == 2
        assert said in capsys.readouterr().err
