"""Machine instructions on sm_90: more per element would leave the memory of an H200 idle."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

LIMITS = {
    "fake_quant_nvfp4": 19,
    "quantize_nvfp4": 18,
    "dequantize_nvfp4": 12,
    "fake_quant_fp8": 16,
}
MORE_FOR_MANY_SCALES = 5
"""The share of a program that computes which matrix is its, over few elements."""
HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, int]]:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parents[1] / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(HERE / "sass.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("operation", sorted(LIMITS))
def test_instructions_per_element(counted: dict[str, dict[str, float]], operation: str) -> None:
    assert counted[operation]["per_element"] <= LIMITS[operation]
    many = counted[f"{operation}, a scale for each matrix"]["per_element"]
    assert many <= LIMITS[operation] + MORE_FOR_MANY_SCALES


@pytest.mark.slow
def test_threads_exchange_nothing_but_packed_block_scales(
    counted: dict[str, dict[str, float]],
) -> None:
    for operation, found in counted.items():
        if not operation.startswith("compensate"):
            assert found["exchanges"] <= (10 if operation.startswith("quantize") else 0), operation


@pytest.mark.slow
def test_a_thread_rounds_the_columns_of_its_rows_alone_and_in_registers(
    counted: dict[str, dict[str, float]],
) -> None:
    compensations = {op: found for op, found in counted.items() if op.startswith("compensate")}
    assert len(compensations) == 3
    for operation, found in compensations.items():
        assert found == {"exchanges": 0, "spilled": 0}, operation
