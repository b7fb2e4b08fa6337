"""Selections changed within their limits: upgraded until nothing more fits, or one group at will.

Shapes: L limits, G groups, F options of the group that has most, P selections.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from autoquant.arrays import Booleans, Floats, Integers
from autoquant.search.relaxation import Tables


@dataclass(frozen=True)
class Filling:
    """Options, what may be spent on them, and which of them are finer than others."""

    tables: Tables
    budgets: Integers
    """[L]."""
    finer: Booleans
    """Whether the option of a column is known to be no worse than that of a row, [G, F, F]."""

    @cached_property
    def _rows(self) -> Integers:
        return np.arange(len(self.finer))

    @cached_property
    def _weights(self) -> Floats:
        """What a step of each cost counts beside one of the first, [L]: their ranges are alike."""
        ranges = (self.tables.costs.max(axis=2) - self.tables.cheapest).sum(axis=1)
        ranges = np.maximum(ranges, 1)
        return np.asarray(ranges[0] / ranges)

    def filled(self, selections: Integers, *, keep: int | None = None) -> Integers:
        """Upgrades that fit, best gain per cost first, until there are none, [P, G].

        An upgrade takes more of some limit and scores less. Where it is finer and takes no less of
        any its score does not matter: more bits never carry less information, and a score that says
        so is noise.

        Args:
            selections: within the limits, [P, G].
            keep: a group whose option stays, unless nothing else is left to upgrade.
        """
        scores, costs = self.tables.scores, self.tables.costs
        chosen = selections.copy()
        taken = costs[:, self._rows, chosen]
        left = self.budgets[:, None] - taken.sum(axis=2)
        open_rows, may_trade = np.arange(len(chosen)), np.ones(len(chosen), dtype=np.bool_)
        while len(open_rows):
            extra = costs[:, None] - taken[:, open_rows, :, None]
            fits = (extra <= left[:, open_rows, None, None]).all(axis=0)
            places, groups, options = np.nonzero(fits & (extra > 0).any(axis=0))
            rows, extra = open_rows[places], extra[:, places, groups, options]
            now = chosen[rows, groups]
            gains = scores[groups, now] - scores[groups, options]
            no_less = (extra >= 0).all(axis=0)
            is_sound = self.finer[groups, now, options] & no_less
            takes = np.flatnonzero(is_sound | (gains > 0) & (may_trade[rows] | no_less))
            rows, groups, options = rows[takes], groups[takes], options[takes]
            extra, gains = extra[:, takes], gains[takes]
            spent = self._weights @ np.maximum(extra, 0)
            order = np.lexsort((-spent, gains / spent, groups != keep, rows))
            is_last = np.diff(rows[order], append=-1) != 0
            best = order[is_last]  # the last of equals, as lexsort is stable
            open_rows, groups, options = rows[best], groups[best], options[best]
            chosen[open_rows, groups] = options
            taken[:, open_rows, groups] = costs[:, groups, options]
            left[:, open_rows] -= extra[:, best]
            # Trading one limit for another ends where scores rise: nothing is taken twice.
            may_trade[open_rows] &= gains[best] > 0
        return chosen

    def around(self, selection: Integers, group: int) -> Integers | None:
        """The selection [G] brought within the limits by changes of all groups but one.

        Other groups give way, least loss per cost first. None if they cannot give enough, one group
        at a time.
        """
        scores, costs = self.tables.scores, self.tables.costs
        chosen = selection.copy()
        while True:
            taken = costs[:, self._rows, chosen]
            excess = (taken.sum(axis=1) - self.budgets)[:, None, None]
            if (excess <= 0).all():
                return chosen
            left = np.maximum(excess + costs - taken[:, :, None], 0)
            saved = np.tensordot(self._weights, np.maximum(excess, 0) - left, axes=1)
            helps = (saved > 0) & self.tables.is_option
            helps[group] = False
            if not helps.any():
                return None
            loss = scores - scores[self._rows, chosen][:, None]
            rates = np.full(scores.shape, np.inf)
            rates[helps] = loss[helps] / saved[helps]
            g, option = np.unravel_index(rates.argmin(), rates.shape)
            chosen[g] = option
