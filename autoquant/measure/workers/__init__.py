"""Processes of one machine that measure different candidates of a round."""
