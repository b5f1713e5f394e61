"""Where a model or a data set is: a local path, an installed package, or a hub id.

A download that failed is tried again where that can help, and else says in one line
why. Knows nothing of what the files hold.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from lpc_jax.errors import UserError

PACKAGE_SCHEME = "package:"
MODEL, DATA_SET = "model", "dataset"

# The hub counts requests in windows of five minutes: no wait that it asks for is longer
# and of use.
LONGEST_WAIT = 300.0

# httpx's, whose package has another name from one huggingface_hub to the next.
_HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
FAILURES = (_HTTP_ERROR, OSError)

_TIMEOUT, _RATE_LIMITED, _SERVER_ERROR = 408, 429, 500

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


class DownloadError(UserError):
    """A download failed for good; the message is for the user."""


@dataclasses.dataclass(frozen=True)
class Retry:
    """What to do when a download fails for a reason that may pass.

    Attributes:
        retries: How many more times it is tried.
        wait: Seconds before the first of them; doubled before each next.
    """

    retries: int
    wait: float


@dataclasses.dataclass(frozen=True)
class _Cause:
    """Why a download failed.

    Attributes:
        what: In words, for a sentence.
        remedy: What a user can do.
        passes: Whether the same request may succeed later.
        wait: Seconds that the hub asks for, if it does.
    """

    what: str
    remedy: str
    passes: bool = False
    wait: float | None = None


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist locally reads as ``owner/name``.

    In the hub's own letters, so that no part of it can be ``..`` or leave a folder.
    """
    if path.count("/") != 1 or exists(path):
        return False
    try:
        validate_repo_id(path)
    except hub_errors.HFValidationError:
        return False
    return True


def exists(path: str) -> bool:
    """Whether a file or folder has this name; one that no name can be has none."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, ~nobody
        return False


def _inside_package(path: str, setting: str) -> Path:
    package, _, name = path.removeprefix(PACKAGE_SCHEME).partition("/")
    parts = name.split("/")
    if not package.isidentifier() or {"", ".", ".."} & set(parts) or "\\" in name:
        raise UserError(
            f"{setting} = {path!r}: expected {PACKAGE_SCHEME}NAME/FILE, a file inside"
            " the package's own folder, got a way out of it. Name the file by its own"
            " path if you mean it."
        )
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(
            f"{setting} = {path!r} needs the Python package {package!r}, which is not"
            f" installed. Install it: pip install {package.replace('_', '-')}"
        )
    # A module that is one file has no folder of its own.
    for folder in spec.submodule_search_locations or ():
        found = Path(folder, *parts)
        if exists(str(found)):
            return found
    raise UserError(
        f"{setting} = {path!r}: the package {package!r} holds no file {name!r}."
    )


def resolve(
    path: str,
    *,
    setting: str,
    revision: str | None,
    patterns: tuple[str, ...],
    retry: Retry,
) -> Path:
    """The local file or folder that a setting names, downloaded if need be.

    Args:
        path: A local path, ``package:NAME/FILE`` or a hub model id ``owner/name``.
        setting: The setting's name in the user's words, for messages.
        revision: Branch, tag or commit of a hub id.
        patterns: Globs of the files wanted from the hub.
        retry: When a download fails.

    Raises:
        UserError: In one line, what is missing and how to get it.
    """
    if path.startswith(PACKAGE_SCHEME):
        return _inside_package(path, setting)
    if exists(path):
        return Path(path).expanduser()
    if not is_hub_id(path):
        raise UserError(
            f"{setting} = {path!r}: no such file or folder, and not a hub id of the"
            " form owner/name. Check the path."
        )

    def fetch() -> Path:
        return Path(
            huggingface_hub.snapshot_download(
                path, revision=revision, allow_patterns=list(patterns)
            )
        )

    return download(
        fetch, path, setting=setting, kind=MODEL, retry=retry, failures=FAILURES
    )


def download(
    fetch: Callable[[], T],
    path: str,
    *,
    setting: str,
    kind: str,
    retry: Retry,
    failures: tuple[type[Exception], ...],
) -> T:
    """What ``fetch`` returns, tried again where a failure may pass.

    Args:
        fetch: Downloads; what it has got whole is kept from one call to the next.
        path: The hub id.
        setting: The setting's name in the user's words, for messages.
        kind: ``MODEL`` or ``DATA_SET``.
        retry: How often, and how long to wait.
        failures: What ``fetch`` raises when it fails.

    Raises:
        DownloadError: In one line, why it failed and what can be done.
    """
    wait = retry.wait
    for left in range(retry.retries, -1, -1):
        try:
            return fetch()
        except failures as e:
            cause = _cause(e)
            if not cause.passes or not left:
                raise DownloadError(
                    _refusal(path, setting, kind, cause, retry.retries - left)
                ) from e
        pause = wait if cause.wait is None else min(cause.wait, LONGEST_WAIT)
        _LOG.warning(
            f"{setting} = {path!r}: {cause.what}. Trying again in {pause:g} s, then"
            f" {left - 1} times more."
        )
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT)
    raise AssertionError("the last try returns or raises")


def _refusal(path: str, setting: str, kind: str, cause: _Cause, retried: int) -> str:
    tries = f", tried {retried + 1} times" if retried else ""
    option, whole = (
        ("", "FOLDER")
        if kind == MODEL
        else (f" --repo-type {kind}", "with a file of it")
    )
    return (
        f"{setting} = {path!r} is not on this machine and could not be downloaded:"
        f" {cause.what}{tries}. {cause.remedy}, or get it elsewhere with: hf download"
        f" {path}{option} --local-dir FOLDER, and pass --{setting} {whole}."
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, the last first."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _cause(error: Exception) -> _Cause:
    chain = list(_chain(error))
    if any(isinstance(link, hub_errors.OfflineModeIsEnabled) for link in chain):
        return _Cause("HF_HUB_OFFLINE is set", "Unset it")
    for link in chain:
        cause = _cause_of_link(link)
        if cause is not None:
            return cause
    return _Cause(_said(error), "See to that")


def _cause_of_link(link: BaseException) -> _Cause | None:
    """What one error of a chain says; None: nothing, ask the one before."""
    # Datasets says both with one class, and drops the hub's error.
    not_found = _name(link) == "DatasetNotFoundError"
    if isinstance(link, hub_errors.GatedRepoError) or (
        not_found and "gated" in str(link)
    ):
        return _Cause(
            "it is gated", "Accept its licence on the hub and run `hf auth login`"
        )
    if isinstance(link, hub_errors.RepositoryNotFoundError) or not_found:
        return _Cause(
            "not found on the hub, or private",
            "Check the name, run `hf auth login` if it is private",
        )
    if isinstance(link, hub_errors.RevisionNotFoundError):
        return _Cause("the hub has no such revision of it", "Check the revision")
    response = getattr(link, "response", None)
    if response is not None:
        return _answered(response.status_code, dict(response.headers))
    if isinstance(link, ConnectionError | TimeoutError) or "Connect" in _name(link):
        return _Cause(
            f"the hub cannot be reached ({_said(link)})",
            "Check the network, raise --hub.retries",
            passes=True,
        )
    # An OSError with a number is this machine's, such as a full disk; huggingface_hub
    # raises one without when a file has not the length that was announced.
    if isinstance(link, _HTTP_ERROR) or (
        isinstance(link, OSError)
        and link.errno is None
        and not isinstance(link, FileNotFoundError)
    ):
        return _Cause(
            f"the download broke off ({_said(link)})",
            "Check the network, raise --hub.retries",
            passes=True,
        )
    return None


def _answered(status: int, headers: dict[str, str]) -> _Cause:
    asked = {name.lower(): value for name, value in headers.items()}.get("retry-after")
    wait = float(asked) if asked is not None and asked.strip().isdigit() else None
    if status == _RATE_LIMITED:
        return _Cause(
            f"the hub limits the rate of requests (answer {status})",
            "Wait, run `hf auth login` for a higher limit, raise --hub.retries",
            passes=True,
            wait=wait,
        )
    if status == _TIMEOUT or status >= _SERVER_ERROR:
        return _Cause(
            f"the hub fails (answer {status})",
            "Wait, raise --hub.retries",
            passes=True,
            wait=wait,
        )
    return _Cause(
        f"the hub refuses it (answer {status})",
        "Check the name and your access, run `hf auth login`",
    )


def _name(error: BaseException) -> str:
    return type(error).__name__


def _said(error: BaseException) -> str:
    """An error's kind and the first line of its words."""
    first = next(iter(str(error).splitlines()), "")
    return f"{_name(error)}: {first}" if first else _name(error)
