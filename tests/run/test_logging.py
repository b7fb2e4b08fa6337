"""What a program that calls AutoQuant sees in its log, and a person on the terminal."""

import logging

import pytest
from autoquant_kernels import backends, build, cpu
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant as package

SETTINGS = {
    flag[2:].replace("-", "_"): value
    for flag, value in zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True)
}


@pytest.mark.slow
def test_a_search_from_python_logs_its_stages_trials_and_warnings(tmp_path, caplog):
    caplog.set_level("INFO", logger="autoquant")
    run = package.search(
        save_searchable("qwen3", tmp_path / "model"),
        calibration=str(save_text(tmp_path / "text")),
        budget_bpe=9.0,
        trials=2,
        mlflow=False,
        export=False,
        out=tmp_path / "run",
        **SETTINGS | {"report_tokens": 65_536},
    )
    records = [record for record in caplog.records if record.name == "autoquant"]
    said = [record.getMessage() for record in records if record.levelno == logging.INFO]
    warned = [record.getMessage() for record in records if record.levelno == logging.WARNING]
    trials = run.trials()
    logged = [line for line in said if line.startswith("trial ")]
    assert len(logged) == len(trials)
    for line, trial in zip(logged, trials.itertuples(), strict=True):
        assert f"trial {trial.Index}: kl={trial.kl:.5f} bpe={trial.bpe:.3f}" in line
        assert line.endswith(f"({trial.stage}: {trial.name})")
    assert any(line.startswith("load: ") for line in said)
    assert any(line.startswith("little text") for line in warned)
    assert logging.getLogger("autoquant").handlers == []


@pytest.fixture
def _no_compiler(monkeypatch):
    def fail():
        raise build.BuildError("no C++ compiler (c++)")

    monkeypatch.setattr(build, "shipped_library", lambda: build.FOLDER / "none.so")
    monkeypatch.setattr(build, "cached_library", fail)
    for cached in (cpu.library, backends._choose):
        cached.cache_clear()
    yield
    for cached in (cpu.library, backends._choose):
        cached.cache_clear()


@pytest.mark.usefixtures("_no_compiler")
def test_the_command_line_shows_what_the_packages_log(autoquant):
    done = autoquant("env")
    assert done.exit_code == 0
    assert done.stderr == (
        "warning: C++ kernels are not available (no C++ compiler (c++)); plain PyTorch is used, "
        "slower.\n"
    )
    for name in ("autoquant", "autoquant_kernels"):
        assert logging.getLogger(name).handlers == []
