"""Where a model and its drafter lie: a folder here, or a repository of the Hugging Face Hub, fetched if need be."""

import re
from pathlib import Path

from mimo_jax.config import ConfigError, drafter_folder

CONFIGURATIONS = ["*.json", "*.jinja"]
"""What a repository is asked for where no weights are wanted."""


def model_folder(
    name: str, revision: str | None = None, download_dir: Path | None = None, *, weights: bool = True
) -> Path:
    """The folder that a person means by `name`.

    Args:
        name: A folder, else REPO, OWNER/REPO or OWNER/REPO/FOLDER.
        revision: Of the repository; default: its main branch.
        download_dir: Where repositories are kept; default: Hugging Face's cache.
        weights: Whether all files are needed, or only configurations.

    Raises:
        ConfigError: There is no such folder, and no such repository that can be had.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", name):
        raise ConfigError(f"{name}: no such folder, and no name of a Hugging Face repository (OWNER/REPO)")
    parts = name.split("/")
    repository, inner = "/".join(parts[:2]), "/".join(parts[2:])
    return _fetched(repository, revision, download_dir, weights, inner) / inner


def drafter_of(
    name: str | None,
    model_name: str,
    model: Path,
    revision: str | None = None,
    download_dir: Path | None = None,
    *,
    weights: bool = True,
) -> Path | None:
    """The folder of a model's drafter, if it has one.

    Args:
        name: As for `model_folder`, or a folder in the model's repository, as MODEL/FOLDER; None: the model's own.
        model_name: What the person calls the model.
        model: Its folder.
        revision: Of the drafter's repository.
        download_dir: As for `model_folder`.
        weights: As for `model_folder`.

    Raises:
        ConfigError: A drafter is named that cannot be had.
    """
    if name is None:
        return drafter_folder(model)
    inside = name.removeprefix(f"{model_name.rstrip('/')}/")
    if inside != name and not Path(name).expanduser().is_dir():
        if not (model / inside).is_dir():
            raise ConfigError(f"{name}: the model's folder {model} has no folder {inside}")
        return model / inside
    return model_folder(name, revision, download_dir, weights=weights)


def _fetched(repository: str, revision: str | None, download_dir: Path | None, weights: bool, inner: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # takes a while, and most models are here already
    except ImportError:
        raise ConfigError(
            f"{repository}: no such folder; to fetch it from the Hugging Face Hub: pip install 'mimo-jax[serve]'"
        ) from None
    wanted = ["*"] if weights else CONFIGURATIONS
    try:
        # goes on where an earlier try was cut off
        found = snapshot_download(
            repository,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=[f"{inner}/{pattern}" for pattern in wanted] if inner else wanted,
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{repository}: no such folder, and the Hugging Face Hub did not give a repository of that name: {reason}"
        ) from error
    return Path(str(found))
