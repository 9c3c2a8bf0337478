"""What a shared cluster does to a run, and what strangers' files do to a program.

`make reliability` runs these with more kills and more examples than CI does; the summary at the end
counts what was survived.
"""
