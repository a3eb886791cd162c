"""The paper's tables and figures on a machine that everybody has: `python -m paper_repro --help`.

One module per table or figure makes an `Experiment`: `run` measures and returns plain numbers, `CLAIMS`
say what the paper states and when it counts as reproduced, `section` and `plots` show it. `harness/` lists
them, remembers what has been measured and writes the report from JSON files alone; `materials/` fetches
models and texts or makes them; `measures/` has what several experiments share.
"""

import os

# Torch's threads wait for each other by spinning, which on a machine that is busy with other work takes
# six times as long. Sleeping costs a tenth where it is idle. It is read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
