"""Settings that commands share, one field a setting.

A field gives the type, bounds, default, heading and help of its setting. The option of the command
line and the key of a settings file follow from it; `autoquant.search` names it once more, for its
signature.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import model_validator

from autoquant.codes.held import Weights
from autoquant.errors import ConfigError
from autoquant.export.layouts.base import Layout
from autoquant.formats.kv_cache import KvCache
from autoquant.plan.activation_mode import ActivationMode, Target
from autoquant.plan.space import Effort
from autoquant.run.config.base import Config
from autoquant.run.config.setting import Setting
from autoquant.run.config.types import Bytes, Factor, Natural, Share, Tokens
from autoquant.tracking import ChildRuns

if TYPE_CHECKING:
    from autoquant.data.tokens import TokenPlan
    from autoquant.model.streaming.placement import Allowance


class ModelConfig(Config):
    """Which model."""

    model: Annotated[
        str | None,
        Setting(
            "Model",
            "Folder or hub id; the bundled reference model by default.",
            "[MODEL]",
            is_argument=True,
        ),
    ] = None
    revision: Annotated[
        str | None,
        Setting(
            "Model",
            "Branch, tag or commit of a model on the hub.",
            "NAME",
            unset="its main branch",
        ),
    ] = None


class MemoryConfig(ModelConfig):
    """How the model is loaded."""

    device: Annotated[
        str | None,
        Setting("Model", "cpu, cuda, cuda:1 ...", "NAME", unset="the first GPU, else the CPU"),
    ] = None
    trust_remote_code: Annotated[bool, Setting("Model", "Run code that comes with the model.")] = (
        False
    )
    weights: Annotated[
        Weights,
        Setting(
            "Model",
            "Where weights are: on the device, on the GPUs of all processes of the machine "
            "together, in the host's memory or in the files, block by block; auto takes the first "
            "that fits. Results are the same.",
        ),
    ] = Weights.AUTO
    device_memory: Annotated[
        Bytes | None,
        Setting("Model", "Most of the device's memory to use, such as 40GiB.", "SIZE", unset="all"),
    ] = None
    host_memory: Annotated[
        Bytes | None,
        Setting("Model", "Most of the host's memory to use.", "SIZE", unset="what is free"),
    ] = None

    @property
    def allowance(self) -> "Allowance":
        """Where the weights may be."""
        from autoquant.model.streaming.placement import Allowance

        return Allowance(
            weights=self.weights,
            device_bytes=self.device_memory,
            host_bytes=self.host_memory,
        )


class TextConfig(MemoryConfig):
    """How the model is loaded, and the text that it sees."""

    calibration: Annotated[
        str | None,
        Setting(
            "Data",
            "File of text, JSONL or JSON, folder, or datasets id (org/name:split); mixture is "
            "chat, prose, code and mathematics from the hub, stdlib the source of Python's "
            "standard library.",
            "TEXT",
            unset="mixture; stdlib for the bundled model",
        ),
    ] = None
    seed: Annotated[Natural, Setting("Data", "Same seed, same tokens and same result.", "N")] = 0
    sequence_length: Annotated[
        Tokens | None,
        Setting(
            "Data",
            "Longest sequence; shorter if the model takes fewer tokens.",
            "N",
            unset="2048; 256 for the bundled model",
        ),
    ] = None
    batch_tokens: Annotated[Tokens, Setting("Data", "Tokens of one forward.", "N")] = 4_096
    calibration_tokens: Annotated[
        Tokens, Setting("Data", "Tokens that input ranges are taken from.", "N")
    ] = 8_192

    @property
    def text(self) -> str:
        """Where the text is from, as `load_corpus` takes it."""
        if self.calibration is not None:
            return self.calibration
        from autoquant.data.hub import MIXTURE
        from autoquant.data.text import STDLIB

        return STDLIB if self.model is None else MIXTURE

    @property
    def longest(self) -> int:
        """The longest sequence, tokens."""
        if self.sequence_length is not None:
            return self.sequence_length
        return 256 if self.model is None else 2_048

    @property
    def tokens(self) -> "TokenPlan":
        """The tokens of each split: those of calibration, and one sequence of the others."""
        from autoquant.data.tokens import TokenPlan

        return TokenPlan(
            calibration=self.calibration_tokens,
            search=1,
            report=1,
            sequence_length=self.longest,
            batch_tokens=self.batch_tokens,
            seed=self.seed,
        )


class LoadedConfig(TextConfig):
    """How the model is loaded, and the tokens that it is measured on."""

    calibrate_all_experts: Annotated[
        bool,
        Setting(
            "Data",
            "Take input ranges from every expert on every token, not only on those routed to it; "
            "KL is measured with the model's own routing either way.",
        ),
    ] = False
    input_headroom: Annotated[
        Factor,
        Setting(
            "Data",
            "Input scales hold X times the largest calibration input, less where small blocks "
            "would suffer: other text reaches further, and headroom costs nothing.",
            "X",
        ),
    ] = 2.0
    search_tokens: Annotated[
        Tokens, Setting("Data", "Tokens that probes and trials are measured on.", "N")
    ] = 16_384

    @property
    def tokens(self) -> "TokenPlan":
        """The tokens of each split; one sequence to report on where nothing is reported."""
        return replace(
            super().tokens, search=self.search_tokens, all_experts=self.calibrate_all_experts
        )


class ReportConfig(LoadedConfig):
    """The tokens of the last word."""

    report_tokens: Annotated[
        Tokens, Setting("Data", "Tokens that the finalists are confirmed on.", "N")
    ] = 65_536

    @property
    def tokens(self) -> "TokenPlan":
        """The tokens of each split."""
        return replace(super().tokens, report=self.report_tokens)


class SpaceConfig(ModelConfig):
    """What may be chosen."""

    space: Annotated[
        str,
        Setting(
            "Search",
            "Which layers may take which formats: a shipped space, or a YAML file.",
            "NAME|FILE",
        ),
    ] = "default"
    effort: Annotated[
        Effort,
        Setting(
            "Search",
            "What a plain nvfp4 or fp8 of the space stands for, at the same bits: codes of the "
            "weight alone (fast), or besides these codes fitted to calibration inputs (default): "
            "scales weighted by them, and rounding that compensates its errors. max also polishes "
            "the winner: weights make up for what the quantized layers before them change.",
        ),
    ] = Effort.DEFAULT
    a16_share: Annotated[
        Share,
        Setting(
            "Search",
            "Most of the searched layers' multiply-adds that NVFP4 layers may do with inputs left "
            "in BF16: no byte more and less KL, and prompts are read more slowly.",
            "X",
        ),
    ] = 0.0


class InputsConfig(Config):
    """What quantized layers multiply with."""

    target: Annotated[
        Target | None,
        Setting(
            "Search",
            "The machine that serves, hence which inputs it quantizes: those of NVFP4 and FP8 "
            "layers, of FP8 layers, or none.",
            unset="blackwell",
        ),
    ] = None
    activation_mode: Annotated[
        Literal[ActivationMode.W4A4, ActivationMode.W4A16] | None,
        Setting(
            "Search",
            "An earlier name of --target: w4a4 is blackwell, w4a16 hopper.",
            unset="that of the target",
        ),
    ] = None

    @property
    def served_by(self) -> Target:
        """The machine, by whichever name it was given."""
        if self.target is not None:
            return self.target
        return Target.BLACKWELL if self.activation_mode is None else Target.of(self.activation_mode)

    @property
    def mode(self) -> ActivationMode:
        """Which inputs that machine quantizes."""
        return self.served_by.mode

    @model_validator(mode="after")
    def _require_one_machine(self) -> Self:
        if self.activation_mode not in (None, self.mode):
            raise ConfigError(
                f"--target {self.target} and --activation-mode {self.activation_mode} are two "
                "machines.",
                fix="leave --activation-mode out: --target says which inputs are quantized.",
            )
        return self


class CacheConfig(Config):
    """What the model's cache holds."""

    kv_cache: Annotated[
        KvCache,
        Setting(
            "Search",
            "How engines are to keep keys and values: fp8 calibrates and stores scales for them, "
            "and counts what it costs in KL.",
        ),
    ] = KvCache.BF16


class MeasuredConfig(CacheConfig, InputsConfig, ReportConfig):
    """How assignments that nobody searches are measured."""


class BreakdownConfig(Config):
    """What else is said of a KL than its distribution over tokens."""

    report_by: Annotated[
        Literal["position"] | None,
        Setting(
            "Data",
            "Report the KL by the position of tokens in their sequences too: what a long context "
            "does. Sequences are as long as --sequence-length.",
        ),
    ] = None


class LayoutConfig(Config):
    """How a checkpoint is written."""

    layout: Annotated[
        Layout,
        Setting(
            "Output",
            "Who reads the checkpoint: vLLM, SGLang and TensorRT-LLM, or vLLM, SGLang and "
            "transformers. The same codes and scales.",
        ),
    ] = Layout.MODELOPT


class TrackingConfig(Config):
    """How a search is recorded."""

    mlflow: Annotated[
        bool,
        Setting(
            "Tracking",
            "Record the search in MLflow: MLFLOW_TRACKING_URI, else mlflow.db in the folder of "
            "runs.",
            opposite="no-mlflow",
        ),
    ] = True
    mlflow_experiment: Annotated[
        str, Setting("Tracking", "Experiment to record under.", "NAME")
    ] = "autoquant"
    mlflow_trials: Annotated[
        ChildRuns,
        Setting(
            "Tracking",
            "Trials that get a child run of their own: each one, or only those that improve.",
        ),
    ] = "all"
