"""The Hugging Face hub, by a small one of our own on this machine: what is asked for, what is not, and what is said."""

from __future__ import annotations

import hashlib
import json
import pickle
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.interop.models import one_sentence, ours, same_weights

pytest.importorskip("huggingface_hub")
pytest.importorskip("tokenizers")

from huggingface_hub import constants

from tutorial_lib.core.model import ModelConfig
from tutorial_lib.data.tokenize import ByteTokenizer
from tutorial_lib.interop.hf import save_hf
from tutorial_lib.interop.hub import download, looks_like_hub_id
from tutorial_lib.interop.pretrained import open_pretrained
from tutorial_lib.interop.weights import WeightsError

COMMIT = "c0ffee" + "0" * 34
SMALL = ModelConfig(vocab_size=257, d_model=16, n_heads=2, n_layers=1, d_mlp=24, max_seq_len=32)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as a download takes."""

    repos: dict[str, dict[str, bytes]] = {}
    gated: set[str] = set()
    asked: list[str] = []

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name = "/".join(parts[2:4])
            if name not in self.repos:
                return self.answer(
                    401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                )
            if parts[4:5] == ["tree"]:
                rows = [
                    {
                        "type": "file",
                        "path": file,
                        "size": len(content),
                        "oid": hashlib.sha1(content).hexdigest(),
                    }
                    for file, content in self.repos[name].items()
                ]
                return self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            about = {
                "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0,
                "siblings": [{"rfilename": file} for file in self.repos[name]],
            }  # fmt: skip
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name in self.gated:
            return self.answer(403, b"", X_Error_Code="GatedRepo", X_Error_Message="Access is restricted")
        content = self.repos.get(name, {}).get(file)
        if content is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[type[Hub]]:
    class Mine(Hub):
        repos, gated, asked = {}, set(), []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    point_to(f"http://127.0.0.1:{server.server_address[1]}", tmp_path, monkeypatch)
    yield Mine
    server.shutdown()
    server.server_close()
    thread.join()


def point_to(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        raising=False,
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True, raising=False)


@pytest.fixture
def files(tmp_path) -> dict[str, bytes]:
    folder = save_hf(
        ours(SMALL), tmp_path / "made", ByteTokenizer(["<|eos|>"]), chat_template="{{ messages }}"
    )
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(name: str) -> str:
    with pytest.raises(WeightsError) as error:
        open_pretrained(name)
    assert one_sentence(error.value), str(error.value)
    assert "127.0.0.1" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["somebody/tiny", "Some.body/tiny-0.1B"])
def test_a_model_by_its_name(hub, files, name):
    hub.repos[name] = files
    found = open_pretrained(name)
    assert same_weights(found.model, ours(SMALL)) and found.tokenizer.encode("né") == [110, 195, 169]
    assert found.stop_ids == {256} and found.template.source == "{{ messages }}"
    asked = [line for line in hub.asked if line.startswith("GET") and "resolve" in line]
    assert len(asked) == len(set(asked)) == 4 and all(COMMIT in line for line in asked)
    hub.asked.clear()
    assert same_weights(open_pretrained(name).model, found.model)  # from the cache
    assert not [line for line in hub.asked if line.startswith("GET") and "resolve" in line]


def test_a_model_in_several_files_is_put_together(hub, tmp_path):
    model = ours(SMALL)
    folder = save_hf(model, tmp_path / "shards", ByteTokenizer(["<|eos|>"]), shard_bytes=5000)
    hub.repos["somebody/shards"] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(hub.repos["somebody/shards"]) > 5
    assert same_weights(open_pretrained("somebody/shards").model, model)


def test_nothing_that_could_run_is_downloaded(hub, files):
    pickles = ["pytorch_model.bin", "model.pt", "training_args.bin", "tf_model.h5", "consolidated.00.pth"]
    code = [
        "modeling_evil.py",
        "tokenizer.py",
        "sub/config.json",
        "original/model.safetensors",
        ".gitattributes",
    ]
    hub.repos["somebody/much"] = {**files, **dict.fromkeys(pickles + code, pickle.dumps("x"))}
    folder = download("somebody/much")
    assert {path.name for path in folder.rglob("*") if path.is_file()} == set(files)
    assert not [line for line in hub.asked if line.rpartition("/")[2] in pickles + code]


def test_a_model_that_is_only_a_pickle(hub, files):
    about = {name: content for name, content in files.items() if name != "model.safetensors"}
    hub.repos["somebody/old"] = {**about, "pytorch_model.bin": pickle.dumps("x")}
    assert "no safetensors on the hub" in refused("somebody/old")
    assert not [line for line in hub.asked if "pytorch_model" in line]


def test_a_model_that_is_not_there(hub):
    said = refused("somebody/nobody")
    assert "no file or folder somebody/nobody" in said and "the hub has no model of that name" in said


def test_a_gated_model_says_how_to_get_in(hub, files):
    hub.repos["meta/gated-3.2-1B"] = files
    hub.gated.add("meta/gated-3.2-1B")
    assert "only to those who asked" in refused("meta/gated-3.2-1B")


def test_a_model_of_another_family(hub, files):
    hub.repos["somebody/mamba"] = {**files, "config.json": b'{"model_type": "mamba"}'}
    assert "'mamba'" in refused("somebody/mamba")


def test_without_a_network_the_cache_serves(hub, files, tmp_path, monkeypatch):
    hub.repos["somebody/tiny"] = files
    open_pretrained("somebody/tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{free.getsockname()[1]}", tmp_path, monkeypatch)
    assert same_weights(open_pretrained("somebody/tiny").model, ours(SMALL))  # what is in the cache is there
    said = refused("somebody/other")
    assert "no file or folder somebody/other, nor such a model in the cache" in said and "network" in said


@pytest.mark.slow  # it tries again a few times
def test_a_download_that_breaks_off(hub, files, monkeypatch):
    """Half of the bytes, then silence: nothing is left that would count as the file."""
    hub.repos["somebody/tiny"] = files
    whole = hub.answer

    def half(self, status, content=b"", **headers):
        if self.command == "GET" and self.path.endswith("model.safetensors"):
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        whole(self, status, content, **headers)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "answer", half)
        assert "could not be downloaded" in refused("somebody/tiny")
    assert same_weights(open_pretrained("somebody/tiny").model, ours(SMALL))


def test_names_that_are_no_names(hub):
    for name in ("a/b/c", "../secret", "a/..b", "/etc/passwd", "a", "a/", "a b/c", "a/b\n", "http://a/b"):
        assert not looks_like_hub_id(name), name
    assert looks_like_hub_id("Qwen/Qwen3-0.6B") and looks_like_hub_id("meta-llama/Llama-3.2-1B")
    for name in ("runs/none.ckpt", "runs/none.gguf", "runs/none.bin", "runs/none.safetensors"):
        with pytest.raises(ValueError) as error:
            open_pretrained(name)
        assert one_sentence(error.value)
    assert not hub.asked
