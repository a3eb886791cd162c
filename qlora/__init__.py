"""QLoRA from scratch: a frozen base model in 4 bits, LoRA adapters trained through it."""

from qlora.adapter_files import adapter_bytes, load_adapter, save_adapter
from qlora.adapters import (
    active_adapters,
    adapter_names,
    add_adapter,
    combine_adapters,
    delete_adapter,
    disable_adapters,
    enable_adapters,
    set_adapter,
    use_adapter,
)
from qlora.config import QLoRAConfig
from qlora.convert import quantize_model
from qlora.functional import qlora_linear
from qlora.kernels.user_formats import register_format
from qlora.loraplus import loraplus_groups
from qlora.merging import merge, requantize
from qlora.modules import LoRALinear, QLoRALinear
from qlora.paged import PagedAdamW
from qlora.pretrained import load_quantized
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora.report import QuantizationReport

__all__ = [
    "LoRALinear",
    "PagedAdamW",
    "QLoRAConfig",
    "QLoRALinear",
    "QuantizationReport",
    "QuantizedTensor",
    "active_adapters",
    "adapter_bytes",
    "adapter_names",
    "add_adapter",
    "combine_adapters",
    "delete_adapter",
    "dequantize_4bit",
    "disable_adapters",
    "enable_adapters",
    "load_adapter",
    "load_quantized",
    "loraplus_groups",
    "merge",
    "qlora_linear",
    "quantize_4bit",
    "quantize_model",
    "register_format",
    "requantize",
    "save_adapter",
    "set_adapter",
    "use_adapter",
]
