"""Measure a model that is served, over NATS or over OpenAI's HTTP API: load, measuring, results, report.

`plan` says what is asked and when, `prompts` and `traces` with what, `targets` whom, `load` does it, `measure` makes
figures of what was seen, `result` is the file that is left, `report` and `plots` show it, `command` ties them together.
"""
