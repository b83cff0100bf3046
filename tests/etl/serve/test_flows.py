"""What a flow makes of the parameters that a Prefect run is given."""

from datetime import date

import pytest
from support import write_stage

from etl import params
from etl.runs.releases import Tree
from etl.serve import flows

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
