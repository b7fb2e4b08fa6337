"""The settings of the commands that take a run directory or a checkpoint for a model."""

from typing import Annotated, ClassVar

from autoquant.run.config.parts import MeasuredConfig
from autoquant.run.config.setting import Setting
from autoquant.run.config.types import ExistingFile, Names, Natural, NewFile, Positive

CheckpointSource = Annotated[
    str | None,
    Setting(
        "Model",
        "The model that a checkpoint was made from: a folder or a hub id.",
        "MODEL",
        unset="that of the run directory it lies in",
        is_saved=False,
    ),
]


class EvaluateConfig(MeasuredConfig):
    """The settings of `autoquant evaluate`; a run directory brings its own of how it measures."""

    command: ClassVar[str] = "evaluate"

    model: Annotated[
        str | None,
        Setting(
            "Model",
            "Model, run directory or exported checkpoint; the bundled reference model by default.",
            "[MODEL|RUN|CHECKPOINT]",
            is_argument=True,
        ),
    ] = None
    source: CheckpointSource = None
    assignment: Annotated[
        Names | None,
        Setting(
            "Model",
            "What is evaluated: bf16, files of assignments, of a run its winner and its trials by "
            "number or name, such as uniform nvfp4.",
            "NAME|FILE[,...]",
            unset="bf16, and what a run or a checkpoint chose",
            is_saved=False,
        ),
    ] = None
    tasks: Annotated[
        Names,
        Setting(
            "Tasks",
            "Tasks of lm-evaluation-harness by name or as YAML files, and files of items (.jsonl, "
            ".jsonl.gz), which need no hub.",
            "TASK|FILE[,...]",
        ),
    ]
    limit: Annotated[Positive | None, Setting("Tasks", "First N items alone.", "N")] = None
    shots: Annotated[
        Natural | None,
        Setting("Tasks", "Examples before each item.", "N", unset="as the task says"),
    ] = None
    chat_template: Annotated[
        bool, Setting("Tasks", "Write prompts in the model's own chat format.")
    ] = False
    out: Annotated[
        NewFile | None,
        Setting(
            "Output",
            "JSON file for the scores, items included.",
            "FILE",
            unset="evaluation.json of a run directory",
            is_saved=False,
        ),
    ] = None


class ReceiptConfig(MeasuredConfig):
    """The settings of `autoquant receipt`; a run and a receipt bring their own."""

    command: ClassVar[str] = "receipt"

    model: Annotated[
        str | None,
        Setting(
            "Model", "Run directory or exported checkpoint.", "[RUN|CHECKPOINT]", is_argument=True
        ),
    ] = None
    source: CheckpointSource = None
    check: Annotated[
        ExistingFile | None,
        Setting(
            "Model",
            "Receipt to hold against what is here: every file is read and the KL measured again, "
            "with the settings of the receipt. The exit code is 4 where it does not hold.",
            "FILE",
            is_saved=False,
        ),
    ] = None
    out: Annotated[
        NewFile | None,
        Setting(
            "Output",
            "File for the receipt.",
            "FILE",
            unset="receipt.json beside the checkpoint's folder",
            is_saved=False,
        ),
    ] = None
