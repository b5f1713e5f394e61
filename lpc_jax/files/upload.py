"""Uploads a folder to the hub, and asks before whether that will be allowed."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub

from lpc_jax.errors import UserError
from lpc_jax.files import sources


def require_access(repository: str, *, setting: str, private: bool = False) -> None:
    """Refuses what no login may write to, or, where ``private``, what stays public."""
    if not sources.names_repository(repository):
        raise UserError(
            f"{setting} must be owner/name on the hub, got {repository!r}. Name one."
        )
    api = huggingface_hub.HfApi()
    try:
        account = api.whoami()
        is_there = private and api.repo_exists(repository)
        is_public = is_there and not api.model_info(repository).private
    except sources.FAILURES as error:
        cause = sources.cause_of(error)
        raise UserError(
            f"{setting} {repository} needs a login on the hub, which failed:"
            f" {cause.what}. Run `hf auth login` or set HF_TOKEN."
        ) from error
    owners = [account["name"], *(org["name"] for org in account.get("orgs", ()))]
    owner, problem = repository.partition("/")[0], None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        problem = (
            "needs a token that may write, got one that may read. Make one on the hub"
            " and run `hf auth login`."
        )
    elif is_public:
        problem = (
            "must be new or private, got one that is public. Name another, or make it"
            " private on the hub."
        )
    elif owner not in owners:
        problem = (
            f"must be of {', '.join(owners)}, who are logged in, got {owner}. Name one,"
            f" or log in as {owner}."
        )
    if problem is not None:
        raise UserError(f"{setting} {repository} {problem}")


def push(folder: Path, repository: str, *, private: bool, setting: str) -> str:
    """Makes the repository if need be and uploads a folder; returns the commit's URL.

    Raises:
        UserError: The hub refuses or fails; the folder is whole and can be sent again.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder)
    except sources.FAILURES as error:
        cause = sources.cause_of(error)
        raise UserError(
            f"{setting} {repository}: {cause.what}. {folder} is whole: {cause.remedy},"
            f" and send it with: hf upload {repository} {folder}"
        ) from error
    return commit.commit_url
