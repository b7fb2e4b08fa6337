"""The result of a search as MLflow shows it: figures, a description, the checkpoint."""

import math
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.tracking import MlflowClient

_NOT_IN_A_METRIC = re.compile(r"[^\w./ :-]")
_NOT_IN_A_MODEL = re.compile(r"[/:.%\"']")

COMPANIONS = ("README.md", "config.json", "hf_quant_config.json")
"""Small files of a checkpoint that say what it is."""


def winner_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of the winner, `result/*`; what was not measured is absent."""
    kl, perplexity = result["kl"], result["perplexity"]
    found = {
        "kl": kl["mean"],
        "kl_stderr": kl["stderr"],
        "kl_p99": kl["p99"],
        "bpe": result["bpe"]["checkpoint"],
        "top1_agreement": result["top1_agreement"],
        "perplexity": perplexity["quantized"],
        "perplexity_bf16": perplexity["bf16"],
        "checkpoint_bytes": float(result["checkpoint_bytes"]),
    }
    return {f"result/{name}": value for name, value in found.items() if value is not None}


def recipe_figures(result: Mapping[str, Any]) -> dict[str, float]:
    """KL of each fixed recipe as a metric, `recipe/NAME`."""
    return {
        f"recipe/{_NOT_IN_A_METRIC.sub('', row['name'])}": row["kl"] for row in result["baselines"]
    }


def description(result: Mapping[str, Any]) -> str:
    """What the search found, and the table of baselines, in Markdown."""
    from autoquant.report.words import finding, fixed, number, target_of

    rows = [("**this search**", result["bpe"]["checkpoint"], result["kl"], True)]
    rows += [
        (row["name"], row["bpe"], {"mean": row["kl"], "stderr": row["stderr"]}, row["fits"])
        for row in result["baselines"]
    ]
    lines = [
        finding(result),
        "",
        "| assignment | bits per element | KL, nats per token | s.e. | in budget |",
        "|---|---:|---:|---:|---|",
    ]
    lines += [
        f"| {name} | {bpe:.3f} | {fixed(kl['mean'], 5)} | {number(kl['stderr'], 2)} "
        f"| {'yes' if fits else 'no'} |"
        for name, bpe, kl, fits in sorted(rows, key=lambda row: float(row[2]["mean"]))
    ]
    lines += [
        "",
        f"KL on fresh tokens, for {target_of(result)}. The whole report is report.html under "
        "Artifacts.",
    ]
    return "\n".join(lines)


def log_checkpoint(
    client: "MlflowClient",
    experiment_id: str,
    run_id: str,
    result: Mapping[str, Any],
    report: tuple[str, str],
    name: str,
) -> None:
    """Log the exported checkpoint as a model that lies outside of MLflow; no weight is copied.

    The winner's metrics belong to it and to the run. Its artifacts are the checkpoint's model card
    and configuration, and `location.json`, which says where the weights are. A checkpoint that the
    run has logged before is left as it is; one that a killed process began to log is completed.

    Args:
        client: of the store.
        experiment_id: of the run.
        run_id: the search's run.
        result: contents of `result.json`, with `checkpoint`.
        report: name and digest of the report split, to which the metrics belong.
        name: of the model.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric

    from autoquant.report.words import target_of

    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    if any(model.status == LoggedModelStatus.READY for model in found):
        return
    folder = Path(result["checkpoint"]).resolve()
    begun = found[0] if found else None
    model = begun or client.create_logged_model(
        experiment_id,
        name=_NOT_IN_A_MODEL.sub("-", name),
        source_run_id=run_id,
        tags={
            "mlflow.model.isExternal": "true",
            "mlflow.note.content": description(result),
            "autoquant.checkpoint": str(folder),
            "autoquant.plan.assignment": result["winner"]["digest"],
        },
        params={
            "budget_bpe": str(result["budget_bpe"]),
            "budget_scope": result["budget_scope"],
            "target": target_of(result),
            "activation_mode": result["activation_mode"],
            **{f"groups.{kind}": str(count) for kind, count in result["counts"].items()},
        },
        model_type="quantized checkpoint",
    )
    _log_files(client, model, folder, result["checkpoint_bytes"])
    now, (dataset, digest) = int(time.time() * 1000), report
    known = {metric.key for metric in model.metrics or ()}
    client.log_batch(
        run_id,
        metrics=[
            Metric(
                metric,
                value,
                now,
                0,
                model_id=model.model_id,
                dataset_name=dataset,
                dataset_digest=digest,
            )
            for metric, value in winner_figures(result).items()
            if math.isfinite(value) and metric not in known
        ],
    )
    outputs = client.get_run(run_id).outputs
    if outputs is None or all(o.model_id != model.model_id for o in outputs.model_outputs):
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    client.finalize_logged_model(model.model_id, "READY")


def _log_files(client: "MlflowClient", model: "LoggedModel", folder: Path, size: int) -> None:
    import shutil
    import tempfile

    from mlflow.models.utils import get_external_mlflow_model_spec

    from autoquant.files import to_json

    with tempfile.TemporaryDirectory() as temporary:
        small = Path(temporary)
        get_external_mlflow_model_spec(model).save(str(small / "MLmodel"))
        (small / "location.json").write_text(
            to_json({"path": str(folder), "tensor_bytes": size}, indent=2)
        )
        for name in COMPANIONS:
            if (folder / name).exists():
                shutil.copy(folder / name, small / name)
        client.log_model_artifacts(model.model_id, str(small))
