"""The machinery of the pipeline: the bus, the runner, the engines, presence, and the command line."""
