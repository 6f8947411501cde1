"""Sphinx: pip install -e '.[docs]' && sphinx-build docs docs/_build"""

project = "gptq_ao"
extensions = ["myst_parser"]
html_theme = "furo"
exclude_patterns = ["_build"]
