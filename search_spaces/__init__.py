"""Search spaces as YAML files, read by `autoquant.plan.space_file`."""
