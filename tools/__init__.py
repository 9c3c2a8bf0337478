"""Commands around training and evaluation: `python tools/NAME.py --help`.

Each command is started as a file, so it puts the project's folder first on the path. Otherwise
another package named `datasets` would come first, even if this project is installed.
"""
