"""The paper's tables and figures on a machine that everybody has: `python -m paper_repro --help`.

One module per table or figure makes an `Experiment`: `run` measures and returns plain numbers, `CLAIMS`
say what the paper states and when it counts as reproduced, `section` and `plots` show it. `experiment.py`
lists them, `lab.py` remembers what has been measured, `report.py` writes REPORT.md from JSON files alone.
"""

import os

# Torch's threads wait for each other by spinning, which on a machine that is busy with other work takes
# six times as long. Sleeping costs a tenth where it is idle. It is read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
