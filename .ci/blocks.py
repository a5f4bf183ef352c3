"""Print the fenced code blocks of a language in a Markdown file, so that CI runs what readers read."""

import re
import sys
from pathlib import Path

path, language = sys.argv[1:]
blocks = re.findall(rf"^```{language}\n(.*?)^```$", Path(path).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
if not blocks:
    sys.exit(f"{path}: no {language} block")
print("\n".join(blocks), end="")
