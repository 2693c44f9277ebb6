"""Draw the README's picture from a demo: `python docs/make_images.py runs/demo/results.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from moesaic.demo import page
from moesaic.report import plots

FOLDER = Path(__file__).parent / "images"


def main(results: Path) -> None:
    """Write docs/images/load.png."""
    found = json.loads(results.read_text(encoding="utf-8"))
    FOLDER.mkdir(exist_ok=True)
    load = page.load_figure(found, "trained")
    print(plots.save(load, FOLDER / "load.png", dpi=110), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
