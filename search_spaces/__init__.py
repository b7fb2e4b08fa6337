"""Search spaces as YAML files, read by `autoquant.space_file`."""
