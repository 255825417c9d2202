"""Model folders that hold configurations alone, of models known by name."""

import json
from pathlib import Path

from mimo_jax.presets import PRESETS


def write_configurations(folder: Path, preset: str) -> Path:
    """`config.json`, and `dflash/config.json` where the model has a drafter."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(PRESETS[preset].backbone))
    if PRESETS[preset].drafter is not None:
        (folder / "dflash").mkdir()
        (folder / "dflash" / "config.json").write_text(json.dumps(PRESETS[preset].drafter))
    return folder
