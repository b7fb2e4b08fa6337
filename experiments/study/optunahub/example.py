"""Twelve layers in three precisions under a budget of bytes: the best is measured, not known."""

import numpy as np
import optuna

from autoquant.samplers import BudgetSampler, PairedPruner

LAYERS = [f"layer {number}" for number in range(12)]
CHOICES = dict.fromkeys(LAYERS, ("4 bits", "8 bits", "16 bits"))
COSTS = dict.fromkeys(LAYERS, (9, 17, 32))
BUDGET = 12 * 14
TRIALS = 40

generator = np.random.default_rng(0)
PRIOR = {
    layer: tuple(weight / size for size in (1, 16, 4096))
    for layer, weight in zip(LAYERS, generator.lognormal(size=12), strict=True)
}
TRUE = {
    layer: tuple(value * np.exp(0.5 * generator.normal()) for value in PRIOR[layer])
    for layer in LAYERS
}
HARD = generator.uniform(0.5, 1.5, 24)
"""How hard each of 24 documents is, for all assignments alike."""


def objective(trial: optuna.Trial) -> float:
    """Mean harm over documents; what clearly loses is stopped with what it came to."""
    chosen = {layer: trial.suggest_categorical(layer, CHOICES[layer]) for layer in LAYERS}
    harm = sum(TRUE[layer][CHOICES[layer].index(label)] for layer, label in chosen.items())
    for document, hard in enumerate(HARD):
        trial.report(harm * hard, document)
        if trial.should_prune():
            raise optuna.TrialPruned
    return float(harm * HARD.mean())


def main() -> None:
    """Print the best assignment, its bytes and its harm."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = BudgetSampler(CHOICES, COSTS, budget=BUDGET, prior=PRIOR, trials=TRIALS)
    study = optuna.create_study(sampler=sampler, pruner=PairedPruner())
    study.optimize(objective, n_trials=TRIALS)
    best = study.best_trial
    cost = sum(COSTS[layer][CHOICES[layer].index(label)] for layer, label in best.params.items())
    print(f"trial {best.number}: {best.value:.4f} in {cost} of {BUDGET} bytes")
    print(f"first trial: {study.trials[0].value:.4f}")


if __name__ == "__main__":
    main()
