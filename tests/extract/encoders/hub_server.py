"""A stand-in for the hub on loopback that imitates the paths, responses and error codes of its API."""

import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from tests.extract.fetch.loopback import Answer, AnsweringServer, running

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


class HubServer(AnsweringServer):
    """Serves `models` by name, keeps the paths that were `asked` for, and answers `broken` to all if that is set."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.models: dict[str, Model] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.broken: int | None = None

    def _answer(self, request: BaseHTTPRequestHandler) -> Answer:
        path = urlsplit(request.path).path
        self.asked.append(f"{request.command} {path}")
        api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models").split("/")[1:]
        if self.broken is not None:
            return self.broken, b"", {}
        if len(parts) < 2:
            return 200, b"", {}
        if (name := "/".join(parts[:2])) not in self.models:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if name in self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        model, (kind, revision, *rest) = self.models[name], parts[2:] or ["revision", "main"]
        commit = model.refs.get(unquote(revision), revision)
        if commit not in model.commits:
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if api:
            return 200, json.dumps(_described(name, commit, model.commits[commit], kind)).encode(), {}
        content = model.commits[commit]["/".join(rest)]
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}


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
