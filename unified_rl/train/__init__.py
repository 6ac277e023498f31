"""ZeRO-3 policy optimisation; `python -m unified_rl.train --help`."""
