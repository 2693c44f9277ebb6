"""Take the README's picture of a demo's report: `python docs/make_images.py runs/demo/report.html`.

Needs chromium on the PATH. The picture is the top of the page in its light colours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PICTURE = Path(__file__).parent / "images" / "report.png"
WIDTH, HEIGHT = 1000, 1090


def main(report: Path) -> None:
    """Write docs/images/report.png."""
    PICTURE.parent.mkdir(exist_ok=True)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    subprocess.run(
        [
            "chromium",
            *options,
            f"--screenshot={PICTURE}",
            f"--window-size={WIDTH},{HEIGHT}",
            report.resolve().as_uri(),
        ],
        check=True,
        capture_output=True,
    )
    print(PICTURE, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
