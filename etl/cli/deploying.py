"""`deploy`: the home machine at Coiled, had, looked at, given back."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etl.cli.common import AsJson, Env, RootOption, load, print_json, refuse, say

if TYPE_CHECKING:
    from etl.serve.deployed import Home, State


def register(app: typer.Typer) -> None:
    app.command()(deploy)


def deploy(
    env: Env = "home",
    root: RootOption = None,
    status: Annotated[bool, typer.Option("--status", help="Only say how it is; exit status 1 unless well.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Give the machine back.")] = False,
    as_json: AsJson = False,
) -> None:
    """`up` on a machine of Coiled's that is always on, as `deploy` in the env file says; again only when need be."""
    from etl.serve import deployed

    if status and stop:
        refuse("--status or --stop: only one of them", status=2)
    try:
        home = deployed.read(load(env, root=root))
    except ValueError as error:
        refuse(str(error), status=2)
    if wrong := deployed.unreachable(home, needs_root=status) if status or stop else deployed.problems(home):
        refuse(wrong[0], status=2)
    try:
        if status:
            _tell(home, deployed.look(home), as_json)
        elif stop:
            say(f"{home.name} is given back" if deployed.stop(home) else f"there is no machine {home.name}")
        elif deployed.deploy(home, say):
            say(f"`up` is at work on {home.name}, on {home.root.url}")
        else:
            say(f"{home.name} is at work as it is to be: nothing was done")
    except deployed.NotDeployed as error:
        refuse(str(error))
    except Exception as error:  # whatever a root, Coiled's client or the way to them raise
        from etl.runs.endings import one_line

        refuse(one_line(error))


def _tell(home: "Home", state: "State", as_json: bool) -> None:
    why, told, beat = state.why_again(home.digest()), state.told or {}, state.beat or {}
    document: dict[str, Any] = {
        "name": home.name,
        "root": home.root.url,
        "machine": state.cluster,
        "deployed_at": told.get("at") if state.is_ours else None,
        "page": told.get("page") if state.is_ours else None,
        "beat_at": beat.get("at"),
        "release": beat.get("release"),
        "to_do": why or None,
    }
    if as_json:
        print_json(document)
    else:
        there = "is there" if state.cluster is not None else "is not there"
        say(f"{home.name} {there}" + (f", deployed {told['at']}" if state.is_ours else ""))
        if beat:
            ago_s = (datetime.now(UTC) - datetime.fromisoformat(beat["at"])).total_seconds()
            say(f"`up` on {home.root.url}: last heard of {ago_s:,.0f} s ago, release {beat.get('release')}")
        if document["page"]:
            say(f"API: {document['page']}")
        say(f"to be deployed: {why}" if why else "all is as it is to be")
    if why:
        raise typer.Exit(1)
