"""A command line that cannot be meant: exit code 2, what is wrong, and the way out."""

import pytest

from autoquant.cli import MODULES


@pytest.mark.parametrize(
    ("line", "message", "fix"),
    [
        ("serach", "No such command 'serach'.", "write `autoquant search`."),
        ("zzz", "No such command 'zzz'.", f"commands are: {', '.join(MODULES)}."),
        ("spaces lst", "No such command 'lst'.", "write `autoquant spaces list`."),
        ("--debgu env", "No such option '--debgu'.", "write --debug."),
        ("plan --buget-bpe 5", "No such option '--buget-bpe'.", "write --budget-bpe."),
        ("plan --zzz", "No such option '--zzz'.", "`autoquant plan --help` lists the options."),
        (
            "search",
            "Missing option '--budget-bpe'.",
            "write `--budget-bpe BITS[,BITS...]`: most stored bits per element of the source "
            "model, scales included; several share one set of probes.",
        ),
        (
            "verify",
            "Missing argument 'CHECKPOINT'.",
            "write `autoquant verify [OPTIONS] CHECKPOINT`.",
        ),
        (
            "search --budget-bpe 5 --trials -1",
            "Invalid value for '--trials': -1 is not in the range x>=0.",
            "write `--trials N`: whole assignments to measure, beyond the fixed recipes, the "
            "solver's optima and the check of their scale rules and roundings.",
        ),
        (
            "search --budget-bpe 5 --seed -1",
            "Invalid value for '--seed': -1 is not in the range x>=0.",
            "write `--seed N`: same seed, same tokens and same result.",
        ),
        (
            "search --budget-bpe 5 --sampler simplex",
            "--sampler simplex is no sampler.",
            "name budget, tpe, cmaes, nsgaii, random, or module:Class.",
        ),
        (
            "plan --budget-bpe 5,5",
            "Invalid value for '--budget-bpe': '5,5' has a comma: this command takes one "
            "budget, such as 5.5.",
            "write `--budget-bpe BITS`: most stored bits per element of the source model, scales "
            "included.",
        ),
        (
            "search --budget-bpe 5,x",
            "Invalid value for '--budget-bpe': 'x' is not a valid budget.",
            "write `--budget-bpe BITS[,BITS...]`: most stored bits per element of the source "
            "model, scales included; several share one set of probes.",
        ),
        (
            "env --format jsn",
            "Invalid value for '--format': 'jsn' is not one of 'human', 'json'.",
            "write `--format [human|json]`: how to print the result.",
        ),
        (
            "plan --config absent.yaml",
            "Invalid value for '--config': File 'absent.yaml' does not exist.",
            "write `--config FILE`: YAML file of settings; flags win over it.",
        ),
        (
            "plan --space",
            "Option '--space' requires an argument.",
            "write `--space NAME|FILE`: which layers may take which formats: a shipped space, or a "
            "YAML file.",
        ),
        (
            "search --trust-remote-code=yes",
            "Option '--trust-remote-code' does not take a value.",
            "write `--trust-remote-code`: run code that comes with the model.",
        ),
        (
            "plan my model",
            "Got unexpected extra argument (model).",
            "write `autoquant plan [OPTIONS] [MODEL]`; quote a name that has a space in it.",
        ),
        (
            "score",
            "neither --assignment nor --checkpoint is given: `score` measures one of them.",
            "give either --assignment FILE or --checkpoint DIR.",
        ),
    ],
)
def test_a_wrong_command_line_is_two_lines_and_exit_2(autoquant, line, message, fix):
    result = autoquant(*line.split())
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == f"error: {message}\n  fix: {fix}\n"


def test_a_call_without_a_command_shows_the_help(autoquant):
    for line in ("", "spaces"):
        result = autoquant(*line.split())
        assert result.exit_code == 2
        assert "Commands:" in result.stderr
        assert "error:" not in result.stderr
