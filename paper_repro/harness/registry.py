"""All experiments, in the order in which they run; a new one is added here."""

from paper_repro import (
    beyond,
    bits,
    datatypes,
    embeddings,
    figure3,
    finetune,
    forgetting,
    guanaco,
    latency,
    layers,
    lora_sizes,
    memory,
    normality,
    paged,
    rank,
    table2,
    tables34,
)
from paper_repro.harness.experiment import Experiment

MODULES = (
    datatypes,
    bits,
    normality,
    table2,
    embeddings,
    figure3,
    tables34,
    finetune,
    layers,
    rank,
    forgetting,
    memory,
    paged,
    guanaco,
    lora_sizes,
    latency,
    beyond,
)

EXPERIMENTS: dict[str, Experiment] = {m.EXPERIMENT.name: m.EXPERIMENT for m in MODULES}
