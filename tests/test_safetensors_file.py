"""Safetensors without torch: the header is believed in nothing, and numbers are rounded once."""

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litlora.errors import UserError
from litlora.safetensors_file import HEADER_LIMIT, SafetensorsFile, from_float32, header_bytes, to_float32, write_safetensors

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with this header, sound or not: an object, or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refusal_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        SafetensorsFile(path)
    assert caught.value.where == str(path), "the file is not named"
    return str(caught.value)


# ---- reading and writing ---------------------------------------------------------------------------------------------


def test_what_is_written_is_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    """The same bytes, so that nobody can tell who wrote a file."""
    tensors = {"b.weight": torch.randn(5, 7).bfloat16(), "a": torch.randn(3), "z": torch.arange(4), "half": torch.randn(2, 2, 3).half()}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with SafetensorsFile(tmp_path / "theirs") as file:
        contents = {name: (info.dtype, info.shape, bytes(file.bytes(name))) for name, info in file.tensors.items()}
        write_safetensors(tmp_path / "ours", dict(reversed(contents.items())), file.metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())


def test_empty_tensors_and_empty_files_are_sound(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "some", {"none": ("F32", (0, 4), b""), "scalar": ("F32", (), np.float32(2.5).tobytes())})
    with SafetensorsFile(tmp_path / "some") as file:
        assert file.tensors["none"].size == 0
        assert bytes(file.bytes("none")) == b""
        assert file.float32("scalar") == 2.5
        assert list(file.parts("none", memoryview(bytearray(8)))) == []
    write_safetensors(tmp_path / "nothing", {})
    with SafetensorsFile(tmp_path / "nothing") as file:
        assert file.tensors == {}
        assert file.metadata == {}


def test_parts_are_the_bytes_in_order(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": ("U8", (10,), bytes(range(10))), "b": ("U8", (3,), b"xyz")})
    with SafetensorsFile(tmp_path / "file") as file:
        assert [bytes(part) for part in file.parts("a", memoryview(bytearray(4)))] == [
            bytes(range(4)),
            bytes(range(4, 8)),
            bytes(range(8, 10)),
        ]
        assert bytes(file.bytes("b")) == b"xyz"
        assert bytes(file.header()) == (tmp_path / "file").read_bytes()[: file.data_start]


def test_a_view_outlives_the_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "file", {"a": ("U8", (3,), b"abc")})
    with SafetensorsFile(tmp_path / "file") as file:
        view = file.bytes("a")
    assert bytes(view) == b"abc"


def test_the_order_of_the_tensors_can_be_kept() -> None:
    _, places = header_bytes({"z": ("F16", (2,)), "a": ("F32", (2,))}, keep_order=True)
    assert list(places) == ["z", "a"]
    assert places["a"].start == places["z"].end
    _, places = header_bytes({"z": ("F16", (2,)), "a": ("F32", (2,))})
    assert list(places) == ["a", "z"]
    assert places["a"].start % 4 == 0


# ---- headers that nobody should believe ------------------------------------------------------------------------------

UNSOUND = {
    "overlap": ({"a": entry(0, 4), "b": entry(3, 8)}, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(5, 8)}, "hole"),
    "hole at the start": ({"a": entry(1, 8)}, "hole"),
    "bytes left over": ({"a": entry(0, 4)}, "belong to none"),
    "cut short": ({"a": entry(0, 9)}, "cut short"),
    "backwards": ({"a": entry(8, 0, [8])}, "no range"),
    "negative": ({"a": entry(-8, 0)}, "no range"),
    "negative shape": ({"a": entry(0, 8, [-2, -4])}, "whole numbers"),
    "shape of true": ({"a": entry(0, 8, [8, True])}, "whole numbers"),
    "shape of floats": ({"a": entry(0, 8, [8.0])}, "whole numbers"),
    "overflow": ({"a": entry(0, 8, [2**32, 2**32 + 1, 8])}, "needs"),
    "overflow to zero": ({"a": entry(0, 8, [2**63, 2])}, "whole numbers"),
    "too many dimensions": ({"a": entry(0, 8, [1] * 33)}, "whole numbers"),
    "size of another dtype": ({"a": entry(0, 8, [8], "F32")}, "needs 32 bytes"),
    "unknown dtype": ({"a": entry(0, 8, [8], "F7")}, "unknown dtype"),
    "no dtype": ({"a": {"shape": [8], "data_offsets": [0, 8]}}, "exactly"),
    "one key more": ({"a": {**entry(0, 8), "code": "x"}}, "exactly"),
    "no object": ([1, 2], "no JSON object"),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)).encode(),) * 2), "twice"),
    "key twice": (b'{"a":{"dtype":"U8","dtype":"F32","shape":[8],"data_offsets":[0,8]}}', "twice"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, "__metadata__"),
    "not UTF-8": (b'{"\xff":1}', "JSON"),
    "no JSON": (b"{nothing}", "JSON"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON"),
    "a number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", "JSON"),
}


@pytest.mark.parametrize("name", UNSOUND)
def test_an_unsound_header_is_refused_by_the_name_of_its_file(tmp_path: Path, name: str) -> None:
    """S05. (Mutation: each check left out in turn lets its case through.)"""
    header, told = UNSOUND[name]
    assert told in refusal_of(raw_file(tmp_path / "model.safetensors", header, b"\0" * 8))


def test_a_header_longer_than_its_file_is_refused(tmp_path: Path) -> None:
    """S05."""
    assert "claims" in refusal_of(raw_file(tmp_path / "a", {}, length=2**62))
    (tmp_path / "b").write_bytes(b"\0\0\0")
    assert "too few" in refusal_of(tmp_path / "b")
    (tmp_path / "c").write_bytes(b"")
    assert "too few" in refusal_of(tmp_path / "c")


def test_a_zip_that_is_also_a_model_is_refused(tmp_path: Path) -> None:
    """S05: what is appended to a file makes another file of it."""
    import zipfile

    write_safetensors(tmp_path / "both", {"a": ("U8", (3,), b"abc")})
    with zipfile.ZipFile(tmp_path / "both", "a") as archive:
        archive.writestr("code.py", "print()")
    assert "belong to none" in refusal_of(tmp_path / "both")


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path) -> None:
    """S04."""
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in refusal_of(tmp_path / "fifo")
    assert "no regular file" in refusal_of(tmp_path)
    assert "cannot be opened" in refusal_of(tmp_path / "absent")
    assert "no regular file" in refusal_of(Path("/dev/zero"))


def test_enormous_headers_cost_little(tmp_path: Path) -> None:
    """S05: 99 MB of JSON and a million tensors: a typed error, less than 300 MB of memory, less than 5 seconds."""
    million = b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(1_000_000)) + b"}"
    files = [raw_file(tmp_path / "million", million), raw_file(tmp_path / "99MB", b"{" + b" " * (99 * 2**20 - 2) + b"}")]
    largest = b'{"a":' + b"[" + b"[]," * ((HEADER_LIMIT - 16) // 3) + b"[]]}"
    files.append(raw_file(tmp_path / "largest", largest))
    code = """
import resource, sys
from litlora.errors import UserError
from litlora.safetensors_file import SafetensorsFile
for path in sys.argv[1:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        SafetensorsFile(path)
    except UserError:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, *map(str, files)], capture_output=True, text=True, cwd=ROOT, check=True)
    grown = [int(line) / 1024 for line in done.stdout.split()]
    assert len(grown) == 3, "one of them was taken for a model"
    assert max(grown) < 300, grown
    assert time.monotonic() - start < 15


@given(st.binary(max_size=200))
def test_no_bytes_at_all_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """S05: a refusal or a file, never another exception."""
    path = tmp_path_factory.mktemp("fuzz") / "file"
    path.write_bytes(struct.pack("<Q", len(data)) + data)
    with contextlib.suppress(UserError):
        SafetensorsFile(path).close()


# ---- numbers ---------------------------------------------------------------------------------------------------------


def all_kinds_of_floats() -> np.ndarray:
    """Every upper half of an fp32, each with the lower halves around a tie of bf16 (and some at random)."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    random = np.random.default_rng(0).integers(0, 2**16, 2**16, dtype=np.uint32)
    return np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, random)]).view(np.float32)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_rounding_is_torchs_for_every_kind_of_number(dtype: str) -> None:
    """N04: to the nearest, ties to even; denormals, infinities and NaN included. (Mutations: truncation; 0x8000 for 0x7FFF + odd.)"""
    values = all_kinds_of_floats()
    stored = from_float32(values, dtype)
    theirs = torch.from_numpy(values).to(TORCH[dtype])
    ours = torch.frombuffer(bytearray(stored), dtype=TORCH[dtype])
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0, torch.inf, -torch.inf), theirs.nan_to_num(7.0, torch.inf, -torch.inf))
    assert torch.equal(ours.signbit()[~ours.isnan()], theirs.signbit()[~theirs.isnan()])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_stored_number_comes_back_exactly(dtype: str) -> None:
    raw = np.arange(2**16, dtype=np.uint16)
    ours = to_float32(raw.tobytes(), dtype, (256, 256))
    theirs = torch.from_numpy(raw.view(np.int16)).view(TORCH[dtype]).float().view(256, 256).numpy()
    assert ours.shape == (256, 256)
    assert np.array_equal(ours, theirs, equal_nan=True)
    finite = ~np.isnan(ours)
    again = np.frombuffer(from_float32(ours, dtype), np.uint16).reshape(256, 256)
    assert np.array_equal(again[finite], raw.reshape(256, 256)[finite])
