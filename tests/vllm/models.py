"""Small random models, made on the spot, so that a real vLLM can run where no model may be downloaded.

Every model is a pure function of its `Recipe`: the same recipe gives the same bytes. Weights are real safetensors files
(not vLLM's dummy loader), because the daemon's namespace is keyed by their content. No tokenizer is written: engines take
token ids and give token ids back. Nothing here is ever committed; models live in a directory of the caller.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any

VOCABULARY = 512


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a model is. `config` is its config.json, `seed` its weights, `middle_seed` the weights of its middle layers."""

    name: str
    config: tuple[tuple[str, Any], ...]
    seed: int = 1
    middle_seed: int | None = None
    lora_seed: int | None = None
    weights_dtype: str = "bfloat16"

    def settings(self) -> dict[str, Any]:
        return {k: json.loads(v) for k, v in self.config}

    def key(self) -> str:
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def recipe(name: str, config: dict[str, Any], **rest: Any) -> Recipe:
    return Recipe(name, tuple((k, json.dumps(v)) for k, v in sorted(config.items())), **rest)


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, head: int, mlp: int, positions: int, vocabulary: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head,
        "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": vocabulary,
        "attention_bias": False, "mlp_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }


def gqa(**rest: Any) -> Recipe:
    """Llama-like: 4 layers, 4 query heads, 2 KV heads, so that two ranks hold one KV head each."""
    return recipe("gqa", _llama(4, 256, 4, 2, 64, 512, 8192, VOCABULARY), **rest)


def demo(layers: int = 16) -> Recipe:
    """Llama-like, with enough work in a prompt of a few thousand tokens for two CPU cores to need seconds."""
    return recipe("demo", _llama(layers, 1024, 16, 4, 64, 2816, 16384, 2048))


def mla(**rest: Any) -> Recipe:
    """DeepSeek-V3-like: latent attention of 512 + 64 values a token, one dense layer, then routed experts."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 64,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("mla", config, **rest)


def gemma(**rest: Any) -> Recipe:
    """Gemma-3-like: sliding-window and full layers, which vLLM keeps in more than one KV-cache group."""
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": VOCABULARY, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("gemma", config, **rest)


def _mlp(prefix: str, hidden: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (size, hidden),
        f"{prefix}.up_proj.weight": (size, hidden),
        f"{prefix}.down_proj.weight": (hidden, size),
    }


def _attention_shapes(c: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv, head = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.q_proj.weight": (heads * head, hidden),
        f"{prefix}.k_proj.weight": (kv * head, hidden),
        f"{prefix}.v_proj.weight": (kv * head, hidden),
        f"{prefix}.o_proj.weight": (hidden, heads * head),
    }
    if c["model_type"] == "gemma3_text":
        shapes |= {f"{prefix}.q_norm.weight": (head,), f"{prefix}.k_norm.weight": (head,)}
    return shapes


def _mla_shapes(c: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    nope, rope, v = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    return {
        f"{prefix}.q_a_proj.weight": (c["q_lora_rank"], hidden),
        f"{prefix}.q_a_layernorm.weight": (c["q_lora_rank"],),
        f"{prefix}.q_b_proj.weight": (heads * (nope + rope), c["q_lora_rank"]),
        f"{prefix}.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
        f"{prefix}.kv_a_layernorm.weight": (rank,),
        f"{prefix}.kv_b_proj.weight": (heads * (nope + v), rank),
        f"{prefix}.o_proj.weight": (hidden, heads * v),
    }


def _layer_shapes(c: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    hidden, prefix = c["hidden_size"], f"model.layers.{i}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    if c["model_type"] == "gemma3_text":
        shapes |= {f"{prefix}.pre_feedforward_layernorm.weight": (hidden,), f"{prefix}.post_feedforward_layernorm.weight": (hidden,)}
    if c["model_type"] != "deepseek_v3":
        return shapes | _attention_shapes(c, f"{prefix}.self_attn") | _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
    shapes |= _mla_shapes(c, f"{prefix}.self_attn")
    if i < c["first_k_dense_replace"]:
        return shapes | _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
    shapes[f"{prefix}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
    shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    shapes |= _mlp(f"{prefix}.mlp.shared_experts", hidden, c["moe_intermediate_size"] * c["n_shared_experts"])
    for e in range(c["n_routed_experts"]):
        shapes |= _mlp(f"{prefix}.mlp.experts.{e}", hidden, c["moe_intermediate_size"])
    return shapes


def _fill(name: str, shape: tuple[int, ...], generator: Any, gemma_norm: bool) -> Any:
    import torch

    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape, dtype=torch.float32)
    if len(shape) == 1:  # a norm; Gemma's adds one to what is stored
        return torch.zeros(shape) if gemma_norm else torch.ones(shape)
    # Attention that looks at something: queries and keys get a larger scale, so a wrong block changes the output.
    scale = 2.0 if ("q_" in name or "k_proj" in name or "kv_a" in name) else 1.0
    return torch.randn(shape, generator=generator) * (scale * shape[1] ** -0.5)


def weights(r: Recipe) -> dict[str, Any]:
    """The tensors of a recipe, in file order."""
    import torch

    c = r.settings()
    dtype = getattr(torch, r.weights_dtype)
    layers = c["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    for i in range(layers):
        shapes |= _layer_shapes(c, i)
    shapes["model.norm.weight"] = (c["hidden_size"],)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    usual = torch.Generator().manual_seed(r.seed)
    changed = torch.Generator().manual_seed(r.seed if r.middle_seed is None else r.middle_seed)
    middle = {f"model.layers.{i}." for i in range(1, layers - 1)} if r.middle_seed is not None else set()
    out = {}
    for name, shape in shapes.items():
        tensor = _fill(name, shape, usual, c["model_type"] == "gemma3_text")
        if any(name.startswith(m) for m in middle):
            tensor = _fill(name, shape, changed, c["model_type"] == "gemma3_text")
        if name.endswith("embed_tokens.weight"):
            tensor = tensor * c["hidden_size"] ** 0.5
        out[name] = tensor if tensor.dtype == torch.float32 and name.endswith("bias") else tensor.to(dtype)
    return out


def make(r: Recipe, root: pathlib.Path) -> pathlib.Path:
    """The directory of a recipe's model under `root`; written once, then reused."""
    from safetensors.torch import save_file

    where = root / r.key()
    if where.exists():
        return where
    scratch = root / f".{r.key()}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    (scratch / "config.json").write_text(json.dumps(r.settings(), indent=1))
    save_file(weights(r), str(scratch / "model.safetensors"), metadata={"format": "pt"})
    try:
        scratch.rename(where)
    except OSError:  # somebody else was first
        shutil.rmtree(scratch, ignore_errors=True)
    return where


def make_lora(base: Recipe, where: pathlib.Path, seed: int, rank: int = 8) -> pathlib.Path:
    """A LoRA adapter for `base` at exactly `where`; another seed gives other content under the same name and path."""
    import torch
    from safetensors.torch import save_file

    c = base.settings()
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(c["num_hidden_layers"]):
        for name, shape in _attention_shapes(c, f"model.layers.{i}.self_attn").items():
            if len(shape) != 2 or not name.split(".")[-2] in ("q_proj", "v_proj"):
                continue
            stem = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{stem}.lora_A.weight"] = torch.randn((rank, shape[1]), generator=generator) * shape[1] ** -0.5
            tensors[f"{stem}.lora_B.weight"] = torch.randn((shape[0], rank), generator=generator) * rank**-0.5
    shutil.rmtree(where, ignore_errors=True)
    where.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 4 * rank, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "lora_dropout": 0.0, "modules_to_save": None,
    }
    (where / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, str(where / "adapter_model.safetensors"), metadata={"format": "pt"})
    return where


def prompt(seed: int, length: int, vocabulary: int = VOCABULARY) -> list[int]:
    """`length` token ids that differ from those of every other seed early on. No torch, no global randomness."""
    out: list[int] = []
    counter = 0
    while len(out) < length:
        block = hashlib.sha256(f"{seed}:{counter}".encode()).digest()
        out += [2 + int.from_bytes(block[i : i + 4], "big") % (vocabulary - 2) for i in range(0, 32, 4)]
        counter += 1
    return out[:length]
