"""What stands in for ModelOpt's NVFP4 on a CPU rounds as the engine does."""

import pytest
import torch

from autoquant.formats import FP8, NVFP4
from autoquant.formats.packed import Statistics
from autoquant.model.inputs import InputScale, InputSet
from autoquant.modelopt.peer import fake_quantize

pytestmark = pytest.mark.slow
CONFIGS = {NVFP4: "NVFP4_DEFAULT_CFG", FP8: "FP8_DEFAULT_CFG"}


@pytest.mark.parametrize("choice", CONFIGS, ids=str)
def test_weights_and_inputs_are_rounded_as_the_engine_rounds_them(choice):
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer, register_quant_backend

    register_quant_backend("checked", fake_quantize)

    torch.manual_seed(0)
    x = torch.randn(64, 128, dtype=torch.bfloat16)
    config = getattr(mtq, CONFIGS[choice])
    entry = next(e for e in config["quant_cfg"] if e.get("cfg"))
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**entry["cfg"], backend="checked"))
    quantizer.amax = x.float().abs().max()
    rounded = quantizer(x)
    as_input = InputSet("x", InputScale(amax=float(quantizer.amax))).quantize(x, choice.format)
    assert torch.equal(rounded, as_input)
    as_weight = choice.format.encode(x, choice, Statistics(weight_amax=quantizer.amax)).decode()
    assert torch.equal(rounded, as_weight)
