"""`autoquant evaluate` from the command line: runs, checkpoints, models and bad input."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import pytest
from searchable import TOKEN_FLAGS, save_searchable, save_text

import autoquant as autoquant_api
from autoquant.environment import extra
from autoquant.errors import ConfigError
from autoquant.evaluate.evaluated import Evaluation
from autoquant.evaluate.tasks import open_tasks
from autoquant.report.record import RunRecord
from autoquant.run.config import EvaluateConfig
from autoquant.run.evaluation.of_run import open_run
from autoquant.run.observer import Logged
from autoquant.store.run_directory import read_json, write_json

pytestmark = pytest.mark.slow

EVIDENCE = Path(__file__).parents[2] / "experiments" / "evidence"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run beside its MLflow store."""
    shutil.copytree(finished.parent, tmp_path / "runs")
    return tmp_path / "runs" / "run"


@pytest.fixture
def evaluate(autoquant):
    def call(*arguments, code=0):
        done = autoquant("evaluate", *arguments, "--format", "json")
        assert done.exit_code == code, done.stderr
        return json.loads(done.stdout)["scores"] if code == 0 else done.stderr

    return call


def test_a_run_s_winner_stands_beside_bf16_with_its_kl(run, evaluate, choices):
    rows = evaluate(run, "--tasks", choices)
    assert [(row["name"], row["metric"]) for row in rows] == [
        (name, metric) for metric in ("acc", "acc_norm") for name in ("bf16", "winner")
    ]
    result = read_json(run, "result.json")
    bf16, winner = rows[:2]
    assert (bf16["kl"], bf16["to_bf16"]) == (0.0, None)
    assert winner["kl"] == result["kl"]["mean"]
    assert winner["bpe"] == result["bpe"]["checkpoint"]
    assert winner["to_bf16"]["low"] <= winner["value"] - bf16["value"] <= winner["to_bf16"]["high"]
    assert winner["items"] == 12


def test_the_model_is_the_one_that_was_scored(run):
    """The session of an evaluation gives the KL of the search to the last digit."""
    record = RunRecord.read(run)
    opened = open_run(record, EvaluateConfig.of({"tasks": "t"}), Logged())
    (_, bf16), (_, winner) = opened.candidates
    scorer, split = opened.session.scorer, opened.session.splits["report"]
    assert scorer.score(winner, split).mean == record.result["kl"]["mean"]
    assert scorer.score(bf16, split).mean == 0.0


def test_refitted_codes_need_a_run_whose_polish_made_them(run, evaluate, choices, tmp_path):
    group = next(iter(read_json(run, "groups.json")["groups"]))["name"]
    file = tmp_path / "refit.yaml"
    file.write_text(f"{{schema_version: 1, groups: {{{group}: fp8/refit}}}}")
    said = evaluate(run, "--tasks", choices, "--assignment", file, code=2)
    assert f"names refitted codes ({group}: fp8/refit)" in said
    assert not said.startswith("load")


def test_groups_that_the_space_of_a_run_closes_are_not_taken_for_bf16(
    run, evaluate, choices, tmp_path
):
    file = tmp_path / "head.yaml"
    file.write_text("{schema_version: 1, groups: {lm_head: fp8}}")
    said = evaluate(run, "--tasks", choices, "--assignment", file, code=2)
    assert "lm_head into fp8, and the space default of the run leaves it in BF16" in said
    assert not said.startswith("load")


def test_scores_are_kept_in_the_run_its_report_and_mlflow(run, evaluate, choices):
    from mlflow.tracking import MlflowClient

    evaluate(run, "--tasks", choices, "--limit", 5)
    evaluate(run, "--tasks", choices, "--limit", 5, "--assignment", "uniform fp8")
    stored = Evaluation.of(read_json(run, "evaluation.json"), "file")
    assert {score.name for score in stored.scores} == {"bf16", "winner", "uniform fp8"}
    assert len({score.digest for score in stored.scores}) == 1
    page = (run / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page
    assert "uniform fp8" in page.partition("<h2>Tasks</h2>")[2]
    client = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    metrics = client.get_run(read_json(run, "tracking.json")["run_id"]).data.metrics
    for score in stored.scores:
        name = f"task/words/acc/{score.name}"
        assert metrics[name] == score.metric("acc").value


def test_scores_are_read_from_python(run, evaluate, choices):
    assert autoquant_api.load_run(run).tasks().empty
    rows = evaluate(run, "--tasks", choices, "--limit", 5)
    table = autoquant_api.load_run(run).tasks()
    assert table["value"].tolist() == [row["value"] for row in rows]
    assert table["name"].tolist() == [row["name"] for row in rows]
    assert table["to_bf16"][1] == rows[1]["to_bf16"]


def test_a_checkpoint_answers_as_the_winner_that_it_holds(run, evaluate, choices, text):
    winner = evaluate(run, "--tasks", choices, "--assignment", "winner")
    found = evaluate(
        *(run / "checkpoint", "--tasks", choices, "--calibration", text, *TOKEN_FLAGS),
        *("--assignment", "checkpoint", "--out", run.parent / "scores.json"),
    )
    assert [row["value"] for row in found] == [row["value"] for row in winner]
    assert found[0]["kl"] == winner[0]["kl"]
    stored = json.loads((run.parent / "scores.json").read_text())
    assert len(stored["scores"][0]["metrics"][0]["items"]) == 12
    assert stored["limit"] is None


def test_a_file_beside_a_run_is_measured_as_the_run_s_trials_are(run, evaluate, choices):
    (run / "mine.yaml").write_text((run / "assignment.yaml").read_text())
    flags = ("--tasks", choices, "--limit", 4, "--assignment")
    evaluate(run, *flags, "winner")
    rows = evaluate(run, *flags, run / "mine.yaml")
    own, other = (next(r for r in rows if r["name"] == name) for name in ("winner", "mine"))
    assert (other["kl"], other["bpe"], other["value"]) == (own["kl"], own["bpe"], own["value"])


def test_a_model_under_a_file_of_an_assignment(model, run, evaluate, choices, text):
    rows = evaluate(
        *(model, "--tasks", choices, "--calibration", text, *TOKEN_FLAGS),
        *("--assignment", f"bf16,{run / 'assignment.yaml'}"),
    )
    assert {row["name"] for row in rows} == {"bf16", "assignment"}
    assert rows[1]["kl"] == read_json(run, "result.json")["kl"]["mean"]


def test_the_table_stands_on_standard_output(run, autoquant, choices):
    done = autoquant("evaluate", run, "--tasks", choices, "--limit", 3)
    header, *lines = done.stdout.splitlines()
    assert header.split()[:5] == ["task", "figure", "assignment", "BPE", "KL"]
    assert len(lines) == 4
    assert "likelihoods of winner" in done.stderr


def test_a_yaml_task_of_one_s_own_needs_no_hub(model, tmp_path, evaluate, choices, text):
    task = tmp_path / "own.yaml"
    task.write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{choices}'}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_target: '{{gold}}'\n"
        "doc_to_choice: choices\nmetric_list: [{metric: acc, aggregation: mean, "
        "higher_is_better: true}]\n"
    )
    flags = (model, "--calibration", text, *TOKEN_FLAGS)
    own = evaluate(*flags, "--tasks", task)
    items = evaluate(*flags, "--tasks", choices)
    assert own[0]["task"] == "own"
    assert own[0]["value"] == items[0]["value"]


def test_items_with_answers_ask_for_what_greedy_decoding_writes(model, tmp_path, evaluate, text):
    file = tmp_path / "answers.jsonl.gz"
    with gzip.open(file, "wt") as lines:
        lines.write('{"query": "a b", "answer": "c"}\n{"query": "b c", "answer": "d"}\n')
    rows = evaluate(model, "--calibration", text, *TOKEN_FLAGS, "--tasks", file)
    assert [(row["task"], row["metric"], row["items"]) for row in rows] == [("answers", "acc", 2)]


def test_a_space_stands_before_a_choice_and_before_an_answer(tmp_path, choices):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"query": "The pass key is", "answer": "82023"}\n')
    tasks = open_tasks([str(file), str(choices)], shots=None)
    asked = {}
    for name, task in tasks.items():
        task.build_all_requests(limit=1)
        asked[name] = [instance.args for instance in task.instances]
    assert asked["answers"] == [("The pass key is", " 82023")]
    assert asked["words"][0] == ("the scale of a", " scale")
    assert len(asked["words"]) == 4


def refused(evaluate, model, tasks, *flags, code):
    return evaluate(model, "--tasks", tasks, *flags, code=code)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"query": "a"}\n', "it has neither choices nor an answer"),
        ('{"choices": ["a"], "gold": 0}\n', "it has no query"),
        ('{"query": "a", "choices": ["b", "c"]}\n', "it has no gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}\n', "gold choice 2 of 2"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}\n', "is no item"),
        ("[1]\n", "it is no JSON object"),
        ('{"query": "a", "answer": "b"}\n{"query": \n', ":2 "),
        ('{"query": "a", "answer": "b"}\n{"query": "a", "choices": ["b"], "gold": 0}\n', "items"),
        ("\n", "holds no item"),
    ],
)
def test_a_file_that_holds_no_items_is_refused(model, tmp_path, evaluate, lines, says):
    file = tmp_path / "bad.jsonl"
    file.write_text(lines)
    assert says in refused(evaluate, model, file, code=4)


def test_a_file_that_only_ends_like_gzip_is_refused(model, tmp_path, evaluate):
    file = tmp_path / "bad.jsonl.gz"
    file.write_bytes(b"no gzip")
    assert str(file) in refused(evaluate, model, file, code=4)


def test_a_file_that_is_not_there_is_refused(model, tmp_path, evaluate):
    for name in ("absent.jsonl", "absent.yaml"):
        assert "does not exist" in refused(evaluate, model, tmp_path / name, code=2)


def test_an_unknown_task_names_its_neighbours(model, evaluate):
    said = refused(evaluate, model, "helaswag", code=2)
    assert "'helaswag' is no task" in said
    assert "hellaswag" in said.partition("no file of a task")[2]


def test_without_a_network_a_hub_s_data_set_cannot_be_had(model, evaluate):
    said = refused(evaluate, model, "hellaswag", code=4)
    assert "the data set of the task hellaswag cannot be had" in said
    assert "file of items" in said


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (("doc_to_text: '{{query}}'", "doc_to_text: '{{nothing}}'"), "cannot be read"),
        (("doc_to_text: '{{query}}'\n", ""), "cannot be read"),
        (("doc_to_target: '{{gold}}'\n", ""), "cannot be read"),
        (("test_split: test", "test_split: other"), "cannot be read"),
        (("dataset_path: json", "dataset_path: 7"), "cannot be"),
        (("task: own\n", ""), "cannot be read"),
    ],
)
def test_a_yaml_task_that_its_data_does_not_fit_is_refused(
    model, tmp_path, evaluate, choices, changed, says
):
    task = tmp_path / "own.yaml"
    task.write_text(
        "task: own\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: '{choices}'}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{query}}'\ndoc_to_target: '{{gold}}'\n"
        "doc_to_choice: choices\n".replace(*changed)
    )
    assert says in refused(evaluate, model, task, code=4)


def test_no_item_at_all_is_refused(model, evaluate, choices):
    assert "--limit" in refused(evaluate, model, choices, "--limit", 0, code=2)


def test_a_task_twice_is_refused(model, tmp_path, evaluate, choices):
    other = shutil.copy(choices, tmp_path / choices.name)
    assert "are called words" in refused(evaluate, model, f"{choices},{other}", code=2)


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match="lm-evaluation-harness cannot be imported") as caught:
        extra("lm_eval.tasks", "evaluate", title="lm-evaluation-harness")
    assert "pip install 'autoquant[evaluate]'" in caught.value.fix


def test_the_command_line_says_so_too(model, evaluate, choices, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert "autoquant[evaluate]" in refused(evaluate, model, choices, code=2)


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path, evaluate, choices, text):
    other = save_searchable("llama", tmp_path / "other", hidden_size=128)
    flags = ("--source", other, "--calibration", text, *TOKEN_FLAGS)
    assert "was not exported from" in refused(evaluate, run / "checkpoint", choices, *flags, code=4)


def test_a_checkpoint_whose_model_nothing_names_is_refused(run, tmp_path, evaluate, choices):
    alone = shutil.copytree(run / "checkpoint", tmp_path / "alone")
    assert "--source" in refused(evaluate, alone, choices, code=2)


def test_a_run_that_is_not_finished_is_refused(run, evaluate, choices):
    (run / "result.json").unlink()
    assert "has no result yet" in refused(evaluate, run, choices, code=2)


def test_a_run_whose_text_has_changed_is_refused(run, evaluate, choices, text, tmp_path):
    other = save_text(tmp_path / "other", documents=60, words=40, seed=5)
    settings = (run / "config.resolved.yaml").read_text()
    (run / "config.resolved.yaml").write_text(settings.replace(str(text), str(other)))
    assert "has changed since" in refused(evaluate, run, choices, code=5)


def test_an_assignment_that_a_run_does_not_have_is_refused(run, evaluate, choices):
    said = refused(evaluate, run, choices, "--assignment", "best", code=2)
    assert "has no trial 'best'" in said
    assert "uniform fp8" in said


def test_a_source_without_a_checkpoint_is_refused(model, evaluate, choices):
    said = refused(evaluate, model, choices, "--source", model, code=2)
    assert "without a checkpoint" in said


def test_an_evaluation_that_is_damaged_is_named(run, evaluate, choices):
    (run / "evaluation.json").write_text('{"schema_version": 1}')
    assert "evaluation.json" in refused(evaluate, run, choices, "--limit", 2, code=4)


def test_a_task_that_asks_for_text_is_answered_and_filtered(model, tmp_path, evaluate, text):
    """Examples from another split, stops, and a figure for each filter, as GSM8K has them."""
    for name, numbers in (("train", (1, 2, 3)), ("test", (4, 5))):
        records = [{"question": f"what is {n}", "answer": f"so #### {n}"} for n in numbers]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    task = tmp_path / "numbers.yaml"
    given = (EVIDENCE / "gsm8k.yaml").read_text().replace("gsm8k_held_out", "numbers")
    given = given.replace("FOLDER", str(tmp_path)).replace("num_fewshot: 5", "num_fewshot: 1")
    task.write_text(given.replace("do_sample: false", "do_sample: false\n  max_gen_toks: 4"))
    rows = evaluate(model, "--calibration", text, *TOKEN_FLAGS, "--tasks", task)
    assert [(row["metric"], row["items"]) for row in rows] == [
        ("exact_match (strict-match)", 2),
        ("exact_match (flexible-extract)", 2),
    ]
    assert all(0 <= row["value"] <= 1 for row in rows)


def test_prompts_in_a_chat_format_that_the_model_lacks_are_refused(model, evaluate, choices, text):
    flags = ("--chat-template", "--calibration", text, *TOKEN_FLAGS)
    assert "chat template" in refused(evaluate, model, choices, *flags, code=4)


def test_prompts_in_the_model_s_chat_format_are_other_items(
    model, tmp_path, evaluate, choices, text
):
    spoken = shutil.copytree(model, tmp_path / "spoken")
    config = json.loads((spoken / "tokenizer_config.json").read_text())
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    config["chat_template"] = template + "{% if add_generation_prompt %}[assistant]{% endif %}"
    (spoken / "tokenizer_config.json").write_text(json.dumps(config))
    flags = ("--calibration", text, *TOKEN_FLAGS, "--tasks", choices, "--limit", 4)
    (plain, *_), (chat, *_) = evaluate(spoken, *flags), evaluate(spoken, *flags, "--chat-template")
    assert plain["digest"] != chat["digest"]


def test_more_examples_are_other_items(model, evaluate, choices, text):
    flags = ("--calibration", text, *TOKEN_FLAGS, "--tasks", choices, "--limit", 4)
    (none, *_), (two, *_) = evaluate(model, *flags), evaluate(model, *flags, "--shots", 2)
    assert none["digest"] != two["digest"]


def test_runs_side_by_side_are_compared_on_the_same_items(run, autoquant, evaluate, choices):
    other = shutil.copytree(run, run.parent / "other")
    evaluate(run, "--tasks", choices)
    evaluate(other, "--tasks", choices)
    stored = json.loads((other / "evaluation.json").read_text())
    stored.pop("checksum")
    winner = next(s for s in stored["scores"] if s["name"] == "winner")
    acc = winner["metrics"][0]
    acc["items"] = [1.0 - value for value in acc["items"]]
    acc["value"] = sum(acc["items"]) / len(acc["items"])
    write_json(other, "evaluation.json", stored)
    page = run.parent / "compared.html"
    done = autoquant("compare", run, other, "--format", "json", "--out", page)
    rows = [row for row in json.loads(done.stdout)["tasks"] if row["metric"] == "acc"]
    assert [(row["run"], row["to_first"] is None) for row in rows] == [
        ("run", True),
        ("other", False),
    ]
    assert rows[1]["to_first"]["mean"] == pytest.approx(rows[1]["value"] - rows[0]["value"])
    assert "<h2>Tasks</h2>" in page.read_text()
    shown = autoquant("compare", run, other).stdout
    assert "to the first" in shown


def test_runs_without_tasks_have_no_table_of_them(run, autoquant):
    done = autoquant("compare", run, "--format", "json")
    assert "tasks" not in json.loads(done.stdout)
    assert "to the first" not in autoquant("compare", run).stdout
