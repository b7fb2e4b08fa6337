"""Samplers and a pruner for Optuna: assignments under a budget whose objective is measured.

    import optuna
    from autoquant.samplers import BudgetSampler, PairedPruner

    sampler = BudgetSampler(choices, costs, budget=budget, prior=prior, trials=60)
    study = optuna.create_study(sampler=sampler, pruner=PairedPruner())
    study.optimize(objective, n_trials=60)

Every assignment that `BudgetSampler` proposes keeps the budget, is new, and leaves nothing of the
budget that an upgrade could use. Neither class writes into the study: what they propose and prune
follows from its trials alone, so a study that is loaded again goes on as it would have.
"""

from autoquant.samplers.budget import BudgetSampler
from autoquant.samplers.paired import PairedPruner

__all__ = ["BudgetSampler", "PairedPruner"]
