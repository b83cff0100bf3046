"""What a stage runs with: its YAML held against the parameters cell of its notebook."""

from etl.params.conventions import breaches
from etl.params.stages import (
    EPOCH,
    Environment,
    ParamsError,
    Project,
    Stage,
    environment,
    environments,
    injected_cell_source,
    load,
    without_yaml,
)
from etl.params.yaml import Problem, nearest

__all__ = [
    "EPOCH",
    "Environment",
    "ParamsError",
    "Problem",
    "Project",
    "Stage",
    "breaches",
    "environment",
    "environments",
    "injected_cell_source",
    "load",
    "nearest",
    "without_yaml",
]
