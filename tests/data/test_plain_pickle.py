"""Pickles of plain data; everything else refused before anything is called."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from damage import changed_bytes

from data.plain_pickle import load_plain_pickle

DATA = {
    "data": np.arange(24, dtype=np.uint8).reshape(2, 12),
    "columns": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
    "big": np.arange(3, dtype=">f8"),
    "flags": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "labels": [1, 2**40, -3],
    "nested": ({"a": None}, [b"bytes", "naïve", 0.5, True]),
}


def equal(a: object, b: object) -> bool:
    if isinstance(b, np.ndarray | np.generic):
        same = np.array_equal(a, b) and np.shape(a) == np.shape(b)
        return same and np.asarray(a).dtype.newbyteorder("=") == np.asarray(b).dtype.newbyteorder("=")
    if isinstance(b, dict):
        return isinstance(a, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


class OtherNumPy(pickle._Pickler):
    """Pickles as NumPy 2 does where this is NumPy 1, and the other way round."""

    RENAMED = ("numpy._core", "numpy.core") if np.__version__ >= "2" else ("numpy.core", "numpy._core")

    def save(self, value, *arguments, **options):
        if isinstance(value, str) and value.startswith(self.RENAMED[0]):
            value = value.replace(*self.RENAMED)
        super().save(value, *arguments, **options)


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("this_numpy", [True, False])
def test_both_numpys(protocol, this_numpy, tmp_path):
    buffer = io.BytesIO()
    (pickle.Pickler if this_numpy else OtherNumPy)(buffer, protocol).dump(DATA)
    content = buffer.getvalue()
    if not this_numpy and protocol < 4:
        content = content.replace(*(b"c" + name.encode() for name in OtherNumPy.RENAMED))
    assert (b"numpy._core" in content) == (this_numpy == (np.__version__ >= "2"))
    (tmp_path / "data").write_bytes(content)
    assert equal(load_plain_pickle(tmp_path / "data"), DATA)


class Call:
    """Pickled as a call of a function; with a state, also as an object that is given one."""

    def __init__(self, function, *arguments, state=None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


class Own:
    pass


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_executed(protocol, tmp_path):
    trace, path = tmp_path / "executed", tmp_path / "data"
    command = f"import os; os.mkdir({str(trace)!r})"
    traps = [
        Call(os.mkdir, str(trace)),
        Call(exec, command),
        Call(getattr, "text", "join"),
        Call(np.load, str(tmp_path)),
        Own(),
        {1, 2},
        complex(1, 2),
        np.array([Call(exec, command), 1], dtype=object),
        np.array([("a", 1)], dtype=[("x", "U1"), ("y", "i4")]),
        np.array(["text"]),
        np.datetime64("2000-01-01"),
        np.dtype("f8"),
    ]
    for trap in traps:
        for value in (trap, {"data": [trap], "labels": DATA["data"]}):
            path.write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(ValueError, match=r"data is not a pickle of plain data: \S"):
                load_plain_pickle(path)
    assert not trace.exists()
    function, arguments = traps[0].__reduce__()
    function(*arguments)  # what unpickling would do
    assert trace.exists()  # the trap works


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR.",  # a data type alone
        b"cnumpy\nndarray\n.",  # a name alone
        b"cnumpy\nndarray\n}X\x01\x00\x00\x00aK\x01sb.",  # attributes for a name
        b"cnumpy\nndarray\n}X\x05\x00\x00\x00_callK\x01s\x86b.",
        b"cnumpy\nndarray\nN}X\x05\x00\x00\x00_callK\x01s\x86b.",
        b"cnumpy\nndarray\n)R.",  # an array without contents
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8K\x00K\x01tR.",
        b"cnumpy\ndtype\n(cnumpy\nndarray\ntR.",
        b"P1\n.",  # a persistent identity
        b"\x82\x01.",  # an extension
        b"",
        b"\x80\x02}",
        b"cnumpy\nndarray\n)\x81.",
    ],
)
def test_pickles_by_hand(content, tmp_path):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match="not a pickle of plain data"):
        load_plain_pickle(tmp_path / "data")


@pytest.mark.parametrize("shape", ["(K\x05K\x05t", "(J\xff\xff\xff\xffJ\xfa\xff\xff\xfft", "X\x01\x00\x00\x00a"])
def test_arrays_that_do_not_fit(shape, tmp_path):
    content = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
        b"(K\x01" + shape.encode("latin1") + b"cnumpy\ndtype\n(X\x02\x00\x00\x00u1K\x00K\x01tR"
        b"(K\x03X\x01\x00\x00\x00|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89C\x06abcdeftb."
    )
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match="an array"):
        load_plain_pickle(tmp_path / "data")


def doubled(empty: bytes, join: bytes) -> bytes:
    """Sixty containers, each of which holds the one before twice: 2^60 in the end."""
    return empty + b"q\x00" + b"".join(join.replace(b"?", b"h%c" % k) + b"q%c" % (k + 1) for k in range(60)) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (doubled(b"]", b"](??e"), "a list stands in it twice"),
        (doubled(b")", b"??\x86"), "a tuple stands in it twice"),
        (doubled(b"}", b"}X\x01\x00\x00\x00a?sX\x01\x00\x00\x00b?s"), "a dict stands in it twice"),
        (b"]q\x00h\x00a.", "a list stands in it twice"),
        (b"]2\x86.", "instruction DUP"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"abc.", "1099511627776"),
        (b"}K\x01K\x01s.", "other keys than strings"),  # of which many can be made to collide
        (b"]" * 20_000 + b"a" * 19_999 + b".", "recursion"),
        (b"cnumpy\ndtype\nq\x00(h\x00)}NtbK\x01\x85R.", "set_state"),  # a partial function of itself
    ],
)
def test_what_comes_out_is_no_larger_than_the_file_allows(content, message, tmp_path):
    (tmp_path / "data").write_bytes(content)
    with pytest.raises(ValueError, match=f"data is not a pickle of plain data: .*{message}"):
        load_plain_pickle(tmp_path / "data")
    (tmp_path / "data").write_bytes(b"]r\xff\xff\xff\x7f.")  # a memo of 2^31 entries, of which one is used
    assert load_plain_pickle(tmp_path / "data") == []


def test_a_missing_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        load_plain_pickle(tmp_path / "data")


@pytest.mark.faults
def test_damaged_bytes(tmp_path):
    """Each of 3000 pickles with a few bytes changed or cut off is read as data, or refused in one line."""
    random, path, refused = np.random.default_rng(0), tmp_path / "data", 0
    whole = pickle.dumps(DATA, 3)
    for content in changed_bytes(whole, random):
        path.write_bytes(content)
        try:
            load_plain_pickle(path)
        except ValueError as error:
            refused += 1
            assert str(error).startswith(f"{path} is not a pickle of plain data: ") and "\n" not in str(error)
    assert 1000 < refused < 3000
