"""The console script `etl`: the commands of the project that the working folder is in."""

import importlib
import os
import sys
from pathlib import Path


def main() -> None:
    """Run the nearest orchestrate.py upwards from the working folder; without one: exit status 2."""
    here = Path.cwd()
    project = next((folder for folder in (here, *here.parents) if (folder / "orchestrate.py").is_file()), None)
    if project is None:
        print(f"there is no project here: no orchestrate.py in {here} or above it", file=sys.stderr)
        sys.exit(2)
    os.environ["ETL_PROJECT"] = str(project)  # before anything of the engine is imported
    sys.path.insert(0, str(project))
    app = importlib.import_module("orchestrate").app
    importlib.import_module("etl.cli").main(app)


if __name__ == "__main__":
    main()
