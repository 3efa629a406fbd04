"""The vocabulary of the pipeline: every subject, message, stream, consumer and header, once.

Needs only the standard library and msgspec, so any process may import it.
"""
