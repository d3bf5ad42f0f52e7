"""Small random models, made on the spot, so that a real vLLM can run where no model may be downloaded.

Every model is a pure function of its `Recipe`: the same recipe gives the same bytes. Weights are real safetensors files
(not vLLM's dummy loader), because the daemon's namespace is keyed by their content. No tokenizer is written, but for the one that
a multimodal model's processor insists on: engines take token ids and give token ids back. Nothing here is ever committed; models live in a directory of the caller.
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
IMAGE_TOKEN = VOCABULARY  # stands for an image in a multimodal model's prompt; no `prompt` has it


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


def gqa(kv_heads: int = 2, **rest: Any) -> Recipe:
    """Llama-like: 4 layers, 4 query heads, 2 KV heads, so that two ranks hold one KV head each."""
    return recipe("gqa", _llama(4, 256, 4, kv_heads, 64, 512, 8192, VOCABULARY), **rest)


def demo(layers: int = 16) -> Recipe:
    """Llama-like, with enough work in a prompt of a few thousand tokens for two CPU cores to need seconds."""
    return recipe("demo", _llama(layers, 1024, 16, 4, 64, 2816, 16384, 2048))


def mla(**rest: Any) -> Recipe:
    """DeepSeek-V3-like: latent attention of 512 + 64 values a token, one dense layer, then routed experts; of head sizes that vLLM's kernels for
    Hopper take, too."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_act": "silu",
        "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 512, "q_lora_rank": 64,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 4,
        "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
        "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0, "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("mla", config, **rest)


def qwen3(**rest: Any) -> Recipe:
    """Qwen3-like: grouped-query attention with a norm on queries and keys; one KV-cache group."""
    config = _llama(4, 256, 4, 2, 64, 512, 8192, VOCABULARY)
    return recipe("qwen3", config | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, **rest)


def gemma(window: int = 256, **rest: Any) -> Recipe:
    """Gemma-3-like: sliding-window and full layers, which vLLM keeps in more than one KV-cache group."""
    config = {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": window,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "tie_word_embeddings": True,
        "torch_dtype": "bfloat16", "vocab_size": VOCABULARY, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("gemma", config, **rest)


def gptoss(**rest: Any) -> Recipe:
    """gpt-oss-like: sliding-window and full layers in turn, attention sinks, biases, routed experts; weights in bfloat16, not mxfp4."""
    config = {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_act": "silu",
        "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "vocab_size": VOCABULARY, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("gptoss", config, **rest)


def qwen3next(**rest: Any) -> Recipe:
    """Qwen3-Next-like: gated delta-net layers, whose state vLLM keeps beside the KV cache of every fourth, full-attention layer."""
    config = {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu",
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "vocab_size": VOCABULARY, "attention_bias": False, "bos_token_id": 0, "eos_token_id": 1,
    }
    return recipe("qwen3next", config, **rest)


def eagle(**rest: Any) -> Recipe:
    """A drafter of one layer for `gqa`, as EAGLE has it: it reads the target's hidden states, and the target's embeddings and head."""
    config = _llama(1, 256, 4, 2, 64, 512, 8192, VOCABULARY)
    return recipe("eagle", config | {"eagle_drafter": True}, **rest)


def mtp(**rest: Any) -> Recipe:
    """MiMo-like: Qwen2's layers, and one more in the same files that guesses the token after the next."""
    config = _llama(4, 256, 4, 2, 64, 512, 8192, VOCABULARY) | {"attention_bias": True, "use_sliding_window": False}
    return recipe("mtp", config | {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "num_nextn_predict_layers": 1}, **rest)


def multimodal(**rest: Any) -> Recipe:
    """LLaVA-like: an image of 56 by 56 pixels becomes 16 tokens of a Llama-like model."""
    config = {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": "bfloat16",
        "image_token_index": IMAGE_TOKEN, "image_seq_length": 16, "projector_hidden_act": "gelu", "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
        "text_config": _llama(4, 256, 4, 2, 64, 512, 8192, VOCABULARY + 32),
        "vision_config": {
            "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_channels": 3, "image_size": 56, "patch_size": 14,
            "projection_dim": 128, "layer_norm_eps": 1e-5,
        },
    }
    return recipe("multimodal", config, **rest)


def _mlp(prefix: str, hidden: int, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (size, hidden),
        f"{prefix}.up_proj.weight": (size, hidden),
        f"{prefix}.down_proj.weight": (hidden, size),
    }


def _attention_shapes(c: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, heads, kv, head = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
    gate = 2 if c["model_type"] == "qwen3_next" else 1  # queries and the gate of what attention gives, in one
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.q_proj.weight": (heads * head * gate, hidden),
        f"{prefix}.k_proj.weight": (kv * head, hidden),
        f"{prefix}.v_proj.weight": (kv * head, hidden),
        f"{prefix}.o_proj.weight": (hidden, heads * head),
    }
    if c["model_type"] in ("gemma3_text", "qwen3", "qwen3_next"):
        shapes |= {f"{prefix}.q_norm.weight": (head,), f"{prefix}.k_norm.weight": (head,)}
    if c["model_type"] == "gpt_oss":
        shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items()}
        shapes[f"{prefix}.sinks"] = (heads,)
    if c["model_type"] == "qwen2":
        shapes |= {name.removesuffix("weight") + "bias": shape[:1] for name, shape in shapes.items() if ".o_proj." not in name}
    return shapes


def _guessing_shapes(c: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    """A layer for multi-token prediction, as MiMo has it: it reads the last layer's output and the next token's embedding."""
    hidden, prefix = c["hidden_size"], f"model.mtp_layers.{i}"
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.{norm}_layernorm.weight": (hidden,) for norm in ("token", "hidden", "final")}
    shapes[f"{prefix}.input_proj.weight"] = (hidden, 2 * hidden)
    return shapes | {name.replace(f"model.layers.{i}.", f"{prefix}."): shape for name, shape in _layer_shapes(c, i).items()}


def _delta_net_shapes(c: dict[str, Any], prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, values = c["hidden_size"], c["linear_num_value_heads"]
    key_dim = c["linear_num_key_heads"] * c["linear_key_head_dim"]
    value_dim = values * c["linear_value_head_dim"]
    return {
        f"{prefix}.in_proj_qkvz.weight": (2 * key_dim + 2 * value_dim, hidden),
        f"{prefix}.in_proj_ba.weight": (2 * values, hidden),
        f"{prefix}.conv1d.weight": (2 * key_dim + value_dim, 1, c["linear_conv_kernel_dim"]),
        f"{prefix}.A_log": (values,),
        f"{prefix}.dt_bias": (values,),
        f"{prefix}.norm.weight": (c["linear_value_head_dim"],),
        f"{prefix}.out_proj.weight": (hidden, value_dim),
    }


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


def _experts(prefix: str, hidden: int, size: int, experts: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for e in range(experts):
        shapes |= _mlp(f"{prefix}.experts.{e}", hidden, size)
    return shapes


def _fused_experts(prefix: str, hidden: int, size: int, experts: int) -> dict[str, tuple[int, ...]]:
    """A router and experts as gpt-oss stores them: all in one tensor, input first."""
    return {
        f"{prefix}.router.weight": (experts, hidden),
        f"{prefix}.router.bias": (experts,),
        f"{prefix}.experts.gate_up_proj": (experts, hidden, 2 * size),
        f"{prefix}.experts.gate_up_proj_bias": (experts, 2 * size),
        f"{prefix}.experts.down_proj": (experts, size, hidden),
        f"{prefix}.experts.down_proj_bias": (experts, hidden),
    }


def _linear(prefix: str, out: int, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{prefix}.weight": (out, size), f"{prefix}.bias": (out,)}


def _vision_shapes(c: dict[str, Any], text_hidden: int) -> dict[str, tuple[int, ...]]:
    """A CLIP tower and what projects its patches to the text model's tokens."""
    hidden, patch, prefix = c["hidden_size"], c["patch_size"], "model.vision_tower.vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.embeddings.class_embedding": (hidden,),
        f"{prefix}.embeddings.patch_embedding.weight": (hidden, c["num_channels"], patch, patch),
        f"{prefix}.embeddings.position_embedding.weight": ((c["image_size"] // patch) ** 2 + 1, hidden),
        f"{prefix}.pre_layrnorm.weight": (hidden,),
        f"{prefix}.pre_layrnorm.bias": (hidden,),
    }
    for i in range(c["num_hidden_layers"]):
        layer = f"{prefix}.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{projection}", hidden, hidden)
        shapes |= _linear(f"{layer}.mlp.fc1", c["intermediate_size"], hidden) | _linear(f"{layer}.mlp.fc2", hidden, c["intermediate_size"])
        shapes |= {f"{layer}.layer_norm{n}.{part}": (hidden,) for n in (1, 2) for part in ("weight", "bias")}
    shapes |= _linear("model.multi_modal_projector.linear_1", text_hidden, hidden)
    return shapes | _linear("model.multi_modal_projector.linear_2", text_hidden, text_hidden)


def _layer_shapes(c: dict[str, Any], i: int) -> dict[str, tuple[int, ...]]:
    hidden, prefix = c["hidden_size"], f"model.layers.{i}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}.input_layernorm.weight": (hidden,),
        f"{prefix}.post_attention_layernorm.weight": (hidden,),
    }
    if c["model_type"] == "gemma3_text":
        shapes |= {f"{prefix}.pre_feedforward_layernorm.weight": (hidden,), f"{prefix}.post_feedforward_layernorm.weight": (hidden,)}
    if c["model_type"] == "gpt_oss":
        shapes |= _attention_shapes(c, f"{prefix}.self_attn")
        return shapes | _fused_experts(f"{prefix}.mlp", hidden, c["intermediate_size"], c["num_local_experts"])
    if c["model_type"] == "qwen3_next":
        if c["layer_types"][i] == "linear_attention":
            shapes |= _delta_net_shapes(c, f"{prefix}.linear_attn")
        else:
            shapes |= _attention_shapes(c, f"{prefix}.self_attn")
        shapes[f"{prefix}.mlp.gate.weight"] = (c["num_experts"], hidden)
        shapes[f"{prefix}.mlp.shared_expert_gate.weight"] = (1, hidden)
        shapes |= _mlp(f"{prefix}.mlp.shared_expert", hidden, c["shared_expert_intermediate_size"])
        return shapes | _experts(f"{prefix}.mlp", hidden, c["moe_intermediate_size"], c["num_experts"])
    if c["model_type"] != "deepseek_v3":
        return shapes | _attention_shapes(c, f"{prefix}.self_attn") | _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
    shapes |= _mla_shapes(c, f"{prefix}.self_attn")
    if i < c["first_k_dense_replace"]:
        return shapes | _mlp(f"{prefix}.mlp", hidden, c["intermediate_size"])
    shapes[f"{prefix}.mlp.gate.weight"] = (c["n_routed_experts"], hidden)
    shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    shapes |= _mlp(f"{prefix}.mlp.shared_experts", hidden, c["moe_intermediate_size"] * c["n_shared_experts"])
    return shapes | _experts(f"{prefix}.mlp", hidden, c["moe_intermediate_size"], c["n_routed_experts"])


def _fill(name: str, shape: tuple[int, ...], generator: Any, c: dict[str, Any]) -> Any:
    import torch

    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape, dtype=torch.float32)
    if name.endswith("A_log"):  # how fast a recurrent state is forgotten: within tens of tokens, so that a wrong one is seen
        return torch.rand(shape, generator=generator) * 2 - 5
    if name.endswith((".bias", ".sinks")):
        return torch.randn(shape, generator=generator) * 0.1
    if name == "model.norm.weight" and c["model_type"] == "gemma3_text":
        return torch.full(shape, 7.0)  # makes up for the small embeddings, see below
    if len(shape) == 1:  # a norm; Gemma's and most of Qwen3-Next's add one to what is stored
        added = c["model_type"] == "gemma3_text" or (c["model_type"] == "qwen3_next" and ".linear_attn." not in name)
        return torch.zeros(shape) if added else torch.ones(shape)
    # Attention that looks at something: queries and keys get a larger scale, so a wrong block changes the output.
    scale = 2.0 if ("q_" in name or "k_proj" in name or "kv_a" in name) else 1.0
    return torch.randn(shape, generator=generator) * (scale * shape[1] ** -0.5)


def weights(r: Recipe) -> dict[str, Any]:
    """The tensors of a recipe, in file order."""
    import torch

    whole = r.settings()
    c = whole.get("text_config", whole)
    dtype = getattr(torch, r.weights_dtype)
    layers = c["num_hidden_layers"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    for i in range(layers):
        shapes |= _layer_shapes(c, i)
    for i in range(c.get("num_nextn_predict_layers", 0)):
        shapes |= _guessing_shapes(c, i)
    shapes["model.norm.weight"] = (c["hidden_size"],)
    if not c["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (c["vocab_size"], c["hidden_size"])
    if "vision_config" in whole:
        shapes |= _vision_shapes(whole["vision_config"], c["hidden_size"])
    if c.get("eagle_drafter"):
        shapes = {n: shape for n, shape in shapes.items() if n.startswith("model.layers.") and not n.endswith("input_layernorm.weight")}
        shapes["fc.weight"] = (c["hidden_size"], 2 * c["hidden_size"])
    usual = torch.Generator().manual_seed(r.seed)
    changed = torch.Generator().manual_seed(r.seed if r.middle_seed is None else r.middle_seed)
    middle = {f"model.layers.{i}." for i in range(1, layers - 1)} if r.middle_seed is not None else set()
    out = {}
    for name, shape in shapes.items():
        tensor = _fill(name, shape, usual, c)
        if any(name.startswith(m) for m in middle):
            tensor = _fill(name, shape, changed, c)
        if name.endswith("embed_tokens.weight"):
            # Gemma scales them itself, and compares what comes out with them: larger ones would only repeat the last token.
            tensor = tensor * (0.25 if c["model_type"] == "gemma3_text" else c["hidden_size"] ** 0.5)
        out[name] = tensor if name.endswith(("e_score_correction_bias", "A_log")) else tensor.to(dtype)
    if c.get("eagle_drafter"):
        out = {n.removeprefix("model."): t for n, t in out.items()}
    if "vision_config" in whole:
        text = ("model.embed_tokens.", "model.layers.", "model.norm.")
        out = {"model.language_model." + n.removeprefix("model.") if n.startswith(text) else n: t for n, t in out.items()}
    return out


def _processor(c: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The files besides config.json from which Transformers makes what turns images into pixel values: name -> content."""
    size = c["vision_config"]["image_size"]
    words = {"<unk>": 0} | {f"t{i}": i for i in range(1, c["text_config"]["vocab_size"])}
    words["<image>"] = words.pop(f"t{c['image_token_index']}")
    image = {"id": words["<image>"], "content": "<image>", "special": True, "normalized": False}
    return {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
            "image_mean": [0.5] * 3, "image_std": [0.25] * 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor", "patch_size": c["vision_config"]["patch_size"], "image_token": "<image>",
            "vision_feature_select_strategy": c["vision_feature_select_strategy"], "num_additional_image_tokens": 1,
        },
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"},
        "tokenizer.json": {
            "version": "1.0", "added_tokens": [image | {"single_word": False, "lstrip": False, "rstrip": False}],
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        },
    }


def make(r: Recipe, root: pathlib.Path) -> pathlib.Path:
    """The directory of a recipe's model under `root`; written once, then reused."""
    from safetensors.torch import save_file

    where = root / r.key()
    if where.exists():
        return where
    scratch = root / f".{r.key()}.{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    c = r.settings()
    for name, content in ({"config.json": c} | (_processor(c) if "vision_config" in c else {})).items():
        (scratch / name).write_text(json.dumps(content, indent=1))
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
