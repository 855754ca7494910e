"""The node agent: answers the CNI plugin, owns the addresses, and keeps the kernel equal to what both say.

What may live here and who may import whom is drawn in ARCHITECTURE.md and enforced by import-linter (pyproject.toml).
"""
