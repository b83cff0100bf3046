"""Does a session end in a purchase? By what is seen of it before the cart."""

from functools import partial

import polars as pl

from etl.lake.table import INT32, Column
from etl.models import registry
from etl.models.card import Card

FLAG, COUNT = Column(INT32, range=(0, 1)), Column(INT32, range=(0, None))
ROW = {"views": COUNT, "pages": COUNT, "known": FLAG, "phone": FLAG}


def sessions(events: pl.DataFrame) -> pl.DataFrame:
    """One row a session: ROW, bought, and held_out, by its id alone."""
    seen, bought = pl.col("kind") == "view", (pl.col("kind") == "purchase").any()
    known, phone = pl.col("user_id").is_not_null().any(), (pl.col("device") == "phone").any()
    pages = pl.col("page").filter(seen).n_unique()
    rows = events.group_by("session").agg(views=seen.sum(), pages=pages, known=known, phone=phone, bought=bought)
    return rows.sort("session").with_columns(held_out=pl.col("session").str.slice(-1).is_in(list("0123")))


SPEC = registry.Spec(ROW)
examine = partial(registry.examine, spec=SPEC)
CARD = Card(
    title="Who buys",
    text="Will a session end in a purchase? By how much was looked at, on what, and whether the user is known.",
    rows="sessions",
    row=ROW,
    example={"views": 6, "pages": 3, "known": 1, "phone": 0},
    outcome="buys",
    figures={"Share of sessions that bought": "{share:.1%}", "Sessions it was judged by": "{rows:,}"},
    losses=lambda metrics: {"the share as a guess": metrics["guess"], "the model": metrics["log_loss"]},
)
