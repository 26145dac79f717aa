"""Attention over the paged KV cache: one interface, one file a backend, imported only when chosen."""
