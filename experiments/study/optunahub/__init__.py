"""The samplers of AutoQuant as a package of OptunaHub."""

from autoquant.samplers import BudgetSampler, PairedPruner

__all__ = ["BudgetSampler", "PairedPruner"]
