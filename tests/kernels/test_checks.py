"""Wrong arguments are named before anything is written."""

import autoquant_kernels as ak
import pytest
import torch
from torch import Tensor

X = torch.ones(4, 32)
G = ak.nvfp4_global_scale(1.0)
CODES, SCALES = ak.quantize_nvfp4(X, G)


@pytest.mark.parametrize(
    "call", [ak.fake_quant_nvfp4, ak.fake_quant_nvfp4_weight, ak.quantize_nvfp4]
)
class TestNvfp4:
    def test_columns(self, call: object) -> None:
        with pytest.raises(ValueError, match=r"multiple of 16.*pad it"):
            call(torch.ones(4, 24), G)

    def test_scalar(self, call: object) -> None:
        with pytest.raises(ValueError, match="multiple of 16"):
            call(torch.ones(()), G)

    def test_dtype(self, call: object) -> None:
        with pytest.raises(ValueError, match=r"float64.*cast it"):
            call(X.double(), G)

    def test_not_a_tensor(self, call: object) -> None:
        with pytest.raises(TypeError, match="list"):
            call([1.0] * 16, G)

    @pytest.mark.parametrize("g", [0.0, -1.0, torch.nan, torch.inf, 1e-60])
    def test_global_scale(self, call: object, g: float) -> None:
        with pytest.raises(ValueError, match="positive and finite"):
            call(X, g)

    @pytest.mark.parametrize(
        "g", [torch.ones(2), torch.ones(4, 1), torch.ones((), dtype=torch.float64)]
    )
    def test_global_scale_tensor(self, call: object, g: Tensor) -> None:
        with pytest.raises(
            ValueError, match=r"one float32 value, or one for each matrix.*\(4, 32\)"
        ):
            call(X, g)

    def test_a_scale_for_each_element(self, call: object) -> None:
        with pytest.raises(ValueError, match="one float32 value"):
            call(torch.ones(32), torch.ones(32))

    def test_one_of_many_scales(self, call: object) -> None:
        with pytest.raises(ValueError, match=r"-1\.0; it must be positive"):
            call(X, torch.tensor([1.0, 2.0, -1.0, 1.0]))


@pytest.mark.parametrize("call", [ak.fake_quant_nvfp4, ak.fake_quant_nvfp4_weight])
class TestOut:
    def check(self, call: object, out: Tensor, message: str) -> None:
        before = out.clone()
        with pytest.raises(ValueError, match=message):
            call(X, G, out=out)
        assert torch.equal(out, before)

    def test_shape(self, call: object) -> None:
        self.check(call, torch.zeros(4, 16), r"must be \(4, 32\)")

    def test_dtype(self, call: object) -> None:
        self.check(call, torch.zeros(4, 32, dtype=torch.bfloat16), "float32")

    def test_strides(self, call: object) -> None:
        self.check(call, torch.zeros(32, 4).T, "contiguous")

    def test_device(self, call: object) -> None:
        with pytest.raises(ValueError, match="meta"):
            call(X, G, out=torch.empty(4, 32, device="meta"))

    def test_overlap(self, call: object) -> None:
        memory = torch.ones(5 * 32)
        with pytest.raises(ValueError, match="overlaps"):
            call(memory[:128].view(4, 32), G, out=memory[32:].view(4, 32))
        assert torch.equal(memory, torch.ones(5 * 32))


@pytest.mark.parametrize("call", [ak.fake_quant_nvfp4_weight, ak.quantize_nvfp4])
def test_unknown_rule(call: object) -> None:
    with pytest.raises(ValueError, match=r"best.*max, mse, four_over_six"):
        call(X, G, rule="best")


@pytest.mark.parametrize("call", [ak.fake_quant_nvfp4_weight, ak.quantize_nvfp4])
class TestMoments:
    @pytest.mark.parametrize("rule", ["diagonal", "hessian"])
    def test_missing(self, call: object, rule: str) -> None:
        with pytest.raises(ValueError, match=f"'{rule}' needs moments"):
            call(X, G, rule=rule)

    def test_beside_a_rule_without_them(self, call: object) -> None:
        with pytest.raises(ValueError, match="'mse' takes no moments"):
            call(X, G, rule="mse", moments=torch.ones(2, 16))

    @pytest.mark.parametrize("shape", [(32,), (1, 16), (2, 16, 16), (4, 2, 16)])
    def test_shape(self, call: object, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"takes \(2, 16\) for a weight of 32 columns"):
            call(X, G, rule="diagonal", moments=torch.ones(shape))

    def test_dtype(self, call: object) -> None:
        with pytest.raises(ValueError, match="float64"):
            call(X, G, rule="diagonal", moments=torch.ones(2, 16).double())

    def test_device(self, call: object) -> None:
        with pytest.raises(ValueError, match="move them to cpu"):
            call(X, G, rule="diagonal", moments=torch.ones(2, 16, device="meta"))

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_finite(self, call: object, value: float) -> None:
        with pytest.raises(ValueError, match="NaN or Inf"):
            call(X, G, rule="hessian", moments=torch.full((2, 16, 16), value))


def test_compensation() -> None:
    w, upper = torch.ones(4, 32), torch.eye(32)
    wrong = (
        ({"w": w.bfloat16()}, "w has dtype"),
        ({"w": torch.ones(4, 24), "upper": torch.eye(24)}, "multiple of 16"),
        ({"w": torch.ones(32)}, r"must be \[N, C\] and \[C, C\]"),
        ({"upper": upper.double()}, "upper has dtype"),
        ({"upper": torch.eye(16)}, r"\(4, 32\) and upper \(16, 16\); they must be \[N, C\]"),
        ({"upper": upper[None]}, r"must be \[N, C\] and \[C, C\]"),
        ({"upper": upper.to("meta")}, "w is on cpu and upper on meta"),
    )
    for changed, message in (
        *wrong,
        ({"global_scale": torch.ones(4)}, "global_scale has 4 values"),
        ({"global_scale": 0.0}, "positive and finite"),
        ({"rule": "best"}, r"best.*max, mse, four_over_six"),
    ):
        given = {"w": w, "upper": upper, "global_scale": G, "rule": "max"} | changed
        with pytest.raises(ValueError, match=message):
            ak.compensate_nvfp4(**given)
    for changed, message in (
        *wrong,
        ({"scale": torch.ones(4)}, "scale has 4 values"),
        ({"scale": torch.inf}, "positive and finite"),
    ):
        with pytest.raises(ValueError, match=message):
            ak.compensate_fp8(**{"w": w, "upper": upper, "scale": 1.0} | changed)
    codes, errors = ak.compensate_fp8(torch.ones(2, 0, 32), upper.expand(2, -1, -1), torch.ones(2))
    assert codes.shape == errors.shape == (2, 0, 32)


@pytest.mark.parametrize(
    "amax", [-1.0, torch.nan, torch.inf, torch.tensor([1.0, -1.0]), torch.ones(2, 1)]
)
def test_amax(amax: float | Tensor) -> None:
    with pytest.raises(ValueError, match="amax"):
        ak.nvfp4_global_scale(amax)
    with pytest.raises(ValueError, match="amax"):
        ak.fp8_scale(amax)


def test_dequantize_shapes_and_dtypes() -> None:
    with pytest.raises(ValueError, match="uint8"):
        ak.dequantize_nvfp4(CODES.int(), SCALES, G)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        ak.dequantize_nvfp4(CODES, SCALES.float(), G)
    with pytest.raises(ValueError, match=r"need \(4, 2\)"):
        ak.dequantize_nvfp4(CODES, SCALES[:, :1], G)
    with pytest.raises(ValueError, match="multiple of 8"):
        ak.dequantize_nvfp4(CODES[:, :12], SCALES, G)
    with pytest.raises(ValueError, match="float64"):
        ak.dequantize_nvfp4(CODES, SCALES, G, dtype=torch.float64)
    with pytest.raises(ValueError, match="inputs on"):
        ak.dequantize_nvfp4(CODES, SCALES.to("meta"), G)


def test_fp8() -> None:
    with pytest.raises(ValueError, match="int64"):
        ak.fake_quant_fp8(torch.ones(3, dtype=torch.int64), 1.0)
    with pytest.raises(ValueError, match="positive and finite"):
        ak.quantize_fp8(X, 0.0)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        ak.dequantize_fp8(CODES, 1.0)
    with pytest.raises(ValueError, match="float64"):
        ak.dequantize_fp8(ak.quantize_fp8(X, 1.0), 1.0, dtype=torch.float64)


def test_empty_strided_and_many_dimensions() -> None:
    assert ak.fake_quant_nvfp4(torch.ones(0, 32), G).shape == (0, 32)
    assert ak.quantize_nvfp4(torch.ones(3, 0), G)[0].shape == (3, 0)
    assert ak.fake_quant_fp8(torch.ones(0), 1.0).shape == (0,)
    none = torch.ones(0, 2, 32), torch.ones(0, 32, 32), torch.ones(0)
    assert ak.compensate_nvfp4(*none, rule="max")[1].shape == (0, 2, 2)
    assert ak.compensate_fp8(*none)[0].shape == (0, 2, 32)
    x = torch.randn(2, 32, 3, 16).transpose(1, 2)
    expected = ak.fake_quant_nvfp4(x.reshape(-1, 16), G).view(2, 3, 32, 16)
    assert torch.equal(ak.fake_quant_nvfp4(x, G), expected)


def test_out_is_returned_and_gradients_are_not_followed() -> None:
    out = torch.empty_like(X)
    assert ak.fake_quant_nvfp4(X.clone().requires_grad_(), G, out=out) is out
    assert not out.requires_grad


def test_operations_survive_torch_export_of_shapes() -> None:
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(4, 32, dtype=torch.bfloat16)
        assert ak.fake_quant_nvfp4(x, 0.5).shape == (4, 32)
        codes, scales = ak.quantize_nvfp4(x, 0.5)
        assert (codes.shape, scales.shape) == ((4, 16), (4, 2))
        found = ak.compensate_nvfp4(x.float(), torch.empty(32, 32), 0.5, rule="max")
        assert [part.shape for part in found] == [(4, 16), (4, 2), (4, 32)]
        found = ak.compensate_fp8(x.float(), torch.empty(32, 32), 0.5)
        assert [part.shape for part in found] == [(4, 32), (4, 32)]
