"""Serving engines: what they build of an architecture, and what they do not load."""
