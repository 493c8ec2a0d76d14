"""Random programs: the engine gives the bits of the interpreter, on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from helpers_program import noise, programs, run_engine, run_reference
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adalayer_native import _C


@pytest.fixture(autouse=True)
def _restore():
    yield
    _C.force_isa("auto")
    _C.set_winograd_policy("auto")


@pytest.mark.parametrize("isa", _C.isas())
def test_engine_is_bit_equal_to_the_interpreter(isa):
    _C.force_isa(isa)

    @settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
    @given(
        program=programs(everything=False),
        batch=st.integers(1, 5),
        chunk=st.integers(0, 2),
        cache=st.sampled_from([0, 2000, 20000]),  # small: nodes run image by image
        threads=st.integers(1, 2),
        nhwc=st.booleans(),
        winograd=st.sampled_from(["auto", "off", "4x4", "2x2"]),
        seed=st.integers(0, 1000),
    )
    def check(program, batch, chunk, cache, threads, nhwc, winograd, seed):
        _C.set_winograd_policy(winograd)
        images = noise(program, batch, seed)
        expected = run_reference(program, images)
        got = run_engine(_C.Engine(program, chunk, cache), images, nhwc=nhwc, threads=threads)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a, b)

    check()
