"""What the rest of the package leans on: checkpoints, loading, the forward context, ranks, memory."""
