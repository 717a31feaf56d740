"""``redis-asgi``: what an operator asks and does;
``commands`` and ``quotas`` are its words, ``output`` how it speaks.

``session`` is what each command needs, ``views`` how results are laid out. Needs the extra ``cli``.
What it finds out and does is in modules that print nothing: ``inspection/`` and ``maintenance``.
"""

import logging
import sys
from importlib.util import find_spec


def main() -> None:
    """Run the command line in ``sys.argv`` and exit."""
    if find_spec("typer") is None or find_spec("rich") is None:
        sys.stderr.write("redis-asgi needs its command line's libraries: pip install 'redis-asgi[cli]'\n")
        sys.exit(2)
    # Log lines are for the app's log; here the same is said in words.
    logging.getLogger("redis_asgi").addHandler(logging.NullHandler())
    logging.getLogger("redis_asgi").propagate = False
    try:
        from .commands import app  # noqa: PLC0415 - the extra may not be installed

        app(prog_name="redis-asgi")
    except KeyboardInterrupt:
        sys.exit(130)
