"""Files are whole or not there, and are read as they were written; a working directory belongs to one experiment, and
what is refused is left as it was."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import changed_bytes
from locks import lock_held_elsewhere

from checkpoints import write_checkpoint
from experiment import files
from experiment.files import (
    claim,
    differences,
    flatten,
    read_array,
    read_arrays,
    read_json,
    write_arrays,
    write_json,
    write_text,
)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_is_made_and_marked(tmp_path):
    folder = claim(tmp_path / "a" / "b", "circles")
    assert folder == tmp_path / "a" / "b"
    assert json.loads((folder / "experiment.json").read_text()) == {"experiment": "circles", "settings": {}}
    assert contents(tmp_path).keys() == {"a/b/experiment.json", "a/b/.lock"}


def test_claiming_again_changes_nothing(tmp_path):
    claim(tmp_path, "circles", {"seed": 1, "radii": (1.0, 2.5)})
    (tmp_path / "results.json").write_text("{}")
    before = contents(tmp_path)
    assert claim(str(tmp_path), "circles", {"radii": (1.0, 2.5), "seed": 1}) == tmp_path
    assert contents(tmp_path) == before


def test_folder_in_use_by_another_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WAIT_SECONDS", 0.0)
    with lock_held_elsewhere(tmp_path / ".lock") as taken:
        assert taken
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by another process"):
            claim(tmp_path, "circles")
        assert not (tmp_path / "experiment.json").exists()
        claim(tmp_path / "other", "circles")
    claim(tmp_path, "circles")
    with lock_held_elsewhere(tmp_path / ".lock") as taken:
        assert not taken


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": "{}"}, "holds a run of main.py"),
        ({"experiment.json": '{"experiment": "squares", "settings": {}}'}, "belongs to the experiment 'squares', not"),
        (
            {"experiment.json": '{"experiment": "circles", "settings": {"seed": 2}}'},
            "holds results of other settings: seed was 2, is 1",
        ),
        ({"experiment.json": '{"experiment": "circ'}, "experiment.json is damaged"),
        ({"experiment.json": '["circles"]'}, "experiment.json is damaged"),
        ({"experiment.json": '{"name": "circles"}'}, "experiment.json is damaged"),
    ],
)
def test_folder_of_something_else_is_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError) as error:
        claim(tmp_path, "circles", {"seed": 1})
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("below", ["", "folder", "folder/folder"])
def test_file_in_the_place_of_a_folder_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="a file, not a folder"):
        claim(tmp_path / "file" / below, "circles")
    assert contents(tmp_path) == {"file": b"precious"}


def test_empty_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="--workdir is empty"):
        claim("", "circles")
    assert contents(tmp_path) == {}


def test_differences_in_words():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert differences({"a": {"b": 1}, "c": 2}, {"c": 2, "a": {"b": 1}}) == ""
    assert differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}) == "a.b was 1, is 2; c was None, is 3"
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 9}, "c": 2}, ("a.",)) == ""
    assert differences(dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 1)).endswith("and 2 more")


# ------------------------------------------------------------------------------------------------ what others wrote


def npy(shape: object, data: bytes = bytes(64), dtype: str = "'<f4'") -> bytes:
    return written(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}", data)


def written(header: str, data: bytes = bytes(64)) -> bytes:
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header.encode() + b"\n" + data


HOSTILE = {
    "100 GB": (npy((25 * 2**30,)), "it claims 107374182"),
    "2^70 rows": (npy((2**70,)), "it claims 4722366482869645213"),
    "2^70 rows of nothing": (npy((2**70, 0), b""), "too large"),
    "negative": (npy((-1, -16)), "unknown dimension"),
    "too long": (npy((16,), bytes(65)), "more is in it"),
    "too short": (npy((16,), bytes(63)), "it claims"),
    "objects": (npy((1,), pickle.dumps([1]), "'|O'"), "allow_pickle"),
    "records": (npy((1,), dtype="[('a', '<f4', (500000000,))]"), "it claims 2000000"),
    "open brackets": (written("(" * 9000), "EOF"),
    "nested": (written("[" * 4000 + "]" * 4000), "header"),
    "signs": (written("-" * 9000 + "1"), r"Memory|recursion|header"),
    "a sum": (written("1" + "+1" * 4000), "recursion|header"),
    "nothing": (b"", "EOF"),
    "text": (b"hello", "magic"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_arrays_claim_no_more_than_there_is(content, message, tmp_path):
    """In an archive or alone: one line that names the file."""
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", content)
    for read, name in ((read_array, "a.npy"), (read_arrays, "a.npz")):
        with pytest.raises(ValueError, match=rf"^.*{name} is missing or damaged: .*({message})") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_archives_claim_no_more_than_there_is(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"

    def refused(message: str, path: Path = path) -> None:
        with pytest.raises(ValueError, match=rf"is missing or damaged: .*{message}"):
            read_arrays(path)

    write_arrays(path, zeros=np.zeros(2**20), one=np.float32(1))
    assert path.stat().st_size < 10_000 and read_arrays(path)["zeros"].shape == (2**20,)
    whole = path.read_bytes()
    start = whole.index(b"PK\x01\x02")  # the directory, which says how long each member is
    path.write_bytes(whole[: start + 24] + struct.pack("<I", 2**31) + whole[start + 28 :])
    refused(r"it claims 21\d{8} bytes, but the file can hold")
    path.write_bytes(whole)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**10)
    refused(r"it claims 838\d{4} bytes, but this machine has 1048576")
    monkeypatch.undo()
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(16))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.npy", buffer.getvalue())
    refused("compressed in another way than NumPy does")
    refused("No such file", tmp_path / "gone.npz")
    os.mkfifo(tmp_path / "pipe.npz")
    refused("no regular file", tmp_path / "pipe.npz")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 150 + "1" + "}" * 150, "9" * 10_000, "{", "\xff"])
def test_json_that_is_damaged(text, tmp_path):
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"a\.json is damaged: \S"):
        read_json(tmp_path / "a.json")


def test_json_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"a\.json is damaged: it is no regular file"):
        read_json(tmp_path / "a.json")


def test_json_with_a_checksum_is_read_as_it_was_written_or_not_at_all(tmp_path):
    """Every bit of it flipped in turn, and the checksum left out."""
    path, value = tmp_path / "a.json", {"nll": 2.125, "rows": [{"k": 3, "name": "u"}, None]}
    write_json(path, value, checksum=True)
    assert read_json(path, checksum=True) == value
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        try:
            assert read_json(path, checksum=True) == value  # white space only
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
    write_json(path, value)
    with pytest.raises(ValueError, match="is damaged: its content is not what its checksum says"):
        read_json(path, checksum=True)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.json"])
def test_damaged_bytes(name, tmp_path):
    """Each of 3000 files with a few bytes changed or cut off is read, or refused in one line that names it."""
    random, path, refused = np.random.default_rng(0), tmp_path / name, 0
    if name == "a.npz":
        write_arrays(path, x=random.normal(size=(5, 3)), y=np.arange(4))
    else:
        path.write_bytes(npy((16,)) if name == "a.npy" else json.dumps({"a": [1, {"b": "c"}]}).encode())
    read = {"a.npz": read_arrays, "a.npy": read_array, "a.json": read_json}[name]
    whole = path.read_bytes()
    for content in changed_bytes(whole, random):
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert 300 < refused < 3000


def test_settings_claimed_by_another_process_meanwhile_are_seen(tmp_path, monkeypatch):
    """Two first calls with different settings: the second gets the lock when the first has ended."""
    take = files.take_lock

    def take_after_another(path: Path):
        (tmp_path / "experiment.json").write_text('{"experiment": "circles", "settings": {"seed": 2}}')
        return take(path)

    monkeypatch.setattr(files, "take_lock", take_after_another)
    with pytest.raises(ValueError, match="holds results of other settings: seed was 2, is 1"):
        claim(tmp_path, "circles", {"seed": 1})


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.faults)])
def test_one_flipped_bit_is_harmless_or_noticed(everywhere, tmp_path):
    """Wherever it is, but above all in the lengths of comments in the archive's directory: whatever such a length spans
    is not there for zipfile."""
    path, written = tmp_path / "a.npz", {"x": np.arange(12.0).reshape(3, 4), "key": np.array("k")}
    write_arrays(path, **written)
    whole, noticed = path.read_bytes(), 0
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", whole)]
    flipped = range(8 * len(whole)) if everywhere else [8 * (n + 32) + bit for n in entries for bit in range(16)]
    for position in flipped:
        byte = whole[position // 8] ^ 1 << position % 8
        path.write_bytes(whole[: position // 8] + bytes([byte]) + whole[position // 8 + 1 :])
        try:
            found = read_arrays(path)
        except ValueError as error:
            noticed += 1
            assert str(path) in str(error)
        else:
            assert found.keys() == written.keys(), position
            assert all(np.array_equal(found[name], value) for name, value in written.items()), position
    assert noticed > len(flipped) / 3


def test_other_content_than_that_of_the_checksum_is_damage(tmp_path):
    write_arrays(tmp_path / "a.npz", x=np.arange(3))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        checksum = file["checksum"]
    for arrays in ({"x": np.arange(3.0)}, {"y": np.arange(3)}, {"x": np.arange(3)[None]}, {}):
        np.savez(tmp_path / "b.npz", **arrays, checksum=checksum)
        with pytest.raises(ValueError, match=r"b\.npz is missing or damaged: .* checksum"):
            read_arrays(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", x=np.arange(3))  # somebody else's file has none
    assert np.array_equal(read_arrays(tmp_path / "b.npz")["x"], np.arange(3))


WRITERS = {
    "checkpoint": lambda path: write_checkpoint(path, {"weights": torch.zeros(10_000)}),
    "arrays": lambda path: write_arrays(path, x=np.random.default_rng(0).random(10_000)),
    "json": lambda path: write_json(path, list(range(10_000))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_that_cannot_be_written_is_named_in_one_line(kind, tmp_path):
    """Of whatever kind; what was there before stays, and nothing else is left."""
    path, limits = tmp_path / "file", resource.getrlimit(resource.RLIMIT_FSIZE)
    path.write_text("before")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            WRITERS[kind](path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    expected = f"cannot write {path}: File too large; allow larger files (ulimit -f); the same command then goes on"
    assert str(error.value) == expected and contents(tmp_path) == {"file": b"before"}


def test_what_a_killed_process_began_to_write_is_removed(tmp_path):
    """And not what a process that lives, or one of another host, is writing."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host, living = files._HOST, os.getppid()
    kept = {f".a.npz.{host}.{living}", f".a.npz.another.{dead.pid}", f".b.{host}.lock"}
    for name in (f".a.npz.{host}.{dead.pid}", *kept):
        (tmp_path / name).write_text("half a file")
    write_text(tmp_path / "c.txt", "whole")
    assert contents(tmp_path).keys() == {"c.txt", *kept}
