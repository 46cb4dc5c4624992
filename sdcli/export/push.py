"""A folder uploaded to the Hugging Face hub."""

from __future__ import annotations

import logging
from pathlib import Path

from sdcli.errors import UserError
from sdcli.hub import quiet

_LOG = logging.getLogger(__name__)


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Uploads the folder, creating the repository where it does not exist; returns its address.

    Raises UserError where the hub does not answer, or does not let this user write. The folder stays.
    """
    from huggingface_hub import HfApi, constants

    _LOG.info("uploading %s to %s", folder, repository)
    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        with quiet():
            api = HfApi()
            created = api.create_repo(repository, private=private, exist_ok=True)
            api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message="Upload a model with sdcli")
    except Exception as error:  # which HTTP library is behind it, and what that raises, changes from release to release
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise UserError(
            f"'{repository}' was not uploaded: {reason}",
            "a connection, a token that may write (hf auth login), and a repository of yours",
            f"the folder is complete: hf upload {repository} {folder}",
        ) from None
    return str(created)
