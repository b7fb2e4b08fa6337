"""The run directory: what survives, what may go on, who is kept out."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import forget_checksums

from autoquant.errors import ConfigError, RunConflict, SourceError
from autoquant.store.run_directory import (
    HOME,
    TRIALS,
    RunDirectory,
    Status,
    home_of,
    write_json,
)

SIGNATURE = {"model": "sha256:ab", "budget_bpe": 5.0, "seed": 0, "space": {"rules": [1, 2]}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a"


def make(path: Path) -> None:
    with RunDirectory.open(path, SIGNATURE) as run:
        run.write_json("result.json", {"kl": 0.25})
        run.append(TRIALS, {"number": 0, "kl": 0.5})


def files(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_codes_lie_beside_where_the_model_and_the_tokens_are_the_same(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        with RunDirectory.open(path, SIGNATURE | {"budget_bpe": len(path.name)}) as run:
            run.write_json("splits.json", {"calibration": "ab", "report": path.name})
    for name in (None, 7, "", ".", "..", "one/", "../one", "x\0y", "a" * 5000, "\ud800", "none"):
        write_json(other, HOME, {"run": name})
        forget_checksums(other)
        assert home_of(other) == other, name
    write_json(other, HOME, {"run": "one"})
    assert home_of(other) == one
    assert home_of(one) == one
    write_json(one, "splits.json", {"calibration": "of other text"})
    assert home_of(other) == other


def test_a_new_directory_is_made_with_its_parents(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.path == path
        assert run.earlier_status is None
        assert run.signature == SIGNATURE
    assert path.is_dir()


def test_what_was_written_is_read_back_by_the_next_process(path):
    make(path)
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.read_json("result.json") == {"kl": 0.25}
        assert run.records(TRIALS) == [{"number": 0, "kl": 0.5}]


def test_what_was_never_written_is_none_or_empty(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.read_json("result.json") is None
        assert run.records(TRIALS) == []


def test_every_json_on_disk_has_a_schema_version(path):
    make(path)
    result = json.loads((path / "result.json").read_text())
    assert result.keys() == {"schema_version", "kl", "checksum"}
    assert (result["schema_version"], result["kl"]) == (1, 0.25)
    for name in ("run.json", TRIALS):
        assert json.loads((path / name).read_text())["schema_version"] == 1


def test_text_is_written_whole_and_no_temporary_file_stays(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        run.write_text("assignment.yaml", "größe: 1\n")
        run.write_text("assignment.yaml", "größe: 2\n")
    assert (path / "assignment.yaml").read_text(encoding="utf-8") == "größe: 2\n"
    assert files(path) - {".lock"} == {"run.json", "assignment.yaml"}


def test_a_failed_write_leaves_the_old_file(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        run.write_json("result.json", {"kl": 0.25})
        with pytest.raises(UnicodeEncodeError):
            run.write_text("result.json", "\ud800")
        assert run.read_json("result.json") == {"kl": 0.25}
        assert files(path) == {".lock", "run.json", "result.json"}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, Status.FINISHED),
        (KeyboardInterrupt, Status.INTERRUPTED),
        (ValueError, Status.FAILED),
    ],
)
def test_the_status_says_how_the_run_ended(path, error, status):
    with pytest.raises(error) if error else nullcontext(), RunDirectory.open(path, SIGNATURE):
        if error:
            raise error
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.earlier_status is status


def test_a_difference_in_the_signature_names_keys_and_both_values(path):
    make(path)
    other = {**SIGNATURE, "budget_bpe": 4.9, "activation_mode": "w4a4"}
    with pytest.raises(RunConflict) as caught:
        RunDirectory.open(path, other)
    assert "budget_bpe is 5.0 there and 4.9 here" in caught.value.message
    assert "activation_mode is None there and 'w4a4' here" in caught.value.message
    assert "seed" not in caught.value.message
    assert "--fresh" in caught.value.fix
    assert caught.value.exit_code == 5


def test_another_model_is_named_by_its_content(path):
    make(path)
    with pytest.raises(RunConflict) as caught:
        RunDirectory.open(path, {**SIGNATURE, "model": "sha256:cd"})
    said = "the content digest of the model is 'sha256:ab' there and 'sha256:cd' here"
    assert said in caught.value.message


def test_a_refused_directory_is_left_as_it_was_and_unlocked(path):
    make(path)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    with pytest.raises(RunConflict):
        RunDirectory.open(path, {"seed": 1})
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    make(path)


def test_the_signature_compares_as_json(path):
    with RunDirectory.open(path, {"formats": ("nvfp4", "fp8")}):
        pass
    with RunDirectory.open(path, {"formats": ["nvfp4", "fp8"]}) as run:
        assert run.earlier_status is Status.FINISHED


@pytest.mark.parametrize("signature", [SIGNATURE, {"seed": 1}], ids=["same", "other"])
def test_starting_anew_sets_the_earlier_run_aside(path, signature):
    make(path)
    with RunDirectory.open(path, signature, resume=False) as run:
        assert run.earlier_status is None
        assert run.records(TRIALS) == []
    (aside,) = (entry for entry in path.parent.iterdir() if entry != path)
    assert re.fullmatch(r"a\.\d{8}T\d{6}\.\d{6}", aside.name)
    assert json.loads((aside / "result.json").read_text())["kl"] == 0.25


def test_starting_anew_needs_no_earlier_run(path):
    with RunDirectory.open(path, SIGNATURE, resume=False) as run:
        assert run.earlier_status is None
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_of_something_else_is_refused_untouched(path, resume):
    path.mkdir(parents=True)
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunConflict, match=r"is no run directory \(it holds 'thesis.tex'\)"):
        RunDirectory.open(path, SIGNATURE, resume=resume)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_an_empty_folder_is_taken(path):
    path.mkdir(parents=True)
    make(path)


def test_a_second_search_is_kept_out_while_the_first_runs(path):
    with RunDirectory.open(path, SIGNATURE), pytest.raises(RunConflict, match="is in use"):
        RunDirectory.open(path, SIGNATURE)


def test_a_second_process_is_kept_out_even_from_starting_anew(path):
    script = textwrap.dedent(f"""
        from pathlib import Path
        from autoquant.errors import RunConflict
        from autoquant.store.run_directory import RunDirectory
        try:
            RunDirectory.open(Path({str(path)!r}), {SIGNATURE!r}, resume=False)
        except RunConflict as error:
            print(error.message)
    """)
    with RunDirectory.open(path, SIGNATURE):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "is in use by another process" in done.stdout
    assert [entry.name for entry in path.parent.iterdir()] == ["a"]


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_search_goes_on(path):
    script = textwrap.dedent(f"""
        import os, signal
        from pathlib import Path
        from autoquant.store.run_directory import RunDirectory
        run = RunDirectory.open(Path({str(path)!r}), {SIGNATURE!r})
        run.append("trials.jsonl", {{"number": 0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.earlier_status is Status.RUNNING
        assert run.records(TRIALS) == [{"number": 0}]


def test_a_directory_that_cannot_be_made_is_a_configuration_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written: Not a directory"):
        RunDirectory.open(tmp_path / "file" / "run", SIGNATURE)


def test_a_damaged_file_is_named(path):
    make(path)
    (path / "result.json").write_text('{"schema_version": 1, "kl"')
    with (
        RunDirectory.open(path, SIGNATURE) as run,
        pytest.raises(SourceError, match=r"result\.json"),
    ):
        run.read_json("result.json")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"schema_version": 1}',
        '{"schema_version": 9}',
        '{"schema_version": 1, "signature": {"seed": 0}, "status": "asleep"}',
        '{"schema_version": 1, "signature": {"seed": 0}, "status": "finished", "environments": 1}',
        '{"schema_version": 1, "signature": {}, "status": "finished", "environments": [[1]]}',
    ],
)
def test_a_damaged_identity_is_refused(path, text):
    make(path)
    (path / "run.json").write_text(text)
    with pytest.raises(SourceError, match=r"run\.json"):
        RunDirectory.open(path, SIGNATURE)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: re.sub(r"0\.2?5", "0.75", text),
        lambda text: text.replace('"kl"', '"kL"'),
        lambda text: re.sub(r"0\.2?5", '["x"]', text),
        lambda text: text.replace("}", ', "more": 1}'),
        lambda text: text.replace("kl", "k\udcffl"),
        lambda text: "[" * 100_000 + "\n",
    ],
)
def test_a_file_or_a_line_that_is_not_what_was_written_is_damaged(path, damage):
    make(path)
    for name in ("result.json", TRIALS):
        text = damage((path / name).read_text())
        (path / name).write_bytes(text.encode(errors="surrogateescape"))
    with RunDirectory.open(path, SIGNATURE) as run:
        with pytest.raises(SourceError, match=r"result\.json is damaged"):
            run.read_json("result.json")
        with pytest.raises(SourceError, match=r"trials\.jsonl line 1 is damaged"):
            run.records(TRIALS)


def test_a_file_without_a_checksum_is_taken_as_it_is(path):
    make(path)
    forget_checksums(path)
    (path / "result.json").write_text('{"schema_version": 1, "kl": 0.5}')
    with RunDirectory.open(path, SIGNATURE) as run:
        assert run.read_json("result.json") == {"kl": 0.5}
        assert run.records(TRIALS) == [{"number": 0, "kl": 0.5}]


@pytest.mark.parametrize("name", ["result.json", TRIALS])
def test_a_record_that_has_lost_its_checksum_is_damaged(path, name):
    make(path)
    text = (path / name).read_text()
    (path / name).write_text(re.sub(r',\s*"checksum": "\w+"', "", text))
    with (
        RunDirectory.open(path, SIGNATURE) as run,
        pytest.raises(SourceError, match="is damaged: it is not what was written"),
    ):
        run.read_json(name) if name.endswith("json") else run.records(name)


def test_a_run_that_an_earlier_version_began_goes_on(path):
    make(path)
    forget_checksums(path)
    for _ in range(2):
        with RunDirectory.open(path, SIGNATURE) as run:
            assert run.read_json("result.json") == {"kl": 0.25}
            run.append(TRIALS, {"number": 1})


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(path):
    make(path)
    (path / "result.json").unlink()
    os.mkfifo(path / "result.json")
    with (
        RunDirectory.open(path, SIGNATURE) as run,
        pytest.raises(SourceError, match=r"result\.json is damaged: it is no regular file"),
    ):
        run.read_json("result.json")


def test_a_damaged_line_in_the_middle_is_named(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        for number in range(3):
            run.append(TRIALS, {"number": number})
        lines = (path / TRIALS).read_text().splitlines(keepends=True)
        (path / TRIALS).write_text(lines[0] + "garbage\n" + lines[2])
        with pytest.raises(SourceError, match=r"trials\.jsonl line 2"):
            run.records(TRIALS)


def test_every_way_to_tear_the_last_line_loses_that_line_alone(path):
    with RunDirectory.open(path, SIGNATURE) as run:
        run.append(TRIALS, {"number": 0})
        whole = (path / TRIALS).read_bytes()
        run.append(TRIALS, {"number": 1, "name": "größe"})
        both = (path / TRIALS).read_bytes()
        for size in range(len(whole), len(both)):
            (path / TRIALS).write_bytes(both[:size])
            assert run.records(TRIALS) == [{"number": 0}]
            run.append(TRIALS, {"number": 2})
            assert run.records(TRIALS) == [{"number": 0}, {"number": 2}]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=8,
)  # fmt: skip
_own = ("schema_version", "checksum")
_records = st.dictionaries(st.text().filter(lambda key: key not in _own), _values)


@pytest.mark.slow
@settings(max_examples=30)  # every example writes to the disk and waits for it
@given(records=st.lists(_records, max_size=4))
def test_any_records_come_back_as_they_were(tmp_path_factory, records):
    with RunDirectory.open(tmp_path_factory.mktemp("run") / "r", {}) as run:
        for record in records:
            run.append(TRIALS, record)
            run.write_json("last.json", record)
            assert run.read_json("last.json") == record
        assert run.records(TRIALS) == records
