"""Upload an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from recondense.errors import UserError


def push_folder(folder: Path, repository: str, private: bool) -> None:
    """Upload a folder to the hub.

    Args:
        folder: the exported folder; it is not changed.
        repository: owner/name; created if it does not exist.
        private: whether a repository that is created is private.

    Raises:
        UserError: the folder does not exist, or the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if not folder.is_dir():
        text = f"{folder} no longer exists; run again with overwrite=true to export it again."
        raise UserError(f"export.push_to_hub={repository}: {text}")
    try:
        api = HfApi()
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"export.push_to_hub={repository}: {reason}. The export is in {folder}. To upload it, run the same command "
            f"again, or `hf upload {repository} {folder}`."
        ) from error
