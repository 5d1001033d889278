"""Uploading: against a server that speaks the Hub's few endpoints, and never unasked."""

import base64
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import ModelCard, constants

from distill.errors import UserError
from distill.export.exporting import export_folder
from distill.export.formats import Options
from tests.distill.export.made_run import make_run


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made"))


class Hub:
    """What the server was asked for and what it was given; ``status`` other than 200 refuses to make repositories."""

    def __init__(self) -> None:
        self.made: list[dict] = []
        self.files: dict[str, bytes] = {}
        self.commits = 0
        self.status = 200
        self.tokens: set[str | None] = set()

    def answer(self, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            return self.status, {"url": f"{constants.ENDPOINT}/org/made", "error": "no"}
        if path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            return 200, {"warnings": [], "errors": []}
        if path == "/api/models/org/made/preupload/main":
            plain = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [plain | {"path": file["path"]} for file in json.loads(body)["files"]]}
        if path == "/api/models/org/made/commit/main":
            self.commits += 1
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files |= {file["path"]: base64.b64decode(file["content"]) for file in files}
            return 200, {
                "commitUrl": f"{constants.ENDPOINT}/org/made/commit/0",
                "commitOid": "0" * 40,
                "pullRequestUrl": None,
            }
        return 404, {"error": path}


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine that the client takes for the real one."""
    here = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            here.tokens.add(self.headers.get("Authorization"))
            status, answer = here.answer(self.path.partition("?")[0], self._body())
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.send_error(404)

        def _body(self) -> bytes:
            if (length := self.headers.get("Content-Length")) is not None:
                return self.rfile.read(int(length))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    yield here
    server.shutdown()
    server.server_close()


def test_the_hub_gets_what_the_folder_holds_and_nothing_else(hub, student, tmp_path):
    out = tmp_path / "out"
    lines = export_folder(student, out, to="standalone", options=Options(push="org/made", private=True))
    (made,) = hub.made
    assert (made["organization"], made["name"]) == ("org", "made")
    # What the client makes of private=True depends on its version.
    assert made.get("private") is True or made.get("visibility") == "private"
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.commits == 1
    assert hub.tokens == {"Bearer hf_of_this_test"}
    assert 'from_pretrained("org/made"' in hub.files["README.md"].decode()
    assert lines[-1].startswith("uploaded to http://127.0.0.1")


@pytest.mark.parametrize(("status", "why"), [(401, "token is not known"), (403, "token may not write")])
def test_a_refusal_says_why_and_leaves_the_export(hub, student, tmp_path, status, why):
    hub.status = status
    with pytest.raises(UserError, match=f"refuses org/made: the {why}.*hf upload org/made"):
        export_folder(student, tmp_path / "out", to="standalone", options=Options(push="org/made"))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not hub.files


def test_no_network_says_so_and_leaves_the_export(student, tmp_path, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    with pytest.raises(UserError, match=r"was not uploaded to http://127\.0\.0\.1.*The export is whole in"):
        export_folder(student, tmp_path / "out", to="standalone", options=Options(push="org/made"))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_what_cannot_be_pushed_is_said_before_anything_is_written(student, tmp_path, monkeypatch):
    def push(repository: str, **options: bool) -> None:
        export_folder(student, tmp_path / "out", to="standalone", options=Options(push=repository, **options))

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match="needs a token"):
        push("org/made")
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    with pytest.raises(UserError, match="give ORG/NAME"):
        push("made")
    with pytest.raises(UserError, match="leave --no-verify out"):
        push("org/made", verify=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        push("org/made")
    assert not (tmp_path / "out").exists()


def test_nothing_touches_the_network_unasked(tmp_path, monkeypatch):
    """With a teacher of the Hub, whose card would be worth asking for."""
    student = make_run(tmp_path / "run", teacher_path="org/teacher-1b", last="convert")

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    for to in ("standalone", "granite"):
        export_folder(student, tmp_path / to, to=to, options=Options())
        assert (tmp_path / to / "README.md").is_file()
