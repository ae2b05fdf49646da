"""What the loopback Hub answers: repositories in memory and the endpoints the client calls."""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml

_DATE = "2026-01-01T00:00:00.000Z"
_YAML_BLOCK = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


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


class User(NamedTuple):
    name: str
    orgs: tuple[str, ...]

    def owns(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.orgs


@dataclass
class Repo:
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


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]


def _reply(
    value: Any,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    headers = {"Content-Type": "application/json", **(headers or {})}
    return Answer(status, json.dumps(value).encode(), headers)


@dataclass(frozen=True)
class Call:
    """A request as an endpoint sees it."""

    hub: Any
    """The `LoopbackHub`: its `repos`, `url` and `create_repo`."""
    user: User | None
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

    def known_user(self) -> User:
        """Who calls.

        The client reads a 401 without a code as RepoNotFound, but on https only: here the code has
        to say so.
        """
        if self.user is None:
            code = "RepoNotFound" if self.repo_id else None
            raise HubError(401, "Invalid username or password.", code)
        return self.user

    def readable(self) -> Repo:
        """A private repository is as good as missing; who has no token is not even told that."""
        repo = self.hub.repos.get(self.repo_id)
        if repo is None or (repo.private and not self.owns(repo)):
            self.known_user()
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self) -> Repo:
        """Who may read may open a pull request."""
        repo = self.readable()
        self.known_user()
        if not (self.owns(repo) or self.creates_pull_request):
            raise HubError(
                403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request"
            )
        return repo

    def owns(self, repo: Repo) -> bool:
        return self.user is not None and self.user.owns(repo.namespace)


def _validate_yaml(call: Call) -> Answer:
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


def _create_repo(call: Call) -> Answer:
    user = call.known_user()
    namespace = call.json.get("organization") or user.name
    repo_id = f"{namespace}/{call.json['name']}"
    url = f"{call.hub.url}/{repo_id}"
    if not user.owns(namespace):
        raise HubError(
            403, f'You don\'t have the rights to create a model under the namespace "{namespace}"'
        )
    if repo_id in call.hub.repos:
        raise HubError(409, "You already created this model repo", url=url)
    call.hub.create_repo(repo_id, private=call.json.get("visibility") == "private")
    return _reply({"url": url, "name": repo_id})


def _info(call: Call) -> Answer:
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


def _tree(call: Call) -> Answer:
    """Every file of the repository; the client asks for no less."""
    files = call.readable().at(call.revision).files
    return _reply([_file_entry(path, data) for path, data in files.items()])


def _refs(call: Call) -> Answer:
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


def _create_branch(call: Call) -> Answer:
    repo = call.writable()
    if call.revision.startswith("refs/"):
        raise HubError(400, f"Invalid reference for a branch: {call.revision}")
    if call.revision in repo.refs:
        raise HubError(409, f"Reference already exists: {call.revision}")
    repo.refs[call.revision] = repo.at(call.json.get("startingPoint", "main")).oid
    return _reply({})


def _preupload(call: Call) -> Answer:
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


def _lfs_batch(call: Call) -> Answer:
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


def _lfs_put(call: Call) -> Answer:
    """The storage behind the Hub: no token, the address is the permission."""
    if call.repo_id not in call.hub.repos or sha256(call.body).hexdigest() != call.path:
        raise HubError(400, "The SHA256 you specified did not match what we received.")
    call.hub.repos[call.repo_id].objects[call.path] = call.body
    return Answer(200, b"", {})


def _lfs_verify(call: Call) -> Answer:
    call.known_user()
    data = call.readable().objects.get(call.json["oid"])
    if data is None:
        raise HubError(404, "The object was not uploaded")
    if len(data) != call.json["size"]:
        raise HubError(422, f"The object has {len(data)} bytes, not {call.json['size']}")
    return _reply({})


def _commit(call: Call) -> Answer:
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


def _parent(
    repo: Repo,
    call: Call,
    oid: str | None,
) -> Commit:
    """The tip of the branch, which has to be the parent that the client names, if it does.

    A pull request may start from any commit.
    """
    tip = repo.at(call.revision)
    if oid in (None, tip.oid):
        return tip
    if call.creates_pull_request:
        return repo.at(oid)
    raise HubError(412, "A commit has happened since. Please refresh and try again.")


def _apply(
    repo: Repo,
    files: dict[str, bytes],
    kind: str,
    value: Mapping[str, Any],
) -> None:
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


def _resolve(call: Call) -> Answer:
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
    return Answer(200, data, headers)


_Endpoint = Callable[[Call], Answer]
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


def route(
    method: str,
    path: str,
) -> tuple[_Endpoint, dict[str, str]]:
    """The endpoint of a request, and the unquoted parts of its path."""
    for methods, pattern, endpoint in _ROUTES:
        match = re.fullmatch(pattern, path)
        if match and re.fullmatch(methods, method):
            return endpoint, {name: unquote(part) for name, part in match.groupdict().items()}
    raise HubError(404, "Sorry, we can't find the page you are looking for.")


def _is_lfs(
    path: str,
    size: int,
) -> bool:
    """Storage cannot take an empty object, so the client commits an empty file as a regular one."""
    return size > 0 and path.endswith(".safetensors")


def _etag(
    path: str,
    data: bytes,
) -> str:
    return sha256(data).hexdigest() if _is_lfs(path, len(data)) else _git_oid(data)


def _git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _file_entry(
    path: str,
    data: bytes,
) -> dict[str, Any]:
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
