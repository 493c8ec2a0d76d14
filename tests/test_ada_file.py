"""The .ada file: round trips, damage, versions, and disks that are full."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from helpers_program import Builder, Grid, noise, programs, run_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operations_page import PAGE, with_table

from adalayer_native import _C
from adalayer_native.operations import geometry, parameters

QUICK = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def from_bytes(data: bytes) -> _C.Program:
    array = np.frombuffer(data, np.uint8)
    return _C.Program.from_bytes(array.ctypes.data, array.size)


def contents(p: _C.Program) -> tuple:
    constants = [(*c, p.constant_bytes(k)) for k, c in enumerate(p.constants())]
    return p.values(), p.nodes(), constants, p.inputs(), p.outputs(), p.metadata()


def small() -> _C.Program:
    b = Builder()
    x = b.input((2, 2, 1))
    q = b.node("quantize", [x], b.value((2, 2, 1), Grid()))
    y = b.node("dequantize", [q], b.value((2, 2, 1)))
    b.program.set_metadata("classes", '["café"]')
    return b.finish([y])


@given(program=programs(), metadata=st.dictionaries(TEXT, TEXT, max_size=4))
@QUICK
def test_round_trip(program, metadata):
    for key, text in metadata.items():
        program.set_metadata(key, text)
    data = program.to_bytes()
    back = from_bytes(data)
    assert contents(back) == contents(program)
    assert back.to_bytes() == data
    images = noise(program, 2, seed=0)
    for a, b in zip(run_reference(program, images), run_reference(back, images), strict=True):
        assert a.tobytes() == b.tobytes()


@given(program=programs(), data=st.data())
@QUICK
def test_truncations_and_flips(program, data):
    good = program.to_bytes()
    for _ in range(20):
        cut = data.draw(st.integers(0, len(good) - 1))
        with pytest.raises(ValueError, match="ada file"):
            from_bytes(good[:cut])
        damaged = bytearray(good)
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= data.draw(st.integers(1, 255))
        with pytest.raises(ValueError, match="ada file"):
            from_bytes(bytes(damaged))


def test_every_byte_of_a_small_file(tmp_path):
    good = small().to_bytes()
    path = tmp_path / "m.ada"
    for i in range(len(good)):
        damaged = bytearray(good)
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(ValueError):
            from_bytes(bytes(damaged))
        with pytest.raises(ValueError):
            from_bytes(good[:i])
        if i % 50 == 0:
            path.write_bytes(good[:i])
            with pytest.raises(ValueError, match=r"m\.ada"):
                _C.Program.load(path)


def test_wrong_version_names_both():
    data = bytearray(small().to_bytes())
    data[8] = 7
    with pytest.raises(ValueError, match=r"version 7\.0 is not supported; this library reads 1\.x"):
        from_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"not an \.ada file"):
        from_bytes(b"PK\x03\x04" + bytes(data[4:]))


def test_bytes_do_not_depend_on_the_instruction_set():
    program = small()
    before = program.to_bytes()
    for isa in _C.isas():
        _C.force_isa(isa)
        try:
            _C.Engine(program)
            assert program.to_bytes() == before
        finally:
            _C.force_isa("auto")


def test_an_invalid_program_is_not_saved(tmp_path):
    program = small()
    program.set_outputs([99])
    with pytest.raises(ValueError, match="value 99 does not exist"):
        program.save(tmp_path / "m.ada")
    assert os.listdir(tmp_path) == []


def test_errors_of_the_operating_system(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        _C.Program.load(tmp_path / "absent.ada")
    with pytest.raises(IsADirectoryError):
        _C.Program.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        small().save(tmp_path / "no" / "m.ada")
    with pytest.raises(OSError, match="regular file"):
        small().save("/dev/full")
    assert not Path("/dev/full").is_file()
    assert os.listdir(tmp_path) == []


FULL_DISK = """
import resource, sys
from adalayer_native import _C
program = _C.Program.load(sys.argv[1])
program.set_metadata("padding", "x" * 100000)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    program.save(sys.argv[2])
except OSError as error:
    print(error)
    sys.exit(7)
"""


@pytest.mark.parametrize("limit", [0, 64, 4096, 65536])
@pytest.mark.parametrize("existing", [False, True])
def test_full_disk(tmp_path, limit, existing):
    source, target = tmp_path / "source.ada", tmp_path / "out" / "m.ada"
    small().save(source)
    target.parent.mkdir()
    if existing:
        target.write_bytes(b"the old file")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(source), str(target), str(limit)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 7, done.stderr
    assert f"after {limit} of" in done.stdout and "m.ada" in done.stdout
    assert os.listdir(target.parent) == (["m.ada"] if existing else [])
    assert not existing or target.read_bytes() == b"the old file"


def test_many_writers_leave_one_whole_file(tmp_path):
    path = tmp_path / "m.ada"
    variants = []
    for k in range(4):
        program = small()
        program.set_metadata("writer", str(k) * (k + 1) * 1000)
        variants.append(program)
    errors: list[Exception] = []

    def write(program: _C.Program) -> None:
        try:
            for _ in range(10):
                program.save(path)
                _C.Program.load(path)
        except (OSError, ValueError) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(p,)) for p in variants]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path) == ["m.ada"]
    assert path.read_bytes() in [p.to_bytes() for p in variants]


def test_the_page_lists_every_operation():
    assert with_table(PAGE.read_text()) == PAGE.read_text(), "run tests/operations_page.py"


def test_parameters_by_name():
    lists = parameters("conv", **geometry((3, 1), padding=(1, 0, 1, 0)), weights=4, scale=5, bias=6)
    assert lists.ints == [3, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 255, 0]
    assert lists.floats == [1.0, -np.inf, np.inf]
    assert lists.constants == [4, 5, 6, -1]
    assert parameters("concat", 3).constants == [-1, -1, -1]
    with pytest.raises(TypeError, match="layer_norm: eps is missing"):
        parameters("layer_norm", gamma=0, beta=1)
    with pytest.raises(TypeError, match="pad has no parameter value"):
        parameters("pad", top=0, left=0, bottom=0, right=0, level=1, value=3)
    with pytest.raises(KeyError, match="convolution"):
        parameters("convolution")
