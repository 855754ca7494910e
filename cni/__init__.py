"""The CNI contract: launcher, wire, and what the specification asks. Knows nothing of the agent."""
