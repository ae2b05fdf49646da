"""The modules of version 0.1.0 under their old names, with a warning; gone in the next release.

`from sae_lens_qk.analysis.activations import collect_activations` and its like still work.
"""

import sys
import warnings
from types import ModuleType

from sae_lens_qk import figures, inputs, tables
from sae_lens_qk.explain import attribution, check, prompt, removals, terms
from sae_lens_qk.statistics import activations, first_token, heads

warnings.warn(
    "sae_lens_qk.analysis is now sae_lens_qk.statistics, .explain, .figures and .tables.",
    DeprecationWarning,
    stacklevel=2,
)
_SUCCESSORS = {
    "activations": (inputs, activations),
    "attribution": (attribution,),
    "causal": (terms, removals),
    "check": (check,),
    "figures": (figures,),
    "heads": (first_token, heads),
    "prompt": (prompt,),
    "show": (tables,),
}
for _name, _modules in _SUCCESSORS.items():
    _old = ModuleType(f"{__name__}.{_name}")
    for _module in _modules:
        _public = {name: value for name, value in vars(_module).items() if name[0] != "_"}
        vars(_old).update(_public)
    sys.modules[_old.__name__] = _old
    globals()[_name] = _old
