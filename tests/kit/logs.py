"""Reading the package's log lines."""

import logging


def event_of(record: logging.LogRecord) -> str:
    """The event of a line; of somebody else's its message."""
    return str(vars(record).get("event") or record.getMessage())
