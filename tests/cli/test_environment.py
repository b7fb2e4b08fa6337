"""`autoquant env`."""

import json

import pytest
import torch

import autoquant as package
from autoquant.environment import VARIABLES, CpuPolicy, cpu_policy, redact


def test_json_holds_versions_machine_and_variables(autoquant):
    result = autoquant("env", "--format", "json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["schema_version"] == 1
    assert facts["autoquant"] == package.__version__
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["machine"]["cores"] >= 1
    assert facts["machine"]["memory_bytes"] > 2**28
    assert facts["kernels"]["cpu"]
    assert set(facts["variables"]) == set(VARIABLES)


def test_human_output_names_the_same_facts(autoquant):
    result = autoquant("env")
    assert result.exit_code == 0
    names = {line.split("  ")[0] for line in result.stdout.splitlines()}
    assert {
        "autoquant",
        "python",
        "torch",
        "cpu",
        "gpus",
        "kernels",
        "cpu products",
        *VARIABLES,
    } <= names


@pytest.mark.parametrize(
    ("capabilities", "environment", "policy", "reason"),
    [
        ({"avx2": True, "avx512_bf16": True}, {}, "bf16", "has avx512_bf16"),
        ({"avx512_bf16": False, "amx_bf16": True}, {}, "bf16", "has amx_bf16"),
        ({"architecture": "aarch64", "bf16": True}, {}, "bf16", "has bf16"),
        ({"avx2": True, "avx512_bf16": False}, {}, "float32", "has no BF16 instructions"),
        ({"architecture": "ppc64le"}, {}, "float32", "has no BF16 instructions"),
        ({"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, "float32", "MAX_CPU_ISA=AVX2"),
        ({"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, "bf16", "has avx512"),
        ({"avx512_bf16": True}, {"AUTOQUANT_CPU_PRODUCTS": "float32"}, "float32", "set by"),
        ({"avx2": True}, {"AUTOQUANT_CPU_PRODUCTS": "bf16"}, "bf16", "set by"),
    ],
)
def test_products_go_by_the_processor(capabilities, environment, policy, reason, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    found = cpu_policy(environment)
    assert found[0] is CpuPolicy(policy)
    assert reason in found[1]


def test_products_can_be_chosen_and_are_shown_with_the_reason(autoquant, monkeypatch):
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "float32")
    assert "float32 (set by AUTOQUANT_CPU_PRODUCTS)" in autoquant("env").stdout
    facts = json.loads(autoquant("env", "--format", "json").stdout)
    assert facts["cpu_products"] == {"policy": "float32", "reason": "set by AUTOQUANT_CPU_PRODUCTS"}
    monkeypatch.setenv("AUTOQUANT_CPU_PRODUCTS", "fp32")
    result = autoquant("env")
    assert result.exit_code == 2
    assert "AUTOQUANT_CPU_PRODUCTS=fp32" in result.stderr
    assert "bf16 and float32" in result.stderr


def test_secrets_are_never_printed(autoquant, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://ann:pass@word@mlflow.example/x")
    for arguments in (["env"], ["env", "--format", "json"]):
        output = autoquant(*arguments).output
        assert "verysecret" not in output
        assert "pass" not in output
        assert "mlflow.example/x" in output


def test_redaction_leaves_plain_addresses_alone():
    assert redact("sqlite:////runs/a@b/mlflow.db") == "sqlite:////runs/a@b/mlflow.db"
    assert redact("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    assert redact(None) is None
