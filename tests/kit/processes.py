"""Scripts that need an interpreter of their own."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping

from .patience import PATIENT

ENDS_WITHIN = 60.0  # seconds, however busy the machine
OURS = ("REDIS_", "RATE_LIMIT", "MAX_REQUESTS_PER_WINDOW", "EMBEDDING_CACHE_")


def is_setting(name: str) -> bool:
    """Whether an environment variable would configure the package; those of the test kit do not."""
    return name.startswith(OURS) and not name.startswith("REDIS_ASGI_")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without any setting of the package but patience, and with *more*."""
    kept = {name: value for name, value in os.environ.items() if not is_setting(name)}
    return {**kept, **PATIENT, **more}


def run_python(
    code: str,
    *arguments: str,
    flags: tuple[str, ...] = ("-W", "error", "-X", "dev"),
    env: Mapping[str, str] | None = None,
    timeout: float = ENDS_WITHIN,
) -> subprocess.CompletedProcess[str]:
    """Run *code* in a fresh interpreter;
    the caller looks at ``returncode``, ``stdout`` and ``stderr``.
    """
    command = [sys.executable, *flags, "-c", code, *arguments]
    environment = clean_environment(**(env or {}))
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    done.stderr = without_haste(done.stderr)
    return done


def without_haste(stderr: str) -> str:
    """*stderr* without what asyncio says in development mode of a machine that is busy."""
    return re.sub(r"^Executing <.* took \d+\.\d+ seconds\n", "", stderr, flags=re.MULTILINE)
