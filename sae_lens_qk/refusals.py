"""Methods of SAELens's SAE that assume one decoder and one output hook, refused by name."""

from typing import Any, NoReturn

REFUSALS = {
    "use_error_term": "A QK dictionary has two outputs and no error term: use d.patched(model).",
    "add_sae": "A QK dictionary cannot be attached with add_sae (two decoders, one output hook): "
    "use d.patched(model), or attach d.query and d.key, which are stock transcoders.",
    "fold_activation_norm_scaling_factor": "QK dictionaries are trained without activation "
    "normalisation.",
    "fold_activation_whitening": "QK dictionaries are trained without activation whitening.",
    "fold_and_get_W_dec_norm": "There are two decoders: fold d.query and d.key, or call "
    "d.fold_W_dec_norm().",
    "turn_on_forward_pass_hook_z_reshaping": "QK dictionaries read the layer's input, not hook_z.",
}


class OneDecoderRefusals:
    """Mixin that stands before `SAE`: each of these would fail late, or silently change a model."""

    def fold_activation_norm_scaling_factor(self, scaling_factor: float) -> NoReturn:
        raise NotImplementedError(REFUSALS["fold_activation_norm_scaling_factor"])

    def fold_activation_whitening(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(REFUSALS["fold_activation_whitening"])

    def fold_and_get_W_dec_norm(self) -> NoReturn:  # noqa: N802
        raise NotImplementedError(REFUSALS["fold_and_get_W_dec_norm"])

    def turn_on_forward_pass_hook_z_reshaping(self) -> NoReturn:
        raise NotImplementedError(REFUSALS["turn_on_forward_pass_hook_z_reshaping"])

    @property
    def hook_z_reshaping_mode(self) -> NoReturn:  # what a bridge's add_sae reads first
        raise NotImplementedError(REFUSALS["add_sae"])

    @hook_z_reshaping_mode.setter
    def hook_z_reshaping_mode(self, value: bool) -> None:
        if value:
            raise NotImplementedError(REFUSALS["add_sae"])

    @property
    def use_error_term(self) -> NoReturn:  # what HookedSAETransformer.add_sae reads first
        raise NotImplementedError(REFUSALS["add_sae"])

    @use_error_term.setter
    def use_error_term(self, value: bool) -> None:
        if value:
            raise NotImplementedError(REFUSALS["use_error_term"])
