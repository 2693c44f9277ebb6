"""Traces: what `moesaic route record` writes, that it can be trusted, and that it can go on."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

import moesaic
from moesaic.core.errors import MoesaicError, UserError
from moesaic.data.sources import open_domains
from moesaic.models.tokenizer import load_tokenizer
from moesaic.routing import reader
from moesaic.routing import record as recorder
from moesaic.routing.blocks import Delimiters, Sample, delimiters, samples
from moesaic.routing.feed import Feed
from moesaic.routing.reader import Text, ahead
from moesaic.routing.trace import Shape, Trace, TraceWriter
from tests.helpers import assert_user_error, run_cli
from tests.models.golden import FAMILIES

WORDS = [f"w{number}" for number in range(80)]
ARRAYS = ("experts", "weights", "token_ids", "document", "position", "domain", "predicted", "loss")


def make_tokenizer(size: int = 97, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A word a token; <s> before a text, </s> is known but not added."""
    names = ["<pad>", "<s>", "</s>", *extra, *WORDS]
    vocab = {name: index for index, name in enumerate(names[:size])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def write_text(path: Path, documents: int, seed: int) -> Path:
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(documents):
        words = rng.choice(WORDS[1:], size=rng.integers(5, 60))
        lines.append(json.dumps({"text": " ".join(words)}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model and its tokenizer, and text of two domains."""
    folder = tmp_path_factory.mktemp("trace")
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    MixtralForCausalLM(config).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    (folder / "text").mkdir()
    write_text(folder / "text" / "news.jsonl", 60, 1)
    write_text(folder / "text" / "code.jsonl", 60, 2)
    return folder


def record(place, out, **options):
    given = {"data": place / "text", "tokens": 300, "sample_length": 32, "batch": 2}
    return moesaic.record(place / "model", out=out, **{**given, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.bin"))}


def test_rows_are_what_the_model_does(place, tmp_path):
    trace = record(place, tmp_path / "trace", logits=True)
    assert trace.rows == len(trace) == 300
    assert trace.complete
    assert trace.domains == ("code", "news")
    assert (trace.layers, trace.num_experts, trace.top_k) == ((0, 1, 2), 6, 2)
    assert np.bincount(trace.domain).tolist() == [150, 150]
    borders = trace.samples()
    assert (np.diff(borders) <= 32).all()
    assert np.diff(borders).tolist() == [32] * 4 + [22] + [32] * 4 + [22]
    model = moesaic.load(place / "model")
    for start, stop in itertools.pairwise(borders):
        ids = torch.from_numpy(trace.token_ids[start:stop].astype(np.int64))[None]
        with torch.no_grad(), moesaic.recording(model) as rec:
            logits = model(ids).logits[0]
        for place_, layer in enumerate(trace.layers):
            assert np.array_equal(trace.chosen(start, stop)[:, place_], rec.experts[layer])
            weights = rec.weights[layer].numpy()
            assert np.allclose(trace.weights[start:stop, place_], weights, atol=1e-3)
            assert np.allclose(trace.logits[start:stop, place_], rec.logits[layer], atol=1e-2)
        loss = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        assert np.allclose(trace.loss[start : stop - 1], loss, atol=1e-4)
        assert np.isnan(trace.loss[stop - 1])
        assert np.array_equal(trace.predicted[start:stop], logits.argmax(-1))


def test_batches_do_not_change_what_is_recorded(place, tmp_path):
    """Short samples are padded in a batch; their rows are the same without."""
    together = record(place, tmp_path / "five", batch=5)
    alone = record(place, tmp_path / "one", batch=1)
    for name in ARRAYS:
        one, five = getattr(alone, name), getattr(together, name)
        if one.dtype.kind == "f":
            assert np.allclose(one, five, atol=2e-3, equal_nan=True), name
        else:
            assert np.array_equal(one, five), name


def test_text_is_cut_as_in_the_study(place, tmp_path):
    """Documents in order, <s> before and </s> after each, one stream, cut every 32 tokens."""
    trace = record(place, tmp_path / "trace")
    tokenizer = make_tokenizer()
    for domain, name in enumerate(trace.domains):
        stream, documents = [], []
        for number, line in enumerate((place / "text" / f"{name}.jsonl").open()):
            ids = [*tokenizer(json.loads(line)["text"])["input_ids"], 2]
            assert ids[0] == 1
            stream += ids
            documents += [number] * len(ids)
        rows = trace.domain == domain
        assert trace.token_ids[rows].tolist() == stream[:150]
        assert trace.document[rows].tolist() == documents[:150]


def test_a_seed_shuffles_documents(place, tmp_path, monkeypatch):
    monkeypatch.setenv("MOESAIC_CACHE", str(tmp_path / "cache"))
    runs = {
        name: record(place, tmp_path / name, seed=seed)
        for name, seed in (("a", 1), ("again", 1), ("b", 2))
    }
    assert contents(tmp_path / "a") == contents(tmp_path / "again")
    assert not np.array_equal(runs["a"].token_ids, runs["b"].token_ids)


def test_a_domain_may_have_less(place, tmp_path):
    short = {"short": write_text(tmp_path / "short.jsonl", 1, 3), "long": place / "text"}
    trace = record(place, tmp_path / "trace", data=short, tokens=400)
    counts = np.bincount(trace.domain)
    assert counts[1] == 200
    assert 0 < counts[0] < 70
    assert trace.complete


def test_capacity_leaves_gaps(tmp_path):
    """A dropped choice is -1, and sequence-to-sequence models have a trace of their encoder."""
    names = tuple(f"<extra_id_{number}>" for number in range(12))
    model = moesaic.load(FAMILIES / "switch_transformers_lowcap", dtype=torch.float32)
    tokenizer = make_tokenizer(model.config.vocab_size, names)
    data = write_text(tmp_path / "text.jsonl", 30, 4)
    trace = moesaic.record(
        model,
        data=data,
        tokens=200,
        out=tmp_path / "trace",
        tokenizer=tokenizer,
        sample_length=64,
        batch=3,
    )
    encoder = trace.encoder
    assert encoder is not None
    assert np.diff(encoder.samples()).tolist() == [64, 64, 64, 8]
    assert np.diff(trace.samples()).tolist() == [9, 9, 9, 1]  # 4 hidden tokens, 5 sentinels
    start, sentinels = model.config.decoder_start_token_id, [3, 4, 5, 6, 7]
    domains = open_domains(data)
    tokens = samples(domains, tokenizer, delimiters(tokenizer), tokens=200, length=64)
    for index, sample in enumerate(tokens):
        hidden = np.arange(8, len(sample), 16)
        fed = sample.ids.copy()
        fed[hidden] = sentinels[: len(hidden)]
        first, last = encoder.samples()[index : index + 2]
        assert encoder.token_ids[first:last].tolist() == fed.tolist()
        labels = []
        for mark, token in zip(sentinels, sample.ids[hidden], strict=False):
            labels += [mark, token]
        first, last = trace.samples()[index : index + 2]
        labels = [start, *labels, sentinels[len(hidden)]][:-1]
        assert trace.token_ids[first:last].tolist() == labels
    assert (encoder.chosen() == -1).any()
    assert (encoder.experts[encoder.chosen() == -1] == encoder.nothing).all()


def test_language_code_opens_every_sample(tmp_path):
    tokenizer = make_tokenizer()
    around = delimiters(tokenizer, language_code=True)
    assert around == Delimiters((), (2,), (1,))
    assert delimiters(tokenizer) == Delimiters((1,), (2,))
    data = write_text(tmp_path / "text.jsonl", 30, 4)
    found = list(samples(open_domains(data), tokenizer, around, tokens=200, length=64))
    assert [len(sample) for sample in found] == [64, 64, 64, 8]
    assert all(sample.ids[0] == 1 and (sample.ids[1:] != 1).all() for sample in found)


def test_copying_is_fed_shifted():
    """NLLB: the decoder reads its own input, one to the right."""
    ids = np.array([5, 6, 7])
    sides = Feed("copy", pad=0, start=9).sides([Sample(0, ids, ids)])
    assert sides["encoder"].ids[0].tolist() == [5, 6, 7]
    assert sides["decoder"].ids[0].tolist() == [9, 5, 6]
    assert sides["decoder"].targets[0].tolist() == [5, 6, 7]


KILLED = """
import sys, time, torch
torch.set_num_threads({threads})
import moesaic
from moesaic.routing import record as recorder
recorder.COMMIT_SECONDS = 0
append = recorder._Run._append
def slowly(self, batch):
    time.sleep(0.05)
    return append(self, batch)
recorder._Run._append = slowly
moesaic.record({model!r}, data={data!r}, tokens=1500, sample_length=32, batch=2, out={out!r})
"""


def test_killed_and_resumed(place, tmp_path):
    """kill -9 in the middle; the same call goes on, and the files are the same bit for bit."""
    out = tmp_path / "killed"
    options = {"tokens": 1500}
    script = KILLED.format(
        threads=torch.get_num_threads(),
        model=str(place / "model"),
        data=str(place / "text"),
        out=str(out),
    )
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while rows_of(out) < 300:
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stderr.close()
    part = Trace(out)
    assert not part.complete
    assert 300 <= part.rows < 1500
    with (out / "experts.bin").open("ab") as file:
        file.write(b"half a batch")
    before = part.rows
    whole = record(place, out, **options)
    assert whole.complete
    assert whole.rows == 1500 > before
    record(place, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def rows_of(out: Path) -> int:
    try:
        return json.loads((out / "trace.json").read_text())["rows"]
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("stop_at", [1, 3])
def test_resumed_with_an_encoder(tmp_path, monkeypatch, stop_at):
    """Both traces of a sequence-to-sequence model go on from the same sample."""
    names = tuple(f"<extra_id_{number}>" for number in range(12))
    model = moesaic.load(FAMILIES / "switch_transformers", dtype=torch.float32)
    tokenizer = make_tokenizer(model.config.vocab_size, names)
    data = write_text(tmp_path / "text.jsonl", 40, 4)
    monkeypatch.setattr(recorder, "COMMIT_SECONDS", 0)

    def run(out):
        options = {"tokens": 300, "sample_length": 40, "batch": 1, "tokenizer": tokenizer}
        return moesaic.record(model, data=data, out=out, **options)

    commit = recorder._Run._commit
    commits = []

    def stopping(self, **options):
        self.writers["encoder"].commit()  # the worst moment: the encoder is ahead
        commits.append(1)
        if len(commits) > stop_at:
            raise KeyboardInterrupt
        commit(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recorder._Run, "_commit", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    assert not Trace(tmp_path / "cut").complete
    run(tmp_path / "cut")
    run(tmp_path / "whole")
    for part in ("", "encoder"):
        found = contents(tmp_path / "cut" / part)
        assert found
        assert found == contents(tmp_path / "whole" / part)


def test_finished_traces_are_kept(place, tmp_path):
    first = record(place, tmp_path / "trace")
    before = (tmp_path / "trace" / "experts.bin").stat().st_mtime_ns
    again = record(place, tmp_path / "trace")
    assert again.rows == first.rows
    assert (tmp_path / "trace" / "experts.bin").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="other settings"):
        record(place, tmp_path / "trace", tokens=301)


def test_opening_is_quick(tmp_path):
    """A million tokens of 16 layers x top 8 open in less than 0.1 s."""
    rows, chosen = 1_000_000, (16, 8)
    shape = Shape(tuple(range(16)), (64,) * 16, (8,) * 16)
    writer = TraceWriter(tmp_path, shape, {"domains": ["text"], "settings": {}})
    for name, (dtype, row) in shape.arrays().items():  # sparse files: only their sizes count
        with (tmp_path / f"{name}.bin").open("r+b") as file:
            file.truncate(rows * dtype.itemsize * int(np.prod(row)))
    writer._pending = rows
    writer.complete = True
    writer.commit()
    writer.close()
    start = time.perf_counter()
    trace = Trace(tmp_path)
    assert trace.experts.shape == (rows, *chosen)
    assert trace.experts[500_000].sum() == 0
    assert time.perf_counter() - start < 0.1


def test_many_experts_take_two_bytes(tmp_path):
    for experts, kind in ((255, np.uint8), (256, np.uint16), (512, np.uint16)):
        shape = Shape((0,), (experts,), (1,), predictions=False)
        writer = TraceWriter(tmp_path / str(experts), shape, {"domains": ["text"]})
        ids = np.array([[[0]], [[experts - 1]], [[np.iinfo(kind).max]]])
        writer.append(
            {
                name: ids if name == "experts" else np.zeros((3, *row))
                for name, (_, row) in shape.arrays().items()
            }
        )
        writer.finish()
        trace = Trace(tmp_path / str(experts))
        assert trace.experts.dtype == kind
        assert trace.chosen()[:, 0, 0].tolist() == [0, experts - 1, -1]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: (d / "weights.bin").write_bytes(b"1234"), "truncated"),
        (lambda d: (d / "loss.bin").unlink(), "missing"),
        (lambda d: (d / "experts.bin").open("ab").write(b"more"), "changed"),
        (lambda d: (d / "trace.json").write_text("{"), "damaged"),
        (lambda d: (d / "trace.json").write_text("{}"), "damaged"),
        (lambda d: (d / "trace.json").unlink(), "no trace"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_damage_is_noticed(place, tmp_path, damage, words):
    record(place, tmp_path / "trace", tokens=64)
    damage(tmp_path / "trace")
    with pytest.raises(UserError, match=words):
        Trace(tmp_path / "trace")


def test_command(place, tmp_path):
    arguments = ("--data", place / "text", "--tokens", 64, "-o", tmp_path / "trace")
    options = ("--sample-length", 32, "--device", "cpu")
    result = run_cli("route", "record", place / "model", *arguments, *options, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.json["rows"] == 64
    assert result.json["path"] == str(tmp_path / "trace")
    assert Trace(tmp_path / "trace").rows == 64
    told = run_cli("route", "record", place / "model", *arguments, *options)
    assert told.stdout.splitlines()[-1] == str(tmp_path / "trace")
    assert "64 tokens in 2 samples" in told.stdout


def test_bad_input(place, tmp_path):
    def run(**changes):
        given = {"data": place / "text", "tokens": 64, "sample-length": 32, **changes}
        options = [part for name, value in given.items() for part in (f"--{name}", value)]
        model = options.pop(options.index("--model") + 1) if "model" in given else place / "model"
        options = [option for option in options if option != "--model"]
        return run_cli("route", "record", model, *options, "-o", tmp_path / "trace")

    assert_user_error(run(tokens=0), "tokens=0", "at least 1")
    assert_user_error(run(**{"sample-length": 1}), "sample_length=1")
    assert_user_error(run(**{"sample-length": 1000}), "sample_length=1000", "128")
    assert_user_error(run(batch=0), "batch=0")
    assert_user_error(run(seed=-1), "seed")
    assert_user_error(run(data=place / "nothing"), "nothing")
    assert_user_error(run(model=place / "modle"), "modle")
    assert_user_error(run(language="eng"), "language")
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    assert_user_error(run(data=empty), "no token")
    dense = Path(moesaic.__file__).parent / "assets" / "demo-llama"
    assert_user_error(run(model=dense), "dense")
    assert not (tmp_path / "trace").exists()
    (tmp_path / "trace").mkdir()
    (tmp_path / "trace" / "other").write_text("")
    assert_user_error(run(), "holds no trace")


def test_reading_in_another_process_is_the_same(place, tmp_path):
    """Samples, the place to start at, faults and a source that only the caller knows."""
    tokenizer, sources = load_tokenizer(place / "model"), open_domains(str(place / "text"))
    text = Text(sources, tokenizer, delimiters(tokenizer), 1500, 32, seed=3)
    expected = list(text.samples())
    assert len(expected) > 20
    for apart, skip in ((True, 0), (True, 20), (False, 20)):
        with ahead(text, skip=skip, apart=apart) as stream:
            found = list(stream)
        assert len(found) == len(expected) - skip
        for one, other in zip(found, expected[skip:], strict=True):
            assert one.domain == other.domain
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.document, other.document)
            assert one.ids.dtype == one.document.dtype == np.int64
    with ahead(text, skip=0, apart=True) as stream:
        next(stream)  # the process is stopped in the middle of it

    class Here:  # cannot be told to another process
        def documents(self):
            yield "some text"

        def fingerprint(self):
            return "here"

    with ahead(replace(text, sources={"here": Here()}, seed=None), skip=0, apart=True) as stream:
        assert len(next(stream)) > 0
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "good"}\n{"text": 5}\n')
    faulty = replace(text, sources=open_domains(str(bad)), seed=None)
    with pytest.raises(UserError) as here:
        list(faulty.samples())
    with ahead(faulty, skip=0, apart=True) as stream, pytest.raises(UserError) as there:
        list(stream)
    assert str(here.value) == str(there.value)


def test_a_reader_that_dies_is_noticed(place, monkeypatch):
    tokenizer, sources = load_tokenizer(place / "model"), open_domains("stdlib")
    text, started, start = (
        Text(sources, tokenizer, delimiters(tokenizer), 10**9, 32),
        [],
        reader._start,
    )
    monkeypatch.setattr(
        reader, "_start", lambda *given: started.append(start(*given)) or started[0]
    )
    with ahead(text, skip=0, apart=True) as stream:
        next(stream)
        started[0].kill()
        with pytest.raises(MoesaicError, match="same call goes on"):
            list(stream)
