"""The hub: a model as a directory, and a directory as a model."""

from pathlib import Path

from gptq_ao.errors import CheckpointError, ConfigError

__all__ = ["check_login", "local_directory", "upload"]

# Weights in formats that are never read here: pickles, and those of other frameworks.
_OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.ot", "*.onnx*", "*.gguf", "*.tflite"]


def local_directory(source: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Path:
    """A directory itself; of a hub id, its snapshot in the cache, where what is not there is fetched: all files but
    weights that are never read.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(source, revision=revision, cache_dir=cache_dir, ignore_patterns=_OTHER_WEIGHTS)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{source!r} is neither a directory nor a model of the hub that can be read: {e}") from e
    return Path(found)


def check_login() -> None:
    """
    Raises:
        ConfigError: the hub knows nobody here, so nothing could be uploaded.
    """
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except (OSError, ValueError) as e:
        raise ConfigError(f"--push-to-hub: not logged in, call `hf auth login` first: {e}") from e


def upload(directory: Path, repository: str) -> str:
    """Upload a directory, as a repository that is made if there is none. Returns its address.

    Raises:
        CheckpointError: it cannot be uploaded; the directory stays.
    """
    from huggingface_hub import HfApi

    try:
        created = HfApi().create_repo(repository, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=directory)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{directory} is complete, but could not be uploaded to {repository!r}: {e}") from e
    return str(created)
