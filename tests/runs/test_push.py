"""Uploading, to a stand-in for the Hub on this machine: what arrives, and what is said where it refuses."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from structprune import UserError, load_model, save_pruned
from structprune.runs.push import push_directory


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files asks."""

    files: dict[str, bytes]
    made: list[dict]
    address: str
    token = "hf_right"

    def log_message(self, *given):
        pass

    def answer(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        known = self.headers.get("Authorization") == f"Bearer {self.token}"
        self.answer(200 if known else 401, {"name": "me", "type": "user", "orgs": []} if known else {"error": "no"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {self.token}":
            self.answer(401, {"error": "Unauthorized"})
        elif self.path == "/api/repos/create":
            self.made.append(json.loads(body))
            self.answer(200, {"url": f"{self.address}/me/small", "name": "me/small"})
        elif "/preupload/" in self.path:
            names = [each["path"] for each in json.loads(body)["files"]]
            self.answer(
                200, {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        else:
            assert "/commit/" in self.path, self.path
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({each["path"]: base64.b64decode(each["content"]) for each in files})
            self.answer(
                200, {"commitUrl": f"{self.address}/me/small/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
            )


@pytest.fixture
def hub():
    """A running stand-in, with what it received in `files` and `made`."""
    handler = type("OwnHub", (Hub,), {"files": {}, "made": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path) -> Path:
    files = {"README.md": 'from_pretrained("PATH")\n', "report.json": {"ratio": 0.5}}
    return save_pruned(load_model(tiny_checkpoint()), tmp_path / "small", files=files)


def run(hub, tmp_path, *arguments: str, token: str = "hf_right") -> subprocess.CompletedProcess:
    """structprune in a process of its own, whose Hub is the stand-in."""
    surroundings = {"HF_ENDPOINT": hub.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    surroundings |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home"), "no_proxy": "*"}
    command = [sys.executable, "-m", "structprune", "export", *arguments]
    return subprocess.run(command, env=os.environ | surroundings, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_directory_arrives_whole_with_its_place_in_the_card(hub, checkpoint, tmp_path):
    (checkpoint / ".cache").mkdir()
    (checkpoint / ".cache" / "x").write_text("left out")
    done = run(hub, tmp_path, str(checkpoint), "--push", "me/small", "--private")
    assert done.returncode == 0, done.stderr
    [made] = hub.made
    assert (made["name"], made["organization"]) == ("small", "me") and "Uploaded to" in done.stdout
    assert made.get("private") is True or made.get("visibility") == "private"  # by the release of the client
    names = {path.name for path in checkpoint.iterdir() if path.is_file()}
    assert set(hub.files) == names and "model.safetensors" in names
    assert hub.files["README.md"] == b'from_pretrained("me/small")\n'
    assert (checkpoint / "README.md").read_text() == 'from_pretrained("PATH")\n'
    assert all(hub.files[name] == (checkpoint / name).read_bytes() for name in names - {"README.md"})


@pytest.mark.slow
def test_an_export_is_uploaded(hub, checkpoint, tmp_path):
    done = run(hub, tmp_path, str(checkpoint), "--out", str(tmp_path / "out"), "--compat", "official", "--push", "me/x")
    assert done.returncode == 0, done.stderr
    assert json.loads(hub.files["config.json"])["model_type"] == "llada"


@pytest.mark.slow
def test_a_wrong_token_is_refused_before_anything_is_written(hub, checkpoint, tmp_path):
    done = run(hub, tmp_path, str(checkpoint), "--out", str(tmp_path / "out"), "--push", "me/x", token="hf_wrong")
    assert done.returncode == 2 and "the Hub does not know you" in done.stderr and "hf auth login" in done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "out").exists() and not hub.files


def test_what_is_no_checkpoint_is_not_uploaded(tmp_path):
    with pytest.raises(UserError, match="--push uploads a checkpoint directory, and .* is none"):
        push_directory(tmp_path, "me/small")
