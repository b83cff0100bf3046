"""What a flow runs: with which parameters, and of which release."""

import json
from dataclasses import replace
from datetime import date

import pytest
from support import write_stage

from etl import params
from etl.runs import delivery
from etl.runs.releases import Tree
from etl.serve import flows
from etl.serve.released import Released, Unreadable
from etl.storage import Root

DECLARED = "word: str = 'x'  # a text\nday: datetime.date = datetime.date(2026, 1, 1)  # a day\n"


@pytest.mark.parametrize("text", ["1e3", "012", "null", "true", "a: b", "2026-01-01"])
def test_values_of_a_prefect_run_keep_their_types(project, text):
    write_stage(project, "typed", "print(word, day)", parameters=DECLARED)
    loaded = params.load(project, stage="typed")
    tree = Tree(project, loaded)
    stage = flows._with_values(loaded.stages["typed"], tree, {"word": text, "day": "2026-02-03"})
    assert stage.values == {"word": text, "day": date(2026, 2, 3)}
    assert stage.origins == {"word": "Prefect", "day": "Prefect"}
    with pytest.raises(params.ParamsError, match="Prefect, typed.word: word: expected str, got int 5"):
        flows._with_values(stage, tree, {"word": 5})


def test_a_release_that_cannot_be_read_is_a_failed_run_that_says_so(project, root, monkeypatch):
    monkeypatch.setattr(flows, "create_link_artifact", lambda *_, **__: None)  # of Prefect's server
    monkeypatch.setattr(delivery, "_in_background", lambda work: None)
    write_stage(project, "typed", "print(word, day)", parameters=DECLARED)
    loaded = params.load(project, stage="typed")
    environment, records = replace(loaded.environment, root=root), []
    trees = Released(Root.at(root), "local")
    with pytest.raises(Unreadable, match="nothing is released under"):
        trees()
    moved = {"moves": [{"id": "0123456789ab", "at": "", "how": "up"}]}
    Root.at(root).write("releases/current.json", json.dumps(moved).encode())
    state = flows.stage_flow(loaded.stages["typed"], environment, None, records.append, trees).fn()
    assert (records[0].state, records[0].reason) == ("failed", f"there is no release 0123456789ab under {root}")
    assert state.name == "Failed" and "there is no release" in state.message
    gone = Tree(project, replace(loaded, stages={}, environment=environment))
    flows.stage_flow(loaded.stages["typed"], environment, None, records.append, lambda: gone).fn()
    assert (records[1].state, records[1].reason) == ("failed", "typed is no stage of the release any more")
