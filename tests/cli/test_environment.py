"""`autoquant env`."""

import json

import autoquant as package
from autoquant.environment import VARIABLES, redact


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
    assert {"autoquant", "python", "torch", "cpu", "gpus", "kernels", *VARIABLES} <= names


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
