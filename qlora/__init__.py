"""QLoRA from scratch: a frozen base model in 4 bits, LoRA adapters trained through it."""

from qlora.adapters import enable_adapters, load_adapter, merge, save_adapter
from qlora.config import QLoRAConfig
from qlora.convert import QuantizationReport, quantize_model
from qlora.functional import qlora_linear
from qlora.modules import LoRALinear, QLoRALinear
from qlora.paged import PagedAdamW
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit

__all__ = [
    "LoRALinear",
    "PagedAdamW",
    "QLoRAConfig",
    "QLoRALinear",
    "QuantizationReport",
    "QuantizedTensor",
    "dequantize_4bit",
    "enable_adapters",
    "load_adapter",
    "merge",
    "qlora_linear",
    "quantize_4bit",
    "quantize_model",
    "save_adapter",
]
