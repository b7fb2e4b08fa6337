"""What the work of a search takes of a CPU's memory beside weights and codes."""

import os
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from autoquant.environment import CpuPolicy, cpu_policy
from autoquant.model.streaming.work import KEPT_LOGIT_BYTES
from autoquant.plan.linears import LayerGroup
from autoquant.plan.model_costs import share_of_token
from autoquant.run.config.parts import LoadedConfig
from autoquant.run.signature import FINALISTS
from autoquant.search.propose.baselines import recipes
from autoquant.source.source import Source

GRAPH_BYTES = 4.4
"""Of a number that a product of a stage reads or gives for a token, while gradients go back through
the stage: its BF16, what else the graph keeps, and what choices are tried with. Counted on a
mixture of experts."""
COMPARED_BYTES = 3 << 24
"""Three float32 tensors, in which gradients compare a product under two choices."""
SCORE_BYTES = 48
"""Of a token that a candidate of the confirmation is reported on."""
PAIR_BYTES = 10
"""Of a pair of positions, for each head, where attention writes them out: the noise floor."""
KERNELS, KERNEL_BYTES = 200, 1 << 20
"""That oneDNN compiles and keeps for experts that a router shares tokens out to, one for each
number of rows that products are rounded up to. Eight of those double it. A batch's experts have
numbers within a factor of 32, forward and back, those of a sequence within one of 8: 208 kernels
for two products. The bundled model has 167, and 69 others."""

_Config = TypeVar("_Config", bound=LoadedConfig)


def shortened(config: _Config, source: Source) -> _Config:
    """The configuration with sequences that the model's positions allow, as a search cuts them."""
    most = source.text_config.get("max_position_embeddings")
    return config.model_copy(update={"sequence_length": min(config.longest, int(most or 2**31))})


def work_bytes(config: LoadedConfig, source: Source, groups: Collection[LayerGroup]) -> int:
    """Bytes of the widest stage with its graph, or of attention that writes out its pairs, of the
    BF16 model's logits that are kept, of kernels, and of what the confirmation keeps of tokens. A
    CPU puts a whole batch through a stage at once.

    Args:
        config: says how many tokens.
        source: the model.
        groups: that may leave BF16.
    """
    text, config = source.text_config, shortened(config, source)
    sequences = max(1, config.batch_tokens // config.longest)
    tokens = sequences * config.longest
    graph = GRAPH_BYTES * tokens * _widest(source, groups) + COMPARED_BYTES
    heads = int(text.get("num_attention_heads") or 0)
    pairs = PAIR_BYTES * heads * tokens * config.longest
    logits = 4 * config.search_tokens * int(text.get("vocab_size") or 0)
    kernels = KERNELS * KERNEL_BYTES if _has_kernels(groups, text) else 0
    scores = SCORE_BYTES * (1 + FINALISTS + len(recipes())) * config.tokens.report
    return int(max(graph, pairs)) + min(KEPT_LOGIT_BYTES, logits) + kernels + scores


def _has_kernels(groups: Collection[LayerGroup], text: Mapping[str, Any]) -> bool:
    """Whether experts get numbers of tokens that differ, and their products are in BF16."""
    shares = (share_of_token(group, text) for group in groups)
    return cpu_policy(os.environ)[0] is CpuPolicy.BF16 and any(share < 1 for share in shares)


def _widest(source: Source, groups: Collection[LayerGroup]) -> float:
    """Numbers that the products of a stage read and give for a token, in the widest one."""
    found = Counter[int]()
    for group in groups:
        if group.layer is not None:
            numbers = sum(own.in_features + own.out_features for own in group.linears)
            found[group.layer] += int(numbers * share_of_token(group, source.text_config))
    return max(found.values(), default=0)
