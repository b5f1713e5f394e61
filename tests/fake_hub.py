"""A hub of one machine: what huggingface_hub and datasets ask of one, and its faults.

Serves folders under ids over loopback, as the real one does: model info, the tree of
files, and each file by HEAD and GET with ETag, commit, length and ranges. Takes
uploads of whom ``TOKEN`` names, who writes for himself and for his team.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMMIT = "a" * 40
TOKEN, ACCOUNT = "hf_abc", {"name": "someone", "orgs": [{"name": "team"}]}
READER = "hf_read"  # a token of the same account that may not write
# For what is no download, or must not be tried again.
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(/.*)?")
_FILE = re.compile(r"(/datasets)?/([^/]+/[^/]+)/resolve/[^/]+/(.+)")


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked: the method, the path, and the first byte wanted."""

    method: str
    path: str
    first: int


@dataclasses.dataclass
class Fault:
    """What goes wrong with a repository.

    Attributes:
        on: A part of the paths that it is about.
        times: How many requests it spoils.
        status: An answer instead, or None: the connection is cut.
        headers: Of that answer.
        after: Bytes of the whole file that are sent before the cut.
    """

    on: str
    times: int
    status: int | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    after: int = 0


@dataclasses.dataclass
class Hub:
    """A running hub: where it is, what it was asked, what it serves and spoils."""

    endpoint: str
    folders: Mapping[str, Path]
    faults: Mapping[str, Fault]
    requests: list[Request]
    # By repository and path.
    uploads: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    def asked(self, name: str, method: str = "GET") -> list[Request]:
        """Requests whose path holds a name."""
        return [r for r in self.requests if name in r.path and r.method == method]


@contextmanager
def serve(folders: Mapping[str, Path], faults: Mapping[str, Fault]) -> Iterator[Hub]:
    """A hub for as long as the block runs.

    Args:
        folders: What each id holds.
        faults: What goes wrong with an id.
    """
    hub = Hub("", folders, faults, [])
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(first[1]) if first else 0
        self.hub.requests.append(Request(self.command, path, start))
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        name = (api or file or [path] * 3)[2]
        fault = self.hub.faults.get(name)
        spoils = fault is not None and fault.times > 0 and fault.on in path
        if (
            fault is not None
            and spoils
            and not (fault.status is None and self.command == "HEAD")
        ):
            fault.times -= 1
            if fault.status is not None:
                self._send(fault.status, b"{}", fault.headers)
                return
            if api:
                self.close_connection = True  # before a word
                return
        else:
            fault = None
        folder = self.hub.folders.get(name)
        if fault is None and self._upload(path, name):
            return
        if folder is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif api:
            self._api(name, folder, api[3] or "")
        elif file and (folder / file[3]).is_file():
            self._file(folder / file[3], start, None if fault is None else fault.after)
        else:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}
            self._send(404, b"{}", headers)

    def _upload(self, path: str, name: str) -> bool:
        """Answers what belongs to an upload; whether it did."""
        reply: Any = {}
        match path.rpartition("/api")[2].split("/")[1:]:
            case ["whoami-v2"]:
                token = self.headers.get("Authorization", "").removeprefix("Bearer ")
                if token not in (TOKEN, READER):
                    self._send(401, b"{}", {})
                    return True
                role = "read" if token == READER else "write"
                reply = ACCOUNT | {"auth": {"accessToken": {"role": role}}}
            case ["validate-yaml"]:
                reply = {"errors": [], "warnings": []}
            case ["repos", "create"]:
                asked = json.loads(self._body)
                name = f"{asked.get('organization') or ACCOUNT['name']}/{asked['name']}"
                self.hub.uploads.setdefault(name, {})
                reply = {"url": f"{self.hub.endpoint}/{name}"}
            case ["models", _, _, "preupload", _]:
                files = json.loads(self._body)["files"]
                mode = {"uploadMode": "regular", "shouldIgnore": False}
                reply = {"files": [{"path": file["path"]} | mode for file in files]}
            case ["models", _, _, "commit", _]:
                for line in map(json.loads, self._body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        self.hub.uploads[name][line["value"]["path"]] = content
                url = f"{self.hub.endpoint}/{name}/commit/{COMMIT}"
                reply = {"success": True, "commitOid": COMMIT, "commitUrl": url}
            case _:
                return False
        self._send(200, json.dumps(reply).encode(), {})
        return True

    def _api(self, name: str, folder: Path, rest: str) -> None:
        files = sorted(f for f in folder.rglob("*") if f.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        entries = [
            {
                "type": "file",
                "path": path,
                "size": file.stat().st_size,
                "oid": _tag(file),
            }
            for path, file in zip(names, files, strict=True)
        ]
        if rest.startswith("/tree/"):
            _, _, _, *inside = rest.split("/")
            found: Any = entries if not inside else []
        elif rest.startswith("/paths-info/"):
            found = entries
        else:
            siblings = [{"rfilename": path} for path in names]
            found = {"id": name, "sha": COMMIT, "siblings": siblings}
        self._send(200, json.dumps(found).encode(), {})

    def _file(self, file: Path, start: int, cut: int | None) -> None:
        whole = file.read_bytes()
        headers = {
            "ETag": f'"{_tag(file)}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        rest = whole[start:]
        self._send(206 if start else 200, rest, headers, cut and max(cut - start, 0))

    def _send(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        self.close_connection = cut is not None


def _tag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest()
