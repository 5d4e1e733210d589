"""Calibration sets, checkpoints and rows of the tests of whole runs."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_calibration(tmp_path_factory):
    """`tiny_calibration(model, **settings)` -> 4 windows of 32 tokens and 2 held-out ones, at 2 noise levels."""
    from structprune.assets import text_file
    from structprune.calibration.build import load_calibration
    from structprune.config import CalibrationSettings
    from structprune.models.adapter import Adapter
    from structprune.models.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_file("calibration.txt").read_text(encoding="utf-8")[:60_000], encoding="utf-8")

    def make(model, **changes):
        keys = {"source": str(path), "windows": 4, "held_out": 2, "length": 32, "interval": 25} | changes
        adapter, tokenizer = Adapter(model), load_tokenizer(model.source.directory)
        return load_calibration(
            CalibrationSettings(**keys), tokenizer, mask_id=adapter.mask_id, schedule=adapter.family.schedule,
            edges_visible=model.edges_visible, vocabulary=adapter.vocabulary,
        )  # fmt: skip

    return make


@pytest.fixture
def eval_checkpoint(tiny_checkpoint):
    """`eval_checkpoint(family, seed=0, name=None)` -> a tiny checkpoint of 128 positions, its tokenizer with a BOS."""

    def make(family: str = "llada", seed: int = 0, name: str | None = None) -> Path:
        positions = "max_position_embeddings" if family == "dream" else "max_sequence_length"
        made = tiny_checkpoint(family, seed, name=name, **{positions: 128})
        path = made / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
        return made

    return make


@pytest.fixture
def plain_rows():
    """`plain_rows(results)` -> checkpoint -> task -> key -> numbers, without the keys of other rows."""

    def make(results) -> dict:
        return {
            label: {task: {row.key: tuple(sorted(row.parts.items())) for row in rows} for task, rows in tasks.items()}
            for label, tasks in results.rows.items()
        }

    return make


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's interface as an upload of small files asks."""

    files: dict[str, bytes]
    made: list[dict]
    address: str
    token = "hf_right"

    def log_message(self, *given):
        pass

    def answer(self, status: int, content: dict | list) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if "/tree/" in self.path:
            self.answer(200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files])
            return
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
            for line in lines:
                if line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            self.files.update({each["path"]: base64.b64decode(each["content"]) for each in files})
            self.answer(
                200, {"commitUrl": f"{self.address}/me/small/commit/1", "commitOid": "1" * 40, "hookOutput": ""}
            )


@pytest.fixture
def hub(tmp_path):
    """A running stand-in for the Hub: what it received is in `files` and `made`, and `structprune(...)` runs a command
    in a process of its own that takes it for the Hub."""
    handler = type("OwnHub", (Hub,), {"files": {}, "made": []})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    handler.address = f"http://127.0.0.1:{server.server_port}"

    def structprune(*arguments: str, token: str = "hf_right") -> subprocess.CompletedProcess:
        own = {"HF_ENDPOINT": handler.address, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        own |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HOME": str(tmp_path / "home"), "no_proxy": "*"}
        command = [sys.executable, "-m", "structprune", *arguments]
        surroundings = os.environ | own | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=600)

    def server_close() -> None:
        server.shutdown()
        server.server_close()

    handler.structprune, handler.server_close = staticmethod(structprune), staticmethod(server_close)
    yield handler
    server_close()
