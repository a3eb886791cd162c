"""All experiments, in the order in which they run; a new one is added here."""

from paper_repro import bits, datatypes, finetune, memory, table2
from paper_repro.experiment import Experiment

EXPERIMENTS: dict[str, Experiment] = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (datatypes, bits, memory, table2, finetune)
}
