"""Searches recorded in MLflow: one run per search, its trials as metrics by step.

Recording never costs a search: a store that cannot be opened, or that fails later, is one warning.
What could not be sent is kept and sent again when the search ends; what the store still refuses
then is sent when the same command is given again.

MLflow's own Optuna storage and callbacks are not used: they write every distribution into one tag,
which overflows at some 60 layer groups, and cost seconds a trial.
"""

from autoquant.tracking.store import track
from autoquant.tracking.tracker import ChildRuns, NullTracker, Tracker, TrialRecord

__all__ = ["ChildRuns", "NullTracker", "Tracker", "TrialRecord", "track"]
