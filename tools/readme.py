#!/usr/bin/env python
"""Write README.md from nbs/index.ipynb, without Quarto.

python tools/readme.py            write README.md
python tools/readme.py --check    exit 1 if README.md is not what the notebook gives
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def render(path: Path) -> str:
    """The notebook as Markdown: hidden cells and directives dropped, fences with their language."""
    import nbformat
    from nbconvert import MarkdownExporter

    nb = nbformat.read(path, 4)
    nb.cells = [c for c in nb.cells if not re.match(r"(#\|\s*(hide|default_exp)|<!--)", c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    # nbdev_clean drops it, and without it the fences lose their language.
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = text.replace("](../", "](").replace('src="../', 'src="')  # the notebook lies one folder deeper
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def main() -> int:
    """Write or check README.md."""
    text, readme = render(ROOT / "nbs" / "index.ipynb"), ROOT / "README.md"
    if "--check" not in sys.argv:
        readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        print("README.md is not what nbs/index.ipynb gives; run tools/readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
