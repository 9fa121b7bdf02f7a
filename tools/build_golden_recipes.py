"""Write every recipe as it resolves into tests/golden/recipes: a diff shows what a change touches.

python tools/build_golden_recipes.py            write the files
python tools/build_golden_recipes.py --check    exit 1 if one is not what its recipe says
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # works in a checkout that is not installed

from cocoa_dist.config import dump_yaml, load_recipe, recipe_names  # noqa: E402

FOLDER = ROOT / "tests" / "golden" / "recipes"


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the files; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    wanted = {f"{name}.yaml": dump_yaml(load_recipe(name)) for name in recipe_names()}
    found = {path.name: path.read_text() for path in FOLDER.glob("*.yaml")}
    if not parser.parse_args(argv).check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in found.keys() - wanted.keys():
            (FOLDER / name).unlink()
        for name, text in wanted.items():
            (FOLDER / name).write_text(text)
        return 0
    stale = sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n))
    if stale:
        sys.stderr.write(
            f"recipes resolve otherwise than tests/golden/recipes has them: {', '.join(stale)}; "
            "look at the diff after python tools/build_golden_recipes.py\n"
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
