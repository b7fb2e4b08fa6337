"""From sensitivities to one confirmed assignment: the solver, the surrogate, the proposers."""
