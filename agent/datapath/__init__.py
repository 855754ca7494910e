"""The eBPF datapath: compiling `bpf/` (in a child process, with bcc); maps, programs and links (with libbpf).

The only package that may import bcc, and only in `compile`, which runs as a process of its own.
"""
