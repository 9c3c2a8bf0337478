"""Commands beside training and evaluation: `python tools/NAME.py --help`.

Each puts the project's folder first on the path: it is started as a file, and even where the
project is installed (`pip install -e .`), another package named `datasets` would win otherwise.
"""
