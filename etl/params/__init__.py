"""What a stage runs with: its YAML held against the parameters cell of its notebook."""

from etl.params.stages import (
    EPOCH,
    Environment,
    ParamsError,
    Project,
    Stage,
    environments,
    injected_cell_source,
    load,
)

__all__ = [
    "EPOCH",
    "Environment",
    "ParamsError",
    "Project",
    "Stage",
    "environments",
    "injected_cell_source",
    "load",
]
