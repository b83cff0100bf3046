"""A stage, and lines of YAML for its `parameters` that have to be refused, with what is said, or taken."""

import json
from datetime import date

CELL = """\
root: str = "outputs/dev"  # where everything is read and written
run_id: str = "dev"  # this run's name
scheduled_for: str | None = None  # UTC, ISO 8601
# what is read
max_files: int = 500  # oldest first
max_bad_share: float = 0.01  # stop when more rows than this are refused
dry: bool = False  # write nothing
market: str = "BUILDING"  # one market segment
day: datetime.date | None = None  # the first day; None: all
until: date = date(2026, 1, 31)  # the last day
order: Literal["asc", "desc"] = "asc"  # of the files
level: Literal[1, 2, None] = 1  # of detail
limit: int | None = None  # rows; None: all
names: list[str] = []  # of tables
weights: dict[str, float] = {"a": 1}  # by table
nested: dict[str, list[int | None]] = {}  # rows by table
token: Secret = "API_KEY"  # of the source
spare: Secret | None = None  # of its twin
schema: str = "x"  # a name that pydantic's own models have
"""
STAGE = "every: 1 minute\ndeadline: 50 seconds\nparameters:\n"
LOCAL = "root: outputs\nmachine: null\ndask: null\n"


def notebook(*cells):
    return json.dumps(
        {
            "cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}]
            + [
                {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": c.splitlines(True)} for c in cells
            ],
            "metadata": {},
            "nbformat": 4,
            "nbformat_minor": 4,
        }
    )


BAD_VALUES = {
    "max_flies: 5": "unknown parameter 'max_flies'; did you mean 'max_files'?",
    "zzz: 5": "unknown parameter 'zzz'",
    "max_files: '500'": "max_files: expected int, got str '500'",
    "max_files: 5.0": "max_files: expected int, got float 5.0",
    "max_files: true": "max_files: expected int, got bool True",
    "max_files: null": "max_files: expected int, got null",
    "max_files:": "max_files: expected int, got null",
    "max_files: 0500": "max_files: expected int, got str '0500'",
    "max_files: 12:30": "max_files: expected int, got str '12:30'",
    "max_files: [5]": "max_files: expected int, got list [5]",
    "max_bad_share: lots": "max_bad_share: expected float, got str 'lots'",
    "max_bad_share: true": "max_bad_share: expected float, got bool True",
    "max_bad_share: .nan": "max_bad_share: expected float, got str '.nan'",
    "max_bad_share: 1e999": "max_bad_share: expected float, got float inf",
    "dry: yes": "dry: expected bool, got str 'yes'",
    "dry: 1": "dry: expected bool, got int 1",
    "market: 5": "market: expected str, got int 5; put text in quotes",
    "day: 2026-02-30": "day: expected datetime.date | None, got str '2026-02-30'",
    "day: 20260201": "day: expected datetime.date | None, got int 20260201",
    "day: 2026-01-01T00:00:00": "day: expected datetime.date | None, got str '2026-01-01T00:00:00'",
    "until: null": "until: expected date, got null",
    "order: up": "order: expected Literal['asc', 'desc'], got str 'up'",
    "level: true": "level: expected Literal[1, 2, None], got bool True",
    "level: 1.0": "level: expected Literal[1, 2, None], got float 1.0",
    "limit: many": "limit: expected int | None, got str 'many'",
    "names: orders": "names: expected list[str], got str 'orders'",
    "weights: [1]": "weights: expected dict[str, float], got list [1]",
    "max_files: &a 5": "not YAML: anchors, aliases and tags are not used here",
    "max_files: !!int 5": "not YAML: anchors, aliases and tags are not used here",
    "max_files: !!python/name:os.system ''": "not YAML: anchors, aliases and tags are not used here",
    "<<: {max_files: 5}": "unknown parameter '<<'",
    "max_files: [5": "not YAML: expected ',' or ']', but got '<stream end>'",
    "root: /elsewhere": "root is supplied by the runner; it comes from the env file or --root",
    "run_id: x": "run_id is supplied by the runner",
    "scheduled_for: 2026-01-01": "scheduled_for is supplied by the runner",
    "dask: null": "dask is supplied by the runner",
    "token: s3cret-canary": "token: expected the name of a secret, such as API_KEY; its value belongs in no file",
    "token: 5": "token: expected the name of a secret, such as API_KEY; its value belongs in no file",
    "token: null": "token: expected the name of a secret, such as API_KEY; its value belongs in no file",
    "spare: ../API_KEY": "spare: expected the name of a secret, such as API_KEY; its value belongs in no file",
    'market: "\\uD800"': "half a surrogate pair is no text",
    "7: x": "a key here is not text; put it in quotes",
}

GOOD_VALUES = [
    ("max_files: 1_000", {"max_files": 1000}),
    ("max_files: -1  # a comment", {"max_files": -1}),
    ("max_bad_share: 1", {"max_bad_share": 1.0}),
    ("max_bad_share: 1e-3", {"max_bad_share": 0.001}),
    ("max_bad_share: .5", {"max_bad_share": 0.5}),
    ("dry: true", {"dry": True}),
    ("dry: False", {"dry": False}),
    ("market: no", {"market": "no"}),
    ("market: ''", {"market": ""}),
    ("market: '5'", {"market": "5"}),
    ("market: 2026-01-05", {"market": "2026-01-05"}),
    ("market: |\n    two\n    lines", {"market": "two\nlines\n"}),
    ("market: żółw 🐢", {"market": "żółw 🐢"}),
    ("day: 2026-01-05", {"day": date(2026, 1, 5)}),
    ('day: "2026-01-05"', {"day": date(2026, 1, 5)}),
    ("day: null", {"day": None}),
    ("until: 2024-02-29", {"until": date(2024, 2, 29)}),
    ("order: desc", {"order": "desc"}),
    ("level: 2", {"level": 2}),
    ("level: null", {"level": None}),
    ("limit: 10", {"limit": 10}),
    ("limit: ~", {"limit": None}),
    ("names: [orders, lineitem]", {"names": ["orders", "lineitem"]}),
    ("names:\n    - orders\n    - '5'", {"names": ["orders", "5"]}),
    ("weights:\n    a: 1\n    b: 2.5", {"weights": {"a": 1.0, "b": 2.5}}),
    ("weights: {\n    a: 1,\n    'no': 2.5}", {"weights": {"a": 1.0, "no": 2.5}}),
    ("nested:\n    a: [1, null]\n    b: []", {"nested": {"a": [1, None], "b": []}}),
    ("token: OTHER_KEY_2", {"token": "OTHER_KEY_2"}),
    ("spare: SPARE", {"spare": "SPARE"}),
    ("schema: y", {"schema": "y"}),
    ("{}", {}),
    ("# only a comment", {}),
]
