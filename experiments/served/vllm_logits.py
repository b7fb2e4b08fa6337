"""Logits of a dense checkpoint by vLLM's own forward on a CPU; runs under an interpreter with vLLM.

    PYTHON vllm_on_any_cpu.py vllm_logits.py SCRIPT CHECKPOINT TOKENS OUT

SCRIPT loads a checkpoint as vLLM does and leaves `model`, `vc` (its configuration) and
`set_current_vllm_config` behind. Configs, names, loader, quantized products and the model's code
are vLLM's; attention alone is PyTorch's, since vLLM's needs a paged cache. TOKENS is a .npy file of
int64 [S, L], OUT one of float32 [S, L, V].
"""

import runpy
import sys
from typing import Any

import numpy as np
import torch

script, checkpoint, tokens, out = sys.argv[1:]
sys.argv = [script, checkpoint]
loaded = runpy.run_path(script, run_name="__main__")

from vllm.forward_context import set_forward_context  # noqa: E402
from vllm.model_executor.layers.attention.attention import Attention  # noqa: E402


def causal(
    self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """Attention of one sequence [L, heads * D] to itself."""
    length = len(query)
    q, k, v = (
        part.view(length, -1, self.head_size).transpose(0, 1) for part in (query, key, value)
    )
    found = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=self.impl.scale, enable_gqa=True
    )
    return found.transpose(0, 1).reshape(length, -1)


Attention.forward = causal
model, config = loaded["model"], loaded["vc"]
rows = torch.from_numpy(np.load(tokens))
with (
    torch.inference_mode(),
    loaded["set_current_vllm_config"](config),
    set_forward_context(None, config),
):
    found = [
        model.compute_logits(model(row, torch.arange(len(row)), None, None)).float().numpy()
        for row in rows
    ]
np.save(out, np.stack(found))
