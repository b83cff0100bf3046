"""`models`: what has been trained, which of it is published, and the way back."""

import importlib
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich import box
from rich.markup import escape
from rich.table import Table

from etl.cli.common import (
    AsJson,
    Env,
    RootOption,
    Timetable,
    err,
    existing_root,
    out,
    print_json,
    refuse,
    refusing,
    say,
)
from etl.cli.printing import print_fields
from etl.storage import Root

if TYPE_CHECKING:
    from etl.models.registry import Model

app = typer.Typer(no_args_is_help=True, help="The models of a root: champion, challenger, previous, shadow.")
Name = Annotated[str, typer.Argument(help="An alias, a model's id, or the beginning of it.")]


@app.command("list")
def list_models(env: Env = "local", root: RootOption = None, as_json: AsJson = False) -> None:
    """The models that are kept, newest first, with their aliases and the first of the metrics they were stored with."""
    from etl.models import registry

    asked = existing_root(env, root)
    rows = registry.listed(asked)
    try:
        registry.aliases(asked)
    except registry.ModelDamaged as error:
        err.print(f"[bold red]{escape(str(error))}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(rows)
        return
    if not rows:
        say(f"there is no model under {asked.url}: the first training publishes it")
        return
    numbers = [_numbers(row["metrics"]) for row in rows]
    first = next((next(iter(each)) for each in numbers if each), "")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", no_wrap=True)  # to be copied
    table.add_column("alias", overflow="fold")
    table.add_column(first, justify="right", no_wrap=True)
    for row, metrics in zip(rows, numbers, strict=True):
        table.add_row(row["model_id"], ", ".join(row["aliases"]), _shown(metrics.get(first)))
    out.print(table)


@app.command("show")
def show_model(
    context: typer.Context,
    name: Name = "champion",
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """What was written down of a model, and whether it still is what was stored. Exit status 1 when it is not."""
    from etl.models import registry

    asked, spec = existing_root(env, root), _module(context).SPEC
    with _known():
        pointer = registry.find(asked, name)
    named = [row for row in registry.listed(asked) if row["model_id"] == pointer["model_id"]]
    told = pointer | (named[0] if named else {"aliases": [name]}) | {"problem": None}
    try:
        registry.verify(asked, pointer["model_id"], spec)
    except (registry.ModelDamaged, registry.NoModel) as error:
        told["problem"] = str(error)
    if as_json:
        print_json(told)
    else:
        shown = ("model_id", "aliases", "run_id", "sha256", "problem", "features", "metrics")
        print_fields({key: told.get(key) for key in shown})
    if told["problem"]:
        raise typer.Exit(1)


@app.command("promote")
def promote_model(
    context: typer.Context,
    name: Name,
    alias: Annotated[
        Literal["champion", "challenger", "shadow"], typer.Option("--as", help="The alias that it gets.")
    ] = "champion",
    env: Env = "local",
    root: RootOption = None,
    as_json: AsJson = False,
) -> None:
    """Publish a model that is kept, after it was verified; the champion before becomes the previous one."""
    from etl.models import registry

    asked, spec = existing_root(env, root), _module(context).SPEC
    with _known():
        model = registry.promote(asked, name, spec, alias)
    _print_moved(asked, model, f"{alias} now", as_json)


@app.command("rollback")
def roll_back_model(
    context: typer.Context, env: Env = "local", root: RootOption = None, as_json: AsJson = False
) -> None:
    """Publish the previous champion again, after it was verified; a second time goes back."""
    from etl.models import registry

    asked, spec = existing_root(env, root), _module(context).SPEC
    with _known():
        model = registry.rollback(asked, spec)
    _print_moved(asked, model, "champion again", as_json)


@app.command("compare")
def compare_models(
    context: typer.Context, a: Name, b: Name, env: Env = "local", root: RootOption = None, as_json: AsJson = False
) -> None:
    """Two models beside each other: the metrics each was stored with, and both judged on the same rows of now."""
    from etl.models import registry

    asked, module = existing_root(env, root), _module(context)
    with _known():
        models = {name: registry.verify(asked, name, module.SPEC) for name in (a, b)}
    stored = {name: model.metrics for name, model in models.items()}
    judged = _judged(context.obj, module, asked, models)
    if as_json:
        ids = {name: model.model_id for name, model in models.items()}
        print_json({"models": ids, "metrics": stored, "judged": judged})
        return
    for label, name in zip(_labels(a, b), (a, b), strict=True):
        say(f"{label:11} {models[name].model_id}")
    _print_beside("as each was stored, on the held-out rows of then", stored, (a, b))
    if isinstance(judged, dict):
        _print_beside("both on the same held-out rows of now", judged, (a, b))
    elif judged:
        say(judged)


def _judged(timetable: Timetable, module: Any, root: Root, models: "dict[str, Model]") -> Any:
    """Name -> metrics, where the domain compares; a sentence where it cannot, and None where it does not."""
    from etl.lake import NothingPublished

    if not hasattr(module, "compare"):
        return None
    try:
        rows = module.compare(timetable.lake_at(root), models).to_dicts()
    except NothingPublished as error:
        return f"not judged on the same rows: {error}"
    return {row.pop("model"): row for row in rows}


def _module(context: typer.Context) -> Any:
    """The domain's model: SPEC, and perhaps `compare`."""
    timetable: Timetable = context.obj
    if not timetable.model:
        refuse("this project has no model: Timetable in orchestrate.py names none", status=2)
    return importlib.import_module(timetable.model)


def _known() -> AbstractContextManager[None]:
    """What is not there or damaged is refused, and nothing has moved."""
    from etl.leases import LeaseHeld
    from etl.models import registry

    return refusing(registry.NoModel, registry.ModelDamaged, LeaseHeld, status=2)


def _print_moved(root: Root, model: "Model", how: str, as_json: bool) -> None:
    from etl.models import registry

    named = {alias: pointer["model_id"] for alias, pointer in registry.aliases(root).items()}
    if as_json:
        print_json({"model_id": model.model_id, "aliases": named})
        return
    out.print(f"[green]{how}[/]  {escape(model.model_id)}", highlight=False, soft_wrap=True)
    for alias, model_id in named.items():
        say(f"{alias:11} {model_id}")


def _print_beside(title: str, metrics: dict[str, dict[str, Any]], names: tuple[str, str]) -> None:
    say(title, style="italic")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    for label in _labels(*names):
        table.add_column(label, justify="right", no_wrap=True)
    before, after = (_numbers(metrics[name]) for name in names)
    for metric in {**before, **after}:
        table.add_row(escape(metric), _shown(before.get(metric)), _shown(after.get(metric)))
    out.print(table)


def _labels(a: str, b: str) -> tuple[str, str]:
    """What the two are called above their columns, where an id has no room."""
    from etl.models import registry

    return a if a in registry.NAMES else "a", b if b in registry.NAMES else "b"


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if type(value) in (int, float)}


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
