"""Names of samplers, without the package that they come from."""

OWN_SAMPLER = "budget"
OPTUNA_SAMPLERS = TPE, CMAES, NSGAII, RANDOM = ("tpe", "cmaes", "nsgaii", "random")
