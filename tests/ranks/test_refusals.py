"""What keeps processes from measuring together is said in one line, by one of them."""

import shutil

import launched
import pytest
import torch
from searchable import TOKEN_FLAGS, save_searchable, save_text
from test_groups import in_a_group

from autoquant.errors import ConfigError
from autoquant.run.config import ProbeConfig
from autoquant.run.machines import following

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refused")
    save_searchable("llama", folder / "model")
    save_text(folder / "text")
    return folder


def words(folder, run, *flags, model="model"):
    return [
        *("search", folder / model, "--budget-bpe", 9, "--calibration", folder / "text"),
        *(*TOKEN_FLAGS, "--no-mlflow", "--out", run, *flags),
    ]


def refused(commands, logs, code):
    """The one line of processes that end at once, all with the same exit code."""
    processes = launched.start(commands, logs)
    size = len(commands)
    codes = [process.wait(timeout=launched.PATIENCE) for process in processes]
    assert codes == [code] * size, launched.printed(logs, 0, "err")
    (error,) = launched.errors(logs, size)
    assert error in launched.printed(logs, 0, "err")
    return error


def test_more_processes_than_batches(folder, tmp_path):
    run = tmp_path / "run"
    command = words(folder, run, "--search-tokens", 256)
    error = refused([command] * 2, tmp_path / "logs", ConfigError.exit_code)
    assert "2 processes share 1 batches of search tokens" in error


def test_a_weight_that_differs(folder, tmp_path):
    other = shutil.copytree(folder / "model", folder / "other") / "model.safetensors"
    content = bytearray(other.read_bytes())
    content[-1] ^= 1
    other.write_bytes(content)
    run = tmp_path / "run"
    commands = [words(folder, run), words(folder, run, model="other")]
    error = refused(commands, tmp_path / "logs", ConfigError.exit_code)
    assert "process 1 has other files of the model than process 0: model.safetensors" in error
    assert not run.exists()


def test_a_model_that_one_machine_lacks(folder, tmp_path):
    run = tmp_path / "run"
    commands = [words(folder, run), words(folder, run, model="absent")]
    error = refused(commands, tmp_path / "logs", 4)
    assert "absent" in error
    assert not run.exists()


def differ(ranks, folder):
    config = ProbeConfig.of({"model": folder / "model", "device": "cpu"})
    other = ProbeConfig.of({"model": folder / "model", "device": "cpu", "seed": ranks.number})
    refuse(ranks, other, "settings: seed is 1 there and 0 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "package_versions", lambda: {"torch": f"2.{ranks.number}"})
        refuse(ranks, config, "installed versions: torch is 2.1 there and 2.0 here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "measuring_on", lambda _: {"device": f"H{ranks.number}00"})
        refuse(ranks, config, "device: device is H100 there and H000 here")
    following._open(config, ranks)


def refuse(ranks, config, difference):
    with pytest.raises(ConfigError) as caught:
        following._open(config, ranks)
    assert f"process 1 has other {difference.partition(':')[0]}" in caught.value.message
    assert difference.partition(": ")[2] in caught.value.message


def in_a_group_with(rank, file, folder):
    in_a_group(rank, file, 2, lambda ranks: differ(ranks, folder))


def test_settings_versions_and_devices_that_differ(folder, tmp_path):
    torch.multiprocessing.spawn(in_a_group_with, (str(tmp_path / "file"), folder), nprocs=2)
