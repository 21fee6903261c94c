"""The files of a Hugging Face directory: what they say of the model, and whether they are all there."""

import json
from pathlib import Path
from typing import Any

_LISTED = 5  # names in one message


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Hugging Face directories need transformers: pip install 'weightdecomp[hf]'") from error
    return transformers


def configuration(folder: Path) -> Any:
    """The configuration in a directory, by a class that transformers has.

    Raises:
        ValueError: If the directory or its config.json is missing or damaged, or of a kind that transformers has not.
        ImportError: If `transformers` is not installed.
    """
    check_directory(folder)
    if not (folder / "config.json").exists():
        found = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"'{folder}' has no config.json; it holds {found[:_LISTED] or 'nothing'}")
    document = _json(folder / "config.json")
    transformers, named = _transformers(), document.get("model_type")
    if not isinstance(named, str) or named not in transformers.CONFIG_MAPPING:
        raise ValueError(
            f"'{folder}/config.json' has model_type {named!r}, which transformers "
            f"{transformers.__version__} does not have; load the model by --model and --weights"
        )
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what settings out of range make the class raise has no bound
        raise ValueError(f"'{folder}/config.json' cannot be used ({told(error)}); restore the file") from error


def check_directory(folder: Path) -> None:
    """Refuse what is no directory.

    Raises:
        ValueError: Saying what it is.
    """
    if folder.is_file():
        raise ValueError(f"'{folder}' is a file, expected the directory that holds it: '{folder.parent}'")
    if not folder.is_dir():
        raise ValueError(f"there is no directory '{folder}'; give a local one, as nothing is downloaded")


def told(error: Exception) -> str:
    """An exception of transformers in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _json(path: Path, kind: type = dict) -> Any:
    """What a JSON file holds, of the kind that is due."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); restore the file") from error
    if not isinstance(found, kind):
        raise ValueError(f"'{path}' holds a {type(found).__name__}, expected a {kind.__name__}; restore the file")
    return found


def remedy(config: Any) -> str:
    """What to do where no model can be made from a configuration."""
    if getattr(config, "quantization_config", None) is not None:
        return "the weights are quantised: dequantise the model where it can be loaded, and save it in float32"
    if (attention := config._attn_implementation) not in (None, "eager", "sdpa"):
        return f'set "attn_implementation" to "sdpa" or "eager" there, in place of {attention!r}'
    return "restore the file"


def model_class(config: Any, folder: Path) -> Any:
    """The class of `transformers` that a configuration names.

    Raises:
        ValueError: If it names none, or one of another kind of model.
    """
    transformers = _transformers()
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(
            f"'{folder}/config.json' has architectures {names}, expected the name of one model class of transformers "
            f"{transformers.__version__}; load the model by --model and --weights"
        )
    if not isinstance(config, own := kind.config_class):
        raise ValueError(
            f"'{folder}/config.json' has architectures {names}, a class for model_type {own.model_type!r}, but "
            f"model_type {config.model_type!r}; take config.json and the weights from one checkpoint"
        )
    return kind


def check_weights(folder: Path) -> None:
    """Refuse a directory whose safetensors are missing, in part or altogether.

    Raises:
        ValueError: Naming what is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.exists():
        places = _json(index).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
            raise ValueError(f"'{index}' has no weight_map, which says what each shard holds; restore the file")
        shards = sorted(set(places.values()))
        missing = [shard for shard in shards if not (folder / shard).exists()]
        if missing:
            raise ValueError(f"'{folder}' lacks {_some(missing)} of {len(shards)} shards; copy them there")
    elif not (folder / "model.safetensors").exists():
        pickled = sorted(path.name for ending in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(ending))
        why = f"only pickled weights ({_some(pickled)}), which are never loaded" if pickled else "no weights"
        raise ValueError(
            f"'{folder}' has {why}; expected model.safetensors, or its shards and model.safetensors.index.json "
            "(save_pretrained of transformers writes them)"
        )


def check_report(report: dict[str, Any], kind: str, folder: Path) -> None:
    """Refuse a model that would keep random weights, or a checkpoint of which a part goes unused.

    Raises:
        ValueError: Naming both.
    """
    shapes = [f"{name} is {tuple(came)}, expected {tuple(own)}" for name, came, own in report["mismatched_keys"]]
    complaints = [
        f"{what}: {_some(sorted(names))}"
        for what, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("of another shape", shapes),
        )
        if names
    ]
    if complaints:
        raise ValueError(
            f"the weights in '{folder}' are not those of the {kind} in config.json ({'; '.join(complaints)}); "
            "take both files from one checkpoint"
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def pooling(folder: Path) -> tuple[str | None, bool]:
    """How a directory of sentence-transformers makes one embedding of all positions, and whether of length one.

    Raises:
        ValueError: For other ways than the mean and the first token.
    """
    if not (folder / "modules.json").exists():
        return None, False
    entries = _json(folder / "modules.json", list)
    if not all(isinstance(one, dict) and {"type", "path"} <= one.keys() for one in entries):
        raise ValueError(
            f"'{folder}/modules.json' holds {entries}, expected modules with a type and a path; restore the file"
        )
    kinds = {str(entry["type"]).split(".")[-1]: str(entry["path"]) for entry in entries}
    others = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"})
    settings = _json(folder / kinds["Pooling"] / "config.json") if "Pooling" in kinds else {}
    # Files name modes by flags or, since sentence-transformers 5.5, by one word.
    modes = {name.removeprefix("pooling_mode_") for name, on in settings.items() if on is True} | {
        settings.get("pooling_mode")
    }
    found = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    chosen = [found[mode] for mode in modes if mode in found]
    wrong = sorted(str(mode) for mode in modes if mode not in found and mode not in (None, "include_prompt"))
    if others or wrong or len(chosen) != 1:
        raise ValueError(
            f"'{folder}' is a sentence encoder with {others or wrong or 'no pooling'}, expected pooling by mean or by "
            "first token and then at most Normalize; load it by --model with a module of your own"
        )
    return chosen[0], "Normalize" in kinds
