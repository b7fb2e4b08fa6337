"""Workers that measure different candidates of a round: their pool, and those of this machine."""
