"""`litlora download`, against a server of this machine that answers as the hub does."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import make_base
from conftest import ROOT
from huggingface_hub import constants
from talkers import byte_tokenizer

from litlora.__main__ import main
from litlora.checkpoint import names
from litlora.checkpoint.resolve import resolve
from litlora.commands import download as command
from litlora.errors import UserError

TOKEN = "hf_thisIsASecretOfTheUser"
COMMIT = "c0ffee" + "0" * 34
UNWANTED = {
    "consolidated.safetensors": b"the weights once more",
    "model-q4.gguf": b"GGUF",
    "pytorch_model.bin": b"pickled",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.00.pth": b"pickled",
    "original/params.json": b"{}",
    "training_args.bin": b"pickled",
    "flax_model.msgpack": b"flax",
    "additional_chat_templates/notes.md": b"# notes",
    "additional_chat_templates/old/rag.jinja": b"{{ 1 }}",
    ".gitattributes": b"*.safetensors filter=lfs",
}


class Hub(ThreadingHTTPServer):
    """One model, at one commit. Weights are large files (LFS): redirected to another path of this host."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.gated = self.private = False
        self.breaks: dict[str, list[int]] = {}  # file -> after how many bytes each of its next answers breaks off
        self.status: dict[str, int] = {}  # file -> what it is answered with
        self.stalls: set[str] = set()  # files of which nothing comes until `released`
        self.released = threading.Event()
        self.lies: dict[str, bytes] = {}  # file -> other bytes, of the same length

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def got(self) -> list[str]:
        """The files whose bytes were asked for."""
        return [path.rsplit("/", 1)[1] for method, path, _ in self.requests if method == "GET" and not path.startswith("/api/")]


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".gguf"))


def listed(name: str, data: bytes) -> dict[str, Any]:
    """A file as /api/models lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    large = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 134}
    return {"size": len(data), "blobId": blob} | ({"lfs": large} if is_large(name) else {})


class Answer(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        if path == "/api/agent-harnesses":
            return self.send(404)
        hub.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        known = re.fullmatch(r"/api/models/org/tiny(/revision/(?P<revision>\w+)|/tree/(?P<tree>\w+))?", path)
        token = self.headers.get("Authorization")
        if hub.private and token != f"Bearer {TOKEN}":
            return self.send(401, {"X-Error-Code": "RepoNotFound"})
        if known:
            if (known["revision"] or known["tree"] or "main") not in ("main", COMMIT):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
            if known["tree"]:
                tree = [{"type": "file", "path": name, "oid": info["blobId"]} | info for name, info in self.listing().items()]
                for each in tree:
                    each |= {"lfs": each["lfs"] | {"oid": each["lfs"]["sha256"]}} if "lfs" in each else {}
                return self.send(200, data=json.dumps(tree).encode())
            siblings = [{"rfilename": name} | info for name, info in self.listing().items()]
            return self.send(200, data=json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        where, _, name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/").rpartition("large/")
        if path.startswith("/org/tiny/resolve/") or where:
            if hub.gated and token != f"Bearer {TOKEN}":
                return self.send(401 if token is None else 403, {"X-Error-Code": "GatedRepo"})
            return self.file(name, redirected=bool(where))
        return self.send(404, {"X-Error-Code": "RepoNotFound"})

    def listing(self) -> dict[str, dict[str, Any]]:
        return {name: listed(name, data) for name, data in self.server.files.items()}

    def file(self, name: str, *, redirected: bool) -> None:
        hub = self.server
        if name in hub.status and self.command == "GET":
            return self.send(hub.status[name])
        data = hub.files[name]
        etag = listed(name, data).get("lfs", {}).get("sha256") or listed(name, data)["blobId"]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}
        if is_large(name) and not redirected:
            linked = {"Location": f"/large/{name}", "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
            return self.send(302, headers | linked)
        if name in hub.stalls and self.command == "GET":
            hub.released.wait(25)
            hub.stalls.discard(name)
        data, first = hub.lies.get(name, data), 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(asked[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        breaks = hub.breaks.get(name, []) if self.command == "GET" else []
        self.send(206 if first else 200, headers, data[first:], cut=breaks.pop(0) if breaks else None)

    def send(self, status: int, headers: dict[str, str] | None = None, data: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data if cut is None else data[:cut])
        if cut is not None:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a Llama in two shards, as a model's authors would publish it."""
    place = byte_tokenizer(make_base(tmp_path_factory.mktemp("published") / "tiny", shards=2, vocab_size=288))
    more = {"LICENSE": b"Apache-2.0", "README.md": b"# tiny", names.GENERATION_CONFIG: b"{}"}
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())} | more


@pytest.fixture
def hub(model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    server = Hub(dict(model) | UNWANTED)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "cache" / "agents.json"))
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # between two tries
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def run(*words: str) -> int:
    return main(["download", *(words or ("org/tiny",))])


def fetched(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_a_model_is_fetched_whole_and_nothing_but_what_a_base_needs(
    hub: Hub, model: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """The bytes are the published ones, the directory is a base, and no file was asked for that is not read."""
    model = model | {"additional_chat_templates/rag.jinja": b"{{ messages }}"}
    hub.files |= model
    assert run() == 0
    said = capsys.readouterr()
    assert fetched(Path("models/tiny")) == model
    assert not {name for _, path, _ in hub.requests for name in UNWANTED if path.endswith("/" + name)}
    assert said.out == "models/tiny\n"
    assert "litlora finetune lora --checkpoint_dir models/tiny --data" in said.err and "litlora inspect models/tiny" in said.err
    assert f"fetched {len(model)} files" in said.err
    assert resolve("models/tiny").kind == "base" and len(set(resolve("models/tiny").shards().values())) == 2


@pytest.mark.parametrize(("method", "code"), [("fp8", 0), ("mxfp4", 0), ("gptq", 2)])
def test_a_quantised_model_is_fetched_where_convert_makes_it_plain(
    method: str, code: int, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Caught: refused before it could be converted; one that nothing reads fetched; told to be trained on."""
    hub.files[names.CONFIG] = json.dumps(json.loads(hub.files[names.CONFIG]) | {"quantization_config": {"quant_method": method}}).encode()
    assert run() == code
    said = capsys.readouterr().err
    assert ("next: litlora convert models/tiny --to hf --out_dir models/tiny-plain" in said) is (code == 0)
    assert "finetune" not in said and ("GPTQ" in said) is (code == 2)


def test_a_complete_directory_is_left_alone_and_no_other_model_goes_into_it(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    before, hub.requests = fetched(Path("models/tiny")), []
    assert run() == 0
    assert "complete" in capsys.readouterr().err and not hub.requests
    assert run("org/other", "--out_dir", "models/tiny") == 2
    assert "holds org/tiny" in capsys.readouterr().err
    assert run("org/tiny", "--revision", "other") == 2
    assert "--out_dir another directory" in capsys.readouterr().err
    shutil.rmtree("models/tiny/.cache")  # as if it had been fetched by other means
    assert run() == 0
    assert "complete" in capsys.readouterr().err
    (Path("models/tiny") / names.CONFIG).write_text("{}")
    assert run() == 2
    assert "holds another model: its config.json" in capsys.readouterr().err
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    assert run("org/tiny", "--out_dir", "mine") == 2
    assert "is not empty" in capsys.readouterr().err
    assert fetched(Path("mine")) == {"letter.txt": b"dear"} and fetched(Path("models/tiny")) == before | {names.CONFIG: b"{}"}


@pytest.mark.parametrize("recorded", [True, False])
def test_only_what_is_not_there_is_asked_for(hub: Hub, model: dict[str, bytes], recorded: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether an earlier `litlora download` left the rest, or something else. Caught: every file asked for, whatever is there."""
    assert run() == 0
    capsys.readouterr()
    Path("models/tiny", names.TOKENIZER).unlink()
    if not recorded:
        shutil.rmtree("models/tiny/.cache")
    hub.requests = []
    assert run() == 0
    first = {names.CONFIG, names.WEIGHTS_INDEX}  # read to see what is needed, into another place
    asked = {path.rsplit("/", 1)[1] for _, path, _ in hub.requests if not path.startswith("/api/")}
    assert asked - first == {names.TOKENIZER}
    assert "result    models/tiny: 1 file, " in (said := capsys.readouterr().err) and f"; {len(model) - 1} are there already" in said, said


def test_a_dropped_connection_goes_on_with_a_range_request(hub: Hub, model: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a file is not fetched twice, and the bytes are the same."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    shard = names.shard_name(1, 2)
    hub.breaks[shard] = [1000, 500]
    assert run() == 0
    ranges = [headers.get("range") for method, path, headers in hub.requests if method == "GET" and path.endswith(shard)]
    assert ranges == [None, "bytes=1000-", "bytes=1500-"]
    assert fetched(Path("models/tiny")) == model


def test_an_interrupted_download_is_no_model_and_goes_on_where_it_was(
    hub: Hub, model: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    """F13: a directory that lacks a shard is refused by name; the same command fetches that shard and nothing else."""
    shard = names.shard_name(2, 2)
    hub.status[shard] = 404
    assert run() == 1
    error = capsys.readouterr().err
    assert "error: org/tiny: " in error and "the same command goes on" in error
    with pytest.raises(UserError, match="the download of org/tiny was not finished") as refused:
        resolve("models/tiny")
    assert refused.value.hint == "go on with it: litlora download org/tiny --out_dir models/tiny"
    leftover = Path("models/tiny/.cache/huggingface/download/killed.incomplete")
    leftover.write_bytes(b"half")
    hub.status, hub.requests = {}, []
    there = set(fetched(Path("models/tiny")))
    assert shard not in there
    assert run() == 0
    again = {names.CONFIG, names.WEIGHTS_INDEX}  # looked at first, somewhere else
    assert set(hub.got()) - again == set(model) - there - again
    assert fetched(Path("models/tiny")) == model and resolve("models/tiny").kind == "base" and not leftover.exists()


def test_a_download_without_its_tokenizer_is_no_model_either(hub: Hub) -> None:
    """All weights are there, and yet it is not whole."""
    hub.status[names.TOKENIZER] = 404
    assert run() == 1
    assert (Path("models/tiny") / names.shard_name(1, 2)).exists()
    with pytest.raises(UserError, match="not finished"):
        resolve("models/tiny")


def test_bytes_that_are_not_the_hubs_are_found_and_fetched_again(
    hub: Hub, model: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = names.shard_name(1, 2)
    hub.lies[shard] = model[shard][:-1] + bytes([model[shard][-1] ^ 1])
    assert run() == 1
    assert shard in capsys.readouterr().err and not (Path("models/tiny") / shard).exists()
    with pytest.raises(UserError, match="not finished"):
        resolve("models/tiny")
    hub.lies = {}
    assert run() == 0 and fetched(Path("models/tiny")) == model


def test_the_token_is_sent_and_never_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A gated and a private model: a clear word without HF_TOKEN, and its bytes with it."""
    hub.gated = True
    assert run() == 2
    assert "is gated" in capfd.readouterr().err and not Path("models").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_ofAnotherAccount")
    assert run() == 2
    said = capfd.readouterr()
    assert "is gated" in said.err and "hf_ofAnother" not in said.err + said.out
    hub.private = True
    assert run() == 2
    said = capfd.readouterr()
    assert "no such model" in said.err and "HF_TOKEN" in said.err and "hf_ofAnother" not in said.err + said.out
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.requests = []
    assert run() == 0
    assert hub.requests and all(headers.get("authorization") == f"Bearer {TOKEN}" for _, _, headers in hub.requests)
    hub.status[names.README] = 500
    shutil.rmtree("models")
    assert run() == 1
    said = capfd.readouterr()
    assert TOKEN not in said.err + said.out
    assert not [path for path in Path().rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["org/nothing"], "no such model"),
        (["org/tiny", "--revision", "v9"], "no revision 'v9'"),
        (["org/tiny/more"], "no name of a model"),
        (["org/ti..ny"], "no name of a model"),
        ([], "which model?"),
    ],
)
def test_what_the_hub_does_not_have_is_said_before_anything_is_written(
    hub: Hub, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["download", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and "hint: " in error and not Path("models").exists()


def test_a_server_that_is_gone_is_said_quickly(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", address := f"http://127.0.0.1:{free.getsockname()[1]}")
    assert run() == 1
    error = capsys.readouterr().err
    assert f"{address} cannot be reached" in error and "HF_ENDPOINT" in error and not Path("models").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run() == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err and not Path("models").exists()


def test_what_litlora_cannot_read_is_not_fetched(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """A family that is not known, a directory without weights, an adapter: known before gigabytes have come."""
    published = dict(hub.files)
    hub.files = published | {names.CONFIG: json.dumps({"model_type": "mamba"}).encode()}
    assert run() == 2
    assert "mamba" in capsys.readouterr().err
    hub.files = {name: data for name, data in published.items() if not name.endswith((".safetensors", ".bin", names.WEIGHTS_INDEX))}
    assert run() == 2
    assert "found: model-q4.gguf" in capsys.readouterr().err
    hub.files = {names.ADAPTER_CONFIG: b"{}", names.ADAPTER_WEIGHTS: b""}
    assert run() == 2
    assert "is an adapter" in capsys.readouterr().err
    index = {"weight_map": {"a": "../../evil.safetensors"}}
    hub.files = published | {names.WEIGHTS_INDEX: json.dumps(index).encode()}
    assert run() == 2
    assert "evil" in capsys.readouterr().err
    hub.files = {name: data for name, data in published.items() if name != names.shard_name(2, 2)}
    assert run() == 2
    assert f"names {names.shard_name(2, 2)}, which is not there" in capsys.readouterr().err
    assert not Path("models").exists()


def test_one_file_of_weights_goes_before_shards_and_pickled_ones_come_last(
    hub: Hub, model: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    shards = {name for name in model if name.startswith("model")}
    hub.files[names.WEIGHTS] = b"one file"
    assert run() == 0
    assert set(fetched(Path("models/tiny"))) == set(model) - shards | {names.WEIGHTS}
    hub.files = {name: data for name, data in hub.files.items() if not name.endswith((".safetensors", names.WEIGHTS_INDEX))}
    assert run("org/tiny", "--out_dir", "old") == 0
    assert set(fetched(Path("old"))) == set(model) - shards | {names.PICKLED_WEIGHTS}
    assert "litlora convert old --to hf" in capsys.readouterr().err


def test_a_full_disk_is_said_before_and_during(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as small:
        small.setattr("litlora.checkpoint.commit.free_bytes", lambda _: 2**24)
        assert run() == 2
    assert "the disk is full" in capsys.readouterr().err and not Path("models").exists()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "fetch", full)
    assert run() == 1
    error = capsys.readouterr().err
    assert "the disk is full" in error and "the same command goes on" in error and "--resume" not in error


def test_an_interrupt_says_how_to_go_on(hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "check_bytes", interrupted)
    assert run() == 130
    assert "go on with: litlora download org/tiny --out_dir models/tiny" in capsys.readouterr().err
    with pytest.raises(UserError, match="not finished"):
        resolve("models/tiny")


def test_the_real_command_honours_hf_endpoint_and_stops_at_once(hub: Hub, model: dict[str, bytes], tmp_path: Path) -> None:
    """In a process of its own: Ctrl-C in the middle of a file does not wait for its end, and the same command goes on."""
    environment = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"PYTHONPATH": str(ROOT)}
    shard = names.shard_name(2, 2)
    hub.stalls.add(shard)
    words = [sys.executable, "-m", "litlora", "download", "org/tiny", "--out_dir", "here"]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 60
        while shard not in hub.got() and process.poll() is None and time.monotonic() < deadline:
            hub.released.wait(0.02)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 130, said
    assert "go on with: litlora download org/tiny --out_dir here" in said and TOKEN not in said and "Traceback" not in said
    assert hub.stalls == {shard}  # the server had not gone on
    hub.released.set()
    assert run("org/tiny", "--out_dir", "here") == 0 and fetched(Path("here")) == model


def test_without_huggingface_hub_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run() == 2
    assert 'pip install "litlora[download]"' in capsys.readouterr().err
