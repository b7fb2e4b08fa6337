"""Takes the pictures of README and docs/review.md: python tests/review/screenshots.py runs/NAME."""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mlflow.tracking import MlflowClient
from pages import LAYER_MAP, chromium, open_study, picture, report_of, run_address
from servers import mlflow_server, optuna_dashboard

IMAGES = Path(__file__).parents[2] / "docs" / "images"


def take(run: Path) -> None:
    """Write the report, MLflow's pages of the run and the dashboard of its study, as PNG."""
    take_study(run)
    store = MlflowClient(tracking_uri=f"sqlite:///{run.parent / 'mlflow.db'}")
    experiment = store.get_experiment_by_name("autoquant").experiment_id
    run_id = json.loads((run / "tracking.json").read_text())["run_id"]
    with chromium() as browser, mlflow_server(run.parent) as server:
        page = browser.open(report_of(run), width=900, height=1545)
        page.screenshot(path=IMAGES / "report.png")
        below = page.get_by_text("Every assignment, on search tokens").bounding_box()
        top = {"x": 0, "y": 0, "width": 900, "height": below["y"] - 8}
        page.screenshot(path=IMAGES / "result.png", clip=top)  # the README's
        picture(page, LAYER_MAP).screenshot(path=IMAGES / "layer-map.png")
        for tab, name in (("", "mlflow-run"), ("/model-metrics", "mlflow-curves")):
            address = run_address(server.url, experiment, run_id, tab)
            page = browser.open(address, width=1200, height=1000 if tab else 1250)
            page.get_by_role("button", name="Close").click()  # MLflow's assistant
            if not tab:
                page.get_by_role("button", name="Expand description").click()
                page.mouse.wheel(0, -5_000)
            else:
                curves = "^(kl|best_kl|bpe|seconds)$"
                page.get_by_placeholder("Search metric charts").fill(curves)
            page.wait_for_timeout(3_000)  # charts are drawn a while after they are there
            page.screenshot(path=IMAGES / f"{name}.png")


def take_study(run: Path) -> None:
    """Write the dashboard's page of a run's study, as PNG."""
    log = Path(tempfile.mkdtemp(prefix="autoquant-")) / "dashboard.log"
    with chromium() as browser, optuna_dashboard(run / "study.log", log) as server:
        page = open_study(browser, server.url)
        page.wait_for_timeout(3_000)  # pictures move into their place
        page.screenshot(path=IMAGES / "dashboard.png")


if __name__ == "__main__":
    take(Path(sys.argv[1]).resolve())
