"""A small API server for tests: Nodes and Events over HTTPS, with what a real one shows rarely on request."""
