"""The stages: each an async generator that takes one typed task and yields emits; no I/O but its engine."""
