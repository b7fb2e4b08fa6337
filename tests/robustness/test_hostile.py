"""Models, texts and settings that no command may take, fail on by accident, or hang over."""

import json
import os
import shutil
import threading
from pathlib import Path

import pytest
from mutations import YAML_LINES
from safetensors.torch import load_file, save_file
from searchable import TOKEN_FLAGS, save_searchable, save_text

from autoquant.errors import SourceError
from autoquant.model import loading
from autoquant.model.loading import choose_device, load_model

SCORE = (*TOKEN_FLAGS[:2], *TOKEN_FLAGS[4:])
ASSIGNMENT = "schema_version: 1\ngroups: {model.layers.0.mlp.down_proj: fp8}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    save_searchable("llama", folder / "model", num_hidden_layers=1)
    save_text(folder / "text", documents=12)
    (folder / "assignment.yaml").write_text(ASSIGNMENT)
    return folder


@pytest.fixture
def model(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder / "model", tmp_path / "model"))


@pytest.fixture
def refused(autoquant, folder, tmp_path):
    """What a command says of a model that it refuses before it loads or writes anything."""

    def call(command: str, model: Path, code: int = 4) -> str:
        rest = {
            "plan": (),
            "score": ("--assignment", folder / "assignment.yaml", *SCORE),
            "search": ("--budget-bpe", 11, *TOKEN_FLAGS, "--out", tmp_path / "run", "--no-mlflow"),
        }[command]
        text = ("--calibration", folder / "text") if rest else ()
        done = autoquant(command, model, *rest, *text)
        assert done.exit_code == code, done.stderr
        error, fix = done.stderr.splitlines()[-2:]
        assert error.startswith("error: ")
        assert fix.startswith("  fix: ")
        assert not (tmp_path / "run" / "calibration.json").exists()
        return error

    return call


def configure(model: Path, **values: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("nested", [False, True])
def test_weights_of_another_file_than_the_exported_one_are_refused(model, refused, nested):
    other = {name: -tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(other, model / "other.safetensors")
    key = {"transformers_weights": "other.safetensors"}
    configure(model, **({"text_config": key} if nested else key))
    for command in ("plan", "score", "search"):
        assert "transformers_weights, 'other.safetensors'" in refused(command, model)


def test_an_adapter_beside_the_weights_is_refused(model, refused):
    (model / "adapter_config.json").write_text("{}")
    assert "holds adapter_config.json beside its weights" in refused("search", model)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**7}, "describes 10,000,000 layers"),
        ({"num_hidden_layers": 1e30}, "describes 1e+30 layers"),
        ({"text_config": {"num_hidden_layers": 10**7}}, "describes 10,000,000 layers"),
        ({"num_labels": 10**9}, "describes 1,000,000,000 labels"),
        ({"hidden_size": 10**9}, "describes a model of 1,027,000,000,016 elements"),
        ({"vocab_size": 10**12}, "describes a model of 128,"),
        ({"model_type": ["llama"]}, "has the model_type ['llama'], which is no name"),
        ({"text_config": {"model_type": {}}}, "has the model_type {}, which is no name"),
        ({"hidden_act": 7}, "cannot load"),
        ({"num_attention_heads": 0}, "cannot load"),
    ],
)
def test_a_config_describes_no_more_than_its_weights_fill(model, refused, values, said):
    configure(model, **values)
    assert said in refused("score", model)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: os.mkfifo(m / "pipe"), "pipe is a folder, a pipe"),
        (lambda m: (m / "loop").symlink_to("loop"), "loop cannot be read: Too many levels"),
        (lambda m: (m / "gone").symlink_to("nowhere"), "gone cannot be read: No such file"),
        (lambda m: (m / "README.md").symlink_to("/etc/hostname"), "README.md is a link to /etc"),
        (lambda m: (m / "data").symlink_to("/etc"), "data is a link to the folder /etc"),
        (lambda m: (m / "a\nb").symlink_to("a\nb"), r"model/a\nb cannot be read"),
        (lambda m: (m / "tokenizer.json").write_text("{"), "tokenizer.json is not JSON"),
        (lambda m: (m / "generation_config.json").write_text("[" * 9), "no server can read it"),
        (lambda m: (m / "chat_template.jinja").write_text("{%"), "no server can read it"),
    ],
)
def test_what_lies_beside_the_weights_is_looked_at_before_a_search(model, refused, make, said):
    for name in ("tokenizer.json", "generation_config.json"):
        if name in said:
            (model / name).unlink()
    make(model)
    assert said in refused("search", model)


@pytest.mark.parametrize("part", ["added_tokens", "model", "pre_tokenizer", "decoder"])
@pytest.mark.parametrize("value", [7, [], {}, {"type": "None"}])
def test_a_tokenizer_of_wrong_types_is_an_error_of_its_files(model, autoquant, folder, part, value):
    file = model / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {part: value}))
    flags = ("--assignment", folder / "assignment.yaml", "--calibration", folder / "text")
    done = autoquant("score", model, *flags, *SCORE)
    assert done.exit_code in (0, 4), done.stderr
    if done.exit_code:
        assert "tokenizer" in done.stderr


def test_an_export_with_known_ranges_looks_at_the_tokenizer_too(model, autoquant, tmp_path, folder):
    (model / "tokenizer_config.json").write_text('{"bos_token": 7}')
    ranges = {"schema_version": 1, "input_amax": {"model.layers.0.mlp.down_proj": 1.0}}
    (tmp_path / "calibration.json").write_text(json.dumps(ranges))
    done = autoquant(
        *("export", model, "--assignment", folder / "assignment.yaml", "--out", tmp_path / "out"),
        *("--calibrated", tmp_path / "calibration.json"),
    )
    assert done.exit_code == 4
    assert "has no tokenizer that transformers can use" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_token_that_the_model_does_not_embed(model, refused):
    file = model / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {name: number + 1000 for name, number in vocabulary.items()}
    file.write_text(json.dumps(tokenizer))
    assert "and the model embeds 272 tokens" in refused("score", model)


def test_a_file_that_is_cut_off_while_the_model_is_loaded_is_named(model, monkeypatch):
    plain = loading._empty

    def cut_first(*arguments):
        file = model / "model.safetensors"
        os.truncate(file, file.stat().st_size - 1000)
        return plain(*arguments)

    monkeypatch.setattr(loading, "_empty", cut_first)
    with pytest.raises(SourceError, match="it changed while it was read"):
        load_model(model, choose_device("cpu"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "\\ud800"}', ":2 holds half of a surrogate pair"),
        ('{"text": %s}' % ("9" * 5000), ":2 holds an integer of thousands of digits"),
        ('{"text": ' + "[" * 5000, ":2 is nested deeper than 128 levels"),
        ('{"text": ["a"]}', ":2 has no text field"),
        ("7", ":2 has no text field"),
        ("\ufffe{", ":2 is not JSON"),
    ],
)
def test_a_line_of_a_text_that_is_none_is_named(folder, autoquant, tmp_path, line, said):
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "scale"}\n' + line + "\n")
    flags = ("--assignment", folder / "assignment.yaml", "--calibration", file)
    done = autoquant("score", folder / "model", *flags, *SCORE)
    assert done.exit_code == 4
    assert f"text.jsonl{said}" in done.stderr


@pytest.mark.parametrize("line", YAML_LINES, ids=lambda line: line[:12])
@pytest.mark.parametrize("flag", ["--space", "--config"])
def test_yaml_of_any_kind_is_refused_or_read(folder, autoquant, tmp_path, line, flag):
    file = tmp_path / "given.yaml"
    file.write_text(f"schema_version: 1\n{line}\n")
    done = autoquant("plan", folder / "model", flag, file)
    assert done.exit_code in (0, 2), done.stderr


def test_a_pipe_in_place_of_a_file_of_settings_is_not_waited_for(folder, autoquant, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    done: list[int] = []
    call = threading.Thread(
        target=lambda: done.append(
            autoquant("plan", folder / "model", "--config", tmp_path / "pipe.yaml").exit_code
        ),
        daemon=True,
    )
    call.start()
    call.join(timeout=60)
    assert done == [2]
