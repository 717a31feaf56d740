"""Findings about a server, and a proxy that answers some commands itself."""

from typing import Any

from redis_asgi import Settings
from redis_asgi.inspection.diagnosis import diagnose
from redis_asgi.inspection.findings import Finding

PASSWORD = "s3cr3t-of-a-test"


async def findings(**values: Any) -> list[Finding]:
    """All that is found with these settings."""
    return [finding async for finding in diagnose(Settings(**{"REDIS_TIMEOUT": 2, **values}))]


async def wrong(**values: Any) -> list[Finding]:
    """What is not well with these settings; each says what to do, and none holds the password."""
    found = await findings(**values)
    for finding in found:
        assert PASSWORD not in f"{finding.text}{finding.fix}"
        assert bool(finding.fix) == (finding.level != "ok")
    return [finding for finding in found if finding.level != "ok"]


async def the_only(**values: Any) -> Finding:
    """The one thing that is not well."""
    (finding,) = await wrong(**values)
    return finding


def levels(found: list[Finding]) -> list[tuple[str, str]]:
    """What was looked at, and how it is."""
    return [(finding.check, finding.level) for finding in found]
