"""Which linears serving engines fuse, and which tensors stay as they are, by name on disk.

A new architecture is a row here. The rows follow the fused parameters of vLLM
(`packed_modules_mapping`), SGLang and TensorRT-LLM.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

ROLES = (
    "qkv_a",
    "q_b",
    "qkv",
    "indexer",
    "gdn_in",
    "in",
    "o",
    "out",
    "gate_up",
    "down",
    "experts",
    "shared_gate_up",
    "shared_down",
    "other",
    "unknown",
    "head",
)
"""Every role, in the order in which a forward pass reaches it."""

UNKNOWN_ROLE, INDEXER_ROLE = "unknown", "indexer"
LEFT_ROLES = {
    UNKNOWN_ROLE: "no engine's table and no rule knows this linear",
    INDEXER_ROLE: "an indexer chooses what sparse attention reads at all",
}
"""Roles whose linears stay in BF16 unless a space opens them by role or name, and why."""


@dataclass(frozen=True, slots=True)
class Fused:
    """Linears of one parent module that engines multiply as one matrix."""

    name: str
    role: str
    parts: tuple[str, ...]
    engine_name: str
    """What engines call the matrix; their exclusion lists are matched against it."""


FUSED = (
    Fused("qkv", "qkv", ("q_proj", "k_proj", "v_proj", "index_q_proj", "index_k_proj"), "qkv_proj"),
    Fused("qkv_a", "qkv_a", ("q_a_proj", "kv_a_proj_with_mqa"), "fused_qkv_a_proj"),
    Fused("in_proj_qkvz", "gdn_in", ("in_proj_qkv", "in_proj_z"), "in_proj_qkvz"),
    Fused("gate_up", "gate_up", ("gate_proj", "up_proj"), "gate_up_proj"),
    Fused("w13", "gate_up", ("w1", "w3"), "gate_up_proj"),
    Fused("c_fc", "gate_up", ("c_fc_0", "c_fc_1"), "c_fc"),
)

SINGLE = {
    "o_proj": "o",
    "wo": "o",
    "dense": "o",
    "out_proj": "out",
    "in_proj": "in",
    "in_proj_qkvz": "gdn_in",
    "q_b_proj": "q_b",
    "qkv_proj": "qkv",
    "query_key_value": "qkv",
    "gate_up_proj": "gate_up",
    "dense_h_to_4h": "gate_up",
    "fc1": "gate_up",
    "down_proj": "down",
    "w2": "down",
    "dense_4h_to_h": "down",
    "fc2": "down",
}
"""Role of a linear that is multiplied alone, or that the checkpoint stores fused."""

CLOSED = {
    "index_q_proj": "vLLM joins it with the indexer of sparse attention, and loads no quantized "
    "form of that matrix",
    **dict.fromkeys(
        ("wo_a", "o_a_proj"),
        "it is multiplied in groups of heads, by a product that reads no such codes",
    ),
}
"""Why a group that a linear of this name belongs to stays BF16 (vLLM 0.33: per-tensor scales of the
joined matrix have places for q, k and v alone)."""

SHARED_EXPERT_ROLES = {"gate_up": "shared_gate_up", "down": "shared_down"}

LAYER = re.compile(r"(?P<layer>(?:.*?\.)?(?:layers|h|blocks)\.(?P<index>\d+))\.(?P<rest>.+)")
ROUTED_EXPERT = re.compile(r"(?P<container>.+\.experts)\.(?P<index>\d+)\.(?P<part>[^.]+)")
FUSED_EXPERTS = re.compile(r"(?P<container>.+\.experts)\.(?P<product>[a-z_]+)")
SHARED_EXPERT = re.compile(r".+\.(shared_experts?|shared_mlp)\.(?P<part>[^.]+)")
LINEAR = re.compile(r".*(proj|linear|dense|attn|mlp|fc\d*|[wW]?qkv|query_key_value|w[qkvo0-9]).*")
"""Last name of a matrix that is plausibly the weight of an `nn.Linear`."""


JOINED_EXPERTS: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Names that engines give the parts, along N, of a tensor that holds all experts of a layer."""

MODELS_WITH_JOINED_EXPERTS = frozenset({"qwen3_vl_moe", "qwen3_5_moe"})
"""Model types whose engines load quantized experts one by one although checkpoints join them.
gpt_oss and llama4 are missing: vLLM transposes every expert of theirs that it reads in the ModelOpt
layout, which packed codes do not survive."""


CLOSED_EXPERTS: Mapping[str, str] = {
    "longcat_flash": "transformers runs these experts, some of which are no matrices, by a forward "
    "of their own, so that no quantization of theirs can be measured",
    "ernie4_5_vl_moe_text": "a layer has experts for text, and others that no text reaches",
}
"""By model type: why routed experts stay BF16 whatever engines load (transformers 5.23)."""


HEAD = re.compile(r"lm_head|embed_out|output")
"""Last name of an output head."""
WORD_EMBEDDINGS = re.compile(r"embed_tokens|embed_in|wte|tokens_embed|(word_|tok_)?embeddings")
"""Last name of the embeddings that an output head may be tied to."""
TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose matrices are stored [in, out]."""


class Fixed(StrEnum):
    """Why a tensor is copied as it is."""

    MTP = "multi-token prediction heads"
    TOWER = "vision and audio towers"
    EMBEDDING = "embeddings"
    TIED_HEAD = "output head tied to the embeddings"
    BIAS = "biases"
    VECTOR = "norms and other vectors"
    CONVOLUTION = "convolutions"
    FUSED_EXPERTS = "experts stored as one 3-D tensor, whose quantized form engines do not load"
    ROUTER = "routers and gates"
    KV_B = "kv_b_proj, which engines absorb into attention"
    STATE_SPACE = "state-space gates"
    TRANSPOSED = "transposed matrices (Conv1D)"
    HELD_IN_PARTS = "matrices that transformers holds in parts"
    DTYPE = "tensors that are not BF16, FP16 or FP32"
    UNKNOWN = "tensors of an unknown kind"


FIXED_COMPONENTS = (
    (Fixed.MTP, re.compile(r"mtp.*|nextn.*")),
    (
        Fixed.TOWER,
        re.compile(
            r"(vision|visual|audio|speech|image|video|multi_modal|multimodal|mm)(_.*)?"
            r"|vit|talker|code2wav|token2wav|aligner|connector|patch_merge.*"
        ),
    ),
)
"""Parts of a model by any component of the tensor's name."""

FIXED_MODULES = (
    (Fixed.EMBEDDING, re.compile(r".*embed.*|wte|wpe")),
    (Fixed.ROUTER, re.compile(r"gate|router|shared_expert_gate|wg|classifier")),
    (Fixed.CONVOLUTION, re.compile(r".*conv(1d)?")),
    (Fixed.KV_B, re.compile(r"kv_b_proj")),
    (Fixed.STATE_SPACE, re.compile(r"in_proj_(a|b|ba)|dt_proj|x_proj")),
)
"""Matrices by the last name of their module."""

INSIDE_ROUTER = re.compile(r"(.+\.)?(router|gate)\..+")
"""Linear of a router that is a module of its own: `router.proj`, `router.mlp.fc1`."""
INSIDE_INDEXER = re.compile(r"(.+\.)?\w*indexer\w*\..+")
"""Linear of the indexer of sparse attention: `self_attn.indexer.wq_b`."""
