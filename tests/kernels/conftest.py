"""Without a GPU the Triton kernels are interpreted; that is decided before triton is imported."""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

IS_INTERPRETED = not torch.cuda.is_available() and find_spec("triton") is not None

if IS_INTERPRETED:
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _modules_are_patched_once_a_kernel() -> Iterator[None]:
    """Triton's interpreter replaces what a module sees of its language at each call of a function
    in a kernel. Again in the same kernel, that changes nothing and takes half of its time.
    """
    if not IS_INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    launch, patched = interpreter.GridExecutor.__call__, set()

    def launch_anew(executor: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        return launch(executor, *arguments, **named)

    def call(function: Any, *arguments: Any, **named: Any) -> Any:
        module = function.fn.__module__
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
