"""What Prometheus scrapes, and the two probes. Names follow prometheus.io/docs/practices/naming.

The only package that imports prometheus_client.
"""

from agent.metrics.registry import Metrics
from agent.metrics.server import serve

__all__ = ["Metrics", "serve"]
