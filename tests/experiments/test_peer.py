"""What stands in for ModelOpt's NVFP4 on a CPU rounds as the engine does."""

import pytest
import torch

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")

import modelopt.torch.quantization as mtq
from autoquant.model.weights import fake_quantize
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer

from autoquant.formats import FP8, NVFP4
from autoquant.model.inputs import InputScale, InputSet
from experiments.vs_modelopt.peer import BACKEND

CONFIGS = {NVFP4: mtq.NVFP4_DEFAULT_CFG, FP8: mtq.FP8_DEFAULT_CFG}


@pytest.mark.parametrize("choice", CONFIGS, ids=str)
def test_weights_and_inputs_are_rounded_as_the_engine_rounds_them(choice):
    torch.manual_seed(0)
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    entry = next(e for e in CONFIGS[choice]["quant_cfg"] if e.get("cfg"))
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**entry["cfg"], backend=BACKEND))
    quantizer.amax = x.float().abs().max()
    amax = float(quantizer.amax)
    ours = InputSet("x", InputScale(amax=amax)).quantize(x, choice.format)
    assert torch.equal(quantizer(x), ours)
    assert torch.equal(quantizer(x), fake_quantize(x, amax, choice))
