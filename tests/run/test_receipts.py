"""Receipts: what is in them, and that nothing of it can be changed unseen."""

import json
import math
import shutil
from dataclasses import replace

import pytest
from click.testing import CliRunner
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.cli import cli
from autoquant.files import to_json
from autoquant.measure.scorer import Scorer
from autoquant.run.receipts.checking import compare
from autoquant.run.receipts.receipt import Receipt, digest_of_code
from autoquant.store.records import sealed
from autoquant.store.run_directory import read_json


def run_command(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("receipts")


@pytest.fixture(scope="module")
def model(folder):
    return save_searchable("llama", folder / "model")


@pytest.fixture(scope="module")
def text(folder):
    return save_text(folder / "text", documents=270, words=20)


@pytest.fixture(scope="module")
def run(folder, model, text):
    done = run_command(
        *("search", model, "--budget-bpe", 9, "--calibration", text, *TOKEN_FLAGS),
        *("--trials", 2, "--no-mlflow", "--out", folder / "run"),
    )
    assert done.exit_code == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def file(run):
    done = run_command("receipt", run)
    assert done.exit_code == 0, done.stderr
    return run / "receipt.json"


@pytest.fixture(scope="module")
def receipt(file):
    return Receipt.read(file)


def changed(receipt, place, value):
    """The receipt with another value at `part.name` or `part.files.NAME`."""
    root = own = receipt.model_dump(mode="json")
    *path, last = place
    for key in path:
        own = own[key]
    own[last] = value
    return Receipt.model_validate(root)


def wrong(said, found):
    return [check.part for check in compare(said, found) if not check.holds and not check.is_note]


def test_a_receipt_says_what_the_run_has_measured(run, receipt):
    result = read_json(run, "result.json")
    assert receipt.kl.mean == result["kl"]["mean"]
    assert receipt.kl.stderr == result["kl"]["stderr"]
    assert receipt.kl.noise_floor == result["noise_floor"]
    assert receipt.kl.low < receipt.kl.mean < receipt.kl.high
    assert receipt.source.digest == result["source"]["digest"]
    assert receipt.checkpoint.checkpoint_bytes == result["checkpoint_bytes"]
    assert receipt.checkpoint.bpe == result["bpe"]["checkpoint"]
    assert receipt.checkpoint.counts == result["counts"]
    assert receipt.tokens.digest == result["tokens"]["report"]["digest"]
    assert receipt.code.digest == digest_of_code()


def test_every_file_that_an_engine_reads_is_hashed(run, model, receipt):
    from autoquant.source.contents import sha256

    assert receipt.source.files == {"model.safetensors": sha256(model / "model.safetensors")}
    checkpoint = run / "checkpoint"
    names = {"model.safetensors", "config.json", "hf_quant_config.json"}
    assert receipt.checkpoint.files == {name: sha256(checkpoint / name) for name in names}


def test_a_receipt_that_nobody_touched_holds(file):
    done = run_command("receipt", "--check", file)
    assert done.exit_code == 0, done.stderr
    assert "the receipt holds" in done.stdout
    assert "NO" not in done.stdout


OTHER = "0" * 64


@pytest.mark.parametrize(
    ("place", "value", "part"),
    [
        (("source", "digest"), "sha256:" + OTHER, "source (digest)"),
        (("source", "files", "model.safetensors"), OTHER, "source (files)"),
        (("checkpoint", "files", "model.safetensors"), OTHER, "checkpoint (files)"),
        (("checkpoint", "files", "config.json"), OTHER, "checkpoint (files)"),
        (("checkpoint", "assignment"), "0" * 16, "checkpoint (assignment)"),
        (("checkpoint", "counts"), {"nvfp4": 1}, "checkpoint (counts)"),
        (("checkpoint", "checkpoint_bytes"), 1, "checkpoint (checkpoint_bytes)"),
        (("checkpoint", "bpe"), 4.5, "checkpoint (bpe)"),
        (("tokens", "digest"), "0" * 16, "tokens (digest)"),
        (("tokens", "tokens"), 10**6, "tokens (tokens)"),
        (("tokens", "units"), 10**3, "tokens (units)"),
        (("kl", "mean"), 1e-4, "KL mean"),
        (("kl", "low"), -1.0, "KL low"),
        (("kl", "high"), 1.0, "KL high"),
        (("kl", "stderr"), 1.0, "KL stderr"),
        (("kl", "noise_floor"), 1.0, "noise floor"),
        (("kl", "top1_agreement"), 0.5, "top-1 agreement"),
        (("kl", "direction"), "KL(quantized || BF16)", "direction"),
        (("kl", "positions"), "the last token of each sequence", "positions"),
        (("kl", "unit"), "bits per token", "unit"),
        (("kl", "confidence"), 0.5, "confidence"),
        (("settings", "target"), "ampere", "settings (target)"),
        (("settings", "seed"), 7, "settings (seed)"),
        (("settings", "report_tokens"), 65536, "settings (report_tokens)"),
        (("settings", "kv_cache"), "fp8", "settings (kv_cache)"),
        (("code", "digest"), OTHER, "code"),
    ],
)
def test_each_part_that_is_changed_is_named(receipt, place, value, part):
    assert wrong(changed(receipt, place, value), receipt) == [part]
    assert wrong(receipt, receipt) == []


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("code", "autoquant"), "9.9.9"),
        (("versions", "torch"), "9.9"),
        (("device",), "cuda"),
        (("source", "model"), "org/its-name"),
        (("settings", "calibration"), "/elsewhere/text"),
    ],
)
def test_where_and_with_what_it_was_measured_does_not_decide(receipt, place, value):
    other = changed(receipt, place, value)
    if place[0] == "code":
        other = changed(other, ("code", "digest"), OTHER)
    assert wrong(other, receipt) == []


def test_another_machine_s_last_digits_hold_and_more_does_not(receipt):
    near = receipt.kl.mean * 1.02
    far = receipt.kl.mean * 1.05 + receipt.kl.noise_floor
    assert wrong(changed(receipt, ("kl", "mean"), near), receipt) == []
    assert wrong(changed(receipt, ("kl", "mean"), far), receipt) == ["KL mean"]


def test_a_file_that_was_edited_is_damaged(file, tmp_path):
    content = file.read_text()
    edited = tmp_path / "receipt.json"
    edited.write_text(content.replace('"seed": 0', '"seed": 1'))
    done = run_command("receipt", file.parent, "--check", edited)
    assert done.exit_code == 4
    assert "is not what was written there" in done.stderr


@pytest.mark.parametrize("name", ["kl", "code", "tokens"])
def test_a_part_that_is_missing_is_named(file, receipt, tmp_path, name):
    data = receipt.model_dump(mode="json")
    del data[name]
    other = tmp_path / "receipt.json"
    other.write_text(to_json(sealed(data)))
    done = run_command("receipt", file.parent, "--check", other)
    assert done.exit_code == 4
    assert f"is no receipt: {name}" in done.stderr


def resealed(receipt, place, value, target):
    target.write_text(changed(receipt, place, value).text())
    return target


def test_a_target_that_was_not_measured_shows_in_the_kl(run, receipt, tmp_path):
    """Whoever seals a receipt anew cannot claim another machine's KL."""
    other = resealed(receipt, ("settings", "target"), "ampere", tmp_path / "receipt.json")
    done = run_command("receipt", run, "--check", other)
    assert done.exit_code == 4
    assert "does not hold: KL mean" in done.stderr


def test_codes_that_were_changed_show_in_their_file(run, file, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shard = copy / "checkpoint" / "model.safetensors"
    content = bytearray(shard.read_bytes())
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    codes = next(own for name, own in header.items() if own.get("dtype") == "U8")
    content[8 + size + codes["data_offsets"][0]] ^= 0x11
    shard.write_bytes(content)
    done = run_command("receipt", "--check", copy / "receipt.json")
    assert done.exit_code == 4
    assert "checkpoint (files)" in done.stderr


def test_another_text_shows_in_the_tokens(run, file, tmp_path):
    other = save_text(tmp_path / "other", documents=270, words=20, seed=3)
    done = run_command("receipt", "--check", file, "--calibration", other)
    assert done.exit_code == 4
    assert "tokens (digest" in done.stderr


def test_another_model_is_refused(file, tmp_path):
    other = save_searchable("llama", tmp_path / "other", hidden_size=128)
    done = run_command("receipt", "--check", file, "--source", other)
    assert done.exit_code == 4
    assert "was not exported from" in done.stderr


def test_a_checkpoint_elsewhere_holds_with_its_model_and_its_text(run, file, model, text, tmp_path):
    alone = shutil.copytree(run / "checkpoint", tmp_path / "alone")
    own = shutil.copy(file, tmp_path / "theirs.json")
    done = run_command(
        *("receipt", alone, "--check", own, "--source", model, "--calibration", text),
        *("--format", "json"),
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["holds"] is True


def test_a_receipt_without_a_checkpoint_beside_it_asks_for_one(file, tmp_path):
    own = shutil.copy(file, tmp_path / "receipt.json")
    done = run_command("receipt", "--check", own)
    assert done.exit_code == 2
    assert "beside" in done.stderr


def test_a_run_without_a_checkpoint_has_no_receipt(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint"))
    done = run_command("receipt", copy)
    assert done.exit_code == 2
    assert "holds no checkpoint" in done.stderr


@pytest.mark.parametrize("missing", ["noise", "score_fully"])
def test_figures_that_are_no_numbers_give_no_receipt(run, missing, tmp_path, monkeypatch):
    measured = getattr(Scorer, missing)

    def overflowing(*given, **options):
        found = measured(*given, **options)
        return (
            replace(found, kl=found.kl * math.nan)
            if missing == "noise"
            else [replace(own, kl=own.kl * math.nan) for own in found]
        )

    monkeypatch.setattr(Scorer, missing, overflowing)
    done = run_command("receipt", run, "--out", tmp_path / "receipt.json")
    assert done.exit_code == 4, done.stderr
    assert "no finite KL and noise floor" in done.stderr


def test_a_receipt_of_nothing_is_refused():
    done = run_command("receipt")
    assert done.exit_code == 2
    assert "none is named" in done.stderr


def test_too_few_documents_give_no_receipt(run, model, tmp_path):
    few = save_text(tmp_path / "few", documents=1, words=400)
    done = run_command(
        *("receipt", run / "checkpoint", "--source", model, "--calibration", few, *TOKEN_FLAGS),
        *("--report-tokens", 64),
    )
    assert done.exit_code == 4
    assert "an interval needs" in done.stderr
