"""An array is what its header says, to the byte, or a sentence; and no header reaches numpy that could kill it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megamask.storage.file_list import list_files
from megamask.storage.npy import is_increasing, map_array, save_array

DEADLY = {"descr": "|S0", "fortran_order": False, "shape": (-1,)}


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def forged(header: dict, body: bytes = b"\0" * 64) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + body


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int64", "bool", "float32"])
@pytest.mark.parametrize("shape", [(0,), (7,), (3, 4), (2, 0), (300_000,)])
def test_an_array_is_saved_like_numpy_and_mapped(tmp_path: Path, kind: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    entry = save_array(tmp_path / "a.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == saved(array)
    assert {"a.npy": entry} == list_files(tmp_path, ["a.npy"])
    loaded = map_array(tmp_path / "a.npy")
    assert loaded.dtype == array.dtype and np.array_equal(loaded, array)
    assert not loaded.flags.writeable


def test_a_transposed_array_keeps_its_values(tmp_path: Path) -> None:
    array = np.arange(12).reshape(3, 4)
    save_array(tmp_path / "a.npy", array.T)
    assert np.array_equal(map_array(tmp_path / "a.npy"), array.T)


def test_a_byte_more_or_less_is_named(tmp_path: Path) -> None:
    raw = saved(np.arange(9))
    for wrong in (raw + b"\0", *(raw[:size] for size in range(len(raw)))):
        (tmp_path / "a.npy").write_bytes(wrong)
        with pytest.raises(ValueError, match=r"."):
            map_array(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (forged(DEADLY), "which is not numeric"),
        (forged({"descr": "|O", "fortran_order": False, "shape": (8,)}), "which is not numeric"),
        (forged({"descr": "<i8", "fortran_order": False, "shape": (-8,)}), "in the shape"),
        (forged({"descr": "<i8", "fortran_order": False, "shape": (-2, -4)}), "in the shape"),
        (forged({"descr": "<i8", "fortran_order": False, "shape": (2**62, 4)}), "in the shape"),
        (b"\x93NUMPY\x03\x00" + saved(np.arange(3))[8:], "of version"),
        (b"PK\x03\x04" + b"\0" * 90, "magic"),
        (b"", "."),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, raw: bytes, sentence: str) -> None:
    (tmp_path / "a.npy").write_bytes(raw)
    with pytest.raises(ValueError, match=sentence):
        map_array(tmp_path / "a.npy")


def test_numpy_crashes_without_the_check(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(forged(DEADLY))
    load = f"import numpy; numpy.load({str(tmp_path / 'a.npy')!r}, mmap_mode='r')"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True).returncode != 0


def test_values_that_wrap_around_are_not_rising() -> None:
    """Each difference of neighbours overflows to a positive one."""
    wrapping = np.array([0, 2**63 - 1, -2, 5])
    assert (np.diff(wrapping) > 0).all()
    assert not is_increasing(wrapping)
    assert is_increasing(np.array([0, 0, 3])) and not is_increasing(np.array([0, 0, 3]), strictly=True)
    assert is_increasing(np.array([0, 2, 3]), strictly=True) and is_increasing(np.array([], np.int64))
