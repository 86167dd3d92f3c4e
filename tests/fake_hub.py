"""A small Hugging Face hub on this machine, for tests: repositories with commits, LFS, branches and downloads; and every way to fail.

It speaks what `huggingface_hub` speaks, and keeps what it was told: `commits` (of each repository, what each commit says and holds) and
`requests`. `faults` lets it answer wrongly: {part of a path: a status, or "hang"}.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
import types
import urllib.parse
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest
import yaml

TOKEN = "hf_" + "FakeTokenOfTests" * 2
LFS_FROM = 5_000
"""Bytes from which a file is uploaded by LFS."""


class Hub:
    """What the server holds."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        """By name, of each branch and commit the files."""
        self.commits: dict[str, list[dict[str, Any]]] = {}
        self.private: dict[str, bool] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: dict[str, Any] = {}
        self.released = threading.Event()
        """Set at the end, so that no request hangs on."""
        self.address = ""

    def put(self, name: str, files: dict[str, bytes], branch: str = "main", deleted: Sequence[str] = ()) -> str:
        """Commit files to a repository, and remove others; returned is the commit."""
        branches = self.repositories.setdefault(name, {"main": {}})
        before = branches.get(branch, branches["main"])
        whole = {path: x for path, x in {**before, **files}.items() if path not in deleted}
        commit = hashlib.sha1(
            repr([name, sorted((path, hashlib.sha1(x).hexdigest()) for path, x in whole.items())]).encode()
        ).hexdigest()
        branches[branch] = branches[commit] = whole
        return commit

    def commit_of(self, name: str, revision: str) -> str | None:
        branches = self.repositories.get(name, {})
        files = branches.get(revision)
        return (
            next((key for key, held in branches.items() if held is files and re.fullmatch("[0-9a-f]{40}", key)), "0" * 40)
            if files is not None
            else None
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        for part, fault in self.hub.faults.items():
            if part in path:
                if fault == "hang":
                    self.hub.released.wait(60)
                    return
                return self._json({"error": f"fault {fault}"}, fault, {"X-Error-Message": f"fault {fault}"})
        for method, pattern, answer in ROUTES:
            if method == self.command and (match := re.fullmatch(pattern, path)):
                return answer(self, body, **match.groupdict())
        return self._json({"error": f"no route {self.command} {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _serve

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _missing(self, code: str) -> None:
        self._json({"error": code}, 404, {"X-Error-Code": code})

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._json({"error": "Invalid username or password."}, 401)
        return False

    # What the client asks for

    def _create(self, body: bytes) -> None:
        if not self._may_write():
            return
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "ours":
            return self._json({"error": "You don't have the rights to create a model under this namespace"}, 403)
        url = {"url": f"{self.hub.address}/{name}", "name": name}
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", **url}, 409)
        self.hub.repositories[name], self.hub.private[name] = (
            {"main": {}},
            asked.get("visibility") == "private" or bool(asked.get("private")),
        )
        return self._json(url)

    def _validate(self, body: bytes) -> None:
        """As the hub does for what Trimtab writes: the block is YAML, a mapping, and its values have the kinds of the specification."""
        content = json.loads(body)["content"]
        try:
            data = yaml.safe_load(content.split("---\n")[1])
            assert isinstance(data, dict), "not a mapping"
            for key in ("base_model", "license", "library_name", "pipeline_tag", "language"):
                assert isinstance(data.get(key, ""), str), key
            for result in data.get("model-index", [{"results": []}])[0]["results"]:
                assert all([result["task"]["type"], result["dataset"]["type"], result["dataset"]["name"]]), "results"
                assert all(isinstance(metric["value"], float | int) and metric["type"] for metric in result["metrics"]), (
                    "metrics"
                )
        except (AssertionError, LookupError, yaml.YAMLError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self._json({"errors": [], "warnings": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        if branch in self.hub.repositories[name]:
            return self._json({"error": "Reference already exists"}, 409)
        self.hub.repositories[name][branch] = self.hub.repositories[name]["main"]
        return self._json({})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        files = json.loads(body)["files"]
        modes = [
            {"path": f["path"], "shouldIgnore": False, "uploadMode": "lfs" if f["size"] > LFS_FROM else "regular"}
            for f in files
        ]
        self._json({"files": modes})

    def _lfs_batch(self, body: bytes, name: str) -> None:
        upload = {"upload": {"href": f"{self.hub.address}/lfs/", "header": {}}}
        objects = [
            {"oid": o["oid"], "size": o["size"], "actions": {"upload": {"href": upload["upload"]["href"] + o["oid"]}}}
            for o in json.loads(body)["objects"]
        ]
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_put(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.lfs[oid] = body
        self._send(b"")

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        if not self._may_write():
            return
        lines = [json.loads(line) for line in body.splitlines()]
        said = {line["key"]: line["value"] for line in lines if line["key"] == "header"}["header"]
        files = {f["path"]: base64.b64decode(f["content"]) for f in (line["value"] for line in lines if line["key"] == "file")}
        files |= {f["path"]: self.hub.lfs[f["oid"]] for f in (line["value"] for line in lines if line["key"] == "lfsFile")}
        deleted = [line["value"]["path"] for line in lines if line["key"] == "deletedFile"]
        commit = self.hub.put(name, files, revision, deleted)
        self.hub.commits.setdefault(name, []).append({"message": said["summary"], "branch": revision, "files": files})
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{commit}", "commitOid": commit, "success": True})

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        commit = self.hub.commit_of(name, revision)
        if commit is None:
            return self._missing("RevisionNotFound" if name in self.hub.repositories else "RepoNotFound")
        files = self.hub.repositories[name][revision]
        siblings = [
            {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        return self._json(
            {"id": name, "modelId": name, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        )

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        files = self.hub.repositories.get(name, {}).get(revision)
        if files is None:
            return self._missing("RevisionNotFound" if name in self.hub.repositories else "RepoNotFound")
        entries = [{"type": "file", "path": p, "size": len(x), "oid": hashlib.sha1(x).hexdigest()} for p, x in files.items()]
        return self._json(entries)

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        files = self.hub.repositories.get(name, {}).get(revision)
        if files is None:
            return self._missing("RevisionNotFound" if name in self.hub.repositories else "RepoNotFound")
        commit = {"X-Repo-Commit": self.hub.commit_of(name, revision) or ""}
        if path not in files:
            return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", **commit})
        headers = {"ETag": f'"{hashlib.sha256(files[path]).hexdigest()}"', **commit}
        return self._send(files[path], 200, headers)


_NAME, _REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", _Handler._create),
    ("POST", "/api/validate-yaml", _Handler._validate),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>.+)", _Handler._branch),
    ("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}", _Handler._preupload),
    ("POST", rf"/api/models/{_NAME}/commit/{_REVISION}", _Handler._commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler._lfs_put),
    ("GET", rf"/api/models/{_NAME}", _Handler._info),
    ("GET", rf"/api/models/{_NAME}/revision/{_REVISION}", _Handler._info),
    ("GET", rf"/api/models/{_NAME}/tree/{_REVISION}", _Handler._tree),
    ("GET", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
    ("HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler._resolve),
)


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Any, token: str | None = TOKEN) -> None:
    """Let this process's client talk to the hub, with a cache of its own."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in (
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "http_proxy",
        "https_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.address)  # of the functions that are its methods
    quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda _: None})
    monkeypatch.setattr(huggingface_hub.utils._http, "time", quick)  # which waits before it asks again
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
