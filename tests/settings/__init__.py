"""The environment, and what may stand in it."""
