"""Counts the machine instructions of Triton kernels, compiled for a GPU that need not be here.

Run as a program it prints the counts of the kernels that must keep up with the memory of an H200.
"""

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from itertools import product
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

NVDISASM = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
CONTROL = ("BRA", "EXIT", "NOP", "BSSY", "BSYNC", "RET", "CALL")


def instructions(
    kernel: object,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    *,
    capability: int = 90,
    warps: int = 4,
) -> Counter[str]:
    """Instructions of one thread of `kernel` by opcode, without padding and control flow."""
    names = kernel.arg_names
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature.get(name, "").startswith("*") or signature.get(name) == "i32"
    }
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        text = subprocess.run(
            [NVDISASM, "-c", cubin], capture_output=True, text=True, check=True
        ).stdout
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9]*)", text, re.M)
    return Counter(opcode for opcode in opcodes if opcode not in CONTROL)


def main() -> None:
    """Print the counts per operation as JSON."""
    from autoquant_kernels.gpu import backend, fused

    pointers = {
        "x_ptr": "*bf16",
        "out_ptr": "*bf16",
        "words_ptr": "*i32",
        "scales_ptr": "*u8",
        "m_ptr": "*fp32",
    }
    scalars = {
        "blocks": "i32",
        "row_blocks": "i32",
        "part_moments": "i32",
        "words": "i32",
        "n": "i32",
        "g": "fp32",
        "sixth": "fp32",
        "scale": "fp32",
        "reciprocal": "fp32",
    }
    usual, packing = (options["num_warps"] for options in (backend.OPTIONS, backend.PACK_OPTIONS))
    cases = {
        "fake_quant_nvfp4": ({"BLOCKS": backend.BLOCKS, "DIVIDE": False}, 16, usual),
        "quantize_nvfp4": (
            {"BLOCKS": backend.BLOCKS, "RULE": "max", "DIVIDE": False, "PAIRS": True},
            16,
            packing,
        ),
        "dequantize_nvfp4": ({"WORDS": backend.WORDS}, 8, usual),
        "fake_quant_fp8": ({"ELEMENTS": backend.ELEMENTS, "DIVIDE": False}, 1, usual),
    }
    found = {}
    for (name, (constants, elements_per_unit, warps)), many in product(cases.items(), (0, 1)):
        kernel = getattr(fused, name)
        types = pointers | scalars | ({"g": "*fp32", "scale": "*fp32"} if many else {})
        signature = {k: v for k, v in types.items() if k in kernel.arg_names}
        counts = instructions(kernel, signature, constants | {"MANY": bool(many)}, warps=warps)
        elements = next(iter(constants.values())) * elements_per_unit
        found[f"{name}, a scale for each matrix" if many else name] = {
            "per_element": counts.total() * 32 * warps / elements,
            "exchanges": sum(counts[op] for op in ("SHFL", "STS", "LDS", "BAR")),
        }
    print(json.dumps(found | compensations()))


def compensations() -> dict[str, dict[str, int]]:
    """Of the kernels that round columns one after the other: what a thread must do without."""
    from autoquant_kernels.gpu import backend, compensated

    types = dict.fromkeys(("w_ptr", "upper_ptr", "over_ptr", "weights_ptr", "errors_ptr"), "*fp32")
    types |= {"words_ptr": "*i32", "scales_ptr": "*u8", "codes_ptr": "*u8"}
    types |= {"rows": "i32", "columns": "i32", "g": "*fp32", "scale": "*fp32"}
    types |= {"sixth": "fp32", "reciprocal": "fp32"}
    usual = {"DIVIDE": False, "ROWS": backend.ROWS, "MANY": True}
    found = {}
    for name, constants in (
        ("compensate_nvfp4", {"RULE": "mse"}),
        ("compensate_nvfp4", {"RULE": "hessian"}),
        ("compensate_fp8", {}),
    ):
        kernel = getattr(compensated, name)
        signature = {k: v for k, v in types.items() if k in kernel.arg_names}
        counts = instructions(
            kernel, signature, usual | constants, warps=backend.PACK_OPTIONS["num_warps"]
        )
        found[" ".join((name, *constants.values()))] = {
            "exchanges": sum(counts[op] for op in ("SHFL", "STS", "LDS")),
            "spilled": counts["LDL"] + counts["STL"],
        }
    return found


if __name__ == "__main__":
    main()
