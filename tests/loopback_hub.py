"""A Hugging Face Hub on 127.0.0.1 for the real huggingface_hub client.

Models in memory, faults on request. It knows what loading and pushing ask of model repositories
(creation, commits over LFS, downloads, listings, pull requests, branches) and answers as the Hub
does, with its status codes, `X-Error-Code` and messages. No users' pages, Xet, ranges, datasets,
spaces, tags, deletion of folders or repositories, history, or pages of a listing.
"""

import base64
import itertools
import json
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
_DATE = "2026-01-01T00:00:00.000Z"
_YAML_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


class Request(NamedTuple):
    """One line of the log."""

    method: str
    path: str
    """As sent: quoted, with the query."""
    status: int
    """0 where the connection was dropped."""
    token: str | None


class Commit(NamedTuple):
    oid: str
    message: str
    files: Mapping[str, bytes]
    parent: str | None
    author: str


class HubError(Exception):
    """An error of the Hub.

    `code` becomes X-Error-Code, by which the client chooses its exception.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        **body: Any,
    ):
        super().__init__(message)
        codes = {"X-Error-Code": code} if code else {}
        # a header holds one line, of these characters alone
        line = " ".join(message.split()).encode("latin-1", "replace").decode("latin-1")
        headers = {**codes, "X-Error-Message": line, **(headers or {})}
        self.answer = _reply({"error": message, **body}, status, headers)


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.url`.

    The address is fixed before the first connection is accepted. Repositories are made over HTTP or
    here on the server's side, and read back with `files` and `commits`.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._serial = itertools.count()
        self._server = _Server(self, port=0)
        self._thread: threading.Thread | None = None
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.reset()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Accept connections; nothing happens if it already does."""
        if self._thread is None:
            self._server.server_activate()
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.05,), daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """Refuse every connection until `start`, those kept open by a client too.

        Repositories stay.
        """
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
            self._server.hang_up()
            self._server.server_close()
            # bound but not listening: nobody else gets the port
            self._server = _Server(self, self._server.server_port)

    def close(self) -> None:
        """Stop for good and give the port back."""
        self.stop()
        self._server.server_close()

    def reset(self) -> None:
        """Forget repositories, users, faults and the log."""
        with self._lock:
            self._users: dict[str, _User] = {}
            self._repos: dict[str, _Repo] = {}
            self._faults: list[_Fault] = []
            self.requests: list[Request] = []

    def add_user(self, token: str, name: str, *, orgs: Iterable[str] = ()) -> None:
        """A user who may write in the namespace `name` and in `orgs`."""
        with self._lock:
            self._users[token] = _User(name, tuple(orgs))

    def create_repo(self, repo_id: str, *, private: bool = False, gated: bool = False) -> str:
        """The first commit, which holds .gitattributes."""
        with self._lock:
            if repo_id in self._repos:
                raise ValueError(f"{repo_id} exists")
            repo = _Repo(repo_id, private, gated, self._serial)
            self._repos[repo_id] = repo
            files = {".gitattributes": _GIT_ATTRIBUTES}
            return repo.append("main", files, "initial commit", "system").oid

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        delete: Iterable[str] = (),
        revision: str = "main",
        message: str = "Somebody else's commit",
    ) -> str:
        """Commit on a branch behind the client's back."""
        with self._lock:
            repo = self._repos[repo_id]
            present = dict(repo.at(revision).files)
            for path in delete:
                present.pop(path, None)
            for data in files.values():
                repo.objects[sha256(data).hexdigest()] = data
            return repo.append(revision, {**present, **files}, message, "system").oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of every file."""
        with self._lock:
            return dict(self._repos[repo_id].at(revision).files)

    def commits(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first."""
        with self._lock:
            return list(self._repos[repo_id].history(revision))

    def fault(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        error_code: str | None = None,
        message: str = "",
        headers: Mapping[str, str] | None = None,
        times: int | None = 1,
        drop: bool = False,
        truncate: int | None = None,
        flip_byte: int | None = None,
    ) -> None:
        """Spoil requests; where several faults match, the oldest that is not used up.

        Args:
            method: Regular expression for the whole of the method, `HEAD|GET`.
            pattern: Regular expression to find in the path, which is quoted and has its query.
            status: Answer this instead of doing the request.
            error_code: X-Error-Code to go with `status`.
            message: X-Error-Message to go with `status`.
            headers: Further headers to go with `status`.
            times: How many requests; None is every one.
            drop: Alone: hang up half-way through the body of the request, which is not done. With
                `truncate`: do the request, announce the whole answer, hang up after `truncate`
                bytes of its body.
            truncate: Send only so many bytes of the body. Without `drop` the Content-Length is that
                of what is sent.
            flip_byte: Invert this byte of the body of the answer.
        """
        error = None
        if status is not None:
            error = HubError(status, message or "Injected fault", error_code, headers)
        fault = _Fault(method, pattern, error, times, drop, truncate, flip_byte)
        with self._lock:
            self._faults.append(fault)

    def _next_fault(self, method: str, path: str) -> "_Fault":
        with self._lock:
            for fault in self._faults:
                if fault.takes(method, path):
                    return fault
        return _Fault("", "")

    def _record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _answer(self, method: str, path: str, headers: Message, body: bytes) -> "_Answer":
        target = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(target.query).items()}
        with self._lock:
            try:
                user = self._user(headers)
                endpoint, parts = _route(method, target.path)
                return endpoint(_Call(self, user, query, body, **parts))
            except HubError as error:
                return error.answer
            except Exception as error:
                # a mistake in this file: with a status that the client does not retry
                return HubError(501, f"{method} {path} broke the loopback Hub: {error!r}").answer

    def _user(self, headers: Message) -> "_User | None":
        """The Hub refuses a token that it does not know even where none is needed."""
        token = _token(headers)
        if token is not None and token not in self._users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self._users[token] if token is not None else None


class _User(NamedTuple):
    name: str
    orgs: tuple[str, ...]

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class _Repo:
    repo_id: str
    private: bool
    gated: bool
    serial: Iterator[int]
    """Keeps the names of two commits of the same content apart, as the date does in git."""
    log: dict[str, Commit] = field(default_factory=dict)
    """Commits by name."""
    refs: dict[str, str] = field(default_factory=dict)
    """Branches by name, pull requests as refs/pr/N."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """LFS content by sha256."""
    n_pulls: int = 0

    @property
    def namespace(self) -> str:
        return self.repo_id.split("/")[0]

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.log:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.log[oid]

    def history(self, revision: str) -> Iterator[Commit]:
        commit = self.at(revision)
        yield commit
        while commit.parent is not None:
            commit = self.log[commit.parent]
            yield commit

    def append(
        self,
        ref: str,
        files: Mapping[str, bytes],
        message: str,
        author: str,
        parent: Commit | None = None,
    ) -> Commit:
        """Commit on `ref`, a new one if need be, on top of `parent` or of what it points to."""
        parent_oid = parent.oid if parent else self.refs.get(ref)
        identity = f"{self.repo_id} {next(self.serial)} {parent_oid} {message}"
        oid = sha1(identity.encode()).hexdigest()
        self.log[oid] = Commit(oid, message, dict(sorted(files.items())), parent_oid, author)
        self.refs[ref] = oid
        return self.log[oid]


class _Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


def _reply(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> _Answer:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return _Answer(status, json.dumps(value).encode(), headers)


@dataclass
class _Fault:
    method: str
    pattern: str
    error: HubError | None = None
    times: int | None = 1
    drop: bool = False
    truncate: int | None = None
    flip_byte: int | None = None

    def takes(self, method: str, path: str) -> bool:
        """Whether it spoils this request, which is then counted."""
        matches = re.fullmatch(self.method, method) and re.search(self.pattern, path)
        if self.times == 0 or not matches:
            return False
        if self.times is not None:
            self.times -= 1
        return True

    def spoil(self, body: bytes) -> bytes:
        if self.flip_byte is not None and body:
            spoilt = bytearray(body)
            spoilt[self.flip_byte] ^= 0xFF
            body = bytes(spoilt)
        return body[: self.truncate]


@dataclass(frozen=True)
class _Call:
    """A request as an endpoint sees it."""

    hub: LoopbackHub
    user: _User | None
    query: Mapping[str, str]
    body: bytes
    repo_id: str = ""
    revision: str = ""
    path: str = ""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def creates_pull_request(self) -> bool:
        return self.query.get("create_pr") == "1"

    def known_user(self) -> _User:
        """Who calls.

        The client reads a 401 without a code as RepoNotFound, but on https only: here the code has
        to say so.
        """
        if self.user is None:
            code = "RepoNotFound" if self.repo_id else None
            raise HubError(401, "Invalid username or password.", code)
        return self.user

    def readable(self) -> _Repo:
        """A private repository is as good as missing; who has no token is not even told that."""
        repo = self.hub._repos.get(self.repo_id)
        if repo is None or (repo.private and not self.owns(repo)):
            self.known_user()
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self) -> _Repo:
        """Who may read may open a pull request."""
        repo = self.readable()
        self.known_user()
        if not (self.owns(repo) or self.creates_pull_request):
            raise HubError(
                403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            )
        return repo

    def owns(self, repo: _Repo) -> bool:
        return self.user is not None and self.user.owns(repo.namespace)


def _validate_yaml(call: _Call) -> _Answer:
    """Only that the metadata is a YAML mapping of plain values.

    The Hub knows the licences and tasks too.
    """
    block = _YAML_BLOCK.match(call.json["content"])
    if block is None:
        warning = {"message": "empty or missing yaml metadata in repo card"}
        return _reply({"errors": [], "warnings": [warning]})
    try:
        metadata = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        problem = f"YAML metadata error: {error}"
    else:
        if metadata is None or isinstance(metadata, dict):
            return _reply({"errors": [], "warnings": []})
        problem = f"YAML metadata must be a mapping, not {type(metadata).__name__}"
    raise HubError(400, "Invalid metadata", errors=[{"message": problem}], warnings=[])


def _create_repo(call: _Call) -> _Answer:
    user = call.known_user()
    namespace = call.json.get("organization") or user.name
    repo_id = f"{namespace}/{call.json['name']}"
    url = f"{call.hub.url}/{repo_id}"
    if not user.owns(namespace):
        raise HubError(
            403, f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        )
    if repo_id in call.hub._repos:
        raise HubError(409, "You already created this model repo", url=url)
    call.hub.create_repo(repo_id, private=call.json.get("visibility") == "private")
    return _reply({"url": url, "name": repo_id})


def _info(call: _Call) -> _Answer:
    repo = call.readable()
    commit = repo.at(call.revision or "main")
    info = {
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in commit.files],
    }
    return _reply(info)


def _tree(call: _Call) -> _Answer:
    """Every file of the repository; the client asks for no less."""
    files = call.readable().at(call.revision).files
    return _reply([_file_entry(path, data) for path, data in files.items()])


def _refs(call: _Call) -> _Answer:
    branches = []
    pulls = []
    for name, oid in call.readable().refs.items():
        if name.startswith("refs/pr/"):
            pulls.append({"name": name, "ref": name, "targetCommit": oid})
        else:
            branches.append({"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid})
    refs = {"branches": branches, "converts": [], "tags": []}
    if "include_prs" in call.query:
        refs["pullRequests"] = pulls
    return _reply(refs)


def _create_branch(call: _Call) -> _Answer:
    repo = call.writable()
    if call.revision.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {call.revision}")
    if call.revision in repo.refs:
        raise HubError(409, f"Reference already exists: {call.revision}")
    repo.refs[call.revision] = repo.at(call.json.get("startingPoint", "main")).oid
    return _reply({})


def _preupload(call: _Call) -> _Answer:
    """How each file is to be sent.

    `oid` names the content that is already there, so that the client can leave an unchanged file
    out.
    """
    present = call.writable().at(call.revision).files
    files = []
    for announced in call.json["files"]:
        path = announced["path"]
        mode = "lfs" if _is_lfs(path, announced["size"]) else "regular"
        file = {"path": path, "uploadMode": mode, "shouldIgnore": False}
        if path in present:
            file["oid"] = _etag(path, present[path])
        files.append(file)
    return _reply({"files": files})


def _lfs_batch(call: _Call) -> _Answer:
    """Where to send each object; one without actions is already there.

    A client that names no ref is about to open a pull request.
    """
    repo = call.writable() if call.json.get("ref") else call.readable()
    call.known_user()
    verify = {"href": f"{call.hub.url}/{repo.repo_id}.git/info/lfs/objects/verify"}
    objects = []
    for announced in call.json["objects"]:
        oid = announced["oid"]
        lfs_object = {"oid": oid, "size": announced["size"]}
        if oid not in repo.objects:
            upload = {"href": f"{call.hub.url}/lfs/{repo.repo_id}/{oid}"}
            lfs_object["actions"] = {"upload": upload, "verify": verify}
        objects.append(lfs_object)
    return _reply({"transfer": "basic", "objects": objects})


def _lfs_put(call: _Call) -> _Answer:
    """The storage behind the Hub: no token, the address is the permission."""
    if call.repo_id not in call.hub._repos or sha256(call.body).hexdigest() != call.path:
        raise HubError(400, "The SHA256 you specified did not match what we received.")
    call.hub._repos[call.repo_id].objects[call.path] = call.body
    return _Answer(200, b"", {})


def _lfs_verify(call: _Call) -> _Answer:
    call.known_user()
    data = call.readable().objects.get(call.json["oid"])
    if data is None:
        raise HubError(404, "The object was not uploaded")
    if len(data) != call.json["size"]:
        raise HubError(422, f"The object has {len(data)} bytes, not {call.json['size']}")
    return _reply({})


def _commit(call: _Call) -> _Answer:
    repo = call.writable()
    user = call.known_user()
    if call.revision not in repo.refs:
        raise HubError(404, f"Invalid rev id: {call.revision}", "RevisionNotFound")
    header, *operations = [json.loads(line) for line in call.body.splitlines()]
    parent = _parent(repo, call, header["value"].get("parentCommit"))
    files = dict(parent.files)
    for operation in operations:
        _apply(repo, files, operation["key"], operation["value"])
    paragraphs = [header["value"]["summary"], header["value"].get("description")]
    message = "\n\n".join(filter(None, paragraphs))
    ref = call.revision
    reply = {"success": True}
    if call.creates_pull_request:
        repo.n_pulls += 1
        ref = f"refs/pr/{repo.n_pulls}"
        reply["pullRequestUrl"] = f"{call.hub.url}/{repo.repo_id}/discussions/{repo.n_pulls}"
    oid = repo.append(ref, files, message, user.name, parent).oid
    reply["commitOid"] = oid
    reply["commitUrl"] = f"{call.hub.url}/{repo.repo_id}/commit/{oid}"
    return _reply(reply)


def _parent(repo: _Repo, call: _Call, oid: str | None) -> Commit:
    """The tip of the branch, which has to be the parent that the client names, if it does.

    A pull request may start from any commit.
    """
    tip = repo.at(call.revision)
    if oid in (None, tip.oid):
        return tip
    if call.creates_pull_request:
        return repo.at(oid)
    raise HubError(412, "A commit has happened since. Please refresh and try again.")


def _apply(repo: _Repo, files: dict[str, bytes], kind: str, value: Mapping[str, Any]) -> None:
    path = value["path"]
    if kind == "file":
        files[path] = base64.b64decode(value["content"])
    elif kind == "lfsFile":
        data = repo.objects.get(value["oid"])
        if data is None or len(data) != value.get("size", len(data)):
            raise HubError(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = data
    elif kind == "deletedFile":
        if path not in files:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        del files[path]
    else:
        raise HubError(400, f"Unknown operation {kind}")


def _resolve(call: _Call) -> _Answer:
    """Gated is checked before the path: who has no access does not learn which files there are."""
    repo = call.readable()
    commit = repo.at(call.revision)
    if repo.gated and not call.owns(repo):
        restricted = f"Access to model {repo.repo_id} is restricted"
        if call.user is None:
            message = f"{restricted}. You must have access to it and be authenticated to access it."
            raise HubError(401, message, "GatedRepo")
        raise HubError(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")
    if call.path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
    data = commit.files[call.path]
    etag = f'"{_etag(call.path, data)}"'
    headers = {
        "Content-Type": "application/octet-stream",
        "X-Repo-Commit": commit.oid,
        "ETag": etag,
    }
    if _is_lfs(call.path, len(data)):
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(data))}
    return _Answer(200, data, headers)


_Endpoint = Callable[[_Call], _Answer]
_REPO = r"(?P<repo_id>[^/]+/[^/]+?)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[str, str, _Endpoint]] = [
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("POST", r"/api/repos/create", _create_repo),
    ("GET", rf"/api/models/{_REPO}", _info),
    ("GET", rf"/api/models/{_REPO}/revision/{_REVISION}", _info),
    ("GET", rf"/api/models/{_REPO}/tree/{_REVISION}", _tree),
    ("GET", rf"/api/models/{_REPO}/refs", _refs),
    ("POST", rf"/api/models/{_REPO}/branch/{_REVISION}", _create_branch),
    ("POST", rf"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
    ("POST", rf"/api/models/{_REPO}/commit/{_REVISION}", _commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/verify", _lfs_verify),
    ("PUT", rf"/lfs/{_REPO}/(?P<path>[0-9a-f]{{64}})", _lfs_put),
    ("HEAD|GET", rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
]
"""Methods, path, endpoint."""


def _route(method: str, path: str) -> tuple[_Endpoint, dict[str, str]]:
    """The endpoint of a request, and the unquoted parts of its path."""
    for methods, pattern, endpoint in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and re.fullmatch(methods, method):
            return endpoint, {name: unquote(part) for name, part in match.groupdict().items()}
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def _is_lfs(path: str, size: int) -> bool:
    """Storage cannot take an empty object, so the client commits an empty file as a regular one."""
    return size > 0 and path.endswith(".safetensors")


def _etag(path: str, data: bytes) -> str:
    return sha256(data).hexdigest() if _is_lfs(path, len(data)) else _git_oid(data)


def _git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file_entry(path: str, data: bytes) -> dict[str, Any]:
    """`oid` is what git stores: of an LFS file that is the pointer."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if not _is_lfs(path, len(data)):
        entry["oid"] = _git_oid(data)
        return entry
    oid = sha256(data).hexdigest()
    lines = ["version https://git-lfs.github.com/spec/v1", f"oid sha256:{oid}", f"size {len(data)}"]
    pointer = "".join(f"{line}\n" for line in lines).encode()
    entry["oid"] = _git_oid(pointer)
    entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": len(pointer)}
    return entry


def _token(headers: Message) -> str | None:
    scheme, _, token = (headers.get("Authorization") or "").partition(" ")
    return token if scheme == "Bearer" else None


class _Server(ThreadingHTTPServer):
    """Bound at once, so that the port is known, but it listens only after `server_activate`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub = hub
        self.connections: set[socket.socket] = set()
        self.server_bind()

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # a client that went away is none of ours
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the next fault spoil it, logs it and sends the answer."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the log is `LoopbackHub.requests`."""

    def serve(self) -> None:
        hub = self.server.hub
        fault = hub._next_fault(self.command, self.path)
        token = _token(self.headers)
        hangs_up_early = fault.drop and fault.truncate is None
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length // 2 if hangs_up_early else length)
        if len(body) < length or hangs_up_early:
            self.close_connection = True
            hub._record(Request(self.command, self.path, 0, token))
            return
        if fault.error:
            answer = fault.error.answer
        else:
            answer = hub._answer(self.command, self.path, self.headers, body)
        status = 0 if fault.drop else answer.status
        hub._record(Request(self.command, self.path, status, token))
        self.send(answer, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, answer: _Answer, fault: _Fault) -> None:
        body = fault.spoil(answer.body)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body if fault.drop else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = self.close_connection or fault.drop
