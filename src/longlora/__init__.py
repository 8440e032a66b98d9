"""longlora: teach a causal language model a longer context with shifted sparse attention (LongLoRA).

Public names are imported on first use, so that `import longlora` does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longlora.errors import LongLoraError

if TYPE_CHECKING:
    from longlora.attention.registry import use_full, use_s2

__version__ = "0.1.0"
__all__ = ["LongLoraError", "__version__", "use_full", "use_s2"]


def __getattr__(name: str) -> Any:
    if name in ("use_s2", "use_full"):
        from longlora.attention import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'longlora' has no attribute {name!r}")
