"""What peers are given: as many bytes as our search has, and none of the text that is judged."""

import argparse
import json

import pytest
from safetensors.torch import load_file
from searchable import save_searchable, save_text

from autoquant.data.text import load_corpus
from autoquant.data.tokenizer import load_tokenizer
from autoquant.data.tokens import TokenPlan
from autoquant.plan.budget import Budget, Scope
from autoquant.plan.plan import make_plan
from autoquant.plan.space_file import load_space
from autoquant.source.source import open_source
from experiments.common.bench import fresh_split
from experiments.evidence.peers import Room, tensor_bytes, write_text

LENGTH = 32


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peers")
    model = save_searchable("llama", folder / "model")
    text = save_text(folder / "text")
    return argparse.Namespace(
        model=model, text=text, seed=0, sequence_length=LENGTH, work=folder / "work"
    )


def test_peers_see_nothing_of_what_is_judged(arguments):
    tokenizer = load_tokenizer(arguments.model, trust_remote_code=False)
    corpus = load_corpus(str(arguments.text))
    plan = TokenPlan(calibration=64, search=64, report=256, sequence_length=LENGTH)
    fresh = fresh_split(corpus, tokenizer, plan, 1024)
    judged = [tokenizer.decode(row) for batch in fresh.batches for row in batch.tolist()]
    assert len(judged) > 8
    lines = write_text(arguments).read_text().splitlines()
    given = [json.loads(line)["text"] for line in lines]
    assert not any(own in whole for own in judged for whole in given)
    parts = [json.loads(line)["text"] for line in write_text(arguments, 2).read_text().splitlines()]
    assert " ".join(parts) == " ".join(given)  # the tokenizer puts blanks between tokens
    assert max(map(len, parts)) < max(map(len, given))


def test_the_bytes_are_those_of_our_budget(arguments):
    room = Room.of(arguments.model, 6.0)
    plan = make_plan(open_source(arguments.model), load_space("default"))
    limit, sizes = plan.limit(Budget(6.0, Scope.SEARCHED)), plan.accounting
    fits = [own for own in (sizes.floor, sizes.ceiling) if limit.fits(own)]
    assert fits == [sizes.floor]
    assert room.searched_bytes == pytest.approx(6.0 * sizes.searched_elements / 8, abs=1)
    beside = sizes.checkpoint_bytes(sizes.floor) - sizes.searched_bytes(sizes.floor)
    assert room.checkpoint_bytes - room.searched_bytes == beside
    assert room.elements == sizes.searched_elements


def test_bytes_are_counted_from_headers(arguments):
    (file,) = arguments.model.glob("*.safetensors")
    expected = sum(tensor.nbytes for tensor in load_file(file).values())
    assert tensor_bytes(arguments.model) == expected < file.stat().st_size
