"""Tables of the papers as they are printed, in compact form.

One string each: a line for each row, columns between bars.
"""

from __future__ import annotations

TABLE2 = """
data type | mean perplexity
Int4 | 34.34
Float4 (E2M1) | 31.07
Float4 (E3M0) | 29.48
NF4 + DQ | 27.41
"""

TABLE3 = """
| RoBERTa-large, GLUE | T5-80M, RougeL | T5-250M | T5-780M | T5-3B | T5-11B
BF16 | 88.6 | 40.1 | 42.1 | 48.0 | 54.3 | 62.0
BF16 replication | 88.6 | 40.0 | 42.2 | 47.3 | 54.9 | -
LoRA BF16 | 88.8 | 40.5 | 42.6 | 47.1 | 55.4 | 60.7
QLoRA Int8 | 88.8 | 40.4 | 42.9 | 45.4 | 56.5 | 60.7
QLoRA FP4 | 88.6 | 40.3 | 42.4 | 47.5 | 55.6 | 60.9
QLoRA NF4 + DQ | - | 40.4 | 42.7 | 47.7 | 55.3 | 60.9
"""

# Alpaca, then FLAN v2, for each size.
TABLE4 = """
| 7B Alpaca | 7B FLAN v2 | 13B Alpaca | 13B FLAN v2 | 33B Alpaca | 33B FLAN v2 | 65B Alpaca | 65B FLAN v2 | mean
BF16 | 38.4 | 45.6 | 47.2 | 50.6 | 57.7 | 60.5 | 61.8 | 62.5 | 53.0
Float4 | 37.2 | 44.0 | 47.3 | 50.0 | 55.9 | 58.5 | 61.3 | 63.3 | 52.2
NF4 + DQ | 39.0 | 44.5 | 47.5 | 50.7 | 57.3 | 59.2 | 61.8 | 63.9 | 53.1
"""

TABLE5 = """
data | 7B | 13B | 33B | 65B
none | 35.1 | 46.9 | 57.8 | 63.4
Self-Instruct | 36.4 | 33.3 | 53.0 | 56.7
Longform | 32.1 | 43.2 | 56.6 | 59.7
Chip2 | 34.5 | 41.6 | 53.6 | 59.8
HH-RLHF | 34.9 | 44.6 | 55.8 | 60.1
Unnatural Instructions | 41.9 | 48.1 | 57.3 | 61.3
Guanaco (OASST1) | 36.6 | 46.4 | 57.0 | 62.2
Alpaca | 38.8 | 47.8 | 57.3 | 62.5
FLAN v2 | 44.5 | 51.4 | 59.2 | 63.9
"""

TABLE6 = """
model | memory | ChatGPT first | ChatGPT second | mean | 95 % interval
GPT-4 | - | 119.4 | 110.1 | 114.5 | 2.6
Bard | - | 93.2 | 96.4 | 94.8 | 4.1
Guanaco 65B | 41 GB | 96.7 | 101.9 | 99.3 | 4.4
Alpaca 65B | - | 63.0 | 77.9 | 70.7 | 4.3
FLAN v2 65B | - | 37.0 | 59.6 | 48.4 | 4.6
Guanaco 33B | 21 GB | 96.5 | 99.2 | 97.8 | 4.4
Open Assistant 33B | 66 GB | 91.2 | 98.7 | 94.9 | 4.5
Alpaca 33B | - | 67.2 | 79.7 | 73.6 | 4.2
FLAN v2 33B | - | 26.3 | 49.7 | 38.0 | 3.9
Vicuna 13B | 26 GB | 91.2 | 98.7 | 94.9 | 4.5
Guanaco 13B | 10 GB | 87.3 | 93.4 | 90.4 | 5.2
Alpaca 13B | - | 63.8 | 76.7 | 69.4 | 4.2
HH-RLHF 13B | - | 55.5 | 69.1 | 62.5 | 4.7
Unnatural Instructions 13B | - | 50.6 | 69.8 | 60.5 | 4.2
Chip2 13B | - | 49.2 | 69.3 | 59.5 | 4.7
Longform 13B | - | 44.9 | 62.0 | 53.6 | 5.2
Self-Instruct 13B | - | 38.0 | 60.5 | 49.1 | 4.6
FLAN v2 13B | - | 32.4 | 61.2 | 47.0 | 3.6
Guanaco 7B | 5 GB | 84.1 | 89.8 | 87.0 | 5.4
Alpaca 7B | - | 57.3 | 71.2 | 64.4 | 5.0
FLAN v2 7B | - | 33.3 | 56.1 | 44.8 | 4.0
"""

ELO = """
model | judged by GPT-4 | judged by people
GPT-4 | 1348 | 1176
Guanaco 65B | 1022 | 1023
Guanaco 33B | 992 | 1009
Vicuna 13B | 974 | 984
ChatGPT | 966 | 916
Guanaco 13B | 916 (Table 1), 913 (Table 7) | 975
Bard | 902 | 909
Guanaco 7B | 879 | 1010
"""

TABLE9 = """
| batch | learning rate | steps | source length | target length
7B and 13B, all other data | 16 | 2e-4 | 10000 | 384 | 128
7B and 13B, OASST1 | 16 | 2e-4 | 1875 | - | 512
7B and 13B, HH-RLHF | 16 | 2e-4 | 10000 | - | 768
7B and 13B, Longform | 16 | 2e-4 | 4000 | 512 | 1024
33B, all other data | 32 | 1e-4 | 5000 | not noted | not noted
33B, OASST1 | 16 | 1e-4 | 1875 | not noted | not noted
33B, HH-RLHF | 32 | 1e-4 | 5000 | not noted | not noted
33B, Longform | 32 | 1e-4 | 2343 | not noted | not noted
65B, all other data | 64 | 1e-4 | 2500 | not noted | not noted
65B, OASST1 | 16 | 1e-4 | 1875 | not noted | not noted
65B, HH-RLHF | 64 | 1e-4 | 2500 | not noted | not noted
65B, Longform | 32 | 1e-4 | 2343 | not noted | not noted
"""

# MMLU after one, two and three epochs, for each number of examples.
TABLE11 = """
data | 50k, 1 | 50k, 2 | 50k, 3 | 100k, 1 | 100k, 2 | 100k, 3 | 150k, 1 | 150k, 2 | 150k, 3
Chip2 | 34.5 | 35.3 | 34.7 | 33.7 | 33.9 | 34.0 | 34.4 | 34.8 | 35.1
Unnatural Instructions | 38.1 | 42.2 | 38.1 | 40.1 | 41.2 | 37.0 | 39.7 | 41.1 | 41.5
FLAN v2 | 43.0 | 43.5 | 44.1 | 43.9 | 43.7 | 44.9 | 44.6 | 45.5 | 43.5
"""

LORA_TABLE2 = """
| MNLI | SST-2 | MRPC | CoLA | QNLI | QQP | RTE | STS-B | mean
RoBERTa-base, fine-tuned (125M) | 87.6 | 94.8 | 90.2 | 63.6 | 92.8 | 91.9 | 78.7 | 91.2 | 86.4
RoBERTa-base, LoRA (0.3M) | 87.5 | 95.1 | 89.7 | 63.4 | 93.3 | 90.8 | 86.6 | 91.5 | 87.2
RoBERTa-large, fine-tuned (355M) | 90.2 | 96.4 | 90.9 | 68.0 | 94.7 | 92.2 | 86.6 | 92.4 | 88.9
RoBERTa-large, LoRA (0.8M) | 90.6 | 96.2 | 90.9 | 68.2 | 94.9 | 91.6 | 87.4 | 92.6 | 89.0
DeBERTa-XXL, fine-tuned | 91.8 | 97.2 | 92.0 | 72.0 | 96.0 | 92.7 | 93.9 | 92.9 | 91.1
DeBERTa-XXL, LoRA (4.7M) | 91.9 | 96.9 | 92.6 | 72.4 | 96.0 | 92.9 | 94.9 | 93.0 | 91.3
"""

LORA_TABLE3 = """
| parameters | BLEU | NIST | METEOR | ROUGE-L | CIDEr
GPT-2 M, fine-tuned | 354.92M | 68.2 | 8.62 | 46.2 | 71.0 | 2.47
GPT-2 M, adapters (L) | 0.37M | 66.3 | 8.41 | 45.0 | 69.8 | 2.40
GPT-2 M, adapters (L) | 11.09M | 68.9 | 8.71 | 46.1 | 71.3 | 2.47
GPT-2 M, adapters (H) | 11.09M | 67.3 | 8.50 | 46.0 | 70.7 | 2.44
GPT-2 M, top 2 layers | 25.19M | 68.1 | 8.59 | 46.0 | 70.8 | 2.41
GPT-2 M, prefixes | 0.35M | 69.7 | 8.81 | 46.1 | 71.4 | 2.49
GPT-2 M, LoRA | 0.35M | 70.4 | 8.85 | 46.8 | 71.8 | 2.53
GPT-2 L, fine-tuned | 774.03M | 68.5 | 8.78 | 46.0 | 69.9 | 2.45
GPT-2 L, adapters (L) | 0.88M | 69.1 | 8.68 | 46.3 | 71.4 | 2.49
GPT-2 L, adapters (L) | 23M | 68.9 | 8.70 | 46.1 | 71.3 | 2.45
GPT-2 L, prefixes | 0.77M | 70.3 | 8.85 | 46.2 | 71.7 | 2.47
GPT-2 L, LoRA | 0.77M | 70.4 | 8.89 | 46.8 | 72.0 | 2.47
"""

LORA_TABLE4 = """
GPT-3 | parameters | WikiSQL | MNLI | SAMSum (R1 / R2 / RL)
fine-tuned | 175,255.8M | 73.8 | 89.5 | 52.0 / 28.0 / 44.5
BitFit | 14.2M | 71.3 | 91.0 | 51.3 / 27.4 / 43.5
embeddings before | 3.2M | 63.1 | 88.6 | 48.3 / 24.2 / 40.5
layers before | 20.2M | 70.1 | 89.5 | 50.8 / 27.3 / 43.5
adapters (H) | 7.1M | 71.9 | 89.8 | 53.0 / 28.9 / 44.8
adapters (H) | 40.1M | 73.2 | 91.5 | 53.2 / 29.0 / 45.1
LoRA | 4.7M | 73.4 | 91.7 | 53.8 / 29.8 / 45.9
LoRA | 37.7M | 74.0 | 91.6 | 53.4 / 29.2 / 45.1
"""

LORA_TABLE5 = """
18M parameters on | q r 8 | k r 8 | v r 8 | o r 8 | q, k r 4 | q, v r 4 | q, k, v, o r 2
WikiSQL | 70.4 | 70.0 | 73.0 | 73.2 | 71.4 | 73.7 | 73.7
MNLI | 91.0 | 90.8 | 91.0 | 91.3 | 91.3 | 91.3 | 91.7
"""

LORA_TABLE6 = """
| r 1 | r 2 | r 4 | r 8 | r 64
WikiSQL, q | 68.8 | 69.6 | 70.5 | 70.4 | 70.0
WikiSQL, q and v | 73.4 | 73.3 | 73.7 | 73.8 | 73.5
WikiSQL, q, k, v, o | 74.1 | 73.7 | 74.0 | 74.0 | 73.9
MNLI, q | 90.7 | 90.9 | 91.1 | 90.7 | 90.7
MNLI, q and v | 91.3 | 91.4 | 91.3 | 91.6 | 91.4
MNLI, q, k, v, o | 91.2 | 91.7 | 91.7 | 91.5 | 91.4
"""

# The query matrix of GPT-3's layer 48: its norm and that of its projections on subspaces of as many directions.
# The last row is from the text beside the table, which has it for r 4.
LORA_TABLE7 = """
| r 4 | r 64
norm of W, projected on the first directions of what was learned | 0.32 | 1.90
the same on those of W itself | 21.67 | 37.71
the same on random ones | 0.02 | 0.33
norm of W | 61.95 | 61.95
norm of what was learned | 6.91 | 3.57
amplification: the norm of what was learned by the first row | 21.5 | -
"""

LORA_TABLE18 = """
GPT-2 M, E2E | r 1 | r 2 | r 4 | r 8 | r 16 | r 32 | r 64 | r 128 | r 256 | r 512 | r 1024
validation loss | 1.23 | 1.21 | 1.18 | 1.17 | 1.16 | 1.16 | 1.16 | 1.16 | 1.16 | 1.16 | 1.17
BLEU | 68.72 | 69.17 | 70.38 | 69.57 | 69.61 | 69.33 | 69.24 | 68.73 | 68.92 | 68.78 | 69.37
"""


def rows(text: str) -> list[list[str]]:
    """The cells of a table above, its header first."""
    return [[cell.strip() for cell in line.split("|")] for line in text.strip().splitlines()]


def by_name(text: str) -> dict[str, list[str]]:
    """Of a table whose rows all have names of their own: the other cells of each below the header, by its name."""
    return {name: cells for name, *cells in rows(text)[1:]}
