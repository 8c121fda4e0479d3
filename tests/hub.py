"""A stand-in for the Hugging Face hub on this machine: repositories in memory, and as much of the hub's interface as
its client asks for."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api

Files = dict[str, bytes]


@dataclass
class Repository:
    """Its files by branch, in the order of commits; who has the `token` reads a private one."""

    branches: dict[str, Files] = field(default_factory=lambda: {"main": {}})
    token: str | None = None
    is_private: bool = False
    messages: list[str] = field(default_factory=list)

    def commit_of(self, revision: str) -> str:
        return hashlib.sha1(repr(sorted(self.branches[revision].items())).encode()).hexdigest()

    def branch_of(self, revision: str) -> str | None:
        if revision in self.branches:
            return revision
        return next((name for name in self.branches if self.commit_of(name) == revision), None)


@dataclass
class LocalHub:
    """The repositories by id; a test puts files there, or finds those that were uploaded."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def add(self, repo_id: str, folder: Path, *, revision: str = "main", token: str | None = None) -> None:
        """Puts the files of a folder into a repository."""
        repository = self.repositories.setdefault(repo_id, Repository(token=token, is_private=token is not None))
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        repository.branches[revision] = files

    def files(self, repo_id: str, revision: str = "main") -> Files:
        return self.repositories[repo_id].branches[revision]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._get()

    def do_GET(self) -> None:
        self._get()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.requests.append(f"POST {'/'.join(path)}")
        match path:
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, "branch", branch]:
                repository = self._repository(f"{owner}/{name}")
                if repository is None:
                    return
                is_new = branch not in repository.branches
                repository.branches.setdefault(branch, dict(repository.branches["main"]))
                self._json({} if is_new else {"error": "Reference already exists"}, 200 if is_new else 409)
            case ["api", "models", owner, name, "preupload", _]:
                if self._repository(f"{owner}/{name}") is not None:
                    files = json.loads(body)["files"]
                    regular = {"uploadMode": "regular", "shouldIgnore": False}
                    self._json({"files": [{"path": file["path"], **regular} for file in files]})
            case ["api", "models", owner, name, "commit", branch]:
                self._commit(f"{owner}/{name}", branch, [json.loads(line) for line in body.splitlines() if line])
            case _:
                self._json({"error": "no such address"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        repo_id = f"{asked.get('organization') or 'someone'}/{asked['name']}"
        is_new = repo_id not in self.hub.repositories
        if is_new:
            is_private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.hub.repositories[repo_id] = Repository(token=self._token(), is_private=is_private)
        answer = {"url": f"http://{self.headers['Host']}/{repo_id}", "id": repo_id, "name": repo_id}
        if is_new:
            self._json(answer)
        else:
            self._json({**answer, "error": "You already created this model repo"}, 409)

    def _commit(self, repo_id: str, branch: str, lines: list[dict[str, Any]]) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        files = dict(repository.branches[branch])
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "header":
                    repository.messages.append(value["summary"])
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "deletedFile":
                    files.pop(value["path"], None)
        repository.branches[branch] = files
        commit = repository.commit_of(branch)
        address = f"http://{self.headers['Host']}/{repo_id}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": address, "hookOutput": ""})

    def _get(self) -> None:
        path = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.requests.append(f"{self.command} {'/'.join(path)}")
        match path:
            case ["api", "models", owner, name, *rest]:
                self._describe(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *file]:
                self._resolve(f"{owner}/{name}", revision, "/".join(file))
            case _:
                self._json({"error": "no such address"}, 404)

    def _describe(self, repo_id: str, rest: list[str]) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        branch = repository.branch_of(rest[1] if len(rest) > 1 else "main")
        if branch is None:
            self._json({"error": "Invalid rev id"}, 404, code="RevisionNotFound")
            return
        files = repository.branches[branch]
        if rest and rest[0] == "tree":
            entries = [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()]
            self._json(entries)
        else:
            siblings = [{"rfilename": path} for path in files]
            commit = repository.commit_of(branch)
            self._json({"id": repo_id, "sha": commit, "siblings": siblings, "private": repository.is_private})

    def _resolve(self, repo_id: str, revision: str, file: str) -> None:
        repository = self._repository(repo_id)
        if repository is None:
            return
        branch = repository.branch_of(revision)
        if branch is None:
            self._json({"error": "Invalid rev id"}, 404, code="RevisionNotFound")
            return
        commit = repository.commit_of(branch)
        if file not in repository.branches[branch]:
            self._json({"error": "Entry not found"}, 404, code="EntryNotFound", commit=commit)
            return
        data = repository.branches[branch][file]
        self._send(data, "application/octet-stream", 200, {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'})

    def _repository(self, repo_id: str) -> Repository | None:
        """The repository, if it is there and the caller may see it."""
        found = self.hub.repositories.get(repo_id)
        if found is None or (found.is_private and self._token() != found.token):
            self._json({"error": "Repository not found"}, 404 if self._token() else 401, code="RepoNotFound")
            return None
        return found

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _json(self, data: Any, status: int = 200, *, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        headers |= {"X-Repo-Commit": commit} if commit else {}
        self._send(json.dumps(data).encode(), "application/json", status, headers)

    def _send(self, data: bytes, kind: str, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def local_hub(cache: Path) -> Iterator[LocalHub]:
    """Runs a stand-in for the hub, which the hub's client talks to meanwhile, with a cache of its own."""
    hub = LocalHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", address)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        # These clients remember the address that they began with.
        patch.setattr(hf_api.api, "endpoint", address)
        patch.setattr("transformers.utils.hub._hf_api", None, raising=False)
        try:
            yield hub
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
