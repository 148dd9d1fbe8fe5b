"""A stand-in for the hub on loopback that imitates the paths, responses and error codes of its API."""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

from tests.extract.fetch.loopback import running

Files = dict[str, bytes]


@dataclass
class Model:
    """The files of each commit of a model, and the commits that branches and tags name."""

    commits: dict[str, Files] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def push(self, files: Files, *refs: str) -> str:
        """Add a commit, point `refs` to it and return its name."""
        commit = hashlib.sha1(b"".join(name.encode() + content for name, content in files.items())).hexdigest()
        self.commits[commit] = files
        self.refs |= dict.fromkeys(refs, commit)
        return commit


class HubServer(ThreadingHTTPServer):
    """Serves `models` by name, keeps the paths that were `asked` for, and answers `broken` to all if that is set."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: dict[str, Model] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.broken: int | None = None

    @property
    def link(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        pass  # a client that went away


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").split("/")[1:]
        if self.server.broken is not None:
            self._send(self.server.broken, b"")
        elif len(parts) < 2:
            self._send(200, b"")
        elif (name := "/".join(parts[:2])) not in self.server.models:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif name in self.server.gated:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        else:
            model, (kind, revision, *rest) = self.server.models[name], parts[2:] or ["revision", "main"]
            commit = model.refs.get(unquote(revision), revision)
            if commit not in model.commits:
                self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif api:
                self._send(200, json.dumps(_described(name, commit, model.commits[commit], kind)).encode())
            else:
                content = model.commits[commit]["/".join(rest)]
                headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
                self._send(200, content, headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _described(name: str, commit: str, files: Files, kind: str) -> object:
    if kind == "tree":
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
    return {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in files]}


def serving_hub() -> AbstractContextManager[HubServer]:
    """A running server."""
    return running(HubServer())
