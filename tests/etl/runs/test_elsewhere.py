"""Runs on another machine, a host behind a real SSH server: their records are those of runs here, whatever happens."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ssh_host import SSHD, ssh_host
from support import s3_variables
from test_engine import RUN_ID, cell_states, notebook, saved

from etl.runs import delivery, elsewhere, index, journal, live, machines
from etl.runs.record import RunRecord, RunRequest
from etl.storage import LocalRoot, Root

pytestmark = pytest.mark.skipif(SSHD is None, reason="no sshd: Debian's package openssh-server has it")
SLEEP = "import time\nfor i in range(6000):\n    print('line', i, flush=True)\n    time.sleep(0.1)"


@pytest.fixture(scope="module")
def host():
    with ssh_host() as block:
        yield block


def request(root, *cells, number=0, deadline_s=60, **fields) -> RunRequest:
    return RunRequest(
        stage="toy",
        run_id=RUN_ID % number,
        root=Root.at(root).url,
        notebook=notebook(*cells),
        parameters={"rows": 3},
        origins={"rows": "params/toy.yml:4"},
        scheduled_for="2026-11-03T10:00:00+00:00",
        deadline_s=deadline_s,
        **fields,
    )


def run(host, asked: RunRequest, silence: str = "6 seconds", **options) -> RunRecord:
    more = {name: options.pop(name) for name in ("boot", "secrets", "dollars_an_hour") if name in options}
    return elsewhere.run(asked, machines.read("toy", host | {"silence": silence} | more), **options)


class InBackground:
    """A run elsewhere, under way."""

    def __init__(self, host, asked, **options):
        self.root, self.run_id, self.cancel = Root.at(asked.root), asked.run_id, threading.Event()
        self.records: list[RunRecord] = []
        work = lambda: self.records.append(run(host, asked, cancel=self.cancel, **options))  # noqa: E731
        self.thread = threading.Thread(target=work)
        self.thread.start()

    def pid_when_it_prints(self) -> int:
        """Of the process on the machine, once home has seen something that the run printed."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            path = journal.spool() / self.run_id / "journal.jsonl"
            if path.exists() and any(journal.read(path, "output")):
                return live.claimed(self.root, self.run_id)["pid"]
            time.sleep(0.05)
        raise TimeoutError(self.run_id)

    def record(self) -> RunRecord:
        self.thread.join(60)
        return self.records[0]


def left(root) -> list[str]:
    return [path for top in ("live", "cancel") for path in Root.at(root).files(top)]


def test_a_run_elsewhere_has_the_record_and_the_report_of_one_here(host, tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_TOKEN", "a-value-of-a-secret")
    seen = []
    cells = [
        "# Count",
        "rows: int = 1",
        "import os\nprint(rows, os.environ['TOY_TOKEN'])",
        "from etl.notebook import record",
    ]
    asked = request(tmp_path, *cells, "record(rows=rows)", secrets=["TOY_TOKEN"])
    record = run(host, asked, dollars_an_hour=3600, on_cell=lambda *told: seen.append(told))
    nb, run_json = saved(record)
    assert (record.state, record.metrics, record.parameters) == ("ok", {"rows": 3}, {"rows": 3})
    assert seen == [(0, 5, "Count"), (1, 5, "Count"), (2, 5, "Count"), (3, 5, "Count"), (4, 5, "Count"), (5, 5, "")]
    assert cell_states(nb) == ["ok"] * 6
    assert nb.cells[3].outputs[0].text == "3 ‹secret TOY_TOKEN›\n"
    assert run_json["machine"]["name"].startswith("etl-toy-") and run_json["machine"]["type"] == "ssh"
    assert 0 < run_json["machine"]["boot_s"] < run_json["machine"]["dollars"] == run_json["receipt"]["dollars"]
    assert run_json["receipt"]["peak_memory_mb"] > 0
    [row] = index.newest(Root.at(tmp_path))
    assert (row["run_id"], row["state"], left(tmp_path)) == (record.run_id, "ok", [])
    assert not any(b"a-value-of" in path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())


def test_a_machine_that_is_lost_leaves_what_it_told(host, tmp_path):
    begun = InBackground(host, request(tmp_path, "# Work", "rows: int = 1", SLEEP))
    os.kill(begun.pid_when_it_prints(), signal.SIGKILL)
    record = begun.record()
    assert (record.state, record.reason) == ("killed", "the machine was lost in 'Work': not a word for 6 s")
    nb, run_json = saved(record)
    [work] = [cell for cell in nb.cells if cell.cell_type == "code" and cell.metadata.runner["state"] == "killed"]
    assert "line 0\n" in work.outputs[0].text and run_json["error"]["heading"] == "Work"
    assert left(tmp_path) == [f"cancel/{record.run_id}"]  # for the machine, should it come back


def test_a_machine_that_hangs_is_ended_and_does_not_go_on(host, tmp_path):
    begun = InBackground(host, request(tmp_path, "# Work", "rows: int = 1", SLEEP))
    pid = begun.pid_when_it_prints()
    os.kill(pid, signal.SIGSTOP)
    record = begun.record()
    assert (record.state, record.reason[:27]) == ("killed", "the machine was lost in 'Wo")
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_home_keeps_the_deadline(host, tmp_path, monkeypatch):
    monkeypatch.setattr(elsewhere, "HELD_S", -8)  # it is before the machine, which knows it, too
    record = run(host, request(tmp_path, "# Work", "rows: int = 1", SLEEP, deadline_s=8))
    assert (record.state, record.reason[:12]) == ("timed_out", "deadline of ")


def test_a_run_elsewhere_is_followed_and_cancelled_as_one_here(host, tmp_path):
    begun = InBackground(host, request(tmp_path, "# Work", "rows: int = 1", SLEEP))
    begun.pid_when_it_prints()
    [run_] = journal.live()
    assert (run_["run_id"], run_["state"], run_["heading"]) == (begun.run_id, "running", "Work")
    texts = (event["output"]["text"] for event in delivery.follow(begun.run_id, tmp_path) if event["event"] == "output")
    assert next(texts).startswith("line 0\n") and next(texts)
    begun.cancel.set()
    record = begun.record()
    assert (record.state, record.reason, left(tmp_path)) == ("cancelled", "cancelled in 'Work'", [])


def test_what_keeps_a_machine_from_beginning_is_the_reason(host, tmp_path):
    def why(block, root=tmp_path, **options):
        record = run(block, request(root, "rows: int = 1"), **options)
        assert record.state == "failed" and saved(record)[1]["reason"] == record.reason
        return record.reason

    assert why(host | {"project": "/nowhere"}, tmp_path / "a").startswith("no machine: OSError: ")
    assert "Connection refused" in why(host | {"ssh": "ssh://127.0.0.1:1"}, tmp_path / "b")
    assert why(host, tmp_path / "c", secrets=["NOT_GIVEN"]).startswith("no machine: no secret NOT_GIVEN")
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 20")
    slow.chmod(0o755)
    assert why(host | {"python": str(slow)}, tmp_path / "d", boot="1 second") == "no machine within 1 s"


def test_a_run_id_runs_once(tmp_path):
    live.ask(Root.at(tmp_path), {"run_id": "toy-1", "variables": {"KEY": "secret"}})
    assert live.asked(Root.at(tmp_path), "toy-1") == {"run_id": "toy-1"}
    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(lambda _: live.claim(Root.at(tmp_path), "toy-1"), range(8))) == [False] * 7 + [True]
    assert elsewhere.there(str(tmp_path), "toy-1") == 3 and elsewhere.there(str(tmp_path), "toy-2") == 2


@pytest.mark.parametrize("amid", [False, True], ids=["forgotten", "half forgotten"])
def test_who_asks_again_while_home_forgets_the_run_does_not_run_it_a_second_time(tmp_path, monkeypatch, amid):
    """The first claim goes with the rest, and the request had been read before: it was claimed once more, and ran."""
    root, whole, told = Root.at(tmp_path), LocalRoot.remove_tree, []
    live.ask(root, {"run_id": "toy-1"})
    assert live.claim(root, "toy-1")

    def half(self, rel):
        self.remove(f"{rel}/claim.json")
        told.append(live.claim(self, "toy-1"))
        whole(self, rel)

    def forgotten_meanwhile(root, run_id):
        if amid:
            monkeypatch.setattr(LocalRoot, "remove_tree", half)
        live.forget(root, run_id, is_over=True)
        return False

    monkeypatch.setattr(live, "is_cancelled", forgotten_meanwhile)
    assert elsewhere.there(str(tmp_path), "toy-1") == 3
    assert left(tmp_path) == [] and told == [False] * amid


def test_a_run_elsewhere_goes_by_the_bucket_alone(host, s3_root, s3_server):
    asked = request(s3_root, "# Work", "rows: int = 1", "print(rows)")
    record = run(host, asked, secrets=list(s3_variables(s3_server)))
    assert record.state == "ok", record.reason
    assert saved(record)[0].cells[3].outputs[0].text == "3\n"
    assert left(s3_root) == []


@pytest.mark.parametrize(
    ("block", "why"),
    [
        ({"ssh": "-oProxyCommand=x", "project": "/x"}, "machine: ssh: expected text, got '-oProxyCommand=x'"),
        ({"ssh": "host"}, "machine: project is missing: the folder of this project on that host"),
        ({"ssh": "host", "project": "/x", "pyton": "x"}, "machine: unknown key 'pyton'; did you mean 'python'?"),
        ({"shh": "host", "project": "/x"}, "machine: unknown key 'shh'; did you mean 'ssh'?"),
        ({"project": "/x"}, "machine: ssh is missing: the host that the rest is about"),
        ({"ssh": "host", "project": "/x", "silence": 60}, 'machine: silence: expected a duration such as "60 seconds"'),
        ({"vm_type": "x", "secrets": ["abc"]}, "machine: secrets: expected the names of secrets, such as "),
    ],
)
def test_a_wrong_block_is_a_sentence(block, why):
    with pytest.raises(ValueError) as raised:
        machines.read("toy", block)
    assert str(raised.value).startswith(why)


def test_what_is_asked_otherwise_is_another_machine():
    names = {machines.read("toy", {"vm_type": vm_type}).name for vm_type in ("a", "b", "a")}
    assert len(names | {machines.read("train", {"vm_type": "a"}).name}) == 3
    assert machines.read("toy", {"vm_type": "a", "silence": "9 seconds"}).name in names


def test_what_nobody_finished_goes_after_a_day(tmp_path):
    root = Root.at(tmp_path)
    live.ask(root, {"run_id": "toy-1"})
    live.cancel(root, "toy-2", "cancelled")
    assert live.sweep(root) == 0
    assert live.sweep(root, live.datetime.now(live.UTC) + live.FORGOTTEN) == 2
    assert left(tmp_path) == []


def test_a_run_whose_home_died_is_finished_at_the_next_start(tmp_path):
    """As far as the machine told, with what home had not read yet; the machine is told to end."""
    root, run_id = Root.at(tmp_path), RUN_ID % 99
    asked = request(tmp_path, "# Work", "rows: int = 1", number=99)
    written = journal.Journal(journal.spool() / run_id)
    nb = elsewhere.engine.with_parameters(asked)
    elsewhere.mark_never_run(nb, run_id)
    told = {name: value for name, value in vars(asked).items() if name not in ("notebook", "variables")}
    written.begin(nb, told)
    written.event("machine", machine={"name": "etl-toy-1", "type": "ssh"})
    written.close()
    live.ask(root, vars(asked))
    event = {"event": "cell_start", "t": "2026-11-03T10:00:01.000+00:00", "index": 1, "heading": "Work"}
    root.write(f"live/{run_id}/part-000001.jsonl", (json.dumps(event) + "\n").encode())
    assert delivery.reconcile() == [run_id]
    record = index.get(root, run_id)
    assert (record["state"], record["reason"]) == ("killed", "the runner was killed in 'Work'")
    assert record["machine"]["name"] == "etl-toy-1" and left(root) == [f"cancel/{run_id}"]
