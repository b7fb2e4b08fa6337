"""Proposers of candidates."""
