"""The timetable of clicks: notebooks/ are its stages, and params/ says when each of them runs."""

import os
import sys
from pathlib import Path

os.environ.setdefault("ETL_PROJECT", str(Path(__file__).resolve().parent))  # before the engine is imported
sys.path.append(str(Path(__file__).resolve().parents[2]))  # last of all: app/, which shows any project, is there

from etl.cli import Timetable, main, make

app = make(Timetable("pipeline:Lake", "pipeline.model"), help_text=__doc__)

if __name__ == "__main__":
    main(app)
