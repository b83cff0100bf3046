"""A port a service: options that a project's timetable names."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer


def with_ports(command: Callable[..., None], ports: Mapping[str, int]) -> Callable[..., None]:
    """The command, whose `**ports` become an option `--<name>-port` for each of `ports`, with its number as default."""

    @functools.wraps(command)
    def called(**options: Any) -> None:
        command(
            **{name: value for name, value in options.items() if not name.endswith("_port")},
            **{name: options[f"{name}_port"] for name in ports},
        )

    signature = inspect.signature(command)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    added = [
        inspect.Parameter(
            f"{name}_port",
            inspect.Parameter.KEYWORD_ONLY,
            default=number,
            annotation=Annotated[int, typer.Option(help=f"Of {name}.")],
        )
        for name, number in ports.items()
    ]
    called.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]  # Typer reads it
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return called
