"""The version, in a room that everything may import."""

__version__ = "0.1.0"
