"""The modules of version 0.1.0 under their old names, with a warning; gone in the next release.

`from sae_lens_qk.analysis.activations import collect_activations` and its like still work.
"""

import sys
import warnings

from sae_lens_qk import figures, tables
from sae_lens_qk.explain import attribution, check, prompt, removals
from sae_lens_qk.statistics import activations, heads

warnings.warn(
    "sae_lens_qk.analysis is now sae_lens_qk.statistics, .explain, .figures and .tables.",
    DeprecationWarning,
    stacklevel=2,
)
causal = removals
show = tables
_MODULES = (activations, attribution, causal, check, figures, heads, prompt, show)
_NAMES = ("activations", "attribution", "causal", "check", "figures", "heads", "prompt", "show")
for _name, _module in zip(_NAMES, _MODULES, strict=True):
    sys.modules[f"{__name__}.{_name}"] = _module
