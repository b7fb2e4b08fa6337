"""Without the extra, ModelOpt is asked for in words that say how to have it."""

import sys

import pytest

from autoquant.environment import modelopt
from autoquant.errors import ConfigError


def test_the_way_out_of_a_missing_extra_is_named(monkeypatch):
    for name in ("modelopt", "modelopt.torch.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="NVIDIA ModelOpt cannot be imported") as caught:
        modelopt("torch.quantization")
    assert "pip install 'autoquant[modelopt]'" in caught.value.fix


@pytest.mark.slow
def test_importing_our_room_does_not_import_modelopt():
    import subprocess

    code = "import sys, autoquant.modelopt; print('modelopt' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
