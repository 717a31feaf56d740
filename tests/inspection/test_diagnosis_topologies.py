"""Diagnosis of clusters and behind sentinels."""

from contextlib import suppress

import pytest
import redis

from redis_asgi import Settings
from redis_asgi.inspection.rights import rights_of

from ..conftest import StartServer
from ..kit.servers import Cluster, SentinelTrio
from .diagnosing import PASSWORD, findings, the_only, wrong

pytestmark = pytest.mark.anyio


async def test_a_cluster_is_looked_at_node_by_node(cluster: Cluster) -> None:
    """Each primary is looked at, with keys of its own slots, and nothing is left behind."""
    found = await findings(REDIS_URL=cluster.url, REDIS_CLUSTER=True)

    assert {finding.level for finding in found} == {"ok"}
    for node in cluster.nodes:
        mine = [finding.check for finding in found if finding.server == f"redis 127.0.0.1:{node.port}"]
        assert {"rights", "script", "latency", "clock", "version"} <= set(mine)
        assert node.client().keys() == []
        assert node.calls("rpush") > 0


async def test_one_node_lacks_a_right(private_cluster: Cluster) -> None:
    """Users are each node's own: the one that lacks something is named."""
    settings = {"REDIS_URL": private_cluster.url, "REDIS_CLUSTER": True, "REDIS_USERNAME": "app"}
    settings["REDIS_PASSWORD"] = PASSWORD
    line = rights_of(Settings(**settings)).line("app", PASSWORD).split()
    for node in private_cluster.nodes:
        node.command(*line)
    assert await wrong(**settings) == []
    private_cluster.nodes[2].command(*line, "-lindex")
    found = await wrong(**settings)
    assert found[0].server == f"redis 127.0.0.1:{private_cluster.nodes[2].port}"
    assert found[0].text == "missing: +lindex"

    for node in private_cluster.nodes:
        node.command(*line, "-cluster|slots")
    only = await the_only(**settings)
    assert "cluster|slots" in only.fix


async def test_cluster_or_not(private_cluster: Cluster, redis_url: str) -> None:
    """A node of a cluster taken for a server alone,
    a server alone for a cluster, and slots that nobody serves.
    """
    alone = await wrong(REDIS_URL=private_cluster.url)
    assert alone[0].fix == "Set REDIS_CLUSTER=true."
    single = await the_only(REDIS_URL=redis_url, REDIS_CLUSTER=True)
    assert ("warn", "cluster") == (single.level, single.check)
    assert single.fix.startswith("Unset REDIS_CLUSTER")
    nodes = {"REDIS_CLUSTER_NODES": [redis_url.removeprefix("redis://").split("/")[0], "127.0.0.1:1"]}
    assert (await the_only(REDIS_CLUSTER=True, **nodes)).fix == "Unset REDIS_CLUSTER."

    for node in private_cluster.nodes:
        with suppress(redis.exceptions.ResponseError):  # it has heard so from another one
            node.command("CLUSTER", "DELSLOTS", *range(16_000, 16_384))
    found = await the_only(REDIS_URL=private_cluster.url, REDIS_CLUSTER=True)
    assert "16000 of 16384 slots" in found.text


async def test_a_node_that_says_nothing_of_its_cluster(private_cluster: Cluster, private_server: StartServer) -> None:
    """Whether it has all keys is found out by asking for some."""
    one = private_server("--cluster-enabled", "yes")
    one.own_all_slots()
    for server, level in ((one, "warn"), (private_cluster.nodes[0], "fail")):
        server.command("ACL", "SETUSER", "default", "-cluster")
        found = await wrong(REDIS_URL=server.url)
        assert (level, "Set REDIS_CLUSTER=true.") == (found[0].level, found[0].fix)


async def test_sentinels(sentinels: SentinelTrio) -> None:
    """All well; a name they do not watch; one that is silent; none that answers."""
    settings = {"REDIS_SENTINELS": ",".join(sentinels.addresses), "REDIS_SENTINEL_MASTER": "mymaster"}
    found = await findings(**settings)
    assert found[1].text == "all 3 know the master 'mymaster'"
    assert {finding.level for finding in found} == {"ok"}

    other = await the_only(**{**settings, "REDIS_SENTINEL_MASTER": "other"})
    assert "know no master 'other'" in other.text

    sentinels.sentinels[0].kill()
    silent = await the_only(**settings)
    assert ("warn", sentinels.addresses[0] in silent.text) == (silent.level, True)

    for sentinel in sentinels.sentinels[1:]:
        sentinel.kill()
    none = await the_only(**settings)
    assert "none of the sentinels answers" in none.text
