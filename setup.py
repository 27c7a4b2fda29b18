"""What pyproject.toml cannot say: the README as a package index shows it.

There its links to files of the repository would lead nowhere.
"""

import re
import tomllib
from pathlib import Path

from setuptools import setup

here = Path(__file__).resolve().parent
repository = tomllib.loads((here / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
text = (here / "README.md").read_text()
text = re.sub(r"(!\[[^]]*)\]\((?!https?:)", rf"\1]({repository}/raw/main/", text)
text = re.sub(r"\]\((?!https?:|#)", rf"]({repository}/blob/main/", text)

setup(long_description=text, long_description_content_type="text/markdown")
