"""A Hugging Face Hub on 127.0.0.1 for the real huggingface_hub client.

Models in memory, faults on request. It knows what loading and pushing ask of model repositories
(creation, commits over LFS, downloads, listings, pull requests, branches; `loopback_endpoints.py`)
and answers as the Hub does, with its status codes, `X-Error-Code` and messages. No users' pages,
Xet, ranges, datasets, spaces, tags, deletion of folders or repositories, history, or pages of a
listing.
"""

import itertools
import re
import socket
import sys
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.message import Message
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, urlsplit

from loopback_endpoints import Answer, Call, Commit, HubError, Repo, User, route

_GIT_ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


class Request(NamedTuple):
    """One line of the log."""

    method: str
    path: str
    """As sent: quoted, with the query."""
    status: int
    """0 where the connection was dropped."""
    token: str | None


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
            self._users: dict[str, User] = {}
            self.repos: dict[str, Repo] = {}
            self._faults: list[_Fault] = []
            self.requests: list[Request] = []

    def add_user(
        self,
        token: str,
        name: str,
        *,
        orgs: Iterable[str] = (),
    ) -> None:
        """A user who may write in the namespace `name` and in `orgs`."""
        with self._lock:
            self._users[token] = User(name, tuple(orgs))

    def create_repo(
        self,
        repo_id: str,
        *,
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """The first commit, which holds .gitattributes."""
        with self._lock:
            if repo_id in self.repos:
                raise ValueError(f"{repo_id} exists")
            repo = Repo(repo_id, private, gated, self._serial)
            self.repos[repo_id] = repo
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
            repo = self.repos[repo_id]
            present = dict(repo.at(revision).files)
            for path in delete:
                present.pop(path, None)
            for data in files.values():
                repo.objects[sha256(data).hexdigest()] = data
            return repo.append(revision, {**present, **files}, message, "system").oid

    def files(
        self,
        repo_id: str,
        revision: str = "main",
    ) -> dict[str, bytes]:
        """The content of every file."""
        with self._lock:
            return dict(self.repos[repo_id].at(revision).files)

    def commits(
        self,
        repo_id: str,
        revision: str = "main",
    ) -> list[Commit]:
        """Newest first."""
        with self._lock:
            return list(self.repos[repo_id].history(revision))

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

    def _next_fault(
        self,
        method: str,
        path: str,
    ) -> "_Fault":
        with self._lock:
            for fault in self._faults:
                if fault.takes(method, path):
                    return fault
        return _Fault("", "")

    def _record(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)

    def _answer(
        self,
        method: str,
        path: str,
        headers: Message,
        body: bytes,
    ) -> "Answer":
        target = urlsplit(path)
        query = {key: values[0] for key, values in parse_qs(target.query).items()}
        with self._lock:
            try:
                user = self._user(headers)
                endpoint, parts = route(method, target.path)
                return endpoint(Call(self, user, query, body, **parts))
            except HubError as error:
                return error.answer
            except Exception as error:
                # a mistake in this file: with a status that the client does not retry
                return HubError(501, f"{method} {path} broke the loopback Hub: {error!r}").answer

    def _user(self, headers: Message) -> "User | None":
        """The Hub refuses a token that it does not know even where none is needed."""
        token = _token(headers)
        if token is not None and token not in self._users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self._users[token] if token is not None else None


@dataclass
class _Fault:
    method: str
    pattern: str
    error: HubError | None = None
    times: int | None = 1
    drop: bool = False
    truncate: int | None = None
    flip_byte: int | None = None

    def takes(
        self,
        method: str,
        path: str,
    ) -> bool:
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


def _token(headers: Message) -> str | None:
    scheme, _, token = (headers.get("Authorization") or "").partition(" ")
    return token if scheme == "Bearer" else None


class _Server(ThreadingHTTPServer):
    """Bound at once, so that the port is known, but it listens only after `server_activate`."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        hub: LoopbackHub,
        port: int,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self.hub = hub
        self.connections: set[socket.socket] = set()
        self.server_bind()

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(
        self,
        request: Any,
        client_address: Any,
    ) -> None:
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

    def send(
        self,
        answer: Answer,
        fault: _Fault,
    ) -> None:
        body = fault.spoil(answer.body)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body if fault.drop else body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.close_connection = self.close_connection or fault.drop
