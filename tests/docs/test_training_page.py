import runpy
from pathlib import Path

from moesaic.training.config import TrainConfig

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_is_what_the_config_says():
    made = runpy.run_path(str(DOCS / "make_training.py"))
    assert (DOCS / "training.md").read_text() == made["page"](), "run: python docs/make_training.py"
    rows = list(made["rows"](TrainConfig, ""))
    assert len(rows) > 40
    assert [name for name, *_, text in rows if len(text) < 5] == [], "a key without a sentence"
