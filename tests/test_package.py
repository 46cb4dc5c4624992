"""The package as others get it: a wheel that is complete without the checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: object, cwd: Path) -> str:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, check=True
    ).stdout


def test_a_wheel_installed_elsewhere_finds_its_recipes_and_digits(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--disable-pip-version-check"]
    run("-m", "pip", "wheel", ROOT, *options, "--wheel-dir", tmp_path, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run("-m", "pip", "install", wheel, "--no-deps", "--quiet", "--target", tmp_path / "site", cwd=tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import sdcli; from sdcli.recipe.load import load_recipe, recipe_folder; from sdcli.data.open import open_dataset\n"
        "print(sdcli.__file__, recipe_folder(), load_recipe(['byot']).title, len(open_dataset('digits').splits['train']))"
    )
    file, folder, *rest = run("-c", code, cwd=tmp_path).split()
    assert Path(file) == tmp_path / "site" / "sdcli" / "__init__.py"
    assert Path(folder) == tmp_path / "site" / "sdcli" / "recipes"
    assert rest == ["Be", "your", "own", "teacher", "1438"]
    assert (tmp_path / "site" / "sdcli" / "recipes" / "schedules" / "cifar.toml").is_file()
    assert (tmp_path / "site" / "sdcli" / "report" / "page.html").is_file()
