"""lorasmith: make LoRA adapters part of a model, streamed, exact to one rounding, all or nothing.

    import lorasmith

    report = lorasmith.merge("base/", ["adapter/"], "merged/")
    print(report.tensors_merged, report.survival)

Importing this package loads nothing heavy: the public names are fetched when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lorasmith.adapter import Adapter
    from lorasmith.errors import (
        AdapterMismatch,
        BadFile,
        BadOption,
        BranchMoved,
        BudgetTooSmall,
        HubFailed,
        HubRefused,
        InputChanged,
        IOFailed,
        LorasmithError,
        MissingFile,
        NoSpace,
        NotFinite,
        OutputBusy,
        OutputExists,
        Unsupported,
    )
    from lorasmith.extracting import extract
    from lorasmith.merging import merge, plan
    from lorasmith.mixing import interference, mix, resize
    from lorasmith.pulling import pull
    from lorasmith.pushing import push
    from lorasmith.records import (
        AdapterUse,
        MergeReport,
        Origin,
        Plan,
        Progress,
        Pushed,
        Survival,
        TargetGroup,
        TensorSurvival,
    )
    from lorasmith.reports import (
        ExtractedModule,
        ExtractReport,
        Interference,
        MixedAdapter,
        MixedModule,
        MixReport,
        ModuleInterference,
        StoredTensor,
    )

_HOME = {
    "lorasmith.adapter": ("Adapter",),
    "lorasmith.extracting": ("extract",),
    "lorasmith.merging": ("merge", "plan"),
    "lorasmith.pulling": ("pull",),
    "lorasmith.pushing": ("push",),
    "lorasmith.mixing": ("interference", "mix", "resize"),
    "lorasmith.records": (
        "AdapterUse",
        "MergeReport",
        "Origin",
        "Plan",
        "Progress",
        "Pushed",
        "Survival",
        "TargetGroup",
        "TensorSurvival",
    ),
    "lorasmith.reports": (
        "ExtractReport",
        "ExtractedModule",
        "Interference",
        "MixReport",
        "MixedAdapter",
        "MixedModule",
        "ModuleInterference",
        "StoredTensor",
    ),
    "lorasmith.errors": (
        "AdapterMismatch",
        "BadFile",
        "BadOption",
        "BranchMoved",
        "BudgetTooSmall",
        "HubFailed",
        "HubRefused",
        "InputChanged",
        "IOFailed",
        "LorasmithError",
        "MissingFile",
        "NoSpace",
        "NotFinite",
        "OutputBusy",
        "OutputExists",
        "Unsupported",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "Adapter",
    "AdapterMismatch",
    "AdapterUse",
    "BadFile",
    "BadOption",
    "BranchMoved",
    "BudgetTooSmall",
    "ExtractReport",
    "ExtractedModule",
    "HubFailed",
    "HubRefused",
    "IOFailed",
    "InputChanged",
    "Interference",
    "LorasmithError",
    "MergeReport",
    "MissingFile",
    "MixReport",
    "MixedAdapter",
    "MixedModule",
    "ModuleInterference",
    "NoSpace",
    "NotFinite",
    "Origin",
    "OutputBusy",
    "OutputExists",
    "Plan",
    "Progress",
    "Pushed",
    "StoredTensor",
    "Survival",
    "TargetGroup",
    "TensorSurvival",
    "Unsupported",
    "__version__",
    "extract",
    "interference",
    "merge",
    "mix",
    "plan",
    "pull",
    "push",
    "resize",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
