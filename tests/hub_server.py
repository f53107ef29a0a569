"""A local Hugging Face Hub for tests: the part of the Hub's HTTP protocol that `huggingface_hub` uses.

It is a real server in a thread. A client in another process sees sockets, redirects, ranges, broken connections and
status codes as on the Internet. Large files are on disk, as in the Hub's LFS storage.

```python
with LoopbackHub(folder) as hub:
    hub.add_repository("author/name", {"config.json": b"{}", "model.safetensors": path})
    subprocess.run(command, env={**os.environ, **hub.environment(cache)})
```
"""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml


DATE = "2026-01-01T00:00:00.000Z"
LFS_SUFFIXES = (".safetensors", ".pth", ".png", ".bin")
BLOCK = 1 << 20


@dataclasses.dataclass
class Blob:
    """Contents of a file: on disk, with the git hash of a small file or the SHA-256 of a large (LFS) one."""

    path: Path
    size: int
    oid: str
    large: bool


@dataclasses.dataclass
class Commit:
    oid: str
    title: str
    files: dict  # path in the repository -> Blob


@dataclasses.dataclass
class Repository:
    commits: list
    tags: dict = dataclasses.field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def find(self, revision):
        """The commit of a branch, tag or complete hash; `None` if there is none."""
        if revision == "main":
            return self.commits[-1]
        wanted = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit.oid == wanted), None)


@dataclasses.dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD /path" matches `pattern`."""

    pattern: str
    status: int | None = None  # answer with this status
    code: str | None = None  # and this X-Error-Code
    cut_after: int | None = None  # send this many bytes of the body, then close the connection
    cut_before_answer: bool = False  # handle the request, then close the connection without an answer
    corrupt: bool = False  # send wrong bytes, as many as announced
    times: int = 1


class LoopbackHub:
    """The server. `requests` lists the requests as "METHOD /path". `faults` lists the faults of the next requests."""

    def __init__(self, folder, token="hf_loopback"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.token = token
        self.repositories = {}
        self.requests = []
        self.faults = []
        self.lock = threading.RLock()

    def __enter__(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        port = self.server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home, token=True):
        """Environment variables that make a client process use this server, with its cache under `home`."""
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return variables | ({"HF_TOKEN": self.token} if token else {})

    def store(self, source, large):
        """Stores bytes or links a file. Returns its `Blob`."""
        data = source if isinstance(source, bytes) else None
        if data is not None and not large:
            oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        else:
            digest = hashlib.sha256(data or b"")
            if data is None:
                with open(source, "rb") as file:
                    while block := file.read(BLOCK):
                        digest.update(block)
            oid = digest.hexdigest()
        path = self.folder / oid
        if not path.exists():
            if data is None:
                path.symlink_to(Path(source).absolute())
            else:
                path.write_bytes(data)
        return Blob(path, path.stat().st_size, oid, large)

    def add_repository(self, name, files, revision=None, private=False, gated=False):
        """Adds a repository with one commit. Files are bytes, or paths of files, which are not copied."""
        blobs = {path: self.store(source, path.endswith(LFS_SUFFIXES)) for path, source in files.items()}
        oid = revision or hashlib.sha1(name.encode()).hexdigest()
        self.repositories[name] = Repository([Commit(oid, "first", blobs)], private=private, gated=gated)
        return oid

    def forget_large_files(self):
        """Deletes all large files, so that clients upload them again."""
        for path in self.folder.iterdir():
            if len(path.name) == 64:
                path.unlink()

    def files(self, name, revision="main"):
        """Contents of a repository's small files and the size of its large ones, by path."""
        commit = self.repositories[name].find(revision)
        return {path: blob.size if blob.large else blob.path.read_bytes() for path, blob in commit.files.items()}

    def take_fault(self, request):
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


class _Refusal(Exception):
    """An error answer. `code` is the value of the Hub's `X-Error-Code`."""

    def __init__(self, status, code=None, message=""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/tag/([^/]+)", "tag"),
        ("GET", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/refs", "refs"),
        ("GET", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/commits/([^/]+)", "list_commits"),
        ("GET", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", "tree"),
        ("GET", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)/revision/([^/]+)", "info"),
        ("GET", r"/api/(?:models|datasets|spaces)/([^/]+/[^/]+)", "info"),
        ("POST", r"/(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs-upload/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs-verify", "lfs_verify"),
        ("HEAD|GET", r"/lfs-files/([0-9a-f]{64})", "lfs_download"),
        ("HEAD|GET", r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.fault = self.hub.take_fault(request)
        self.body_read = False
        try:
            if self.fault is not None and self.fault.status is not None:
                raise _Refusal(self.fault.status, self.fault.code, "a fault of the test")
            for methods, pattern, name in self.ROUTES:
                if self.command in methods.split("|") and (match := re.fullmatch(pattern, path)):
                    return getattr(self, name)(*match.groups())
            raise _Refusal(404, message=f"no such address: {path}")
        except _Refusal as refusal:
            self.refuse(refusal)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_POST = do_PUT = do_GET

    # Reading and answering

    def read_blocks(self):
        self.body_read = True
        left = int(self.headers.get("Content-Length", 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
        while left > 0:
            block = self.rfile.read(min(left, BLOCK))
            if not block:
                raise ConnectionResetError
            left -= len(block)
            yield block

    def read_json(self):
        return json.loads(b"".join(self.read_blocks()) or b"{}")

    def answer(self, value, status=200):
        self.send(status, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status, headers, body=b""):
        if self.fault is not None and self.fault.cut_before_answer:
            self.connection.close()
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, refusal):
        if not self.body_read:
            for _ in self.read_blocks():
                pass
        headers = {"Content-Type": "application/json", "X-Error-Message": refusal.message}
        headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
        self.send(refusal.status, headers, json.dumps({"error": refusal.message}).encode())

    # Permissions

    def has_token(self):
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.hub.token}":
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        return sent is not None

    def repository(self, name, write=False):
        repository = self.hub.repositories.get(name)
        allowed = self.has_token()
        if repository is None or (repository.private and not allowed):
            raise _Refusal(404 if allowed else 401, "RepoNotFound", "Repository not found")
        if write and not allowed:
            raise _Refusal(401, message="Invalid username or password.")
        return repository

    def find_commit(self, name, revision):
        commit = self.repository(name).find(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Reading repositories

    def whoami(self):
        if not self.has_token():
            raise _Refusal(401, message="Invalid username or password.")
        self.answer({"type": "user", "name": "author", "auth": {"accessToken": {"role": "write"}}})

    def info(self, name, revision="main"):
        commit = self.find_commit(name, revision)
        repository = self.hub.repositories[name]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        facts = {"id": name, "sha": commit.oid, "private": repository.private, "gated": repository.gated}
        self.answer({**facts, "lastModified": DATE, "siblings": siblings, "tags": []})

    def refs(self, name):
        repository = self.repository(name)
        tags = [{"name": t, "ref": f"refs/tags/{t}", "targetCommit": oid} for t, oid in repository.tags.items()]
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.commits[-1].oid}
        self.answer({"branches": [main], "converts": [], "tags": tags})

    def list_commits(self, name, revision):
        self.find_commit(name, revision)
        commits = self.hub.repositories[name].commits
        facts = {"authors": [{"user": "author"}], "date": DATE, "message": ""}
        self.answer([{"id": commit.oid, "title": commit.title, **facts} for commit in reversed(commits)])

    def tree(self, name, revision, folder=None):
        commit = self.find_commit(name, revision)
        recursive = "recursive=true" in urlsplit(self.path).query.lower()
        entries, inside = [], f"{folder}/" if folder else ""
        for path, blob in sorted(commit.files.items()):
            if not path.startswith(inside):
                continue
            child, _, below = path.removeprefix(inside).partition("/")
            if below and not recursive:
                entry = {"type": "directory", "path": inside + child, "oid": commit.oid, "size": 0}
                if entry not in entries:
                    entries.append(entry)
                continue
            entry = {"type": "file", "path": path, "oid": blob.oid[:40], "size": blob.size}
            if blob.large:
                entry["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": 134}
            entries.append(entry)
        if inside and not entries:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.answer(entries)

    def resolve(self, name, revision, path):
        commit = self.find_commit(name, revision)
        if self.hub.repositories[name].gated and not self.has_token():
            raise _Refusal(401, "GatedRepo", f"Access to model {name} is restricted.")
        headers = {"X-Repo-Commit": commit.oid}
        if path not in commit.files:
            self.send(404, {**headers, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        blob = commit.files[path]
        if blob.large:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": blob.size}
            # Another name of this machine, so that storage is another host for the client, as on the Hub.
            self.send(302, {**headers, "Location": f"{self.hub.storage_url}/lfs-files/{blob.oid}"})
        else:
            self.send_file(blob, headers)

    def lfs_download(self, oid):
        path = self.hub.folder / oid
        self.send_file(Blob(path, path.stat().st_size, oid, True), {})

    def send_file(self, blob, headers):
        start, end, asked = 0, blob.size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            start, end = int(asked[1]), min(int(asked[2] or end - 1) + 1, end)
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{blob.size}"}
        self.send_response(206 if asked else 200)
        facts = {"Content-Length": end - start, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        for name, value in {**facts, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = end - start
        if self.fault is not None and self.fault.cut_after is not None:
            left = min(left, self.fault.cut_after)
            self.close_connection = True
        with open(blob.path, "rb") as file:
            file.seek(start)
            while left > 0:
                block = file.read(min(left, BLOCK))
                left -= len(block)
                self.wfile.write(bytes(len(block)) if self.fault is not None and self.fault.corrupt else block)

    # Writing repositories

    def create(self):
        asked = self.read_json()
        if not self.has_token():
            raise _Refusal(401, message="Invalid username or password.")
        name = f"{asked['organization'] or 'author'}/{asked['name']}"
        with self.hub.lock:
            if name in self.hub.repositories:
                facts = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
                return self.answer(facts, status=409)
            private = asked.get("private") is True or asked.get("visibility") == "private"
            attributes = self.hub.store(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", large=False)
            first = Commit(hashlib.sha1(name.encode()).hexdigest(), "initial commit", {".gitattributes": attributes})
            self.hub.repositories[name] = Repository([first], private=private)
        self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate_yaml(self):
        content = self.read_json()["content"]
        try:
            errors = [] if isinstance(yaml.safe_load(content.split("---")[1]), dict) else ["no metadata"]
        except (yaml.YAMLError, IndexError) as error:
            errors = [str(error)]
        status = 400 if errors else 200
        self.answer({"errors": [{"message": error} for error in errors], "warnings": []}, status)

    def preupload(self, name, revision):
        asked = self.read_json()
        self.repository(name, write=True)
        commit = self.find_commit(name, revision)
        files = []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            there = commit.files.get(file["path"])
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            files[-1]["oid"] = there.oid if there else None
        self.answer({"files": files})

    def lfs_batch(self, name):
        asked = self.read_json()
        self.repository(name, write=True)
        objects = []
        for entry in asked["objects"]:
            answer = {"oid": entry["oid"], "size": entry["size"]}
            if not (self.hub.folder / entry["oid"]).exists():
                upload, verify = f"{self.hub.url}/lfs-upload/{entry['oid']}", f"{self.hub.url}/lfs-verify"
                answer["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
            objects.append(answer)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid):
        partial = self.hub.folder / f"{oid}.partial"
        digest, received = hashlib.sha256(), 0
        with open(partial, "wb") as file:
            for block in self.read_blocks():
                received += len(block)
                if self.fault is not None and self.fault.cut_after is not None and received > self.fault.cut_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != oid:
            raise _Refusal(400, message="the content does not have this hash")
        shutil.move(partial, self.hub.folder / oid)
        self.send(200, {"ETag": f'"{oid}"'})

    def lfs_verify(self):
        asked = self.read_json()
        path = self.hub.folder / asked["oid"]
        if not path.exists() or path.stat().st_size != asked["size"]:
            raise _Refusal(404, message="not uploaded")
        self.answer({})

    def commit(self, name, revision):
        lines = [json.loads(line) for line in b"".join(self.read_blocks()).splitlines()]
        repository = self.repository(name, write=True)
        with self.hub.lock:
            parent = self.find_commit(name, revision)
            header = next(line["value"] for line in lines if line["key"] == "header")
            if header.get("parentCommit") not in (None, parent.oid):
                raise _Refusal(412, message="The repository has moved on since its parent commit")
            files = dict(parent.files)
            for line in lines:
                self.apply(line["key"], line["value"], files)
            names = json.dumps([parent.oid, sorted((path, blob.oid) for path, blob in files.items())])
            oid = hashlib.sha1(names.encode()).hexdigest()
            repository.commits.append(Commit(oid, header["summary"], files))
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def apply(self, key, value, files):
        """One line of a commit: a small file with its content, the name of an uploaded one, or a deletion."""
        if key == "file":
            files[value["path"]] = self.hub.store(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            path = self.hub.folder / value["oid"]
            if not path.exists():
                raise _Refusal(400, message=f"{value['path']} was not uploaded")
            files[value["path"]] = Blob(path, value["size"], value["oid"], True)
        elif key == "deletedFile":
            files.pop(value["path"])

    def tag(self, name, revision):
        asked = self.read_json()
        repository = self.repository(name, write=True)
        commit = self.find_commit(name, revision)
        if asked["tag"] in repository.tags:
            raise _Refusal(409, message="Reference already exists")
        repository.tags[asked["tag"]] = commit.oid
        self.answer({})


class HubClient:
    """
    A Python process that uses the local Hub. `huggingface_hub` reads its endpoint on import, so the tests' own process
    cannot change it.
    """

    PROGRAM = """
import json, sys
answers, sys.stdout, scope = sys.stdout, sys.stderr, {}
for line in sys.stdin:
    try:
        scope["result"] = None
        exec(json.loads(line), scope)
        answer = {"result": scope["result"]}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""

    def __init__(self, environment):
        root = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            env={**os.environ, **environment},
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def answer(self, program):
        """Runs Python statements in the client. Returns {"result": the value of `result`}, or error and message."""
        self.process.stdin.write(json.dumps(program) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def run(self, program):
        """As `answer` for programs that succeed. Returns the result."""
        answer = self.answer(program)
        assert "error" not in answer, answer
        return answer["result"]

    def fail(self, program):
        """As `answer` for programs that fail. Returns "Error: message"."""
        answer = self.answer(program)
        assert "error" in answer, answer
        return f"{answer['error']}: {answer['message']}"

    def close(self):
        self.process.stdin.close()
        self.process.wait()
