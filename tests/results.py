"""What a run's results.json says."""

import json
import math
from pathlib import Path


def results_of(folder: Path) -> dict[str, float]:
    """Return the numbers by name; what is null there is NaN."""
    results = json.loads((folder / "results.json").read_text())["results"]
    return {name: math.nan if found["value"] is None else found["value"] for name, found in results.items()}
