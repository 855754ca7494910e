"""Tests of podlane on any real cluster that runs it: `make test-kubernetes KUBECONFIG=…`. No part of `make test`."""
