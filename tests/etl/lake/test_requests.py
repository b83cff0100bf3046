"""What is asked of an object store, counted: each thing once in a run, and nothing as a whole that grows for ever."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from support import AT, ingest_all

from etl.lake import ledger
from etl.questions import ask
from etl.storage import Root
from pipeline import Lake, queries, source

LIMITS = {"max_files": 500, "max_bytes": 50_000_000}


def test_a_batch_of_two_files_takes_at_most_45_requests(faulty, s3_root, stream, made, monkeypatch):
    root = Root.at(s3_root)
    source.land(root, stream, {0: made[0]})
    ingest_all(s3_root)
    source.land(root, stream, {1: made[1]})
    faulty.asked.clear()
    lake = Lake(s3_root)  # as the notebook does it
    batch = lake.next_batch(**LIMITS, scheduled_for=AT)
    lake.commit(lake.read(batch), run_id="counted")
    lake.drain(**LIMITS, max_bad_share=0, for_s=25, scheduled_for=AT, run_id="counted")
    assert not lake.unmatched() and lake.snapshot().batch == 2 and not batch.blocked
    assert len(batch.files) == 2 and len(faulty.asked) <= 45, faulty.asked
    assert root.files("landing/orders") == [] and len(root.files("archive")) == 10

    faulty.asked.clear()
    snapshot = lake.snapshot()
    asked = [question for question in queries.questions() if question.name in ("q01", "q03", "q04", "q12")]
    answers = {question.name: ask(question, snapshot) for question in asked}
    read = Counter(key for kind, key in faulty.asked if kind == "GET" and key.endswith(".parquet"))
    assert read and set(read.values()) == {1}, "a file is read once for all questions"
    monkeypatch.setattr("etl.lake.snapshot.HELD_BYTES", 0)
    for question in asked:
        assert answers[question.name].equals(ask(question, lake.snapshot()))


@pytest.mark.parametrize("where", ["s3_root", "root"])
def test_a_digest_is_found_wherever_it_is_in_the_index(request, where, monkeypatch):
    monkeypatch.setattr(ledger, "WHOLE", 10)
    monkeypatch.setattr(ledger, "RECENT", 0)
    root, numbers = (
        Root.at(request.getfixturevalue(where)),
        np.random.default_rng(5).integers(0, 1 << 64, 30_000, np.uint64),
    )
    digests = [f"{number:016x}" for number in [0, (1 << 64) - 1, *numbers.tolist()]]
    known = ledger.Known(root, None, {digest: n % 1000 for n, digest in enumerate(digests)}).folded(1000)
    again = ledger.Known(root, known.index, dict.fromkeys(digests[5:7], 1001), known.count).folded(1001)
    for index, newer in ((known, 5), (again, 1001)):
        asked = [*digests[:8], f"{int(digests[9], 16) ^ 1:016x}", "0000000000000001"]
        assert index.find(asked) == {
            digest: newer if n == 5 and newer > 5 else n for n, digest in enumerate(asked[:8])
        } | ({digests[6]: 1001} if newer == 1001 else {})
    assert again.count == known.count + 2 == ledger.count_of(root, again.index)
    assert again.all() == {*digests} and pl.Series(digests).n_unique() == known.count
