"""The sampler in OptunaHub's form: its example runs, and its page says what there is."""

import importlib.util
import inspect

import optuna
import pytest
import yaml
from tracked import ROOT

from autoquant.samplers import BudgetSampler, PairedPruner

FOLDER = ROOT / "experiments/study/optunahub"


def loaded(name):
    spec = importlib.util.spec_from_file_location(f"optunahub_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(optuna.logging, "set_verbosity", lambda level: None)
    return loaded("example")


def test_the_example_finds_better_than_its_first_trial_within_the_budget(example, capsys):
    example.main()
    best, first = capsys.readouterr().out.splitlines()
    value, cost = best.split(": ")[1].split(" in ")
    assert float(value) < float(first.rpartition(" ")[2])
    assert int(cost.split()[0]) <= example.BUDGET


def test_the_package_has_what_a_registry_loads():
    assert loaded("__init__").BudgetSampler is BudgetSampler
    assert loaded("__init__").PairedPruner is PairedPruner
    assert "MIT License" in (FOLDER / "LICENSE").read_text()
    _, front, page = (FOLDER / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert {"author", "title", "description", "tags", "optuna_versions", "license"} == facts.keys()
    for made in (BudgetSampler, PairedPruner):
        (signature,) = [
            line for line in page.splitlines() if line.startswith(f"- `{made.__name__}(")
        ]
        for name in inspect.signature(made).parameters:
            assert name in signature
