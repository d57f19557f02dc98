"""A small Hub for tests: it speaks huggingface_hub's protocol for reading, committing (LFS included) and refusing, on a folder of blobs.

Made after the requests of huggingface_hub 2.4 (Xet off: HF_HUB_DISABLE_XET=1 and plain LFS). A commit is all or nothing; an LFS object with another
sha256 than announced is refused; a token that is unknown gets 401, a repository that a token may not see is called missing.
"""

import asyncio
import base64
import hashlib
import json
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web
from huggingface_hub.repocard import metadata_load

USER = "acme"
LFS_FROM_BYTES = 10_000  # smaller than the real Hub's, so that tests of small models go both ways
MAIN = "main"


@dataclass
class Repository:
    """Branches and commits; a commit is a mapping of path to blob digest.

    Attributes:
        lfs: paths that were uploaded as LFS objects.
    """

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def commit(self, branch: str, files: dict[str, str], title: str) -> str:
        """Adds a commit on top of a branch and returns its id."""
        digest = hashlib.sha1(f"{branch}{title}{sorted(files.items())}{len(self.commits)}".encode(), usedforsecurity=False).hexdigest()
        self.commits[digest] = files
        self.titles[digest] = title
        self.branches[branch] = digest
        return digest


@dataclass
class HubServer:
    """A running Hub.

    Attributes:
        endpoint: for HF_ENDPOINT.
        token: the one write token, of the user `acme`.
        read_token: a token of the same user that may not write.
        repositories: by kind and name, such as ("model", "acme/bot").
        refuse: asked before each request; an HTTP status makes the server answer with it.
    """

    folder: Path
    token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(12)}")
    read_token: str = field(default_factory=lambda: f"hf_{secrets.token_hex(12)}")
    endpoint: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    refuse: Callable[[str, str], int | None] = lambda _method, _path: None

    def repository(self, name: str, kind: str = "model", *, private: bool = False) -> Repository:
        """The repository; made, with an empty first commit, when there is none."""
        if (kind, name) not in self.repositories:
            made = Repository(private=private)
            made.commit(MAIN, {}, "initial commit")
            self.repositories[kind, name] = made
        return self.repositories[kind, name]

    def put(self, name: str, files: dict[str, bytes], kind: str = "model", *, private: bool = False) -> str:
        """Commits files to the main branch, as somebody else would; returns the commit."""
        repository = self.repository(name, kind, private=private)
        blobs = {path: self.store(content) for path, content in files.items()}
        return repository.commit(MAIN, repository.commits[repository.branches[MAIN]] | blobs, "put")

    def files(self, name: str, revision: str = MAIN, kind: str = "model") -> dict[str, bytes]:
        """Path -> content of a revision."""
        repository = self.repositories[kind, name]
        listed = repository.commits[repository.resolve(revision) or ""]
        return {path: self.blob(digest).read_bytes() for path, digest in listed.items()}

    def blob(self, digest: str) -> Path:
        """Where a blob lies."""
        return self.folder / digest

    def store(self, content: bytes) -> str:
        """Keeps a blob and returns its sha256."""
        digest = hashlib.sha256(content).hexdigest()
        self.blob(digest).write_bytes(content)
        return digest


@contextmanager
def running_hub(folder: Path, address: str = "127.0.0.1") -> Iterator[HubServer]:
    """Serves a Hub that keeps its blobs under `folder`, on a free port, until the block ends."""
    folder.mkdir(parents=True, exist_ok=True)
    server = HubServer(folder)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    runner = web.AppRunner(_application(server), access_log=None)
    try:
        port = asyncio.run_coroutine_threadsafe(_start(runner, address), loop).result(10)
        server.endpoint = f"http://{address}:{port}"
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(runner: web.AppRunner, address: str) -> int:
    await runner.setup()
    await web.TCPSite(runner, address, 0).start()
    return int(runner.addresses[0][1])


def _application(server: HubServer) -> web.Application:
    application = web.Application(client_max_size=2**30, middlewares=[_guard(server)])
    hub = _Routes(server)
    repo, rest = "/{owner}/{name}", "/{path:.+}"
    api = "/api/{kind:models|datasets}" + repo
    application.add_routes(
        [
            web.get("/api/whoami-v2", hub.whoami),
            web.get("/api/agent-harnesses", hub.no_harnesses),
            web.post("/api/validate-yaml", hub.validate_yaml),
            web.post("/api/repos/create", hub.create_repository),
            web.get(api, hub.info),
            web.get(api + "/revision/{revision}", hub.info),
            web.get(api + "/auth-check", hub.auth_check),
            web.get(api + "/auth-check/write", hub.auth_check),
            web.get(api + "/tree/{revision}", hub.tree),
            web.post(api + "/branch/{branch}", hub.create_branch),
            web.post(api + "/preupload/{revision}", hub.preupload),
            web.post(api + "/commit/{revision}", hub.commit),
            web.post("/{kind:datasets}" + repo + ".git/info/lfs/objects/batch", hub.lfs_batch),
            web.post(repo + ".git/info/lfs/objects/batch", hub.lfs_batch),
            web.put("/lfs/{digest}", hub.lfs_put),
            web.post("/lfs-verify", hub.lfs_verify),
            web.get("/{kind:datasets}" + repo + "/resolve/{revision}" + rest, hub.resolve),
            web.get(repo + "/resolve/{revision}" + rest, hub.resolve),
        ]
    )
    return application


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _guard(server: HubServer) -> Any:
    """Tokens, and the refusals that a test has asked for."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        refused = server.refuse(request.method, request.path)
        if refused:
            return web.json_response({"error": "refused by the test"}, status=refused)
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in (server.token, server.read_token):
            return _error(401, "Invalid credentials in Authorization header")
        writes = request.method in ("POST", "PUT") and not request.path.startswith(("/api/validate-yaml", "/lfs"))
        if (writes or request.path.endswith("/auth-check/write")) and token != server.token:
            return _error(403 if token else 401, "this token may not write")
        try:
            return await handler(request)
        except _Refused as refusal:
            return refusal.answer

    return guard


class _Routes:
    def __init__(self, server: HubServer) -> None:
        self.server = server

    async def whoami(self, request: web.Request) -> web.Response:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return _error(401, "no token")
        role = "write" if token == self.server.token else "read"
        return web.json_response({"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": {"displayName": "test", "role": role}}})

    async def no_harnesses(self, _: web.Request) -> web.Response:
        return web.json_response({})

    async def validate_yaml(self, _: web.Request) -> web.Response:
        return web.json_response({"errors": [], "warnings": []})

    async def create_repository(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        name, kind = f"{wanted.get('organization') or USER}/{wanted['name']}", wanted.get("type") or "model"
        if not name.startswith(f"{USER}/"):
            return _error(403, "not a member of that account")
        if (kind, name) in self.server.repositories:
            return web.json_response({"error": "You already created this repo", "url": f"{self.server.endpoint}/{name}"}, status=409)
        self.server.repository(name, kind, private=bool(wanted.get("private")) or wanted.get("visibility") == "private")
        return web.json_response({"url": f"{self.server.endpoint}/{name}"})

    async def info(self, request: web.Request) -> web.Response:
        repository, commit = self._find(request)
        files = [{"rfilename": path, "blobId": digest[:40]} for path, digest in sorted(repository.commits[commit].items())]
        answer = {"id": _name(request), "sha": commit, "siblings": files, "private": repository.private, "tags": []}
        readme = repository.commits[commit].get("README.md")
        return web.json_response(answer | ({"cardData": metadata_load(self.server.blob(readme))} if readme else {}))

    async def auth_check(self, request: web.Request) -> web.Response:
        self._repository(request)
        return web.json_response({})

    async def tree(self, request: web.Request) -> web.Response:
        repository, commit = self._find(request)
        files = repository.commits[commit].items()
        return web.json_response([self._tree_entry(path, digest, path in repository.lfs) for path, digest in files])

    def _tree_entry(self, path: str, digest: str, lfs: bool) -> dict[str, Any]:
        content = self.server.blob(digest).read_bytes()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()
        entry = {"type": "file", "path": path, "size": len(content), "oid": _git_blob(pointer if lfs else content)}
        return entry | ({"lfs": {"oid": digest, "size": len(content), "pointerSize": len(pointer)}} if lfs else {})

    async def create_branch(self, request: web.Request) -> web.Response:
        repository, branch = self._repository(request), request.match_info["branch"]
        if branch in repository.branches:
            return _error(409, "the branch exists")
        repository.branches[branch] = repository.branches[MAIN]
        return web.json_response({})

    async def preupload(self, request: web.Request) -> web.Response:
        self._find(request)
        files = (await request.json())["files"]
        modes = [
            {"path": item["path"], "uploadMode": "lfs" if item["size"] >= LFS_FROM_BYTES else "regular", "shouldIgnore": False}
            for item in files
        ]
        return web.json_response({"files": modes})

    async def lfs_batch(self, request: web.Request) -> web.Response:
        self._repository(request)
        objects = (await request.json())["objects"]
        answers = []
        for item in objects:
            actions = {
                "upload": {"href": f"{self.server.endpoint}/lfs/{item['oid']}"},
                "verify": {"href": f"{self.server.endpoint}/lfs-verify"},
            }
            known = self.server.blob(item["oid"]).is_file()
            answers.append({"oid": item["oid"], "size": item["size"], "authenticated": True} | ({} if known else {"actions": actions}))
        return web.json_response({"transfer": "basic", "objects": answers}, content_type="application/vnd.git-lfs+json")

    async def lfs_put(self, request: web.Request) -> web.Response:
        content = await request.read()
        if hashlib.sha256(content).hexdigest() != request.match_info["digest"]:
            return _error(400, "the content has another sha256")
        self.server.store(content)
        return web.Response()

    async def lfs_verify(self, request: web.Request) -> web.Response:
        wanted = await request.json()
        path = self.server.blob(wanted["oid"])
        return web.json_response({}) if path.is_file() and path.stat().st_size == wanted["size"] else _error(404, "no such object")

    async def commit(self, request: web.Request) -> web.Response:
        repository, parent = self._find(request)
        branch = request.match_info["revision"]
        lines = [json.loads(line) for line in (await request.read()).splitlines()]
        files, title = dict(repository.commits[parent]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                title = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = self.server.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if not self.server.blob(value["oid"]).is_file():
                    return _error(400, "an LFS object is missing")
                files[value["path"]] = value["oid"]
                repository.lfs.add(value["path"])
            elif line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                return _error(404, "no such file")
        made = repository.commit(branch, files, title)
        return web.json_response(
            {"success": True, "commitOid": made, "commitUrl": f"{self.server.endpoint}/{_name(request)}/commit/{made}"}
        )

    async def resolve(self, request: web.Request) -> web.StreamResponse:
        repository, commit = self._find(request)
        digest = repository.commits[commit].get(request.match_info["path"])
        if digest is None:
            return _error(404, "Entry not found", code="EntryNotFound", commit=commit)
        # The real Hub sends large files' readers to another host; here they are served at once.
        return web.FileResponse(
            self.server.blob(digest), headers={"X-Repo-Commit": commit, "ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"'}
        )

    def _repository(self, request: web.Request) -> Repository:
        kind = request.match_info.get("kind", "models").removesuffix("s")
        repository = self.server.repositories.get((kind, _name(request)))
        known = bool(request.headers.get("Authorization"))
        if repository is None or (repository.private and not known):
            raise _Refused(_error(404 if known else 401, "Repository not found", code="RepoNotFound"))
        return repository

    def _find(self, request: web.Request) -> tuple[Repository, str]:
        repository = self._repository(request)
        commit = repository.resolve(request.match_info.get("revision", MAIN))
        if commit is None:
            raise _Refused(_error(404, "Invalid rev id", code="RevisionNotFound"))
        return repository, commit


class _Refused(Exception):  # noqa: N818 an answer, not an error of ours
    """An answer that ends a handler."""

    def __init__(self, answer: web.Response) -> None:
        super().__init__(answer.status)
        self.answer = answer


def _git_blob(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _name(request: web.Request) -> str:
    return f"{request.match_info['owner']}/{request.match_info['name']}"


def _error(status: int, message: str, code: str = "", commit: str = "") -> web.Response:
    headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | ({"X-Repo-Commit": commit} if commit else {})
    return web.json_response({"error": message}, status=status, headers=headers)
