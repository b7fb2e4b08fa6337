"""How likely a model under an assignment finds given continuations, by the forward of the scorer.

Shapes: B sequences, L tokens, N tokens of continuations, H hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch

from autoquant.forward.flow import Flow
from autoquant.measure.scorer import Scorer
from autoquant.plan.assignment import Assignment


@torch.inference_mode()
def continuations(
    scorer: Scorer,
    sequences: torch.Tensor,
    lengths: Sequence[int],
    assignment: Assignment,
    *,
    with_cache: bool = True,
) -> list[tuple[float, bool]]:
    """Log-probability of the last tokens of each sequence, nats, and whether each is the likeliest.

    Args:
        scorer: calibrated.
        sequences: int64 [B, L + 1]; the last token of each is predicted, not read.
        lengths: of each continuation, tokens, 1 to L, [B].
        assignment: what the model multiplies with.
        with_cache: whether keys and values are rounded, where there is such a cache.
    """
    tokens, targets = sequences[:, :-1].to(scorer.device), sequences[:, 1:].to(scorer.device)
    (hidden,) = scorer.forward([tokens], assignment, with_cache=with_cache)
    rows = torch.cat([own[-length:] for own, length in zip(hidden, lengths, strict=True)])
    wanted = torch.cat([own[-length:] for own, length in zip(targets, lengths, strict=True)])
    likelihood, is_likeliest = _of_rows(scorer, rows, wanted, assignment, with_cache)
    return [
        (float(own.sum()), bool(likeliest.all()))
        for own, likeliest in zip(
            likelihood.split(list(lengths)), is_likeliest.split(list(lengths)), strict=True
        )
    ]


def _of_rows(
    scorer: Scorer,
    rows: torch.Tensor,
    wanted: torch.Tensor,
    assignment: Assignment,
    with_cache: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of final hidden states [N, H] and its next token [N], on the host.

    Returns:
        Log-probabilities, float64 [N], and whether the token is the likeliest, [N].
    """
    likelihoods, likeliest = [], []
    (buffer,) = scorer.head.buffers(rows[None], 1)
    with scorer.applied(Flow.of_assignment(assignment, with_cache=with_cache)):
        for span in scorer.head.spans(rows[None]):
            tile = buffer[: span.stop - span.start]
            logits = scorer.head.candidate_logits(rows[span], tile)
            chosen = logits.gather(1, wanted[span][:, None])[:, 0]
            likelihoods.append((chosen - torch.logsumexp(logits, dim=-1)).double().cpu())
            likeliest.append((logits.argmax(dim=-1) == wanted[span]).cpu())
    return torch.cat(likelihoods), torch.cat(likeliest)
