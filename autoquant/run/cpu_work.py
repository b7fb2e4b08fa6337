"""What the work of a search takes of a CPU's memory beside weights and codes."""

from collections import Counter
from collections.abc import Iterable

from autoquant.model.streaming.work import KEPT_LOGIT_BYTES
from autoquant.plan.linears import LayerGroup
from autoquant.plan.model_costs import share_of_token
from autoquant.run.config.parts import LoadedConfig
from autoquant.source.source import Source

GRAPH_BYTES = 4.4
"""Of a number that a product of a stage reads or gives for a token, while gradients go back through
the stage: its BF16, what else the graph keeps, and what choices are tried with. Counted on a
mixture of experts."""
COMPARED_BYTES = 3 << 24
"""Three float32 tensors, in which gradients compare a product under two choices."""
PAIR_BYTES = 10
"""Of a pair of positions, for each head, where attention writes them out: the noise floor."""


def work_bytes(config: LoadedConfig, source: Source, groups: Iterable[LayerGroup]) -> int:
    """Bytes of the widest stage with its graph, or of attention that writes out its pairs, and of
    the BF16 model's logits that are kept. A CPU puts a whole batch through a stage at once.

    Args:
        config: says how many tokens.
        source: the model.
        groups: that may leave BF16.
    """
    text = source.text_config
    sequences = max(1, config.batch_tokens // config.longest)
    tokens = sequences * config.longest
    graph = GRAPH_BYTES * tokens * _widest(source, groups) + COMPARED_BYTES
    heads = int(text.get("num_attention_heads") or 0)
    pairs = PAIR_BYTES * heads * tokens * config.longest
    logits = 4 * config.search_tokens * int(text.get("vocab_size") or 0)
    return int(max(graph, pairs)) + min(KEPT_LOGIT_BYTES, logits)


def _widest(source: Source, groups: Iterable[LayerGroup]) -> float:
    """Numbers that the products of a stage read and give for a token, in the widest one."""
    found = Counter[int]()
    for group in groups:
        if group.layer is not None:
            numbers = sum(own.in_features + own.out_features for own in group.linears)
            found[group.layer] += int(numbers * share_of_token(group, source.text_config))
    return max(found.values(), default=0)
