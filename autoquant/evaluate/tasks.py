"""Tasks by name, as YAML files of the harness, or as files of items."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoquant.errors import ConfigError, SourceError, first_line
from autoquant.evaluate.harness import harness
from autoquant.evaluate.items import ItemFile, is_item_file, read_items

YAML = (".yaml", ".yml")

_VERSION = 1.0


def open_tasks(names: Sequence[str], *, shots: int | None) -> dict[str, Any]:
    """The harness' task objects, by name; a group gives each of its tasks.

    Args:
        names: of the harness' own tasks and groups, YAML files, files of items.
        shots: examples before each item; None leaves what a task says, else none.

    Raises:
        ConfigError: no such task or file, or lm-eval is not installed.
        SourceError: a file is damaged, a task has no item, or its data set cannot be had.
    """
    items = {name: read_items(Path(name)) for name in names if is_item_file(name)}
    missing = [n for n in names if n.endswith(YAML) and not Path(n).is_file()]
    if missing:
        raise ConfigError(f"the task file {missing[0]} does not exist.", fix="check the path.")
    own = [name for name in names if name not in items and not name.endswith(YAML)]
    manager = harness("tasks").TaskManager(include_defaults=bool(own))
    _require_known(own, manager.all_tasks)
    found: dict[str, Any] = {}
    for name in names:
        for task, opened in _opened(manager, name, items.get(name)).items():
            if task in found:
                raise ConfigError(
                    f"two of the tasks are called {task}.", fix="leave one out, or rename a file."
                )
            found[task] = opened
    for name, task in found.items():
        _prepare(name, task, shots)
    return found


def _require_known(names: Sequence[str], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ConfigError(
                f"{name!r} is no task of lm-evaluation-harness, and no file of a task.",
                fix=f"write {' or '.join(close)}."
                if close
                else f"name a task of `lm-eval ls tasks`, a file {', '.join(YAML)} of one, or a "
                "file of items (.jsonl, .jsonl.gz).",
            )


def _opened(manager: Any, name: str, items: ItemFile | None) -> Mapping[str, Any]:
    try:
        loaded: Mapping[str, Any] = manager.load([name if items is None else _task_of(items)])
        return loaded["tasks"]  # type: ignore[no-any-return]
    except (IndexError, ZeroDivisionError) as error:
        raise SourceError(
            f"the task {name} has no item.", fix="check its data set and its split."
        ) from error
    except Exception as error:  # the harness, templates and the hub's client raise dozens of types
        if _is_of_the_hub(error):
            raise SourceError(
                f"the data set of the task {name} cannot be had: {first_line(error)}",
                fix="make the hub reachable, or pass a file of items (.jsonl) or a YAML task with "
                "data_files, which need none.",
            ) from error
        raise SourceError(
            f"the task {name} cannot be read: {type(error).__name__}: {first_line(error)}",
            fix="a task's YAML needs task, dataset_path, a split, doc_to_text and doc_to_target, "
            "by the columns that its data has.",
        ) from error


def _is_of_the_hub(error: BaseException | None) -> bool:
    """Whether the hub, the network or a folder that is not there is the cause."""
    while error is not None:
        modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
        if modules & {"huggingface_hub", "httpx", "requests", "fsspec"} or isinstance(
            error, (ConnectionError, FileNotFoundError, TimeoutError)
        ):
            return True
        error = error.__cause__
    return False


def _task_of(items: ItemFile) -> dict[str, Any]:
    """The harness' description of a task of items.

    With choices, the likeliest counts: by its probability (acc), and by that over its length in
    bytes (acc_norm), as for HellaSwag. With an answer, the item is right where every token of the
    answer is the likeliest, as greedy decoding would write it; the harness puts a space before a
    choice, and none before such an answer.
    """
    scored = ("acc", "acc_norm") if items.has_choices else ("acc",)

    def data_set(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(list(items.records))}

    return {
        "task": items.name,
        "custom_dataset": data_set,
        "test_split": "test",
        "output_type": "multiple_choice" if items.has_choices else "loglikelihood",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{gold}}" if items.has_choices else " {{answer}}",
        **({"doc_to_choice": "choices"} if items.has_choices else {}),
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in scored
        ],
        "metadata": {"version": _VERSION},
    }


def _prepare(name: str, task: Any, shots: int | None) -> None:
    """Set the number of examples as the harness does; a task that says none keeps none."""
    said = task.get_config("num_fewshot")
    if shots is not None and said != 0:
        task.set_config(key="num_fewshot", value=shots)
    elif said is None:
        task.set_config(key="num_fewshot", value=0)
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise ConfigError(
            f"the task {name} runs code that models write, or shows pictures.",
            fix="leave it out; run it by lm-eval itself on the exported checkpoint.",
        )
    if not len(task.eval_docs):
        raise SourceError(f"the task {name} has no item.", fix="check its data set and its split.")
