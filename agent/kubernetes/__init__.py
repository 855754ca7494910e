"""The Kubernetes API: who is in the cluster, and what the cluster is told of this node.

The only importer of the client library. Nothing is decided here: what other nodes mean is for `agent.cluster`, whether
this node is ready for `agent.readiness`.
"""

from agent.kubernetes.api import Api, ApiError, Conflict, Gone
from agent.kubernetes.herald import NODE_READY_REASON, Herald, tell_once
from agent.kubernetes.nodes import OwnNode
from agent.kubernetes.source import NodeSource

__all__ = ["NODE_READY_REASON", "Api", "ApiError", "Conflict", "Gone", "Herald", "NodeSource", "OwnNode", "tell_once"]
