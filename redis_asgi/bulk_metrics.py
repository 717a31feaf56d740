"""Metrics that are told many amounts at once, in hardly more time than one takes them.

It imports prometheus-client, which costs as much as the rest of the package: import it late.
"""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Sequence

import prometheus_client


class Counter(prometheus_client.Counter):
    """A counter."""

    def tell(self, amounts: Sequence[float]) -> None:
        """Count all *amounts*."""
        self.inc(sum(amounts))


class Histogram(prometheus_client.Histogram):
    """A histogram."""

    def tell(self, amounts: Sequence[float]) -> None:
        """Observe all *amounts*, in one go for each bucket:
        one by one they would take it two locks and a search each.
        """
        try:
            bounds, buckets, total = self._upper_bounds, self._buckets, self._sum
        except AttributeError:  # they are prometheus-client's own, and may be called something else one day
            for amount in amounts:
                self.observe(amount)
            return
        total.inc(sum(amounts))
        for bucket, times in Tally([bisect_left(bounds, amount) for amount in amounts]).items():
            buckets[bucket].inc(times)
