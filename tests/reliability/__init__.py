"""What a shared cluster does to a run, and what untrusted files do to a program.

`make reliability` runs these with more kills and more examples than CI does. The summary at the end
counts them.
"""
