"""A directory as a model of the hub."""

from pathlib import Path

from gptq_ao.errors import CheckpointError, ConfigError

__all__ = ["check_login", "upload"]


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
    """Upload a directory or a file, as a repository that is made if there is none. Returns its address.

    Raises:
        CheckpointError: it cannot be uploaded; the directory stays.
    """
    from huggingface_hub import HfApi

    try:
        created = HfApi().create_repo(repository, exist_ok=True)
        if directory.is_file():
            HfApi().upload_file(repo_id=repository, path_or_fileobj=directory, path_in_repo=directory.name)
        else:
            HfApi().upload_folder(repo_id=repository, folder_path=directory)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{directory} is complete, but could not be uploaded to {repository!r}: {e}") from e
    return str(created)
