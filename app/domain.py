"""The domain's model, where it has one: `pipeline/model.py`."""

import importlib
import importlib.util

from etl.models.card import Card

NO_MODEL = "this project has no model, so there is nothing to predict: pipeline/model.py would declare one"
_NO_CARD = Card("", "", rows="rows", row={}, example={}, outcome="outcome", figures={}, losses=lambda _: {})

model = importlib.import_module("pipeline.model") if importlib.util.find_spec("pipeline.model") else None
CARD: Card = model.CARD if model else _NO_CARD
