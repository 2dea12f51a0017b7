"""Uploads an exported folder to the hub."""

from __future__ import annotations

from pathlib import Path

from recondense.errors import UserError


def push_folder(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder to the hub; a repository that is not there is created.

    Args:
        repository: owner/name.
        private: of one that is created.

    Raises:
        UserError: the folder is gone; the hub refuses, or cannot be reached; the folder stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not folder.is_dir():
        raise UserError(f"export.push_to_hub={repository}: {folder} is no longer there; overwrite=true makes it again.")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"export.push_to_hub={repository}: {reason}. The folder is whole in {folder}: the same command uploads "
            f"it, or `hf upload {repository} {folder}`."
        ) from error
