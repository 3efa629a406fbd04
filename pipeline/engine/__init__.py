"""Engines: what runs a model. `protocol` says what a stage may ask of one."""
