"""A worker of another machine: what it must have in common with a search, and how it takes part."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from optuna.storages import BaseStorage

from autoquant.environment import measuring_on
from autoquant.errors import ConfigError
from autoquant.measure.calibration import Calibration
from autoquant.measure.evaluator import Evaluator
from autoquant.measure.ranks.ranks import ALONE, Ranks
from autoquant.measure.session import Session
from autoquant.model.loading import choose_device
from autoquant.plan.plan import Plan
from autoquant.progress import Progress
from autoquant.run.config import JoinConfig, SearchConfig
from autoquant.run.measuring import local_evaluator, make_ready
from autoquant.run.opening import open_plan
from autoquant.run.sensitivity.probing import open_to_probe
from autoquant.run.signature import search_signature
from autoquant.study.joining.link import SUFFIX
from autoquant.study.joining.membership import Membership
from autoquant.study.joining.roster import Roster
from autoquant.study.joining.searches import Searches
from autoquant.study.joining.watch import PATIENCE
from autoquant.study.mirror import open_storage


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """What a worker has done."""

    search: str
    """The name of the search's study."""
    trials: int
    """That it measured."""


@contextmanager
def roster_of(
    config: SearchConfig, plan: Plan, storage: BaseStorage | None, name: str, ranks: Ranks
) -> Iterator[Roster | None]:
    """The workers that join a command's searches while it lasts; None where there is nothing to
    share, or nowhere to meet.

    Args:
        config: of all searches.
        plan: their model.
        storage: of their studies.
        name: of the searches.
        ranks: the processes that share batches; several have no workers.
    """
    if storage is None or config.trials_at_once == 1 or ranks.size > 1:
        yield None
        return
    with Roster.open(storage, name + SUFFIX, in_common(config, plan)) as roster:
        yield roster


def in_common(config: SearchConfig, plan: Plan) -> dict[str, Any]:
    """What a worker must have as the search has it: settings, model, versions and kind of device.

    The name of the text is left out, which may be another elsewhere: its tokens are compared.
    """
    signature = search_signature(config.of_each_budget()[0], plan)
    signature.pop("calibration")
    machine = measuring_on(choose_device(config.device))
    return {**signature, "budget_bpe": list(config.budget_bpe), **machine}


def join_search(config: JoinConfig, observer: Progress) -> Joined:
    """Measure trials of a search on another machine, until it has ended.

    Args:
        config: as the search's, but for names of places.
        observer: watches.

    Raises:
        ConfigError: settings, model, text, versions or device differ from those of the search, or
            the storage cannot be used.
        SourceError: model or text missing, damaged or not understood.
        OutOfMemory: the model does not fit the device.
        RunConflict: the storage does not answer, or no search is heard of.
    """
    assert config.study_storage is not None
    storage = open_storage(config.study_storage)
    plan = open_plan(config)
    plan.source.contents.digests(observer)
    minutes = PATIENCE / 60
    observer.note(f"looks for its search in the study's storage, for {minutes:.0f} minutes at most")
    about = in_common(config, plan)
    with Searches(storage, about) as searches:
        name = searches.ours()
    search = name.removesuffix(SUFFIX)
    observer.note(f"joins the search {search}")
    with Membership(storage, name, about, observer.note) as member, _folder(config.out) as folder:
        session = open_to_probe(config, plan, folder, observer, ALONE)
        offer = member.offer()
        if offer is None:
            return Joined(search=search, trials=0)
        evaluator = evaluator_of_offer(offer, config, session, plan, observer)
        count = member.serve(evaluator, lambda count: observer.note(f"trials measured: {count}"))
        return Joined(search=search, trials=count)


def offer_of(session: Session, calibration: Calibration) -> dict[str, Any]:
    """What a worker of another machine measures with, besides the settings; JSON values."""
    return {"calibration": calibration.to_dict(), "tokens": _tokens(session)}


def evaluator_of_offer(
    offer: Mapping[str, Any], config: SearchConfig, session: Session, plan: Plan, observer: Progress
) -> Evaluator:
    """A model on another machine than the search, ready to measure what the search would.

    Raises:
        ConfigError: its tokens are others.
        SourceError: the disk has no room for moments of inputs.
    """
    if offer["tokens"] != _tokens(session):
        raise ConfigError(
            f"the text {config.text!r} or the tokenizer gives other tokens here than in the "
            "search.",
            fix="give the worker the text and the tokenizer of the search.",
        )
    make_ready(session, plan, offer["calibration"], observer)
    return local_evaluator(session, config.trials_at_once)


def _tokens(session: Session) -> dict[str, str]:
    """Digests of the tokens that a measurement depends on."""
    return {name: session.splits[name].digest for name in ("calibration", "search")}


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    """Where moments of inputs are kept, and codes: for another time where a folder is given."""
    if out is not None:
        yield out
        return
    with TemporaryDirectory(prefix="autoquant-") as own:
        yield Path(own)
