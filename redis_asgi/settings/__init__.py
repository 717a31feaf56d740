"""The environment, validated: `Settings`,
from what variables may say to what contradicts each other.
"""

from .settings import NO_SERVER, HeaderStyle, OnRedisError, Settings, StrategyName, check_settings

__all__ = ["NO_SERVER", "HeaderStyle", "OnRedisError", "Settings", "StrategyName", "check_settings"]
