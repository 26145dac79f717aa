"""The engine: requests, their KV blocks, what runs next, and the running of it."""
