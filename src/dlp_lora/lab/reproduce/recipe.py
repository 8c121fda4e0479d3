"""Recipes: a small TOML file in, the settings of `reproduce` for one backbone out."""

import tomllib
from dataclasses import fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from dlp_lora.errors import TrainingError
from dlp_lora.lab.evals.answers import AnswerArgs
from dlp_lora.lab.reproduce import ReproduceArgs
from dlp_lora.training.args import PRESETS, AdapterTrainingArgs
from dlp_lora.training.router import RouterTrainingArgs

SECTIONS: dict[str, type] = {"training": AdapterTrainingArgs, "answers": AnswerArgs, "router": RouterTrainingArgs}


def recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _folder().iterdir() if file.name.endswith(".toml"))


def read_recipe(
    name: str | Path, args: ReproduceArgs | None = None, *, preset: str | None = None
) -> tuple[str, ReproduceArgs]:
    """Reads a recipe by its name or path; gives the model and the settings, on top of `args`.

    What a `preset` sets wins over the recipe; what it leaves at the default stays as the recipe has it.

    Raises:
        TrainingError: if there is no such recipe, or a key of it means nothing.
    """
    text = _read(name)
    try:
        recipe = tomllib.loads(text)
        model = recipe.pop("model")
        recipe["preset"] = preset or recipe.get("preset")
        found = _settings(args or ReproduceArgs(), recipe)
        return model, found if preset is None else with_preset(found, preset)
    except tomllib.TOMLDecodeError as error:
        raise TrainingError(f"recipe {name}: not TOML ({error}); correct it") from error
    except KeyError as error:
        raise TrainingError(f'recipe {name} names no model; add model = "owner/name" at its top') from error
    except (TypeError, ValueError) as error:
        raise TrainingError(f"recipe {name}: {error}") from error


def with_preset(args: ReproduceArgs, preset: str) -> ReproduceArgs:
    """The settings with what a preset of adapter training sets.

    Raises:
        ValueError: if there is no such preset.
    """
    if preset not in PRESETS:
        raise ValueError(f"no preset {preset!r}; choose {' or '.join(PRESETS)}")
    default, own = vars(PRESETS["default"]), vars(PRESETS[preset])
    return replace(args, training=replace(args.training, **{k: v for k, v in own.items() if v != default[k]}))


def _settings(args: ReproduceArgs, recipe: dict[str, Any]) -> ReproduceArgs:
    preset = recipe.pop("preset")
    if preset is not None:
        args = with_preset(replace(args, training=PRESETS["default"]), preset)
    changes: dict[str, Any] = {}
    for key, value in recipe.items():
        if key in SECTIONS:
            known = [f.name for f in fields(SECTIONS[key])]
            if unknown := [k for k in value if k not in known]:
                raise ValueError(f"[{key}] has no setting {unknown[0]!r}; there are {', '.join(known)}")
            value = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
            changes[key] = replace(getattr(args, key), **value)
        elif key in {f.name for f in fields(ReproduceArgs)}:
            changes[key] = tuple(value) if isinstance(value, list) else value
        else:
            raise ValueError(f"no setting {key!r}; there are {', '.join(f.name for f in fields(ReproduceArgs))}")
    return replace(args, **changes)


def _read(name: str | Path) -> str:
    if str(name) in recipes():
        return str((_folder() / f"{name}.toml").read_text(encoding="utf-8"))
    if Path(name).is_file():
        return Path(name).read_text(encoding="utf-8")
    raise TrainingError(f"no recipe {name}; give a TOML file, or one of {', '.join(recipes())}")


def _folder() -> Any:
    return files("dlp_lora.lab.reproduce") / "recipes"
