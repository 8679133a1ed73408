"""DeepSpeed JSON files found: the user's by path, those that come with the package by name. Standard library only."""

from pathlib import Path

from gdyn.errors import UserError

_INSTALLED = Path(__file__).parent / "ds_configs"
_CHECKOUT = Path(__file__).parents[1] / "ds_configs"


def bundled() -> dict[str, Path]:
    """Name -> file of the recipes in ds_configs/, which an installation carries inside the package."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.json"))}


def find_recipe(name_or_path: str | Path, relative_to: Path | None = None) -> Path:
    """Absolute path of a DeepSpeed JSON.

    Args:
        name_or_path: a file, looked for from `relative_to` and then from the current folder; else the name of a bundled
            recipe: `fp32_zero1`, `fp32_zero1.json` or `ds_configs/fp32_zero1.json`.
        relative_to: the run file's folder.

    Raises: UserError with the bundled names where there is neither.
    """
    wanted = Path(name_or_path).expanduser()
    folders = [relative_to, Path()] if relative_to else [Path()]
    for path in (folder / wanted for folder in folders):
        if path.is_file():
            return path.absolute()
    recipes = bundled()
    by_name = wanted.suffix in ("", ".json") and wanted.parent in (Path(), Path("ds_configs"))
    if by_name and wanted.stem in recipes:
        return recipes[wanted.stem].absolute()
    looked = " or ".join(dict.fromkeys(str(folder.absolute()) for folder in folders))
    raise UserError(
        f'DeepSpeed JSON "{name_or_path}" is neither a file (looked from {looked}) nor a recipe; '
        f"recipes: {', '.join(recipes) or 'none'}."
    )
