"""Save a model as a Hugging Face directory, without passing progress bars."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers.utils import logging as hub_logging


def save(model: Any, folder: Path) -> None:
    """Write a model's config and weights (in the released layout) into an existing `folder`."""
    bars = hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            hub_logging.enable_progress_bar()
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.glob("*.safetensors"):  # safetensors 0.8 lets only the owner read them
        file.chmod(0o666 & ~mask)
