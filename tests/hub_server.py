"""A hub on this machine: the parts of its API that huggingface_hub 2.4.0 uses here, and its faults.

Two servers: the hub, and the store ("CDN") on another port to which the hub redirects large files,
as the real one does. Repositories lie in memory. Every request is written down, with the bytes that
were sent for it, so that a test can say what was asked for and what was not.

Read:  GET api/models/R[/revision/V][?blobs], HEAD and GET R/resolve/V/FILE.
Write: POST api/repos/create, preupload, LFS batch, PUT to the store, verify, commit; whoami.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors",)  # stored as LFS objects, whatever their size
TOKEN = "hf_" + "LocalTestTokenThatMustNeverBePrinted"
PIECE = 16 << 10


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Repo:
    """Commits by hash (file name → bytes), branches and tags by name, and who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        text = json.dumps([sorted((n, sha256(d)) for n, d in files.items()), len(self.commits)])
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name], self.refs[branch] = dict(files), name
        return name


@dataclass
class Fault:
    """What goes wrong for requests whose path matches; `times` of them.

    status: answer with it. break_after: cut the connection after that many bytes of the body.
    corrupt: change a byte. delay: seconds before each 16 KiB. no_range: ignore Range. text: answer
    200 with this instead (a proxy's page). body: the refusal's, instead of {"error": …}. endless:
    answer 200 and then the body again and again, as long as it is taken.
    whole: not for a range that has an end, as headers are read.
    """

    path: str
    status: int = 0
    times: float = float("inf")
    break_after: int | None = None
    corrupt: bool = False
    delay: float = 0
    no_range: bool = False
    text: str = ""
    method: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | None = None
    endless: bool = False
    whole: bool = False


@dataclass
class Request:
    """One request as it came, and the bytes of its answer's body."""

    method: str
    path: str
    range: str | None
    authorized: bool
    store: bool
    sent: int = 0
    status: int = 0
    received: int = 0


class Hub:
    """The hub's state, and its two servers while it is entered as a context."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.xet = False  # take uploads by Xet's protocol too, without putting files together,
        self.meant: dict[str, bytes] = {}  # so a test says what they hold, by SHA-256
        self.commits: list[dict] = []  # what was committed: summary and paths

    def __enter__(self) -> Hub:
        self.servers = [serve(self, store=False), serve(self, store=True)]
        self.url, self.store_url = (f"http://127.0.0.1:{s.server_port}" for s in self.servers)
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: dict[str, bytes], **kind: bool) -> Repo:
        """A repository with one commit on main."""
        repo = self.repos[name] = Repo(**kind)
        repo.commit(files)
        return repo

    def asked(self, pattern: str, method: str = "") -> list[Request]:
        """The requests whose path matches."""
        return [r for r in self.requests if re.search(pattern, r.path) and method in ("", r.method)]

    def fault(self, path: str, method: str, part: bool) -> Fault | None:
        """The fault of a request; part: it asks for a range that has an end."""
        for fault in self.faults:
            if part and fault.whole:
                continue
            if fault.times > 0 and re.search(fault.path, path) and fault.method in ("", method):
                fault.times -= 1
                return fault
        return None


def asks_for_part(ranges: str | None) -> bool:
    """True for a range that has an end, as headers are read; not for the rest of a file."""
    return re.fullmatch(r"bytes=\d+-\d+", ranges or "") is not None


def serve(hub: Hub, store: bool) -> ThreadingHTTPServer:
    class Bound(Handler):
        pass

    Bound.hub, Bound.store = hub, store
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    store: bool
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_any()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_any(self) -> None:
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path).strip("/"), parse_qs(split.query)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        login = self.headers.get("Authorization")
        self.note = Request(
            self.command, self.route, self.headers.get("Range"), login is not None, self.store
        )
        self.note.received = len(body)
        self.hub.requests.append(self.note)
        self.login = login == f"Bearer {TOKEN}"
        self.now = self.hub.fault(
            self.route, self.command, asks_for_part(self.headers["Range"])
        ) or Fault("")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if self.now.endless:
                self.pour()
            elif self.now.status:
                self.refuse(self.now.status, **self.now.headers)
            elif self.now.text:
                self.answer(200, self.now.text.encode(), {"Content-Type": "text/html"})
            elif login and not self.login and not self.store:
                message = "Invalid credentials in Authorization header"
                self.refuse(401, **{"X-Error-Message": message})
            else:
                self.dispatch(body)

    def dispatch(self, body: bytes) -> None:
        if self.store:
            return self.do_store(body)
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, self.route):
                return getattr(self, method)(body, **match.groupdict())
        return self.refuse(404)

    # ------------------------------------------------------------------------------- answers

    def refuse(self, code: int, **headers: str) -> None:
        body = json.dumps({"error": f"refused {code}"}).encode()
        self.answer(code, body if self.now.body is None else self.now.body, headers)

    def pour(self) -> None:
        """Answer without end, up to 2 GB."""
        self.note.status = 200
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while self.note.sent < 2 << 30:
            self.wfile.write(self.now.body)
            self.wfile.flush()
            self.note.sent += len(self.now.body)

    def reply(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, code: int, data: bytes, headers: dict[str, str], length: int = -1) -> None:
        self.note.status = code
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length < 0 else length))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(data)
        self.wfile.flush()

    def send_body(self, data: bytes) -> None:
        stop = len(data) if self.now.break_after is None else self.now.break_after
        for start in range(0, min(len(data), stop), PIECE):
            time.sleep(self.now.delay)
            piece = data[start : min(start + PIECE, stop)]
            self.wfile.write(piece)
            self.wfile.flush()
            self.note.sent += len(piece)
        if stop < len(data):
            self.close_connection = True

    # --------------------------------------------------------------------------------- reading

    def find(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """The files of a revision; None, after a refusal, when the caller may not have them."""
        found = self.hub.repos.get(repo)
        if found is None or (found.private and not self.login):
            code = 404 if self.login else 401
            return self.refuse(code, **{"X-Error-Code": "RepoNotFound"})
        self.commit = found.refs.get(revision, revision)
        if self.commit not in found.commits:
            return self.refuse(404, **{"X-Error-Code": "RevisionNotFound"})
        return found.commits[self.commit]

    def entry(self, name: str, data: bytes) -> dict:
        large = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
        entry = {"rfilename": name}
        if "blobs" in self.query:
            entry |= {"size": len(data), "blobId": git_sha1(data)}
            entry |= {"lfs": large} if name.endswith(LARGE) else {}
        return entry

    def model_info(self, _: bytes, repo: str, revision: str | None = None) -> None:
        files = self.find(repo, revision or "main")
        if files is None:
            return
        self.reply({
            "id": repo, "modelId": repo, "sha": self.commit, "private": False, "tags": [],
            "gated": "manual" if self.hub.repos[repo].gated else False,
            "siblings": [self.entry(n, d) for n, d in sorted(files.items())],
        })  # fmt: skip

    def resolve(self, _: bytes, repo: str, revision: str, file: str) -> None:
        files = self.find(repo, revision)
        if files is None:
            return None
        headers = {"X-Repo-Commit": self.commit}
        if self.hub.repos[repo].gated and not self.login:
            return self.refuse(401, **headers, **{"X-Error-Code": "GatedRepo"})
        if file not in files:
            return self.refuse(404, **headers, **{"X-Error-Code": "EntryNotFound"})
        data = files[file]
        if not file.endswith(LARGE):
            return self.send_file(data, headers | {"ETag": f'"{git_sha1(data)}"'})
        oid = sha256(data)
        self.hub.objects[oid] = data
        headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{oid}"'}
        return self.answer(302, b"", headers | {"Location": f"{self.hub.store_url}/{oid}/{file}"})

    def do_store(self, body: bytes) -> None:
        if self.hub.xet and self.route.startswith("v1/"):
            return self.do_xet()
        oid = self.route.split("/")[0]
        if self.command == "PUT":
            if sha256(body) == oid:
                self.hub.objects[oid] = body
            return self.answer(200, b"", {"ETag": f'"{oid}"'})
        if oid not in self.hub.objects:
            return self.refuse(404)
        return self.send_file(self.hub.objects[oid], {"ETag": f'"{oid}"'})

    def do_xet(self) -> None:
        """Xet's store: takes blocks of chunks and lists of files, knows no chunk beforehand."""
        if self.command == "POST" and re.match(r"v1/(xorbs|shards|telemetry)\b", self.route):
            return self.reply({"was_inserted": True, "result": 1})
        return self.refuse(404)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        if self.now.corrupt:
            data = bytes([data[0] ^ 1]) + data[1:]
        size = len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not wanted or self.now.no_range:
            return self.answer(200, data, headers)
        first, last = int(wanted[1]), min(int(wanted[2] or size), size - 1)
        if first >= size:
            return self.refuse(416, **{"Content-Range": f"bytes */{size}"})
        headers |= {"Content-Range": f"bytes {first}-{last}/{size}"}
        return self.answer(206, data[first : last + 1], headers)

    # --------------------------------------------------------------------------------- writing

    def whoami(self, _: bytes) -> None:
        if not self.login:
            return self.refuse(401)
        return self.reply({"type": "user", "name": "user", "auth": {}, "orgs": []})

    def validate(self, body: bytes) -> None:
        self.reply({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        if not self.login:
            return self.refuse(401)
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'user'}/{wanted['name']}"
        url = {"url": f"{self.hub.url}/{name}", "name": name}
        if name in self.hub.repos:
            return self.answer(409, json.dumps(url | {"error": "exists"}).encode(), {})
        self.hub.add(name, {".gitattributes": b""}, private=bool(wanted.get("private")))
        return self.reply(url)

    def writable(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        if not self.login:
            return self.refuse(403)
        return self.find(repo, revision)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        files = self.writable(repo, revision)
        if files is None:
            return
        answers = []
        for file in json.loads(body)["files"]:
            name, old = file["path"], files.get(file["path"])
            large = name.endswith(LARGE)
            oid = None if old is None else sha256(old) if large else git_sha1(old)
            answers.append({"path": name, "uploadMode": "lfs" if large else "regular",
                            "shouldIgnore": False, "oid": oid})  # fmt: skip
        self.reply({"files": answers})

    def batch(self, body: bytes, repo: str) -> None:
        if self.writable(repo) is None:
            return
        objects = []
        for one in json.loads(body)["objects"]:
            new = {"upload": {"href": f"{self.hub.store_url}/{one['oid']}/upload"}}
            actions = {} if one["oid"] in self.hub.objects else {"actions": new}
            objects.append({"oid": one["oid"], "size": one["size"]} | actions)
        self.reply({"transfer": "basic", "objects": objects})

    def xet_token(self, _: bytes, repo: str) -> None:
        """Where hf_xet uploads to, and a token for it, good for an hour."""
        if not self.hub.xet:
            return self.refuse(404)
        expires = int(time.time()) + 3600
        return self.reply({"accessToken": "x", "exp": expires, "casUrl": self.hub.store_url})

    def commit_files(self, body: bytes, repo: str, revision: str) -> None:
        files = self.writable(repo, revision)
        if files is None:
            return None
        files, paths, summary = dict(files), [], ""
        for line in body.splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "header":
                summary = value["summary"]
            elif one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                data = self.hub.objects.get(value["oid"])
                if data is None and self.hub.xet:
                    data = self.hub.meant.get(value["oid"])
                if data is None:
                    return self.refuse(400)
                files[value["path"]] = data[:-1] + b"?" if self.now.corrupt else data
            elif one["key"] == "deletedFile":
                files.pop(value["path"], None)
            paths += [value["path"]] if "path" in value else []
        oid = self.hub.repos[repo].commit(files)
        self.hub.commits.append({"summary": summary, "paths": paths})
        return self.reply(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"}
        )


NAME = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = (
    (r"api/whoami-v2", "whoami"),
    (r"api/repos/create", "create"),
    (r"api/validate-yaml", "validate"),
    (rf"api/models/{NAME}", "model_info"),
    (rf"api/models/{NAME}/revision/(?P<revision>.+)", "model_info"),
    (rf"api/models/{NAME}/preupload/(?P<revision>[^/]+)", "preupload"),
    (rf"api/models/{NAME}/commit/(?P<revision>[^/]+)", "commit_files"),
    (rf"api/models/{NAME}/xet-write-token/.+", "xet_token"),
    (rf"{NAME}\.git/info/lfs/objects/batch", "batch"),
    (rf"{NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", "resolve"),
)
