"""What a stage runs with: params/<stage>.yml held against the notebook's own parameters cell.

No notebook is executed and no notebook machinery imported, so `load` takes milliseconds. All mistakes in all
files are found in one go.
"""

import ast
import datetime
import itertools
import keyword
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from etl.params.alerts import Alerts
from etl.params.cell import DEFAULT, SUPPLIED, BadNotebook, read_cell
from etl.params.retention import Rules
from etl.params.yaml import Doc, Keys, Problem, got, nearest, parse, short
from etl.storage import BadRoot, root_url

EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class ParamsError(Exception):
    """Everything that is wrong, in `problems`."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = sorted(set(problems), key=lambda p: (p.path, p.line or 0, p.message))
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True)
class Environment:
    """Where and how big: params/env/<name>.yml. `stages` holds only what the file overrides."""

    name: str
    root: str
    machine: dict[str, Any] | None
    dask: dict[str, Any] | None
    stages: dict[str, dict[str, Any]]
    retention: Rules = Rules()
    ready_kernels: int = 1  # that wait for a run, while `up` is at work; 0: each run starts one
    alerts: Alerts | None = None
    machine_above_rows: int | None = None
    deploy: dict[str, Any] | None = None  # the home machine at Coiled


@dataclass(frozen=True)
class Stage:
    """What and when. Of `every_s` (seconds) and `cron` one is set; `every_s` counts in UTC, `cron` in `timezone`.

    `missed` says which runs are made up for when nothing ran at their time; none is scheduled after `until`.
    `values` holds JSON values and datetime.date; `origins` says where each of them was written and `help`
    what the comment beside it in the notebook says. `supplied` are the names of SUPPLIED it declares, `secrets` the
    names of the secrets it reads: the values of the parameters annotated Secret.
    """

    name: str
    notebook_path: Path
    params_path: Path
    every_s: float | None
    cron: str | None
    overlap: Literal["skip", "queue"]
    deadline_s: float
    retries: int
    values: dict[str, Any]
    origins: dict[str, str]
    help: dict[str, str]
    supplied: set[str]
    machine: dict[str, Any] | None
    dask: dict[str, Any] | None
    secrets: tuple[str, ...] = ()
    memory_mb: int | None = None  # of all its processes together
    fresh_within_s: float | None = None  # without an ok run for so long it is late; None: three times of its schedule
    timezone: str = "UTC"
    enabled: bool = True
    missed: Literal["skip", "once", "all"] = "once"
    until: datetime.datetime | None = None  # with a time zone
    machine_above_rows: int | None = None  # of its last ok run, for `machine` to count; None: always

    @property
    def when(self) -> str:
        """Its schedule, as people read it."""
        zone = "" if self.timezone == "UTC" else f" {self.timezone}"
        off = "" if self.enabled else " (not enabled)"
        until = f" until {self.until:%Y-%m-%d %H:%M} UTC" if self.until else ""
        return f"{self.cron}{zone}{until}{off}" if self.cron else f"every {self.every_s:g} s{until}{off}"

    def next_run(self, after: datetime.datetime) -> datetime.datetime | None:
        """The first scheduled time later than `after` (with a time zone), in UTC; None when it has no more."""
        if after.tzinfo is None:
            raise ValueError("next_run needs a time with a time zone")
        after = after.astimezone(datetime.UTC)
        if self.cron:
            times = _cron_times(self.cron, self.timezone, after)
            next_one = next(time for time in times if time > after)  # it begins anew in an hour that comes twice
        else:
            next_one = EPOCH + ((after - EPOCH) // self._every + 1) * self._every
        return next_one if self.enabled and (self.until is None or next_one <= self.until) else None

    def due(self, after: datetime.datetime, now: datetime.datetime, most: int) -> list[datetime.datetime]:
        """The scheduled times in (`after`, `now`], in UTC and in order; of more than `most` the last ones."""
        now = min(now, self.until) if self.until else now
        if not self.enabled:
            return []
        if self.cron:
            # from later on, as in an hour that comes twice it begins with the first of them
            back = _cron_times(self.cron, self.timezone, now + datetime.timedelta(hours=3), reverse=True)
            times = itertools.takewhile(lambda time: time > after, (time for time in back if time <= now))
        else:
            last = EPOCH + (now - EPOCH) // self._every * self._every
            each = (last - number * self._every for number in itertools.count())
            times = itertools.takewhile(lambda time: time > after, each)
        return sorted(set(itertools.islice(times, most)))

    @property
    def _every(self) -> datetime.timedelta:
        assert self.every_s is not None, "where there is no cron"
        return datetime.timedelta(seconds=self.every_s)


def _cron_times(
    cron: str, timezone: str, start: datetime.datetime, reverse: bool = False
) -> Iterator[datetime.datetime]:
    """As Debian's cron has them: a time of the day that clocks leave out is its end, one that comes twice the first."""
    for time in CronSim(cron, start.astimezone(ZoneInfo(timezone)), reverse=reverse):
        yield time.astimezone(datetime.UTC)


@dataclass(frozen=True)
class Project:
    """`stages` goes from the shortest cadence to the longest, so producers come before their readers."""

    environment: Environment
    stages: dict[str, Stage]


def load(
    project: Path,
    env: str = "local",
    overrides: Iterable[str] = (),
    stage: str | None = None,
    values: Mapping[str, Any] | None = None,
    values_from: str = "given",
    may_be_unreadable: bool = False,
) -> Project:
    """Every stage, or only `stage`, as it would run in the environment `env`.

    `values` are JSON values by name, as a run recorded them, and stay what they are; a date may be text. `values_from`
    says where they come from, in origins and problems. `overrides` are "name=value", for each stage that declares the
    name, or "stage.name=value"; the value is YAML, and the last one wins. `may_be_unreadable`: a file that is no
    notebook is no problem; its stage has no parameters, and its runs say why. Raises ParamsError with all problems at
    once.
    """
    project = Path(project)
    problems: list[Problem] = []
    names, known = _discover(project, stage, problems)
    env_file, env_doc = _read_environment(project, env, known, problems)
    chosen = [name for name in names if stage in (None, name)]
    drafts = [_Draft(project, name, problems, may_be_unreadable) for name in chosen]
    for draft in drafts:
        draft.give(draft.doc.block("parameters"), draft.doc, ("parameters",))
        keys = ("stages", draft.name, "parameters")
        draft.give(env_doc.block(*keys), env_doc, keys)
        over = env_doc.block(*keys[:2])
        schedule = over if over.keys() & {"every", "cron"} else draft.doc.value or {}
        if "timezone" in over and "cron" not in schedule:
            problems.append(env_doc.problem((*keys[:2], "timezone"), "timezone goes with cron; every counts in UTC"))
        for name, value in (values or {}).items():
            draft.give({name: value}, Doc(f"{values_from}, {draft.name}.{name}", {}), (), values_from)
    _give_from_command_line(drafts, overrides, problems)
    if problems or env_file is None:
        raise ParamsError(problems)
    drafts.sort(key=lambda draft: (_cadence_s(draft.file), draft.name))
    environment = _environment(env, env_file)
    return Project(environment, {draft.name: draft.finish(project, environment) for draft in drafts})


def environment(project: Path, env: str = "local") -> Environment:
    """The environment alone: all that a command needs which only reads a root. Raises ParamsError."""
    problems: list[Problem] = []
    file, _ = _read_environment(Path(project), env, None, problems)
    if problems or file is None:
        raise ParamsError(problems)
    return _environment(env, file)


def without_yaml(project: Path) -> list[Problem]:
    """Notebooks that are no stages, because they have no YAML: a slip, or work that has just begun.

    Those that are called `Untitled...`, as JupyterLab does it, or that begin with `_` are left alone.
    """
    notebooks, params = names(Path(project))
    return [
        Problem(f"notebooks/{name}.ipynb", None, f"there is no params/{name}.yml{nearest(name, params - notebooks)}")
        for name in sorted(notebooks - params)
        if not name.startswith(("_", "Untitled"))
    ]


def environments(project: Path) -> list[str]:
    """The names `load` takes for `env`."""
    return sorted(path.stem for path in Path(project).glob("params/env/[!.]*.yml"))


def injected_cell_source(values: dict[str, Any], declared: Iterable[str]) -> str:
    """The Python text of the cell that sets a run's values, one assignment a line.

    Values are JSON values (lists and dicts in any depth) and datetime.date, anything else is a TypeError.
    A name the notebook does not declare, or that is none, is a ValueError. So nothing can become code.
    """
    declared = set(declared)
    for name in values:
        if name not in declared or not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise ValueError(f"not a declared parameter: {name!r}")
    return "".join(f"{name} = {_to_code(value)}\n" for name, value in values.items())


def _to_code(value: Any) -> str:
    kind = type(value)  # exact: a subclass brings a __repr__ of its own
    if kind is float and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or kind in (bool, int, float, str):
        return repr(value)  # also escapes lone surrogates and line separators
    if kind is datetime.date:
        return f'__import__("datetime").date.fromisoformat("{value.isoformat()}")'
    if kind is list:
        return "[" + ", ".join(map(_to_code, value)) + "]"
    if kind is dict:
        if any(type(key) is not str for key in value):
            raise TypeError("a dict in a parameter has text keys only")
        return "{" + ", ".join(f"{key!r}: {_to_code(item)}" for key, item in value.items()) + "}"
    raise TypeError(f"a parameter is a JSON value or a date, not {kind.__name__}")


# --- params/<stage>.yml and params/env/<name>.yml ---


def seconds(text: Any) -> float:
    """The seconds of a duration such as "30 seconds"; raises ValueError for what is none."""
    units = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
    match = isinstance(text, str) and re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?) +([a-z]+?)s?", text)
    duration = float(match[1]) * units.get(match[2], 0) if match else 0
    if not 0 < duration <= 366 * units["day"]:
        raise ValueError("not a duration")
    return duration


def _megabytes(text: Any) -> int:
    match = isinstance(text, str) and re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) +(MB|GB)", text)
    megabytes = int(float(match[1]) * (1000 if match[2] == "GB" else 1)) if match else 0
    if not megabytes:
        raise ValueError("not a size")
    return megabytes


def _plain_cron(text: str) -> str:
    """Prefect's croniter and our cronsim read other forms differently (6-6, 7/1, */2 beside a weekday)."""
    item = r"([0-9]{1,2}|[A-Za-z]{3})(-([0-9]{1,2}|[A-Za-z]{3})(/[0-9]{1,2})?)?"
    fields = text.split()
    if len(fields) != 5 or not all(re.fullmatch(rf"\*(/[0-9]{{1,2}})?|{item}(,{item})*", f) for f in fields):
        raise ValueError("not five plain fields")
    if fields[2] != "*" and fields[4] != "*":
        raise ValueError("a day of the month and a day of the week")
    try:
        next(CronSim(text, EPOCH))
    except (CronSimError, StopIteration) as error:
        raise ValueError("never fires") from error
    return text


def _timezone(text: str) -> str:
    try:
        ZoneInfo(text)
    except (ZoneInfoNotFoundError, OSError) as error:  # a folder of them, such as Europe
        raise ValueError("no such time zone") from error
    return text


def _end(text: str, timezone: str = "UTC") -> datetime.datetime:
    """The last moment that "2026-12-31", the whole day, or a time says; in `timezone` unless it says another."""
    moment = datetime.datetime.fromisoformat(text)
    if re.fullmatch(r"\d{4}-?\d{2}-?\d{2}", text):
        moment += datetime.timedelta(days=1, microseconds=-1)
    zone = moment.tzinfo or ZoneInfo(timezone)
    return moment.replace(tzinfo=zone).astimezone(datetime.UTC)


def _until(text: str) -> str:
    _end(text)
    return text


_SCHEDULER = re.compile(r"(?!https?:)(?:[a-z]+://)?[^\s/]+:[0-9]+(?:/\S*)?")  # a browser's page is none


def _one_dask(block: dict[str, Any]) -> dict[str, Any]:
    match block:
        case {"n_workers": int(n)} if n > 0 and n is not True and len(block) == 1:
            return block
        case {"address": str(address)} if _SCHEDULER.fullmatch(address) and len(block) == 1:
            return block
        case {"coiled": dict(some)} if some and len(block) == 1:
            return block
    raise ValueError("none of the three forms")


def _root(text: str) -> str:
    root_url(text)
    return text


_Duration = Annotated[float, BeforeValidator(seconds)]
_Memory = Annotated[int, BeforeValidator(_megabytes)]
_Cron = Annotated[str, AfterValidator(_plain_cron)]
_Timezone = Annotated[str, AfterValidator(_timezone)]
_Until = Annotated[str, AfterValidator(_until)]
_Missed = Literal["skip", "once", "all"]
_Dask = Annotated[dict[str, Any], AfterValidator(_one_dask)] | None
_NOT_GIVEN: Any = None  # what is given is never null
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Above(BaseModel):
    model_config = _STRICT
    rows: Annotated[int, Field(ge=0)]


_File = TypeVar("_File", bound=BaseModel)


class _OfStage(BaseModel):
    """What a stage's own file and an env file may say of it alike."""

    model_config = _STRICT
    every: _Duration = _NOT_GIVEN
    cron: _Cron = _NOT_GIVEN
    timezone: _Timezone = _NOT_GIVEN
    until: _Until = _NOT_GIVEN
    fresh_within: _Duration = _NOT_GIVEN
    memory: _Memory = _NOT_GIVEN
    parameters: dict[str, Any] | None = None


class _StageFile(_OfStage):
    enabled: bool = True
    missed: _Missed = "once"
    overlap: Literal["skip", "queue"] = "skip"
    deadline: _Duration
    retries: Annotated[int, Field(ge=0)] = 0


class _StageOverride(_OfStage):
    enabled: bool = _NOT_GIVEN
    missed: _Missed = _NOT_GIVEN
    deadline: _Duration = _NOT_GIVEN
    machine: dict[str, Any] | None = None
    machine_above: _Above | None = None
    dask: _Dask = None


class _EnvFile(BaseModel):
    model_config = _STRICT
    root: Annotated[str, Field(min_length=1), AfterValidator(_root)]
    machine: dict[str, Any] | None = None
    machine_above: _Above | None = None
    dask: _Dask = None
    retention: Rules = Rules()
    ready_kernels: Annotated[int, Field(ge=0, le=16)] = 1
    alerts: Alerts | None = None
    deploy: dict[str, Any] | None = None
    stages: dict[str, _StageOverride] | None = None


_EXPECTED = {
    "every": 'a duration such as "30 seconds", "1 minute" or "6 hours"',
    "deadline": 'a duration such as "50 seconds"',
    "fresh_within": 'a duration such as "3 minutes"',
    "cron": 'five plain fields such as "0 * * * *"',
    "timezone": 'a time zone such as "Europe/Berlin"',
    "until": 'a day such as "2026-12-31" or a time such as "2026-12-31 18:00"',
    "enabled": "true or false",
    "missed": "skip, once or all",
    "memory": 'a size such as "500 MB" or "4 GB"',
    "overlap": "skip or queue",
    "retries": "a whole number from 0",
    "parameters": "name: value lines",
    "root": "a folder or a URL",
    "machine": "null or key: value lines",
    "deploy": "null or key: value lines",
    "machine_above": "null or {rows: a whole number}",
    "dask": "null, {n_workers: 1 or more}, {address: tcp://host:port} or {coiled: {...}}",
    "retention": "numbers from 0 for all_hours, hourly_days, page_days and days, true or false for daily and slowest",
    "ready_kernels": "a whole number from 0 to 16",
    "alerts": "to, command, on and figures",
    "to": "the names of secrets that are Apprise URLs, or URLs such as json://host/path that hold no secret",
    "command": "a program and its arguments, as a list",
    "on": "a list of failed, late, up, damaged, stale, quarantine, slow, recovered",
    "figures": 'a list of lines such as "question.column < 1000"',
    "stages": "a stage's name and, under it, what to override",
}


def _read_file(model: type[_File], project: Path, path: str, problems: list[Problem]) -> tuple[_File | None, Doc]:
    """(the file as `model`, or None when it does not fit; its Doc, whose value is a dict in any case)"""
    doc = parse((project / path).read_bytes(), path, problems)
    if doc is None:
        return None, Doc(path, {})
    if not isinstance(doc.value, dict | None):
        problems.append(doc.problem((), f"expected key: value lines, got {got(doc.value)}"))
        return None, Doc(path, {})
    doc.value = doc.value or {}
    for keys in [(), *(("stages", name) for name in doc.block("stages"))]:
        if {"every", "cron"} <= doc.block(*keys).keys():
            problems.append(doc.problem((*keys, "cron"), "give every or cron, not both"))
    if model is _StageFile and not {"every", "cron"} & doc.value.keys():
        problems.append(doc.problem((), "missing 'every' (or 'cron')"))
    if model is _StageFile and "timezone" in doc.value and "cron" not in doc.value:
        problems.append(doc.problem(("timezone",), "timezone goes with cron; every counts in UTC"))
    try:
        return model.model_validate(doc.value), doc
    except ValidationError as error:
        for e in error.errors():
            where, key = e["loc"], e["loc"][-1]
            if e["type"] == "extra_forbidden":
                blocks: dict[str, type[BaseModel]] = {"retention": Rules, "alerts": Alerts}
                known = model if len(where) == 1 else blocks.get(str(where[0]), _StageOverride)
                message = f"unknown key {short(key)}{nearest(key, known.model_fields)}"
            elif e["type"] == "missing":
                message = f"missing {key!r}"
            elif isinstance(reason := e.get("ctx", {}).get("error"), BadRoot):
                message = f"root: {reason}"
            else:
                key = next(part for part in reversed(where) if part in _EXPECTED)
                shown = "" if key == "to" else f", got {got(e['input'])}"  # it may hold a secret
                message = f"{key}: expected {_EXPECTED[key]}{shown}"
            problems.append(doc.problem(where, message))
        return None, doc


def _environment(name: str, file: _EnvFile) -> Environment:
    overridden = {stage: over.model_dump(exclude_unset=True) for stage, over in (file.stages or {}).items()}
    return Environment(
        name,
        file.root,
        file.machine,
        file.dask,
        overridden,
        file.retention,
        file.ready_kernels,
        file.alerts,
        file.machine_above.rows if file.machine_above else None,
        file.deploy,
    )


def _read_environment(
    project: Path, env: str, stages: set[str] | None, problems: list[Problem]
) -> tuple[_EnvFile | None, Doc]:
    """(the file, or None; its Doc). `stages`: the names it may override, None when nobody asks."""
    if env not in (known := environments(project)):
        problems.append(Problem(f"params/env/{env}.yml", None, f"no such environment{nearest(env, known)}"))
        return None, Doc("", {})
    file, doc = _read_file(_EnvFile, project, f"params/env/{env}.yml", problems)
    for name in doc.block("stages"):
        if stages is not None and name not in stages:
            message = f"unknown stage {short(name)}{nearest(name, stages)}"
            problems.append(doc.problem(("stages", name), message))
    problems += _aimless(doc)
    return file, doc


def _aimless(doc: Doc) -> Iterator[Problem]:
    """Conditions for a machine that nobody asks for."""
    everywhere = doc.value.get("machine")
    of = {name: doc.block("stages", name).get("machine", everywhere) for name in doc.block("stages")}
    machines = {(): everywhere or any(of.values())} | {("stages", name): machine for name, machine in of.items()}
    for keys, machine in machines.items():
        if doc.block(*keys).get("machine_above") and not machine:
            yield doc.problem((*keys, "machine_above"), "machine_above goes with machine, and there is none")


def _discover(project: Path, wanted: str | None, problems: list[Problem]) -> tuple[list[str], set[str]]:
    """(the stages: names with a notebook and a YAML; all names). Problems of other than `wanted` are left.

    A notebook without its YAML is no stage, and stops none.
    """
    notebooks, params = names(project)
    unpaired = []
    if wanted in notebooks - params:
        what = f"there is no params/{wanted}.yml{nearest(wanted, params - notebooks)}"
        unpaired.append(Problem(f"notebooks/{wanted}.ipynb", None, what))
    for name in sorted(params - notebooks):
        what = f"there is no notebooks/{name}.ipynb{nearest(name, notebooks - params)}"
        unpaired.append(Problem(f"params/{name}.yml", None, what))
    for name in sorted(notebooks & params):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "all":
            what = "a stage's name is lower-case letters, digits and _, and not 'all'"
            unpaired.append(Problem(f"params/{name}.yml", None, what))
    problems += [problem for problem in unpaired if wanted in (None, Path(problem.path).stem)]
    if wanted is None and not unpaired and not notebooks & params:
        problems.append(Problem("notebooks", None, "there is no stage here"))
    if wanted is not None and wanted not in notebooks | params:
        what = f"unknown stage {short(wanted)}{nearest(wanted, notebooks & params)}"
        problems.append(Problem("command line", None, what))
    return sorted(notebooks & params), notebooks | params


def names(project: Path) -> tuple[set[str], set[str]]:
    """(the names of the notebooks, those of the YAML files): a stage has both."""
    notebooks = {path.stem for path in project.glob("notebooks/[!.]*.ipynb")}
    return notebooks, {path.stem for path in project.glob("params/[!.]*.yml")}


def _cadence_s(file: _StageFile) -> float:
    """Seconds from run to run; for a cron the median gap of ten."""
    if file.cron is None:
        return file.every
    cron = CronSim(file.cron, EPOCH)
    times = [next(cron).timestamp() for _ in range(11)]
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(times))


# --- from the files to the stages ---


class _Draft:
    """A stage while its values come in: defaults first, then each source over the one before."""

    def __init__(self, project: Path, name: str, problems: list[Problem], may_be_unreadable: bool):
        self.name, self.problems = name, problems
        self.values: dict[str, Any] = {}
        self.origins: dict[str, str] = {}
        self._file, self.doc = _read_file(_StageFile, project, f"params/{name}.yml", problems)
        path = f"notebooks/{name}.ipynb"
        try:
            declared, defaults = read_cell(project, path, problems)
        except BadNotebook as error:
            declared, defaults = None, Doc(path, {})
            if not may_be_unreadable:
                problems.append(Problem(path, None, str(error)))
        self.is_declared, self.declared = declared is not None, declared or {}
        typed: Any = TypedDict  # of names that no type checker can know
        types = {parameter: declared.type for parameter, declared in self.declared.items()}
        self.model = TypeAdapter[dict[str, Any]](with_config(_STRICT)(typed(name, types, total=False)))
        self.give(defaults.value, defaults, (), DEFAULT)

    @property
    def file(self) -> _StageFile:
        assert self._file is not None, "it was read without a problem"
        return self._file

    def give(self, values: dict[str, Any], doc: Doc, keys: Keys, origin: str | None = None) -> None:
        """Take `values`, found in `doc` at `keys`; `origin` is their file and line when not said."""
        if not self.is_declared:
            return
        supplied: set[str] = set() if origin == DEFAULT else values.keys() & set(SUPPLIED)
        for name in sorted(supplied):
            how = "; it comes from the env file or --root" if name == "root" else ""
            self.problems.append(doc.problem((*keys, name), f"{name} is supplied by the runner{how}"))
        values = {name: value for name, value in values.items() if name not in supplied}
        try:
            values = self.model.validate_python(values, context=origin)
        except ValidationError as error:
            self.problems += [doc.problem((*keys, *e["loc"]), self._explain(e)) for e in error.errors()]
        for name in values.keys() - set(SUPPLIED):
            self.values[name] = values[name]
            self.origins[name] = origin or f"{doc.path}:{doc.line((*keys, name))}"

    def _explain(self, error: Mapping[str, Any]) -> str:
        name, *inside = error["loc"]
        if error["type"] == "extra_forbidden":
            return f"unknown parameter {short(name)}{nearest(name, self.declared)}"
        if self.declared[name].is_secret:  # what was given may be the secret itself
            return f"{name}: expected the name of a secret, such as API_KEY; its value belongs in no file"
        annotation = self.declared[name].annotation
        expected = ast.unparse(annotation) if annotation else "nothing"
        message = f"{name}: expected {expected}, got {got(error['input'])}"
        if inside:
            message += f" in {name}" + "".join(f"[{short(part)}]" for part in inside if part != "[key]")
        if error["type"] == "string_type" and isinstance(error["input"], bool | int | float):
            message += "; put text in quotes"
        return message

    def finish(self, project: Path, environment: Environment) -> Stage:
        over = environment.stages.get(self.name, {})
        schedule = over if over.keys() & {"every", "cron"} else self.file.model_dump()
        timezone = (over.get("timezone") or self.file.timezone or "UTC") if schedule.get("cron") else "UTC"
        until = over.get("until", self.file.until)
        above = over.get("machine_above", {"rows": environment.machine_above_rows}) or {"rows": None}
        return Stage(
            name=self.name,
            notebook_path=project / f"notebooks/{self.name}.ipynb",
            params_path=project / f"params/{self.name}.yml",
            every_s=schedule.get("every"),
            cron=schedule.get("cron"),
            overlap=self.file.overlap,
            deadline_s=over.get("deadline", self.file.deadline),
            retries=self.file.retries,
            values={name: self.values[name] for name in self.declared if name in self.values},
            origins={name: self.origins[name] for name in self.declared if name in self.origins},
            help={name: declared.help for name, declared in self.declared.items()},
            supplied=self.declared.keys() & set(SUPPLIED),
            machine=over.get("machine", environment.machine),
            dask=over.get("dask", environment.dask),
            secrets=tuple(
                self.values[name]
                for name, declared in self.declared.items()
                if declared.is_secret and self.values[name]
            ),
            memory_mb=over.get("memory", self.file.memory),
            fresh_within_s=over.get("fresh_within", self.file.fresh_within),
            timezone=timezone,
            enabled=over.get("enabled", self.file.enabled),
            missed=over.get("missed", self.file.missed),
            until=_end(until, timezone) if until else None,
            machine_above_rows=above["rows"],
        )


def _give_from_command_line(drafts: list[_Draft], overrides: Iterable[str], problems: list[Problem]) -> None:
    for text in overrides:
        target, equals, value = text.partition("=")
        stage, dot, name = target.rpartition(".")
        path = f"-p {target}"
        aimed = [draft for draft in drafts if not dot or draft.name == stage]
        takers = [draft for draft in aimed if not draft.is_declared or name in draft.declared]
        wrong: list[Problem] = []
        if not equals or not name:
            wrong.append(Problem(path, None, "expected name=value or stage.name=value"))
        elif not aimed:
            known = {draft.name for draft in drafts}
            wrong.append(Problem(path, None, f"unknown stage {short(stage)}{nearest(stage, known)}"))
        elif not takers and name not in SUPPLIED:
            known = {parameter for draft in aimed for parameter in draft.declared}
            wrong.append(Problem(path, None, f"unknown parameter {short(name)}{nearest(name, known)}"))
        elif doc := parse(value, path, wrong):
            doc.lines = {}
            for draft in takers if name not in SUPPLIED else aimed:
                draft.give({name: doc.value}, doc, (), "command line")
        problems += [replace(problem, line=None) for problem in wrong]
