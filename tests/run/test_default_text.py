"""The text of a command that names none, with the hub and without it."""

import json
import warnings

import pytest
from searchable import TOKEN_FLAGS, save_searchable

from autoquant.data import hub
from autoquant.run.config import SearchConfig
from autoquant.run.text import with_text

TOKENS = [
    word
    for flag, count in zip(TOKEN_FLAGS[::2], TOKEN_FLAGS[1::2], strict=True)
    if flag != "--report-tokens"
    for word in (flag, count)
]


class Told:
    """Keeps what it is warned of."""

    def __init__(self):
        self.warnings = []

    def warn(self, message):
        self.warnings.append(message)


def text_of(config):
    told = Told()
    return with_text(config, told).text, told.warnings


@pytest.fixture
def answers(monkeypatch):
    monkeypatch.setattr("autoquant.run.text.is_reachable", lambda: True)


CONFIG = SearchConfig(model="m", budget_bpe=5)


def test_a_hub_that_answers_gives_the_mixture(answers):
    assert text_of(CONFIG) == ("mixture", [])


def test_without_a_hub_it_is_the_standard_library_and_a_warning():
    assert not hub.is_reachable()
    text, (warning,) = text_of(CONFIG)
    assert text == "stdlib"
    assert "--calibration" in warning


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"model": "m", "calibration": "mixture"}, "mixture"),
        ({"model": "m", "calibration": "mine.txt"}, "mine.txt"),
        ({}, "stdlib"),
    ],
)
def test_text_that_is_named_and_the_bundled_models_stay(settings, text):
    assert text_of(SearchConfig(budget_bpe=5, **settings)) == (text, [])


def test_an_answer_of_the_hub_counts_whatever_it_says(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    class Busy(HfHubHTTPError):
        def __init__(self):
            Exception.__init__(self, "busy")

    def refuse(*_, **__):
        raise Busy

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    assert hub.is_reachable()


@pytest.mark.parametrize("command", [("search", "--budget-bpe", 9), ("probe",)])
def test_what_decides_by_its_text_does_not_take_another(command, autoquant, tmp_path):
    source = save_searchable("llama", tmp_path / "source")
    done = autoquant(command[0], source, *command[1:], *TOKENS, "--out", tmp_path / "run")
    assert done.exit_code == 4
    assert "calibration text is by default a mixture from the hub" in done.stderr
    assert "--calibration stdlib" in done.stderr


@pytest.mark.slow
def test_an_export_and_a_score_need_no_hub(autoquant, tmp_path):
    source, out = save_searchable("llama", tmp_path / "source"), tmp_path / "out"
    assignment = tmp_path / "assignment.json"
    groups = {"model.layers.0.self_attn.o_proj": "fp8"}
    assignment.write_text(json.dumps({"schema_version": 1, "groups": groups}))
    done = autoquant("export", source, "--assignment", assignment, "--out", out, *TOKENS)
    assert done.exit_code == 0, done.stderr
    assert "the hub does not answer" in done.stderr
    flags = ("--assignment", assignment, "--format", "json", *TOKENS)
    scored = autoquant("score", source, *flags)
    assert scored.exit_code == 0, scored.stderr
    assert "the hub does not answer" in scored.stderr
    named = autoquant("score", source, *flags, "--calibration", "stdlib")
    assert json.loads(scored.stdout)["kl"] == json.loads(named.stdout)["kl"]


def test_earlier_names_of_what_is_imported_are_kept():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from autoquant.checkpoint.source import open_source
        from autoquant.grouping import find_groups
    from autoquant.plan import grouping
    from autoquant.source import source

    assert (open_source, find_groups) == (source.open_source, grouping.find_groups)
    assert {w.category for w in caught} == {DeprecationWarning}
