"""The journal holds what the report will: live, after a crash, and while the place for reports is down."""

import fcntl
import itertools
import json
import logging
import os
import resource
import shutil
import tempfile
import threading
from pathlib import Path
from shutil import rmtree

import nbformat
import polars as pl
import pytest
from deltalake import write_deltalake
from test_engine import RUN_ID, alive, as_run, cell_states, run, saved

from etl.runs import delivery, driver, index, journal
from etl.storage import LocalRoot, Root, Unreachable

SHOWS = [
    "rows: int = 1",
    "import sys\nprint('one')\nprint('two', file=sys.stderr)\nprint('three')",
    "import time\nfor n in range(30):\n    print(f'\\r{n} of 29', end='')\n    time.sleep(0.03)",
    "from IPython.display import clear_output, display as d\nprint('gone')\nclear_output()",
    "shown = d('a', display_id=True)",
    "shown.update('b')\nd('c')\nprint('d')",
    "from etl.notebook import record\nrecord(rows=rows)",
]


@pytest.fixture
def down(monkeypatch):
    """While set, nothing can be written below any root's reports."""
    is_down, original = threading.Event(), LocalRoot.write

    def refuse(self, rel, data):
        if is_down.is_set() and rel.startswith("reports/"):
            raise OSError(28, "No space left on device")
        original(self, rel, data)

    monkeypatch.setattr(LocalRoot, "write", refuse)
    return is_down


def test_a_report_whose_place_is_down_waits_and_is_delivered_by_the_next_run(tmp_path, spool, down, caplog):
    down.set()
    with caplog.at_level(logging.WARNING):
        record = run(tmp_path, *SHOWS)
    assert record.state == "ok" and "is delivered later" in caplog.text
    kept = spool / record.run_id
    assert json.loads((kept / "run.json").read_text())["state"] == "ok" and (kept / "report.html").exists()
    assert not (tmp_path / "reports").exists() and journal.live() == []
    assert delivery.deliver(Root.at(tmp_path)) == [] and kept.exists()  # still down
    down.clear()
    run(tmp_path, "rows: int = 1", number=1)
    assert saved(record)[1] == json.loads(json.dumps(vars(record)))
    assert sorted(row["run_id"] for row in index.newest(Root.at(tmp_path))) == [RUN_ID % 0, RUN_ID % 1]
    assert list(spool.iterdir()) == []


def test_a_journal_tells_what_the_report_tells(tmp_path, spool, down):
    """The notebook as the run kept it, and as its journal has it."""
    down.set()
    record = run(tmp_path, *SHOWS, "print('before')\n1 / 0", "print('never')")
    folder = spool / record.run_id
    kept = json.loads((folder / "report.ipynb").read_text())
    progress = delivery.from_journal(folder)
    again, nb = progress.record, progress.nb
    assert vars(again) == vars(record)
    assert [cell.metadata.runner for cell in nb.cells] == [cell["metadata"]["runner"] for cell in kept["cells"]]
    told = json.loads(json.dumps(kept["cells"]).replace('"execution_count"', '"n"'))
    for cell, other in zip(nb.cells, told, strict=True):
        for out in other.get("outputs", []):
            out["text"] = "".join(out.get("text", ""))
            for mime, value in out.get("data", {}).items():
                out["data"][mime] = "".join(value) if isinstance(value, list) else value
        for out in cell.get("outputs", []):
            out.setdefault("text", "")
        outs = json.loads(json.dumps(cell.get("outputs", [])).replace('"execution_count"', '"n"'))
        assert outs == other.get("outputs", [])


def test_a_run_that_ended_but_was_not_delivered_gets_one_report_and_one_row(tmp_path, spool, monkeypatch):
    """As if killed after the row was written and before the spool's folder was removed."""
    monkeypatch.setattr(delivery.shutil, "rmtree", lambda *_, **__: None)
    record = run(tmp_path, *SHOWS)
    monkeypatch.undo()
    monkeypatch.setenv("ETL_SPOOL", str(spool))
    before = saved(record)[1]
    shutil.rmtree(tmp_path / record.report)
    assert delivery.reconcile() == []  # it was no longer running
    assert saved(record)[1] == before
    assert len(index.newest(Root.at(tmp_path))) == 1 and list(spool.iterdir()) == []


def in_the_request(**changed):
    """The journal's lines with another request."""

    def edit(lines):
        start = json.loads(lines[0])
        return [json.dumps(start | {"request": start["request"] | changed}), *lines[1:]]

    return edit


BAD = {
    "not-json": (lambda lines: ["no JSON", *lines[1:]], "does not say what ran"),
    "no-object": (lambda lines: ["[1]", "7", "null"], "does not say what ran"),
    "no-request": (lambda lines: [json.dumps(json.loads(lines[0]) | {"request": None})], "does not say what ran"),
    "no-event": (lambda lines: [lines[0], '{"event": "kernel"}'], "KeyError: 'folder'"),
    "newer": (in_the_request(invented="later"), "unexpected keyword argument 'invented'"),
    "older": (lambda lines: [line.replace('"run_id"', '"id"') for line in lines], "TypeError"),
    "no-cell": (lambda lines: [lines[0], '{"event": "cell_start", "index": 99}'], "IndexError"),
    "refused": (in_the_request(root="a%20b"), "BadRoot: 'a%20b': '%20' cannot be"),
    "gone": (in_the_request(root="/dev/shm/gone/away"), "its root /dev/shm/gone/away is gone; remove the folder"),
    "panics": (lambda lines: [line.replace('"toy"', '"panics"') for line in lines], "RuntimeError: a library panicked"),
}


def panic(root, record, append=index.append):
    """What deltalake 1.6.3 does where there is a ^ in the path."""
    append(root, record) if record.stage != "panics" else write_deltalake(f"{root.url}/^", pl.DataFrame({"k": [1]}))


def test_one_bad_entry_in_the_spool_stops_no_other(tmp_path, spool, monkeypatch, caplog):
    monkeypatch.setattr(index, "append", panic)
    monkeypatch.setattr(delivery.shutil, "rmtree", lambda *_, **__: None)
    run(tmp_path / "root", *SHOWS)
    monkeypatch.setattr(delivery.shutil, "rmtree", rmtree)
    whole = spool / (RUN_ID % 0)
    for number, (name, (edit, _)) in enumerate(BAD.items(), start=2):
        shutil.copytree(whole, spool / name)
        lines = (whole / "journal.jsonl").read_text().replace(whole.name, RUN_ID % number).splitlines()
        (spool / name / "journal.jsonl").write_text("\n".join(edit(lines)) + "\n")
    os.mkfifo(spool / "pipe")
    (spool / "folder/journal.jsonl").mkdir(parents=True)
    (spool / "waits").mkdir()
    os.mkfifo(spool / "waits/journal.jsonl")
    (spool / "torn").mkdir()
    (spool / "torn/journal.jsonl").write_text('{"event": "start", "requ')
    os.utime(whole, (2e9, 2e9))  # looked at last

    assert journal.live() == []
    shutil.rmtree(tmp_path / "root/runs")
    assert whole.name in {row["run_id"] for row in delivery.newest(Root.at(tmp_path / "root"), state="ok")}
    with caplog.at_level(logging.WARNING):
        assert delivery.deliver(Root.at(tmp_path / "root")) == [whole.name]
    assert [row["run_id"] for row in index.newest(Root.at(tmp_path / "root"))] == [whole.name]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert delivery.reconcile() == []
    for why, alike in itertools.groupby(BAD, lambda name: BAD[name][1]):
        names = [*alike]
        begin = tuple(f"the report of run {name} still waits in {spool / name}" for name in names)
        (text,) = [text for text in caplog.messages if text.startswith(begin)]
        assert why in text and (f" and {len(names) - 1} more beside it: " in text) == (len(names) > 1)
        assert "\n" not in text
    assert {path.name for path in spool.iterdir()} == {*BAD, "pipe", "folder", "waits"}
    assert run(tmp_path / "root", "rows: int = 1", number=1).state == "ok"
    assert not os.path.exists("/dev/shm/gone")
    assert [event["event"] for event in delivery.follow("no-object", tmp_path / "root")] == ["end"]


def test_reports_for_a_bucket_that_nobody_has_are_one_line(spool, s3_root, caplog):
    for number in range(3):
        run(s3_root.replace("//", "//un", 1), "rows: int = 1", number=number)
    caplog.clear()
    assert delivery.reconcile() == []
    (text,) = caplog.messages
    assert text.startswith("the report of run toy-") and " and 2 more beside it: " in text
    assert text.endswith(" is gone; remove the folder when it is not wanted any more")
    for path in spool.iterdir():
        shutil.rmtree(path)


def test_a_store_that_is_away_is_asked_once_for_all_that_waits(spool, tmp_path, caplog, monkeypatch):
    asked = []

    def away(root):
        asked.append(root.url)
        raise Unreachable(f"{root.url} cannot be reached")

    monkeypatch.setattr(delivery, "_save", lambda *_: away(Root.at(tmp_path)))
    for number in range(3):
        run(tmp_path, "rows: int = 1", number=number)
    monkeypatch.setattr(delivery, "_hand_in_from_journal", lambda _, root: away(root))
    caplog.clear()
    asked.clear()
    assert delivery.reconcile() == delivery.deliver(Root.at(tmp_path)) == [] and asked == [str(tmp_path)] * 2
    assert [text.rpartition(" beside it: ")[2] for text in caplog.messages] == [f"{tmp_path} cannot be reached"] * 2


def test_what_another_user_left_in_the_spool_is_a_warning(spool, monkeypatch, caplog):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own is closed to others
        theirs = Path(folder, "spool/theirs/journal.jsonl")
        theirs.parent.mkdir(parents=True)
        theirs.write_text('{"event": "start", "request": {}}\n')
        os.chmod(folder, 0o755)
        os.chmod(theirs, 0)
        monkeypatch.setenv("ETL_SPOOL", f"{folder}/spool")
        me = os.geteuid()
        os.seteuid(65534 if me == 0 else me)
        try:
            assert journal.live() == [] and delivery.reconcile() == [] and delivery.deliver(Root.at("/")) == []
        finally:
            os.seteuid(me)
    assert "theirs still waits" in caplog.text and "Permission denied" in caplog.text


def test_a_run_is_followed_while_it_runs_and_told_again_afterwards(tmp_path):
    begun, events = threading.Event(), []

    def follow():
        begun.wait(60)
        events.extend(delivery.follow(RUN_ID % 0, tmp_path))

    thread = threading.Thread(target=follow)
    thread.start()
    lives = []

    listed, place = [], Root.at(tmp_path)

    def on_cell(done, total, heading):
        begun.set()
        lives.append(journal.live())
        listed.append(delivery.newest(place))

    record = run(tmp_path, "# Look", *SHOWS, on_cell=on_cell)
    thread.join(30)
    (before,) = listed[-1]
    (after,) = delivery.newest(place)
    assert before.keys() == after.keys() and (before["state"], after["state"]) == ("running", "ok")
    assert {name: before[name] for name in before if before[name] == after[name]}.keys() == set(before) - {
        *("state", "reason", "ended_at", "seconds", "kept")
    }
    assert {(one["run_id"], one["stage"]) for live in lives for one in live} == {(record.run_id, "toy")}
    assert lives[-1][0]["heading"] == "Look" and journal.live() == []
    again = list(delivery.follow(record.run_id, tmp_path))
    for told in (events, again):
        assert (told[0]["event"], told[-1]["event"], told[-1]["state"]) == ("start", "end", "ok")
        assert [e["heading"] for e in told if e["event"] == "cell_start"] == ["Look"] * 8
        assert "three" in "".join(e["output"].get("text", "") for e in told if e["event"] == "output")
    with pytest.raises(KeyError):
        list(delivery.follow("toy-20261103T100000-ffffff", tmp_path))


def test_a_growing_report_is_always_whole_and_seldom_written(tmp_path, monkeypatch):
    monkeypatch.setattr(driver, "BEAT_S", 0.05)
    versions, write = [], LocalRoot.write

    def watch(self, rel, data):
        write(self, rel, data)
        if rel.endswith(".ipynb"):
            versions.append(self.read(rel))

    monkeypatch.setattr(LocalRoot, "write", watch)
    code = "import base64, os, time\nprint(base64.b64encode(os.urandom(30_000)).decode())\ntime.sleep(0.1)"
    record = run(tmp_path, "rows: int = 1", *[code] * 25)
    found = [nbformat.reads(version.decode(), as_version=4) for version in versions]
    assert [nb.metadata.runner["state"] for nb in found] == ["running"] * (len(found) - 1) + ["ok"]
    assert len(found) >= 3 and "never_ran" in cell_states(found[0])
    assert sum(map(len, versions)) <= 2.2 * len(versions[-1])
    assert record.state == "ok"


def test_a_spool_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ETL_SPOOL", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        record = run(tmp_path / "root", "rows: int = 1", "print('x' * 300_000)")
    assert record.state == "ok" and "no journal can be kept" in caplog.text
    nb, _ = saved(record)
    assert len(as_run(nb)[-1].outputs[0].text) == 300_001  # head and tail hold all of it


def test_a_run_that_just_begins_is_not_taken_for_a_dead_one(tmp_path, monkeypatch):
    """Another process looks for dead runs at the worst moment: the journal is there, and not locked yet."""
    lock = fcntl.flock

    def look_first(file, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        assert delivery.reconcile() == []
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", look_first)
    record = run(tmp_path, "rows: int = 1")
    assert record.state == "ok" and record.receipt["cpu_s"]  # the black box found the journal


def test_a_disk_that_fills_up_under_a_run_leaves_it_alone(tmp_path, spool, caplog):
    """No process takes it for a dead one and ends its kernel; what the black box adds to a torn journal is read."""
    limits, seen = resource.getrlimit(resource.RLIMIT_FSIZE), []

    def fill(done, total, heading):
        full = done == 2
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000 if full else limits[0], limits[1]))
        if done == 3:
            path = spool / (RUN_ID % 0) / "journal.jsonl"
            with path.open("a") as box:  # after a line that is torn
                box.write('lost\n{"event": "sample", "t": "2026-11-03T10:00:00.000+00:00", "rss_mb": 7, "cpu_s": 1}\n')
            seen.extend([delivery.reconcile(), [run["rss_mb"] for run in journal.live()], path.read_text()])

    cells = ("rows: int = 1", "print('x' * 30_000)", "import time\ntime.sleep(0.1)\nprint(2)")
    record = run(tmp_path, *cells, on_cell=fill)
    assert record.state == "ok" and "no journal can be kept" in caplog.text
    closed, samples, text = seen
    assert closed == [] and samples == [7] and len(text) > 5_000
    assert as_run(saved(record)[0])[-2].outputs[0].text == "x" * 30_000 + "\n"
    assert [row["state"] for row in index.newest(Root.at(tmp_path))] == ["ok"] and list(spool.iterdir()) == []


def test_a_secret_printed_in_pieces_is_nowhere(tmp_path, spool, down, monkeypatch):
    monkeypatch.setenv("TOY_TOKEN", "tall-giraffe-4711")
    down.set()
    slowly = "import os, time\nfor c in 'x' * {} + os.environ['TOY_TOKEN']:\n    print(c, end='', flush=True)\n"
    code = slowly.format(3) + "    time.sleep(0.05)\nraise ValueError(os.environ['TOY_TOKEN'])"
    record = run(tmp_path, "rows: int = 1", slowly.format(0) + "print('y' * 400_000)", code)
    files = list((spool / record.run_id).iterdir())
    assert {"journal.jsonl", "report.ipynb", "report.html", "run.json", "cell-03-output.txt"} <= {f.name for f in files}
    assert [path.name for path in files if b"giraffe" in path.read_bytes()] == []
    assert record.reason == "ValueError: ‹secret TOY_TOKEN›"


def test_what_a_dead_black_box_leaves_is_ended_at_the_next_start(tmp_path):
    """Runner and black box are killed: the kernel dies with its parent, its children at the next start."""
    pids = tmp_path / "pids"
    cell = (
        "import os, subprocess, pathlib\nchild = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"pathlib.Path({str(pids)!r}).write_text(f'{{os.getpid()}} {{child.pid}}')\nos.kill(os.getppid(), 9)"
    )
    record = run(tmp_path, "rows: int = 1", "# Work", cell + "\nimport time; time.sleep(1e9)")
    assert (record.state, record.reason) == ("killed", "the kernel was killed by SIGKILL in 'Work'")
    assert not [pid for pid in map(int, pids.read_text().split()) if alive(pid)]


def test_what_was_about_to_run_has_its_name_when_it_is_whole(tmp_path):
    """Written in place it would be empty for a moment, for who reads along, and for good if the process died then."""
    kept = journal.Journal(tmp_path / "run")
    (tmp_path / "run" / journal.NOTEBOOK).write_text("{}")
    with (tmp_path / "run" / journal.NOTEBOOK).open() as reader:  # of what has the name before
        kept.begin(nbformat.v4.new_notebook(), {})
        assert reader.read() == "{}"
    assert nbformat.read(tmp_path / "run" / journal.NOTEBOOK, as_version=4).cells == []
    kept.close()
