# The commands of this project. Each starts with the set-up, which does nothing the second time.

bin := justfile_directory() / ".venv/bin"

# List the recipes
default:
    @just --list --unsorted

# Make .venv with everything, from PyPI
setup:
    @sh infra/setup.sh

# Start everything on this machine, ask one question, print the answer and its timing
demo *args: setup
    @{{bin}}/sglang-nats demo {{args}}

# Start everything on this machine and keep it running
up *args: setup
    @{{bin}}/sglang-nats up {{args}}

# Lint, then run every test: what starts engines or kills workers alone, the rest, which mostly waits, three at a time
test: check
    {{bin}}/pytest tests/engine tests/faults tests/interop
    {{bin}}/pytest -n 3 --dist loadfile tests/property tests/server tests/unit

# Lint and check the formatting
check: setup
    {{bin}}/ruff check
    {{bin}}/ruff format --check

# Kill, freeze and starve the parts for ten minutes, and see that no request is lost
faults *args: setup
    {{bin}}/pytest tests/faults -m "not engine" {{args}}

# Measure what the pipeline itself costs, beside bare nats-py; needs a machine with nothing else to do
bench *args: setup
    @{{bin}}/python tests/perf/pipeline_cost.py {{args}}

# Write docs/subjects.md from the code
subjects: setup
    @{{bin}}/sglang-nats subjects

# Pin the newest versions that fit, for both extras
constraints: (pin "cpu") (pin "cuda")

[private]
pin extra: setup
    {{bin}}/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate --upgrade --group dev \
        --extra {{extra}} --config-file infra/install/{{extra}}.toml -o infra/install/{{extra}}.txt pyproject.toml
