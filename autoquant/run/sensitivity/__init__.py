"""Where the sensitivities of a search are from: probes, or scores that ModelOpt has saved."""
