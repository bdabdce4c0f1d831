"""A working directory belongs to one experiment, and what is refused is left as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from locks import lock_held_elsewhere

from experiment import files
from experiment.files import claim, differences, flatten


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
