"""What pyproject.toml cannot say: a package index shows README.md without its relative links and images.

They would be dead there: the files they name are beside README.md only in the repository.
"""

import re
from pathlib import Path

from setuptools import setup

RELATIVE = r"\((?!https?://)[^)]*\)"
NOTE = "*The plots and the files that this text names are in the source repository.*\n\n"

text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
text = re.sub(rf"^!\[[^]]*\]{RELATIVE}\n+", "", text, flags=re.MULTILINE)
text = re.sub(rf"\[([^]]*)\]{RELATIVE}", r"\1", text)
title, rest = text.split("\n\n", 1)
setup(long_description=f"{title}\n\n{NOTE}{rest}", long_description_content_type="text/markdown")
