"""The one health function: what it says of a time and of what was read, with no clock of its own."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from etl import leases, params
from etl.params.alerts import Line
from etl.serve import health, heartbeat
from etl.serve.health import Answered, Seen
from etl.storage import PROJECT, Root
from pipeline import Lake, queries

NOW = datetime(2026, 3, 1, 12, 0, 10, tzinfo=UTC)  # the last preprocess was due at 12:00:00
STAGES = params.load(PROJECT).stages
BEAT = {
    **{"at": (NOW - timedelta(seconds=4)).isoformat(), "pid": 7, "host": "here", "env": "local"},
    **{"since": "2026-03-01T06:00:00+00:00", "expected_since": "2026-03-01T06:00:00+00:00"},
    "reports_url": "http://127.0.0.1:8000",
}
SEEN = Seen(stages=STAGES, beat=BEAT, last_ok=dict.fromkeys(STAGES, NOW), root_url="/data")


def ago(**span: float) -> datetime:
    return NOW - timedelta(**span)


def run(stage: str, ended_at: datetime, state: str = "ok", seconds: float = 1.0, **more) -> dict:
    run_id = f"{stage}-{ended_at:%Y%m%dT%H%M%S}-abcdef"
    told = {"run_id": run_id, "stage": stage, "state": state, "seconds": seconds, "ended_at": ended_at}
    return told | {"reason": "", "report": f"reports/{stage}/{run_id}"} | more


def told(seen: Seen, now: datetime = NOW) -> dict[str, str]:
    return {finding.key: finding.sentence for finding in health.findings(now, seen)}


def test_nothing_is_said_where_all_is_well():
    assert told(SEEN) == {}
    assert health.summary([]) == "Healthy: nothing failed last, and nothing is late"


def test_a_stage_is_late_after_three_times_of_its_schedule_or_fresh_within():
    late = replace(SEEN, last_ok=SEEN.last_ok | {"preprocess": ago(minutes=3)})  # 11:57:10, due at 11:58, 59, 12:00
    assert told(late, NOW - timedelta(seconds=11)) == {}
    assert told(late) == {
        "late stage preprocess": "preprocess is 2 min late: an ok run was due at 11:58:00 UTC, none since 11:57:10 UTC"
    }
    fresh = replace(late, stages=STAGES | {"preprocess": replace(STAGES["preprocess"], fresh_within_s=240)})
    assert told(fresh) == {}
    assert "late stage preprocess" in told(fresh, NOW + timedelta(seconds=61))
    daily = replace(STAGES["query"], every_s=None, cron="0 6 * * *")
    cron = replace(SEEN, stages={"query": daily}, last_ok={"query": ago(days=3)})  # 26 February, 12:00
    cron = replace(cron, beat=BEAT | dict.fromkeys(("since", "expected_since"), "2026-01-01T00:00:00+00:00"))
    assert "query is 2 days late: an ok run was due at 2026-02-27 06:00 UTC" in told(cron)["late stage query"]
    assert told(cron, ago(hours=7)) == {}


def test_a_stage_that_runs_and_fails_is_failed_and_not_late():
    runs = [run("preprocess", ago(minutes=9))]
    runs += [run("preprocess", ago(minutes=m), "failed", reason="no room", heading="Write", cell=7) for m in (5, 4, 1)]
    runs += [run("preprocess", ago(seconds=20), "cancelled")]
    seen = replace(SEEN, runs=runs, last_ok=SEEN.last_ok | {"preprocess": ago(minutes=9)})
    [finding] = health.findings(NOW, seen)
    assert finding.sentence == (
        "preprocess: failed, in Write, cell 7: no room (3 times in a row, since 11:55:10 UTC)"  # the card's first line
    )
    assert (finding.since, finding.link) == (ago(minutes=5), f"http://127.0.0.1:8000/reports/{runs[3]['run_id']}")
    assert health.summary([finding]).startswith("Not healthy: preprocess: failed, in Write")
    assert [f.kind for f in health.findings(NOW + timedelta(minutes=5), seen)][0] == "up"  # no beat for so long


def test_a_dead_up_is_seen_and_then_a_stage_is_late_at_its_next_time():
    died, now = ago(seconds=350), ago(seconds=300)  # 11:54:20, 11:55:10
    dead = replace(SEEN, beat=BEAT | {"at": died.isoformat()}, last_ok=dict.fromkeys(STAGES, died))
    said = told(dead, now)
    assert said["up up"].startswith("`up` is dead: it was last seen at 11:54:20 UTC (process 7 on here)")
    assert said.keys() == {"up up", "late stage generate", "late stage preprocess"}  # due at 11:54:30, at 11:55:00
    # one that takes over from it does not make a stage that did not run yet well
    successor = replace(dead, beat=BEAT | {"at": now.isoformat(), "since": ago(seconds=301).isoformat()})
    assert told(successor, now).keys() == {"late stage generate", "late stage preprocess"}
    assert told(replace(successor, last_ok=dict.fromkeys(STAGES, now)), now) == {}
    assert health.findings(NOW, replace(SEEN, is_gone=True))[0].kind == "up"  # its process: no beat is waited for
    failed = replace(dead, runs=[run("train", ago(hours=1), "failed")])
    links = [finding.link for finding in health.findings(NOW, failed) if finding.kind == "failed"]
    assert links == [f"/data/{failed.runs[0]['report']}/report.html"]  # nobody serves it


def test_one_that_was_ended_is_told_calmly_and_a_root_without_one_is_well():
    [finding] = health.findings(NOW, replace(SEEN, beat=BEAT | {"ended_at": ago(seconds=5).isoformat()}))
    assert finding.level == "warning" and "was ended at 12:00:05 UTC" in finding.sentence
    assert health.is_healthy([finding])
    ended = replace(SEEN, beat=BEAT | {"ended_at": ago(seconds=300).isoformat()})
    late = health.findings(NOW, replace(ended, last_ok=dict.fromkeys(STAGES, ago(seconds=310))))
    assert [finding.about for finding in late][:3] == ["up", "stage generate", "stage preprocess"]  # why, then what
    assert {finding.remedy for finding in late if finding.kind == "late"} == {"start `python orchestrate.py up`"}
    assert health.summary(late).startswith("Not healthy: `up` was ended at 11:55:10 UTC (process 7 on here): nothing")
    ill = {"name": "Prefect server", "why": "locked by process 7 (a; b); end it", "since": ago(seconds=9).isoformat()}
    [finding] = health.findings(NOW, replace(SEEN, beat=BEAT | {"ill": [ill]}))
    assert finding.sentence == "Prefect server: locked by process 7 (a; b), since 12:00:01 UTC"
    assert finding.remedy == "end it" and health.is_healthy([finding])
    never = health.findings(NOW, Seen(stages=STAGES, last_ok={"train": ago(days=9)}))
    assert [finding.level for finding in never] == ["note"] and health.is_healthy(never)


def test_a_stage_that_never_ran_is_late_by_when_up_began():
    began = replace(
        SEEN, last_ok={}, beat=BEAT | dict.fromkeys(("since", "expected_since"), ago(seconds=25).isoformat())
    )
    assert told(began) == {}
    later = NOW + timedelta(seconds=60 + STAGES["generate"].deadline_s)  # the first brings what there is
    began = replace(began, beat=began.beat | {"at": later.isoformat()})
    assert "late stage generate" in told(began, later)


def test_tables_questions_quarantine_figures_and_slow_runs():
    hour = timedelta(hours=1)
    seen = replace(
        SEEN,
        tables={"events": hour, "users": hour},
        written={"events": ago(minutes=61), "users": ago(minutes=59)},
        questions={"q1": hour, "q2": None, "q3": None},
        answers=[Answered("q1", ago(hours=2), "query", 7), Answered("q2", ago(hours=5), "query", 7)]
        + [Answered("q3", ago(hours=5), "query", 9)],
        batch=9,
        runs=[run("preprocess", ago(minutes=m), versions_written={"quarantine": 3}) for m in (90, 30, 2)],
        quarantined=1200,
        lines=[(Line("q1", "total", "<", 1000.0), 999.5), (Line("q2", "total", "<", 1000.0), 1000.0)],
    )
    said = told(seen)
    assert said.keys() == {
        *("late table events", "late question q1", "stale answers", "quarantine table quarantine"),
        "figure q1.total < 1000",
    }
    assert said["stale answers"] == "1 answer is stale: q2 is of 07:00:10 UTC, 2 batches ago"
    assert said["quarantine table quarantine"].startswith("quarantine grows: 2 runs of the last hour")
    usual = [run("train", ago(hours=40 - i), seconds=10 + i % 5) for i in range(20)]
    slow = [run("train", ago(minutes=9 - i), seconds=20) for i in range(3)]
    assert told(replace(SEEN, runs=[*usual, *slow])).keys() == {"slow stage train"}
    assert told(replace(SEEN, runs=[*usual, *slow[:2], run("train", NOW, seconds=13)])) == {}


def test_what_is_read_of_a_root(filled):
    root, at = Root.at(filled), [0.0]
    reader = health.Reader(root, Lake(root), queries.questions(), clock=lambda: at[0])
    assert told(reader.seen()).keys() == {"up up"}
    # each damage is named, and the rest is looked at all the same
    table = next(path for path in root.files("lake/orders") if path.endswith(".parquet"))
    root.write(table, b"PAR1")
    root.write(heartbeat.PLACE, b"{")
    assert told(reader.seen()).keys() == {"damaged services/heartbeat.json", "up up"}
    at[0] += 2 * health.SLOWLY_S
    assert {"damaged table orders", "damaged services/heartbeat.json"} <= told(reader.seen()).keys()
    root.write("lake/published.json", b"[]")
    root.write("runs/_delta_log/00000000000000000000.json", b"{")
    at[0] += 2 * health.SLOWLY_S
    said = told(reader.seen())
    assert {"damaged the published snapshot", "damaged the index of runs"} <= said.keys()
    document = health.as_json(health.findings(NOW, reader.seen()))
    assert document["healthy"] is False and json.loads(json.dumps(document)) == document


@pytest.mark.parametrize("ended", [True, False])
def test_the_heart_beats_and_keeps_since_when_runs_are_expected(tmp_path, ended):
    from etl.runs.releases import Tree

    root = Root.at(str(tmp_path))
    hearts = []
    for _ in range(2):
        api = "http://127.0.0.1:8000"
        heart = heartbeat.Heart(root, {"API": api}, api, lambda: [{"name": "x"}])
        heart.ensure()  # nothing before it knows what runs
        heart.tree = Tree(PROJECT, params.load(PROJECT))
        heart.ensure()
        heart._thread.join()
        hearts.append(heartbeat.read(root))
        assert not leases.is_gone(hearts[-1]) and hearts[-1]["next_runs"].keys() == STAGES.keys()
        assert hearts[-1]["ill"] == [{"name": "x"}]
        if ended:
            heart.end()
            assert heartbeat.read(root)["ended_at"]
    assert (hearts[0]["expected_since"] == hearts[1]["expected_since"]) is not ended
    assert leases.is_gone(hearts[0] | {"pid": 2**22 + 1})
