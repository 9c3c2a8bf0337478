"""Commands beside training and evaluation: `python tools/NAME.py --help`."""
