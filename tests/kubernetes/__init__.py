"""Tests of podlane on any real cluster that runs it: `make test-kubernetes KUBECONFIG=…`. No part of `make test`."""

import pytest

# What they share asserts, too, and is to say what it saw.
pytest.register_assert_rewrite("tests.kubernetes.cluster", "tests.kubernetes.reach", "tests.kubernetes.watching")
