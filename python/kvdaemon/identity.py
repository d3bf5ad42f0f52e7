"""What must agree for two engines to share KV blocks, as far as configuration and files say it.

Digests of weights and adapters take time, so they are computed on a thread of their own (`Finder`); until they are known
nothing is stored or loaded. Digests of files are kept in the user's cache directory by device, inode, size and times.
"""

from __future__ import annotations

import json
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kvdaemon._native import digest, file_digest
from kvdaemon._paths import cache_dir

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
KNOWN_LOADERS = ("auto", "hf", "safetensors", "pt", "npcache", "mistral", "gguf", "bitsandbytes", "fastsafetensors")
_BLOB = re.compile(r"^[0-9a-f]{64}$")
_MOST_FILES = 4096


class Unknown(Exception):
    """The content can't be told from outside; the text says why."""


def _stamp(path: Path) -> tuple[int, ...]:
    stat = path.stat()
    return (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def content_digest(path: Path) -> str:
    """BLAKE3 of a file's content, from the cache of digests if the file is the one that was read."""
    path = path.resolve()
    stamp = _stamp(path)
    kept = Path(cache_dir()) / "digests" / digest(repr(stamp).encode())
    try:
        known = kept.read_text().strip()
        if _BLOB.match(known):
            return known
    except OSError:
        pass
    found = file_digest(os.fspath(path))
    if _stamp(path) == stamp:
        _keep(kept, found)
    return found


def _keep(place: Path, text: str) -> None:
    """Best effort: without a cache the digest is computed again."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.{os.getpid()}.{threading.get_ident()}")
        fresh.write_text(text + "\n")
        fresh.replace(place)
    except OSError:
        pass


def _hub_blob(path: Path) -> str | None:
    """The hub's own digest of a file in its cache: what the link there points to is named by it."""
    if not path.is_symlink():
        return None
    target = path.resolve()
    return target.name if target.parent.name == "blobs" and _BLOB.match(target.name) else None


def tree_digest(directory: Path, suffixes: Iterable[str]) -> str:
    """A digest over names and contents of a directory's files with these suffixes.

    Raises:
        Unknown: there are none, or too many.
    """
    wanted = tuple(suffixes)
    files = sorted(path for path in directory.rglob("*") if path.name.endswith(wanted) and path.is_file())
    if not files:
        raise Unknown(f"{directory} has no files of weights")
    if len(files) > _MOST_FILES:
        raise Unknown(f"{directory} has more than {_MOST_FILES} files of weights")
    lines = []
    for path in files:
        blob = _hub_blob(path)
        content = f"hub:{blob}" if blob else f"blake3:{content_digest(path)}"
        lines.append(f"{path.relative_to(directory)}\0{content}")
    return "blake3:" + digest("\n".join(lines).encode())


def model_directory(model: str, revision: str | None, download_dir: str | None) -> Path:
    """Where the files of a model are: a directory, or the hub's cache.

    Raises:
        Unknown: neither.
    """
    if os.path.isdir(model):
        return Path(model)
    if os.path.isfile(model):
        raise Unknown(f"{model} is a single file")
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True)
    except Exception as error:
        raise Unknown(f"the files of {model} are not in the hub's cache: {error}") from error
    return Path(found)


def weights_identity(model_config: Any, load_config: Any, besides: tuple[str, ...] = ()) -> str:
    """What the weights are; of the files beside them, also those whose names end like `besides`.

    Raises:
        Unknown: only this engine start knows.
    """
    loader = str(getattr(load_config, "load_format", "auto"))
    if loader not in KNOWN_LOADERS:
        raise Unknown(f"weights come from the loader {loader!r}")
    if getattr(model_config, "model_weights", ""):
        raise Unknown(f"weights come from {model_config.model_weights}")
    directory = model_directory(
        model_config.model,
        getattr(model_config, "revision", None),
        getattr(load_config, "download_dir", None),
    )
    suffixes: tuple[str, ...] = WEIGHT_SUFFIXES + besides
    if getattr(model_config, "trust_remote_code", False):
        suffixes += (".py",)
    found = tree_digest(directory, suffixes)
    extra = getattr(load_config, "model_loader_extra_config", None)
    return found if not extra else f"{found}:{digest(_json(extra).encode())}"


def adapter_digest(path: str) -> str:
    """What a LoRA is: its files, not its name.

    Raises:
        Unknown: its files can't be found.
    """
    directory = model_directory(path, None, None)
    return tree_digest(directory, (*WEIGHT_SUFFIXES, "adapter_config.json", "new_embeddings.safetensors"))


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str, separators=(",", ":"))


def _plain(text: Any) -> str:
    """A value without control characters, not empty."""
    cleaned = "".join(char for char in str(text) if char.isprintable())
    return cleaned or "-"


def _hf_dict(config: Any) -> dict[str, Any]:
    """The effective model configuration, without what does not change values."""
    try:
        whole = dict(config.to_dict())
    except Exception:
        whole = dict(vars(config))
    for name in ("torch_dtype", "dtype"):
        whole.pop(name, None)
    return dict(_without_places(whole))


def _without_places(value: Any) -> Any:
    """Also of the configurations within."""
    if isinstance(value, dict):
        places = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
        return {name: _without_places(one) for name, one in value.items() if name not in places}
    return [_without_places(one) for one in value] if isinstance(value, list | tuple) else value


def _rope(config: Any, longest: Any) -> str:
    """How positions are rotated. LongRoPE takes other factors for models that are served with a longer context (`longest` tokens)."""
    names = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "max_position_embeddings")
    found = {name: getattr(config, name) for name in names if getattr(config, name, None) is not None}
    if _is_long_rope(config):
        found["max_model_len"] = longest
    return _json(found)


def _is_long_rope(config: Any) -> bool:
    text = _json([getattr(config, name, None) for name in ("rope_scaling", "rope_parameters")])
    return '"longrope"' in text or '"su"' in text


def _quantization(model: Any) -> str | None:
    """The method, and what is set beside the files of a model (vLLM's online quantisation)."""
    method = getattr(model, "quantization", None)
    given = getattr(model, "quantization_config", None)
    if given is None:
        return str(method) if method else None
    text = repr(given)
    return f"{method}:{uuid.uuid4() if ' at 0x' in text else digest(text.encode())}"


GUESSES_WITHOUT_KV = ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")
"""Ways of guessing tokens that have no KV cache, and change nothing in the target's."""
GUESSES_OF_MODELS = ("eagle", "eagle3", "mtp", "draft_model", "dflash", "dspark")
"""Those whose KV cache follows from the files of a model and the settings below."""


def _drafter(vllm_config: Any, weights: str, warn: Callable[[str], None]) -> str | None:
    """What a drafter's part of the KV is, if it has one: its files, and the settings that change what is made of them. Not its effective
    configuration: the model's code adds to that when it runs, which may be in this process or in another."""
    config, target = getattr(vllm_config, "speculative_config", None), vllm_config.model_config
    if config is None or config.method in GUESSES_WITHOUT_KV:
        return None
    draft = config.draft_model_config
    names = (
        "method", "num_speculative_tokens", "num_speculative_tokens_per_batch_size", "parallel_drafting", "quantization", "kv_cache_dtype",
        "attention_backend", "use_heterogeneous_vocab", "index_share_for_mtp_iteration", "max_model_len",
    )  # fmt: skip
    found = {name: getattr(config, name, None) for name in names}
    try:
        if config.method not in GUESSES_OF_MODELS:
            raise Unknown(f"kvd does not know what the KV of {config.method!r} follows from")
        if callable(getattr(target, "hf_overrides", None)):
            raise Unknown("hf_overrides is a function")
        if str(getattr(draft, "config_format", "auto")) not in ("auto", "hf", "mistral"):
            raise Unknown(f"its configuration is of the format {draft.config_format}")
        found["dtype"] = str(draft.dtype).removeprefix("torch.")
        text = getattr(draft, "hf_text_config", None) or draft.hf_config
        if _is_long_rope(text):
            found["rope"] = _rope(text, draft.max_model_len)
        if draft.model == target.model:  # layers of the target's own files (MTP)
            found["files"] = weights
        else:
            load = getattr(config, "draft_load_config", None) or vllm_config.load_config
            found["files"] = weights_identity(draft, load, ("config.json", "params.json"))
    except (Unknown, OSError) as error:
        warn(f"KV blocks are shared with no other engine start, because the drafter can't be told from outside: {error}")
        found["files"] = f"private:{uuid.uuid4()}"
    return _json({name: value for name, value in found.items() if value is not None})


def hash_identity(cache_config: Any, none_hash: bytes, lookahead: int) -> str:
    """Algorithm and seed of the engine's block hashes (the hash that begins every chain), and how many tokens after its block
    a hash covers."""
    algorithm = getattr(cache_config, "prefix_caching_hash_algo", "?")
    suffix = f":lookahead={lookahead}" if lookahead else ""
    return f"{algorithm}:{none_hash.hex()[:32]}{suffix}"


def facts(
    vllm_config: Any, kv_dtype: str, tenant: str, weights: str, none_hash: bytes, warn: Callable[[str], None]
) -> list[tuple[str, str]]:
    """The fields of the namespace record that come from the configuration. `warn` hears why engines will not share."""
    model = vllm_config.model_config
    cache = vllm_config.cache_config
    text = getattr(model, "hf_text_config", None) or model.hf_config
    name = os.path.basename(os.path.normpath(model.model)) if os.path.isdir(model.model) else model.model
    found = {
        "tenant": tenant,
        "model": name,
        "weights": weights,
        "kv_dtype": kv_dtype,
        "hash": hash_identity(cache, none_hash, getattr(vllm_config, "num_hash_lookahead_tokens", 0)),
        "compute_dtype": str(model.dtype).removeprefix("torch."),
        "rope": _rope(text, model.max_model_len),
        "overrides": "blake3:" + digest(_json(_hf_dict(model.hf_config)).encode()),
    }
    if quantization := _quantization(model):
        found["quantization"] = quantization
    if drafter := _drafter(vllm_config, weights, warn):
        found["speculative"] = drafter
    return [(key, _plain(value)) for key, value in found.items()]


class Finder:
    """Finds things out on threads of its own and hands them on. Threads end with the process."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._stopped = threading.Event()

    def weights(self, model_config: Any, load_config: Any, chosen: str) -> str:
        """The weights identity; private to this start when it can't be known."""
        if chosen:
            return f"chosen:{chosen}"
        try:
            return weights_identity(model_config, load_config)
        except (Unknown, OSError) as error:
            self._warn(
                f"KV blocks are shared with no other engine start, because the weights can't be told from outside ({error}); "
                "set weights_id in kv_connector_extra_config to name them"
            )
            return f"private:{uuid.uuid4()}"

    def adapter(self, path: str) -> str:
        """An adapter's digest; private to this start when it can't be known."""
        try:
            return adapter_digest(path)
        except (Unknown, OSError) as error:
            self._warn(f"KV blocks of the adapter at {path} are shared with no other engine start: {error}")
            return f"private:{uuid.uuid4()}"

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Runs `work` on a thread. What it raises becomes a warning."""

        def run() -> None:
            try:
                work()
            except Exception as error:
                if not self._stopped.is_set():
                    self._warn(f"{name} failed, so KV blocks are neither stored nor loaded: {error}")

        threading.Thread(target=run, name=name, daemon=True).start()

    def wait(self, ready: Callable[[], Any], timeout: float) -> Any:
        """Polls until `ready` gives something, at most `timeout` seconds; None if it never does."""
        step, waited = 0.005, 0.0
        while (found := ready()) is None and waited < timeout and not self._stopped.wait(step):
            waited += step
        return found

    def stop(self) -> None:
        """Threads end as soon as they notice."""
        self._stopped.set()
