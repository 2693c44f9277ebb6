"""Whether llama.cpp computes what plain transformers does, for an exported model.

    pip install diskcache  # its Python package asks for it
    pip download llama-cpp-python==0.3.36 --no-deps --no-binary :all:
    tar xf llama_cpp_python-0.3.36.tar.gz
    cmake -S llama_cpp_python-0.3.36/vendor/llama.cpp -B build -DCMAKE_BUILD_TYPE=Release \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_CURL=OFF
    cmake --build build --target llama
    moesaic export runs/moe -o runs/mixtral --layout mixtral
    python benchmarks/export_llama_cpp.py runs/mixtral --source llama_cpp_python-0.3.36 \
        --library build/bin

The model is converted to GGUF in float32 and run with caches and attention in float32, or, with
--half, as llama.cpp does by default. Prints the differences of the logits of a text, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

TEXT = Path(__file__).with_name("construction.md")


def convert(model: Path, out: Path, source: Path) -> None:
    """Run llama.cpp's own converter; a tokenizer that it does not know is taken for GPT-2's."""
    root = source / "vendor/llama.cpp"
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(self: Any, tokenizer: Any) -> str:
        try:
            return str(known(self, tokenizer))
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = named
    sys.argv = ["convert", str(model), "--outfile", str(out), "--outtype", "f32"]
    runpy.run_path(str(root / "convert_hf_to_gguf.py"), run_name="__main__")


def logits(file: Path, ids: list[int], source: Path, library: Path, *, half: bool) -> Any:
    """llama.cpp's logits of every token, [T, V]."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(library)
    sys.path.insert(0, str(source))
    from llama_cpp import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(str(file).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {file}; its own words are above.")
    settings = llama.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = len(ids)
    if not half:
        settings.type_k = settings.type_v = 0  # float32
        settings.flash_attn_type = 0  # off: it computes in float16
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for place, token in enumerate(ids):
        batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
        batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
    if llama.llama_decode(context, batch):
        raise SystemExit("llama.cpp could not compute the batch.")
    width = (llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model)),)
    rows = (llama.llama_get_logits_ith(context, place) for place in range(len(ids)))
    return np.stack([np.ctypeslib.as_array(row, width).copy() for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a folder that plain transformers loads")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--library", type=Path, required=True, help="folder of libllama.so")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--half", action="store_true")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    from moesaic.models.tokenizer import load_tokenizer

    ids = load_tokenizer(given.model)(given.text.read_text())["input_ids"][: given.tokens]
    source, library = given.source.resolve(), given.library.resolve()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        convert(given.model.resolve(), file, source)
        found = logits(file, ids, source, library, half=given.half)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    difference = np.abs(found - wanted)
    report = {
        "model": type(model).__name__,
        "tokens": len(ids),
        "largest difference": float(difference.max()),
        "median difference": float(np.median(difference)),
        "largest logit": float(np.abs(wanted).max()),
        "same first choice": float((found.argmax(1) == wanted.argmax(1)).mean()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
