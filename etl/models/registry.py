"""Models: their files under `models/<model_id>/`, and the aliases in `models/aliases.json` that name some of them.

The champion is the published one, previous the champion before it, challenger what was trained last and not published,
shadow one to watch. All aliases move in one swap of the file, after the model was read back and gave its golden
predictions again: those it gave for a few rows when it was stored. A reader checks the same before it uses a model.
What only the domain knows, its features and how rows become a matrix of them, is handed in as a Spec.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from etl.lake.table import Column, DataType
from etl.models import rows
from etl.storage import Root, Unreadable

if TYPE_CHECKING:
    import numpy as np
    import polars as pl
    import xgboost

    from etl.findings import Finding

log = logging.getLogger(__name__)

ALIASES = "models/aliases.json"  # alias -> pointer
OLDER = "models/current.json"  # the champion's pointer of older releases; gone with the first change
POINTER = {"model_id": str, "run_id": str, "sha256": str, "metrics": dict}  # what it holds
CHAMPION, CHALLENGER, PREVIOUS, SHADOW = NAMES = ("champion", "challenger", "previous", "shadow")
LEASE = "leases/models.lease"  # of whoever moves an alias or removes models: what is verified stays until it is named
WAIT_S = 120
BINS = 10  # even parts of 0 to 1 in which predictions are counted
KEPT = 30  # models, those with an alias among them
AS_PREDICTIONS = (
    b'{"type": 0, "training": false, "iteration_begin": 0, "iteration_end": 0, "missing": NaN, "strict_shape": false,'
    b' "cache_id": 0}'
)  # as `Booster.inplace_predict` asks
TOLERANCE = 1e-5  # between machines; a damaged tree is off by far more
JSON_LIMIT, MODEL_LIMIT = 1_000_000, 250_000_000  # bytes of the small files and of the model's own


class NoModel(LookupError):
    """No model has been published under this root yet, or none is what was asked for."""


class ModelDamaged(ValueError):
    """What is stored is not the model that was published."""


@dataclass(frozen=True)
class Spec:
    """What the domain says of its model.

    `row`: the columns that a row has when it is asked about, declared as those of a table; `features`: name -> how it
    is computed from them, in the order of the matrix's columns; the columns as they are, where none is named. `stage`:
    the one that publishes the model, for what is to be done. `golden_rows` and `golden_predictions`: the keys of the
    two lists in golden.json.
    """

    row: Mapping[str, Column | DataType]
    features: Mapping[str, rows.Feature] = field(default_factory=dict)
    stage: str = "train"
    golden_rows: str = "rows"
    golden_predictions: str = "predictions"

    def __post_init__(self) -> None:
        if not self.features:
            object.__setattr__(self, "features", {name: itemgetter(name) for name in self.row})

    def matrix(self, given: "pl.DataFrame | Sequence[Mapping[str, Any]]") -> "np.ndarray":
        """A frame's rows, or rows as JSON has them, as XGBoost takes them: Float32, a column a feature."""
        import polars as pl

        row = rows.columns_of(self.row)
        columns = rows.of_frame(given, row) if isinstance(given, pl.DataFrame) else rows.of_rows(given, row)
        return rows.matrix(columns, self.features)


@dataclass(frozen=True)
class Model:
    """A model as it was loaded. `metrics` are what it was published with."""

    model_id: str
    run_id: str
    sha256: str
    metrics: dict[str, Any]
    booster: "xgboost.Booster" = field(repr=False)
    spec: Spec = field(repr=False)

    @property
    def features(self) -> list[str]:
        """Their names, which are those that the domain declares too."""
        return list(self.booster.feature_names or ())

    def predict(self, given: "pl.DataFrame | Sequence[Mapping[str, Any]]") -> list[float]:
        """A prediction for each row. Safe in threads. Raises what the domain's features do when rows do not fit."""
        return _floats(predict(self.booster, self.spec.matrix(given)))

    def predict_columns(self, columns: rows.Columns) -> list[float]:
        """As `predict`, of rows that are columns already."""
        return _predict_few(self.booster, rows.matrix(columns, self.spec.features))

    def explain(self, given: Sequence[Mapping[str, Any]]) -> list[tuple[float, dict[str, float], float]]:
        """For each row its prediction, what each feature adds to it in the model's own scale, and where that begins."""
        import xgboost

        matrix = self.spec.matrix(given)
        data = xgboost.DMatrix(matrix, feature_names=self.features, nthread=1)
        added = self.booster.predict(data, pred_contribs=True).astype("float64").tolist()
        predictions = _floats(predict(self.booster, matrix))
        rows_of = zip(predictions, added, strict=True)
        return [(p, dict(zip(self.features, each, strict=False)), each[-1]) for p, each in rows_of]


def predict(booster: "xgboost.Booster", matrix: "np.ndarray") -> "np.ndarray":
    """A prediction (float64) for each row of a matrix, where NaN is a missing value. Safe in threads.

    Without a DMatrix, which wakes a thread on every core: on busy ones a row cost 14 to 21 ms of CPU.
    """
    predictions: np.ndarray = booster.inplace_predict(matrix).astype("float64")
    return predictions


@functools.cache
def _library() -> ctypes.CDLL:
    from xgboost.libpath import find_lib_path

    return ctypes.CDLL(find_lib_path()[0])


def _predict_few(booster: "xgboost.Booster", matrix: "np.ndarray") -> list[float]:
    """As `predict`, as a list, by XGBoost's own function: of one row what Python does around it takes most of the time.

    What that does not take, `predict` meets, too, and tells."""
    import numpy as np

    matrix = np.ascontiguousarray(matrix, np.float32)
    address = matrix.__array_interface__["data"][0]
    shape = ", ".join(map(str, matrix.shape))
    about = f'{{"data": [{address}, true], "shape": [{shape}], "typestr": "<f4", "version": 3}}'.encode()
    dimensions, sizes = ctypes.c_uint64(), ctypes.POINTER(ctypes.c_uint64)()
    values = ctypes.POINTER(ctypes.c_float)()
    told = (ctypes.byref(sizes), ctypes.byref(dimensions), ctypes.byref(values))
    failed = _library().XGBoosterPredictFromDense(booster.handle, about, AS_PREDICTIONS, None, *told)
    if failed or dimensions.value != 1 or sizes[0] != len(matrix):
        return _floats(predict(booster, matrix))
    return values[: len(matrix)]


def publish(
    root: Root,
    booster: "xgboost.Booster",
    metrics: dict[str, Any],
    golden_rows: list[dict[str, Any]],
    run_id: str,
    spec: Spec,
    alias: str = CHAMPION,
    reference: "np.ndarray | None" = None,
) -> str:
    """Write the model, read it back, compare its predictions, then give it the alias; returns its model_id.

    `golden_rows`: rows as JSON has them, at least one. `reference`: its predictions for rows that it was not trained
    on: how they are spread is kept, and later ones are held against that. Raises ModelDamaged, and the aliases stay,
    when what is read back is not what was trained, or predicts what is no number.
    """
    raw = bytes(booster.save_raw("json"))
    sha256 = hashlib.sha256(raw).hexdigest()
    model_id = f"{run_id}-{sha256[:8]}"  # a retried run never rewrites what it stored before
    predictions = _floats(predict(booster, spec.matrix(golden_rows)))
    golden = {spec.golden_rows: golden_rows, spec.golden_predictions: predictions}
    pointer = {"model_id": model_id, "sha256": sha256, "run_id": run_id, "metrics": metrics}
    root.write(f"models/{model_id}/model.json", raw)
    root.write(f"models/{model_id}/golden.json", _json(golden))
    more = {"features": list(spec.features)} | ({} if reference is None else {"reference": spread(reference)})
    root.write(f"models/{model_id}/metrics.json", _json(pointer | more))
    with _leased(root):
        _load(root, pointer, spec)
        _name(root, alias, pointer)
        _remove_oldest(root)
    return model_id


def spread(predictions: "np.ndarray") -> list[float]:
    """The shares of predictions in BINS even parts of 0 to 1; none of them is 0, as half a row more is in each."""
    import numpy as np

    parts = np.clip(np.floor(predictions * BINS), 0, BINS - 1).astype(np.int64)
    return _floats((np.bincount(parts, minlength=BINS) + 0.5) / (len(predictions) + 0.5 * BINS))


def promote(root: Root, name: str, spec: Spec, alias: str = CHAMPION) -> Model:
    """Give an alias, by default the champion's, to a model that is stored, after it was verified.

    `name`: as `find` takes it. Raises NoModel, and ModelDamaged when it is not what was stored: then all stays.
    """
    find(root, name)  # or who asks for what is not there would leave a lease
    with _leased(root):
        pointer = find(root, name)
        model = _load(root, pointer, spec)
        _name(root, alias, pointer)
    return model


def rollback(root: Root, spec: Spec) -> Model:
    """Make the previous champion the champion again, and this one the previous. Raises as `promote`."""
    return promote(root, PREVIOUS, spec)


def aliases(root: Root) -> dict[str, dict[str, Any]]:
    """Alias -> pointer: model_id, run_id, sha256, metrics; none before the first model. Raises ModelDamaged."""
    try:
        named = _read_json(root, ALIASES)
    except FileNotFoundError:
        try:
            return {CHAMPION: _pointer(_read_json(root, OLDER), root.url_of(OLDER))}
        except FileNotFoundError:
            return {}
    if not isinstance(named, dict) or CHAMPION not in named:
        raise ModelDamaged(f"{root.url_of(ALIASES)} names no model as {CHAMPION}")
    return {alias: _pointer(named[alias], root.url_of(ALIASES)) for alias in NAMES if alias in named}


def mark(root: Root) -> str | None:
    """What changes whenever an alias moves; None before the first model."""
    entry = root.entry(ALIASES) or root.entry(OLDER)
    return entry.mark if entry else None


def find(root: Root, name: str) -> dict[str, Any]:
    """The pointer to a model that is stored, by an alias, its id or the beginning of that.

    Raises NoModel, and ModelDamaged for an alias when they cannot be read: by its id a model still can be promoted.
    """
    called = aliases(root) if name in NAMES else _aliases_or_none(root)
    if name in called:
        return called[name]
    if name in NAMES:
        raise NoModel(f"there is no {name} under {root.url}; `models list` says what there is")
    pointers = {each["model_id"]: {key: each[key] for key in POINTER} for each in (*stored(root), *called.values())}
    ids = [name] if name in pointers else [each for each in pointers if name and each.startswith(name)]
    if len(ids) != 1:
        how_many = f"{len(ids)} models begin with {name}" if ids else f"there is no model {name}"
        raise NoModel(f"{how_many} under {root.url}; `models list` says what there is")
    return pointers[ids[0]]


def verify(root: Root, name: str, spec: Spec) -> Model:
    """A model that is stored, by what `find` takes. Raises NoModel, and ModelDamaged when it is not what was stored."""
    return _load(root, find(root, name), spec)


def _leased(root: Root) -> contextlib.AbstractContextManager[Any]:
    return root.lease(LEASE, f"process {os.getpid()}", wait_s=WAIT_S)


def _name(root: Root, alias: str, pointer: dict[str, Any]) -> None:
    """Give the alias to a model: by one swap, in which the champion before becomes the previous one.

    An answer of the store that was lost is no harm: the second time there is nothing to do.
    """
    while True:
        read = root.mark(ALIASES)
        before = _aliases_or_none(root)
        after = before | {alias: pointer}
        if alias == CHAMPION:  # it is no challenger any more, nor in the shadow
            after = {k: v for k, v in after.items() if k == CHAMPION or v["model_id"] != pointer["model_id"]}
            if CHAMPION in before and before[CHAMPION]["model_id"] != pointer["model_id"]:
                after[PREVIOUS] = before[CHAMPION]
        if (read and before.get(alias) == pointer) or root.replace(ALIASES, _json(after), read) is not None:
            break
    root.remove(OLDER)


def _aliases_or_none(root: Root) -> dict[str, dict[str, Any]]:
    """As `aliases`; none where they are damaged, as then the next model that is published takes their place."""
    try:
        return aliases(root)
    except ModelDamaged as error:
        log.warning("what is published cannot be read: %s", error)
        return {}


def _remove_oldest(root: Root) -> None:
    """Of more than KEPT models the oldest go, two in a publication, by the store's clock; none that an alias names."""
    names = root.names("models")
    models = [name for name in names if root.exists(f"models/{name}/model.json")]  # the first that is written
    if len(models) <= KEPT:
        return
    kept = {pointer["model_id"] for pointer in aliases(root).values()}
    written = {name: root.newest(f"models/{name}") for name in models if name not in kept}
    oldest = sorted((time, name) for name, time in written.items() if time)
    for _, name in oldest[: min(2, len(models) - KEPT)]:
        root.remove_tree(f"models/{name}")


def load_current(root: Root, spec: Spec) -> Model:
    """The published model, after its sha256 and its golden predictions were checked.

    Raises NoModel before the first, ModelDamaged when it is not what was published.
    """
    return _load(root, current(root, spec.stage), spec)


def current(root: Root, stage: str = "train") -> dict[str, Any]:
    """The pointer to the published model. Raises NoModel before the first, and ModelDamaged."""
    pointer = aliases(root).get(CHAMPION)
    if pointer is None:
        raise NoModel(f"no model is published under {root.url} yet: run {stage}")
    return pointer


def stored(root: Root) -> list[dict[str, Any]]:
    """What was written down of each model that is there, the newest first: its pointer and its features."""
    listed = []
    for model_id in sorted(root.names("models"), reverse=True):  # the time of its training is in its id
        try:
            said = _read_json(root, f"models/{model_id}/metrics.json")
        except (ModelDamaged, OSError):  # none, or one that is under way
            continue
        if _is_pointer(said) and isinstance(said.get("features"), list):
            listed.append(said)
    return listed


def listed(root: Root) -> list[dict[str, Any]]:
    """As `stored`, each with its aliases; none where the aliases are damaged."""
    named = _aliases_or_none(root)
    return [
        said | {"aliases": [alias for alias, pointer in named.items() if pointer["model_id"] == said["model_id"]]}
        for said in stored(root)
    ]


def champion(root: Root, spec: Spec) -> Model | None:
    """The published model, or None when there is none that can be used: then any challenger is better."""
    try:
        return load_current(root, spec)
    except NoModel:
        return None
    except ModelDamaged as error:
        log.warning("the champion is replaced: %s", error)
        return None


def given(root: Root, spec: Spec) -> dict[str, Any]:
    """What a training starts from besides its rows, for its replay: the aliases with the champion as JSON, and
    the sha256 of each of the champion's files; nothing when there is no champion that can be used."""
    model = champion(root, spec)
    if model is None:
        return {}
    pointer = {key: getattr(model, key) for key in POINTER}
    files = [f"models/{pointer['model_id']}/{name}" for name in ("model.json", "golden.json")]
    hashes = {name: hashlib.sha256(_read(root, name, MODEL_LIMIT)).hexdigest() for name in files}
    return {ALIASES: {CHAMPION: pointer}} | hashes


def examine(root: Root, spec: Spec) -> "list[Finding]":
    """Whether the published model can be used, as a reader would load it, and what to do when it cannot."""
    from etl import findings

    return findings.inspect("the model", lambda: _problems(root, spec))


def _problems(root: Root, spec: Spec) -> Iterator[tuple[str, str]]:
    try:
        pointers = aliases(root)
    except ModelDamaged as error:
        yield str(error), f"run {spec.stage}: it publishes another"
        return
    for alias, pointer in pointers.items():
        try:
            _load(root, pointer, spec)
        except ModelDamaged as error:
            if alias == CHAMPION:
                yield str(error), f"run {spec.stage}: it publishes another"
            else:
                yield f"{alias}: {error}", f"wait for another {alias}, or name one: `orchestrate.py models promote`"


def _load(root: Root, pointer: dict[str, Any], spec: Spec) -> Model:
    """The model a pointer names. XGBoost gets to see its bytes only when their sha256 is right: it crashes on some
    damaged files, and loads others without a word."""
    import xgboost

    folder = f"models/{pointer['model_id']}"
    try:
        raw = _read(root, f"{folder}/model.json", MODEL_LIMIT)
        golden = _read_json(root, f"{folder}/golden.json")
        if hashlib.sha256(raw).hexdigest() != pointer["sha256"]:
            raise ModelDamaged(f"{root.url_of(folder)}/model.json does not have the sha256 that was published")
        booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(raw))
        model = Model(pointer["model_id"], pointer["run_id"], pointer["sha256"], pointer["metrics"], booster, spec)
        if model.features != list(spec.features):
            raise ModelDamaged(f"{root.url_of(folder)} was trained on other features: {model.features}")
        is_golden = _is_golden(model, golden)
    except ModelDamaged:
        raise
    except Exception as error:  # the domain's features may raise anything for rows that are damaged
        raise ModelDamaged(f"the model {pointer['model_id']} cannot be read: {error!r}") from error
    if not is_golden:
        raise ModelDamaged(f"{root.url_of(folder)} does not predict what it did when it was published")
    return model


def _pointer(given: Any, url: str) -> dict[str, Any]:
    """What `url` has of a model. Raises ModelDamaged when that names none."""
    if not _is_pointer(given):
        raise ModelDamaged(f"{url} names no model")
    pointer: dict[str, Any] = given
    return pointer


def _is_pointer(given: Any) -> bool:
    return isinstance(given, dict) and all(isinstance(given.get(key), kind) for key, kind in POINTER.items())


def _is_golden(model: Model, golden: dict[str, Any]) -> bool:
    """Whether the model predicts, for at least one golden row, what it did; NaN and infinity are no predictions."""
    predictions, expected = model.predict(golden[model.spec.golden_rows]), golden[model.spec.golden_predictions]
    differences = [abs(a - b) for a, b in zip(predictions, expected, strict=True)]
    # not by the largest: max() passes over a NaN, which is no number within the tolerance either
    return bool(differences) and all(difference <= TOLERANCE for difference in differences)


def _read(root: Root, rel: str, most: int) -> bytes:
    """An ordinary file of at most `most` bytes. Raises FileNotFoundError, and ModelDamaged for anything else."""
    try:
        return root.read_at_most(rel, most)
    except (Unreadable, NotADirectoryError) as error:
        raise ModelDamaged(f"{root.url_of(rel)} cannot be used: {error}") from error


def _read_json(root: Root, rel: str) -> Any:
    """What is in a small JSON file. Raises ModelDamaged and FileNotFoundError."""
    data = _read(root, rel, JSON_LIMIT)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ModelDamaged(f"{root.url_of(rel)} is not JSON: {error}") from error


def _floats(values: "np.ndarray") -> list[float]:
    """An array of one dimension as a list."""
    floats: list[float] = values.tolist()
    return floats


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode()
