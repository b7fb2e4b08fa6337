"""Native code keeps off the standard output."""

import ctypes
import os

import pytest

from autoquant.search.quiet import quiet_library

libc = ctypes.CDLL(None)


def test_what_native_code_prints_is_dropped_and_what_python_prints_is_not(capfd):
    print("before")
    with quiet_library():
        libc.puts(b"HighsMipSolverData::transformNewIntegerFeasibleSolution")
        os.write(1, b"unbuffered\n")
    libc.puts(b"after, natively")
    libc.fflush(None)
    print("after")
    assert capfd.readouterr().out == "before\nafter, natively\nafter\n"


def test_an_error_inside_leaves_standard_output_as_it_was(capfd):
    def fail() -> None:
        with quiet_library():
            raise ValueError("no solution")

    with pytest.raises(ValueError, match="no solution"):
        fail()
    print("still there")
    assert capfd.readouterr().out == "still there\n"
