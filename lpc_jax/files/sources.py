"""Where a model or a data set is: a local path, an installed package, or a hub id."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id

from lpc_jax.errors import UserError

PACKAGE_SCHEME = "package:"
MODEL, DATA_SET = "model", "dataset"
# httpx's, whose package has another name from one huggingface_hub to the next.
_HTTP_ERROR: type[Exception] = hub_errors.HfHubHTTPError.__bases__[0]
FAILURES = (_HTTP_ERROR, OSError)
# huggingface_hub goes on with files that were cut and waits out most failures itself,
# but asks for a repository once (HfApi.repo_info): these seconds are between whole
# tries. It counts requests in windows of five minutes, so a longer wait is of no use.
_PAUSES, _LONGEST_PAUSE = (2.0, 4.0, 8.0), 300.0
_TIMEOUT, _RATE_LIMITED, _SERVER_ERROR = 408, 429, 500
_LOG = logging.getLogger(__name__)
# https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
_ADDRESS = re.compile(
    r"(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/(?:datasets/)?"
    r"([\w.-]+/[\w.-]+)"
)
T = TypeVar("T")


class Cause(NamedTuple):
    """Why a download failed, and what a user can do."""

    what: str
    remedy: str
    wait: float | None = None  # seconds that the hub asks for; None if it can't pass


_GATED = Cause("it is gated", "Accept its licence on the hub and run `hf auth login`")
_ABSENT = Cause(
    "not found on the hub, or private",
    "Check the name, run `hf auth login` if it is private",
)
# What no further try can mend, the special before the general.
_FINAL = {
    hub_errors.OfflineModeIsEnabled: Cause("HF_HUB_OFFLINE is set", "Unset it"),
    hub_errors.LocalTokenNotFoundError: Cause("no token is on this machine", "Log in"),
    hub_errors.GatedRepoError: _GATED,
    hub_errors.RepositoryNotFoundError: _ABSENT,
    hub_errors.RevisionNotFoundError: Cause(
        "the hub has no such revision of it", "Check the revision"
    ),
}


def is_hub_id(path: str) -> bool:
    """Whether a path that does not exist locally reads as ``owner/name``."""
    return not exists(path) and names_repository(path)


def names_repository(path: str) -> bool:
    """Whether a text has the form ``owner/name`` that the hub takes."""
    if path.count("/") != 1:
        return False
    try:
        validate_repo_id(path)  # no part can be .. or leave a folder
    except hub_errors.HFValidationError:
        return False
    return True


def of_address(path: str) -> str:
    """What to give instead of a hub page's address; nothing for other paths."""
    matched = _ADDRESS.match(path)
    return f"Give {matched[1]!r}, its hub id." if matched else ""


def exists(path: str) -> bool:
    """Whether a file or folder has this name."""
    try:
        return Path(path).expanduser().exists()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL byte, ~nobody
        return False


def resolve(
    path: str, *, setting: str, revision: str | None, patterns: tuple[str, ...]
) -> Path:
    """The local file or folder of a path, package or hub id, downloaded if need be."""
    if path.startswith(PACKAGE_SCHEME):
        return _inside_package(path, setting)
    if exists(path):
        return Path(path).expanduser()
    if not is_hub_id(path):
        raise UserError(
            f"{setting} = {path!r}: no such file or folder, and not a hub id of the"
            f" form owner/name. {of_address(path) or 'Check the path.'}"
        )
    fetch = functools.partial(
        huggingface_hub.snapshot_download,
        path,
        revision=revision,
        allow_patterns=list(patterns),
    )
    return Path(download(fetch, path, setting=setting, kind=MODEL, failures=FAILURES))


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
        if exists(str(Path(folder, *parts))):
            return Path(folder, *parts)
    raise UserError(
        f"{setting} = {path!r}: the package {package!r} holds no file {name!r}."
    )


def download(
    fetch: Callable[[], T],
    path: str,
    *,
    setting: str,
    kind: str,
    failures: tuple[type[Exception], ...],
) -> T:
    """What ``fetch`` returns, tried again after ``failures`` that may pass.

    ``fetch`` keeps complete files from one call to the next. ``kind`` is ``MODEL`` or
    ``DATA_SET``. ``UserError`` says why it failed and what can be done.
    """
    pauses = iter(_PAUSES)
    while True:
        try:
            return fetch()
        except failures as e:
            cause, pause = cause_of(e), next(pauses, None)
            if pause is None or cause.wait is None:
                raise UserError(_refusal(path, setting, kind, cause)) from e
        pause = min(cause.wait or pause, _LONGEST_PAUSE)
        _LOG.warning(
            f"{setting} = {path!r}: {cause.what}. Trying again in {pause:g} s."
        )
        time.sleep(pause)


def _refusal(path: str, setting: str, kind: str, cause: Cause) -> str:
    tries = "" if cause.wait is None else f", tried {len(_PAUSES) + 1} times"
    option, argument = {
        MODEL: ("", "FOLDER"),
        DATA_SET: (f" --repo-type {kind}", "with a file of it"),
    }[kind]
    return (
        f"{setting} = {path!r} is not on this machine and could not be downloaded:"
        f" {cause.what}{tries}. {cause.remedy}, or get it elsewhere with: hf download"
        f" {path}{option} --local-dir FOLDER, and pass --{setting} {argument}."
    )


def cause_of(error: BaseException) -> Cause:
    """Why the hub failed: the first telling error of a chain, the last raised first."""
    chain = [error]
    while link := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(link)
    for kind, cause in _FINAL.items():
        if any(isinstance(link, kind) for link in chain):
            return cause
    causes = filter(None, map(_cause_of_link, chain))
    return next(causes, Cause(_in_words(error), "See to that"))


def _cause_of_link(link: BaseException) -> Cause | None:
    name, response = type(link).__name__, getattr(link, "response", None)
    if name == "DatasetNotFoundError":  # says both, and drops the hub's error
        return _GATED if "gated" in str(link) else _ABSENT
    if response is not None:
        return _answered(response.status_code, response.headers.get("retry-after", ""))
    if isinstance(link, ConnectionError | TimeoutError) or "Connect" in name:
        what = f"the hub cannot be reached ({_in_words(link)})"
        return Cause(what, "Check the network", wait=0)
    # An OSError with a number is this machine's, such as a full disk; huggingface_hub
    # raises one without when a file has not the length that was announced.
    local = isinstance(link, FileNotFoundError) or getattr(link, "errno", None)
    if isinstance(link, FAILURES) and not local:
        what = f"the download broke off ({_in_words(link)})"
        return Cause(what, "Check the network", wait=0)
    return None


def _answered(status: int, retry_after: str) -> Cause:
    wait = float(retry_after) if retry_after.strip().isdigit() else 0.0
    answer = f"(answer {status})"
    if status == _RATE_LIMITED:
        remedy = "Wait, or run `hf auth login` for a higher limit"
        return Cause(f"the hub limits the rate of requests {answer}", remedy, wait)
    if status == _TIMEOUT or status >= _SERVER_ERROR:
        return Cause(f"the hub fails {answer}", "Wait", wait)
    remedy = "Check the name and your access, run `hf auth login`"
    return Cause(f"the hub refuses it {answer}", remedy)


def _in_words(error: BaseException) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
