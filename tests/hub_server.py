"""A Hub on the loopback interface for the real huggingface_hub client: repositories, commits, large files, faults.

with Hub(folder) as hub:
    hub.add("org/base", path)                       a repository with a folder's files, as its first commit
    hub.fault("GET", r"/resolve/", status=503, times=2)
    ... run anything with HF_ENDPOINT=hub.url, HF_TOKEN=WRITER
    hub.requests                                    what was asked for, and how many bytes went each way

Large files are kept by their SHA-256 and travel by LFS. With ``xet`` on, the client is sent to a content-addressed
store in a local folder (``local://``), which hf_xet itself reads and writes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER = "hf_loopbackwriter", "hf_loopbackreader"
"""Tokens: one may write to every repository, one may read private ones."""

LARGE = (".safetensors", ".bin", ".model")
"""What the names of large files end with."""


@dataclass(frozen=True)
class File:
    """A file of a commit: its Git object's name, its size and, if it is large, its SHA-256."""

    oid: str
    size: int
    content: bytes = b""
    sha256: str | None = None


class Sparse:
    """Some bytes, and then zeros up to a size, of which only what is asked for is made."""

    def __init__(self, head: bytes, size: int) -> None:
        self._head, self._size = head, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, span: slice) -> bytes:
        start, stop, _ = span.indices(self._size)
        known = self._head[start:stop]
        return known + bytes(max(0, stop - start) - len(known))


@dataclass
class Repository:
    """Commits by their names, each a mapping of paths to files, and what branches, tags and requests point at."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, File], ref: str, message: str) -> str:
        text = json.dumps([sorted((path, file.oid) for path, file in files.items()), ref, len(self.commits)])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.refs[ref], self.messages[name] = files, name, message
        return name

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Request:
    """One request: ``received`` and ``sent`` are bytes of bodies, ``span`` the range that was asked for."""

    method: str
    path: str
    query: dict[str, list[str]]
    span: str | None
    agent: str
    authorized: bool
    status: int = 0
    received: int = 0
    sent: int = 0
    body: Any = None
    began: float = 0.0
    ended: float = 0.0


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of a kind."""

    method: str
    pattern: str
    status: int | None
    code: str | None
    drop_after: int | None
    wait: float
    act: Callable[[], None] | None
    times: int


class Answer(Exception):
    """Ends the handling of a request early."""

    def __init__(
        self, status: int, code: str | None = None, message: str | None = None, location: str | None = None
    ) -> None:
        self.status, self.code, self.message, self.location = status, code, message, location


class Hub:
    """The server, its repositories and the record of requests."""

    def __init__(self, folder: Path, *, xet: bool = False) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.copies = True
        self.signature = ""
        self.ranges = True
        self.cas = folder / "cas" if xet else None
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ---------------------------------------------------------------------------------------- for tests to use

    def add(self, name: str, folder: Path, *, ref: str = "main", private: bool = False, gated: bool = False) -> str:
        """Commit a folder's files to a repository, which is made if need be; returns the commit."""
        files = {
            path.relative_to(folder).as_posix(): self.keep(path.name, path.read_bytes())
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repository = self.repositories.setdefault(name, Repository(private, gated))
        return repository.commit(files, ref, f"Add {folder.name}")

    def keep(self, name: str, content: bytes) -> File:
        """A file of this content, a large one by its digest."""
        if name.endswith(LARGE) and content:
            sha256 = hashlib.sha256(content).hexdigest()
            self.large[sha256] = content
            return File(pointer_name(sha256, len(content)), len(content), sha256=sha256)
        return File(git_name(content), len(content), content)

    def add_large(self, name: str, path: str, content: Sparse) -> None:
        """Add a file to a repository's last commit that is too large for this machine."""
        repository = self.repositories[name]
        sha256 = hashlib.sha256(f"{name} {path}".encode()).hexdigest()
        self.large[sha256] = content  # type: ignore[assignment]
        files = {**self.files(name), path: File(pointer_name(sha256, len(content)), len(content), sha256=sha256)}
        repository.commit(files, "main", f"Add {path}")

    def content(self, name: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes."""
        return self.bytes_of(self.files(name, revision)[path])

    def files(self, name: str, revision: str = "main") -> dict[str, File]:
        repository = self.repositories[name]
        commit = repository.find(revision)
        assert commit is not None
        return repository.commits[commit]

    def fault(
        self,
        method: str,
        pattern: str,
        *,
        status: int | None = None,
        code: str | None = None,
        drop_after: int | None = None,
        wait: float = 0.0,
        act: Callable[[], None] | None = None,
        times: int = 1,
    ) -> None:
        """Let the next requests of a kind fail, end after so many bytes, wait, or do something first."""
        self.faults.append(Fault(method, pattern, status, code, drop_after, wait, act, times))

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The recorded requests of a kind."""
        return [one for one in list(self.requests) if one.method == method and re.search(pattern, one.path)]

    # --------------------------------------------------------------------------------------------------- inside

    def bytes_of(self, file: File) -> bytes:
        return file.content if file.sha256 is None else self.large[file.sha256]

    def xet_hashes(self) -> dict[str, str]:
        """SHA-256 to xet hash of every file in the content-addressed store, as its shard files tell."""
        found: dict[str, str] = {}
        for shard in (self.cas or Path("/nowhere")).rglob("*.mdb"):
            found |= _read_shard(shard.read_bytes())
        return found

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and fault.times > 0 and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None


def git_name(content: bytes) -> str:
    """The name that Git gives a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def pointer_name(sha256: str, size: int) -> str:
    """The name that Git gives the pointer to a large file."""
    return git_name(f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode())


def _read_shard(raw: bytes) -> dict[str, str]:
    """The files of a shard: a header of 48 bytes, then per file a head, its segments, and perhaps a SHA-256."""
    found, position = {}, 48
    while position + 48 <= len(raw):
        flags, count = struct.unpack_from("<II", raw, position + 32)
        name = "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", raw, position))
        if name == "f" * 64:
            break
        position += 48 + 48 * count * (2 if flags & 1 << 31 else 1)
        if flags & 1 << 30:
            words = struct.unpack_from("<4Q", raw, position)
            found["".join(f"{word:016x}" for word in words)] = name
            position += 48
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for the other side
    wbufsize = 1 << 16
    entry: Request

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_HEAD(self) -> None:
        self._handle("HEAD")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PUT(self) -> None:
        self._handle("PUT")

    def _handle(self, method: str) -> None:
        parts = urlsplit(self.path)
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        self.token = token if token in (WRITER, READER) else None
        agent, span = self.headers.get("user-agent", ""), self.headers.get("range")
        query = parse_qs(parts.query)
        self.entry = Request(method, parts.path, query, span, agent, self.token is not None, began=time.monotonic())
        self.hub.requests.append(self.entry)
        self.fault = self.hub.take_fault(method, parts.path)
        try:
            self._fail()
            if token and self.token is None:
                raise Answer(401, None, "Invalid credentials in Authorization header")
            for verb, pattern, action in ROUTES:
                match = re.fullmatch(pattern, parts.path)
                if match and verb in (method, "GET" if method == "HEAD" else ""):
                    action(self, **{key: unquote(value or "") for key, value in match.groupdict().items()})
                    break
            else:
                raise Answer(404)
        except Answer as answer:
            with contextlib.suppress(OSError):
                self._body()
            headers = {"X-Error-Code": answer.code, "X-Error-Message": answer.message, "Location": answer.location}
            self._send(answer.status, b"", {key: value for key, value in headers.items() if value})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            self.entry.ended = time.monotonic()

    def _fail(self) -> None:
        if self.fault is None:
            return
        time.sleep(self.fault.wait)
        if self.fault.act is not None:
            self.fault.act()
        if self.fault.status is not None:
            raise Answer(self.fault.status, self.fault.code)
        if self.fault.drop_after is not None and self.entry.method in ("PUT", "POST"):
            self.entry.received = len(self.rfile.read(self.fault.drop_after))
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        raise BrokenPipeError

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("content-length") or 0) - self.entry.received)
        if self.headers.get("transfer-encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            body = b"".join(parts)
        self.entry.received += len(body)
        return body

    def _json(self) -> Any:
        self.entry.body = json.loads(self._body() or b"null")
        return self.entry.body

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.entry.status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.entry.method == "HEAD":
            return
        limit = self.fault.drop_after if self.fault else None
        for start in range(0, len(body), 1 << 16):
            block = body[start : start + (1 << 16)][: None if limit is None else max(0, limit - start)]
            self.wfile.write(block)
            self.entry.sent += len(block)
        if limit is not None and limit < len(body):
            self.wfile.flush()
            self._hang_up()

    def _answer(self, value: Any, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    # ------------------------------------------------------------------------------------------------- looking

    def _repository(self, name: str) -> Repository:
        if name in self.hub.renamed:
            raise Answer(307, location=self.path.replace(name, self.hub.renamed[name], 1))
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self.token is None):
            raise Answer(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, name: str, revision: str) -> tuple[str, dict[str, File]]:
        repository = self._repository(name)
        commit = repository.find(revision or "main")
        if commit is None:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def info(self, name: str, revision: str = "") -> None:
        commit, files = self._commit(name, revision)
        repository = self._repository(name)
        facts = {"id": name, "sha": commit, "private": repository.private, "tags": [], "downloads": 0}
        self._answer({**facts, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, name: str, revision: str, inside: str = "") -> None:
        hashes = self.hub.xet_hashes()
        _, files = self._commit(name, revision)
        found = [(path, file) for path, file in files.items() if path.startswith(f"{inside}/" if inside else "")]
        self._answer([self._item(path, file, hashes) for path, file in found])

    def paths_info(self, name: str, revision: str) -> None:
        _, files = self._commit(name, revision)
        form = parse_qs(self._body().decode())
        hashes = self.hub.xet_hashes()
        if self.hub.copies and self.hub.cas is None:
            hashes = {file.sha256: file.sha256 for file in files.values() if file.sha256}
        self._answer([self._item(path, files[path], hashes) for path in form.get("paths", []) if path in files])

    def _item(self, path: str, file: File, hashes: dict[str, str]) -> dict[str, Any]:
        facts: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
        if file.sha256 is not None:
            facts["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            if file.sha256 in hashes:
                facts["xetHash"] = hashes[file.sha256]
        return facts

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self._commit(name, revision)
        if self._repository(name).gated and self.token != WRITER:
            raise Answer(403 if self.token else 401, "GatedRepo", "Access to this model is restricted")
        if path not in files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        file = files[path]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256 is not None:
            headers |= {"ETag": f'"{file.sha256}"', "X-Linked-Etag": f'"{file.sha256}"'}
            headers["X-Linked-Size"] = str(file.size)
            xet = self.hub.xet_hashes().get(file.sha256)
            if xet is not None:
                headers["X-Xet-Hash"] = xet
                headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
        if self.entry.method == "HEAD":
            self._send(200, b"", headers, file.size)
            return
        self._send_range(self.hub.bytes_of(file), headers)

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.entry.span or "")
        if match is None or not self.hub.ranges:
            self._send(200, content, headers)
            return
        start, stop = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        span = {"Content-Range": f"bytes {start}-{stop}/{len(content)}"}
        self._send(206, content[start : stop + 1], {**headers, **span})

    # ------------------------------------------------------------------------------------------------- writing

    def _require_writer(self) -> None:
        if self.token is None:
            raise Answer(401, None, "Invalid username or password.")
        if self.token != WRITER:
            raise Answer(403, None, "you do not have the right to write to this repository")

    def who(self) -> None:
        if self.token is None:
            raise Answer(401, None, "Invalid username or password.")
        self._answer({"type": "user", "name": "me" if self.token == WRITER else "reader"})

    def auth_check(self, name: str, write: str) -> None:
        repository = self._repository(name)
        if write:
            self._require_writer()
        elif repository.gated and self.token != WRITER:
            raise Answer(403, "GatedRepo", "Access to this model is restricted")
        self._answer({})

    def create(self) -> None:
        self._require_writer()
        facts = self._json()
        name = f"{facts['organization'] or 'me'}/{facts['name']}"
        self.hub.renamed.pop(name, None)  # a new repository takes the place of what led to the old one
        there = name in self.hub.repositories
        if not there:
            made = self.hub.repositories[name] = Repository(private=facts.get("visibility") == "private")
            made.commit({".gitattributes": self.hub.keep(".gitattributes", b"")}, "main", "initial commit")
        self._answer({"url": f"{self.hub.url}/{name}", "id": name}, status=409 if there else 200)

    def branch(self, name: str, branch: str) -> None:
        self._require_writer()
        repository = self._repository(name)
        if branch.startswith("refs/"):
            raise Answer(400, None, "Invalid reference for a branch")
        if branch in repository.refs:
            raise Answer(409, None, "Reference already exists")
        repository.refs[branch], _ = self._commit(name, (self._json() or {}).get("startingPoint", ""))
        self._answer({}, status=201)

    def validate(self) -> None:
        content = self._json()["content"]
        good = re.match(r"---\n.*?\n---\n", content, re.DOTALL) and "license: not-a-licence" not in content
        errors = [] if good else [{"message": '"license" must be one of [apache-2.0, ...]'}]
        self._answer({"errors": errors, "warnings": []}, status=200 if good else 400)

    def preupload(self, name: str, revision: str) -> None:
        self._require_writer()
        _, files = self._commit(name, revision)
        answers = []
        for one in self._json()["files"]:
            mode = "lfs" if one["path"].endswith(LARGE) else "regular"
            there = files.get(one["path"])
            known = {} if there is None else {"oid": there.sha256 if mode == "lfs" else there.oid}
            answers.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, **known})
        self._answer({"files": answers})

    def batch(self, name: str) -> None:
        self._require_writer()
        self._repository(name)
        objects = []
        for one in self._json()["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.large:
                upload = {"href": f"{self.hub.url}/lfs/{one['oid']}{self.hub.signature}"}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{one['oid']}/verify"}}
            objects.append(answer)
        self._answer({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        body = self._body()
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400)
        self.hub.large[oid] = body
        self._answer({})

    def verify(self, oid: str) -> None:
        facts = self._json()
        if len(self.hub.large.get(oid, b"")) != facts["size"]:
            raise Answer(404)
        self._answer({})

    def duplicate(self, name: str) -> None:
        self._require_writer()
        self._repository(name)
        files = self._json()["files"]
        failed = [] if self.hub.copies else files
        self._answer({"failed": [{**one, "error": "another storage region"} for one in failed]})

    def token_for_xet(self, name: str) -> None:
        facts = {"casUrl": f"local://{self.hub.cas}", "accessToken": "cas", "exp": int(time.time()) + 3600}
        self._answer(facts, {
            "X-Xet-Cas-Url": str(facts["casUrl"]),
            "X-Xet-Access-Token": "cas",
            "X-Xet-Token-Expiration": str(facts["exp"]),
        })  # fmt: skip

    def commit(self, name: str, revision: str) -> None:
        self._require_writer()
        with self.hub.lock:
            head, files = self._commit(name, revision)
            lines = [json.loads(line) for line in self._body().splitlines() if line.strip()]
            self.entry.body = lines
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != head:
                raise Answer(412, None, "The branch has moved since")
            now = dict(files)
            for line in lines[1:]:
                self._apply(now, line["key"], line["value"])
            repository = self._repository(name)
            numbers = [int(ref.rsplit("/", 1)[1]) for ref in repository.refs if ref.startswith("refs/pr/")]
            number = max(numbers, default=0) + 1 if "create_pr" in self.entry.query else 0
            made = repository.commit(now, f"refs/pr/{number}" if number else revision, lines[0]["value"]["summary"])
        url = f"{self.hub.url}/{name}"
        facts = {"success": True, "commitOid": made, "commitUrl": f"{url}/commit/{made}"}
        self._answer({**facts, **({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {})})

    def _apply(self, files: dict[str, File], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            content = base64.b64decode(value["content"])
            files[path] = File(git_name(content), len(content), content)
        elif key == "lfsFile":
            oid = value["oid"]
            if oid not in self.hub.large and oid not in self.hub.xet_hashes():
                raise Answer(400, None, f"LFS pointer {oid} points to a file that does not exist")
            size = value.get("size") or len(self.hub.large.get(oid, b""))
            files[path] = File(pointer_name(oid, size), size, sha256=oid)
        elif key == "deletedFile":
            del files[path]
        else:
            raise Answer(400)


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", "/api/whoami-v2", _Handler.who),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_NAME}/auth-check(?P<write>/write)?", _Handler.auth_check),
    ("GET", rf"/api/models/{_NAME}/xet-(?:read|write)-token/[^/]*", _Handler.token_for_xet),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>[^/]+)(?:/(?P<inside>.*))?", _Handler.tree),
    ("POST", rf"/api/models/{_NAME}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>[^/]+)", _Handler.commit),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/lfs-files/duplicate", _Handler.duplicate),
    ("GET", rf"/api/models/{_NAME}(?:/revision/(?P<revision>[^/]+))?", _Handler.info),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", r"/lfs/(?P<oid>\w+)/verify", _Handler.verify),
    ("PUT", r"/lfs/(?P<oid>\w+)", _Handler.put),
    ("GET", rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
)


@contextlib.contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Hub]:
    """A Hub for the time of a ``with`` block."""
    with Hub(folder, **options) as hub:
        yield hub
