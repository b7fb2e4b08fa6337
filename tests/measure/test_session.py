"""What a session makes of a loaded model: room for states, and refused tokens."""

from types import SimpleNamespace

import pytest
import torch
from searchable import save_searchable, save_text
from torch import nn

from autoquant.data.tokens import Split, TokenPlan
from autoquant.errors import SourceError
from autoquant.measure import session
from autoquant.model.streaming.placement import Left
from autoquant.model.streaming.work import STATE_BYTES
from autoquant.plan.activation_mode import ActivationMode
from autoquant.plan.grouping import find_groups
from autoquant.run.observer import Logged
from autoquant.source.source import open_source


def loaded(*, is_streamed=False, **more):
    store = SimpleNamespace(is_streamed=is_streamed)
    return SimpleNamespace(store=store, device=torch.device("cpu"), **more)


def test_room_for_states_is_what_streamed_weights_leave():
    left = Left(host=1 << 30, device=1 << 34)
    streamed = session._room(loaded(is_streamed=True, left=left))
    assert streamed.is_streamed
    assert streamed.walk_bytes == 1 << 30
    streamed.limit(0, 1, 1, None)  # of a GPU: states stay there as long as they fit
    assert streamed.walk_bytes == streamed.device_bytes == STATE_BYTES + (1 << 34)
    resident = session._room(loaded(left=left))
    assert not resident.is_streamed
    resident.limit(0, 1, 1, None)
    assert resident.device_bytes == STATE_BYTES + (1 << 34)


@pytest.mark.parametrize(("token", "is_refused"), [(8, True), (9, True), (7, False)])
def test_a_token_that_the_model_does_not_embed_is_refused(token, is_refused):
    model = SimpleNamespace(get_input_embeddings=lambda: nn.Embedding(8, 4))
    splits = {
        "calibration": Split.unrelated("calibration", (torch.tensor([[1, token]]),), digest="a"),
        "search": Split.unrelated("search", (torch.tensor([[1, 2]]),), digest="b"),
    }
    if not is_refused:
        session._require_vocabulary(model, splits)
        return
    with pytest.raises(SourceError, match=f"gives token {token}, and the model embeds 8 tokens"):
        session._require_vocabulary(model, splits)


def test_each_split_that_got_too_little_text_is_named(tmp_path, caplog):
    source = open_source(save_searchable("llama", tmp_path / "model"))
    tokens = TokenPlan(
        calibration=10**7, search=64, report=64, sequence_length=32, batch_tokens=256
    )
    with caplog.at_level("WARNING", logger="autoquant"):
        session.open_session(
            source,
            [group for group in find_groups(source) if not group.closed],
            calibration=str(save_text(tmp_path / "text")),
            tokens=tokens,
            mode=ActivationMode.W4A4,
            device="cpu",
            trust_remote_code=False,
            observer=Logged(),
        )
    (said,) = [r.getMessage() for r in caplog.records if "little text" in r.getMessage()]
    assert "calibration: " in said
    assert "where 10000000 were asked" in said
