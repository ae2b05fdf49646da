"""TEMPORARY stub of the mixin, to be replaced."""
# P: overwrite this file.
import json
from pathlib import Path
from typing import Any, Literal
import torch
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import override

_NO_CONFIG = (KeyError, TypeError, AttributeError, RecursionError, NotImplementedError, UnicodeDecodeError, json.JSONDecodeError)


class Pretrained:
    runner_cfg: Any

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Figures that travel with the dictionary: what `evaluate` measured, as a dict. An `Evaluation` can be assigned."""
        return self._metrics

    @metrics.setter
    def metrics(self, measured: Any) -> None:
        self._metrics = measured.to_dict() if hasattr(measured, "to_dict") else measured

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        release: str,
        sae_id: str | None = None,
        device: str = "cpu",
        dtype: str | None = "float32",
        force_download: bool = False,
        converter: Any = None,
        fold_W_dec_norm: bool = False,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        verify: bool | Literal["strict"] = True,
    ) -> Any:
        """Load a dictionary by name, from a folder or from the Hub, verified; see `sae_lens_qk.pretrained.loading`."""
        return cls.from_pretrained_with_cfg_and_sparsity(
            release,
            sae_id,
            device,
            dtype,
            force_download,
            converter,
            fold_W_dec_norm,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            verify=verify,
        )[0]

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(  # type: ignore[override]
        cls, release: str, sae_id: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any], Tensor | None]:
        """`from_pretrained`, with the config as a dict, and None for the sparsity."""
        from sae_lens_qk.pretrained.loading import from_pretrained_with_cfg_and_sparsity

        return from_pretrained_with_cfg_and_sparsity(cls, release, sae_id, *args, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        folder: str,
        *,
        private: bool = False,
        revision: str = "main",
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Publish as `<repo_id>/<folder>` in one commit; see `sae_lens_qk.pretrained.push.push_to_hub`."""
        from sae_lens_qk.pretrained.push import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            folder,
            private=private,
            revision=revision,
            token=token,
            commit_message=commit_message,
            create_pr=create_pr,
        )

    def export_transcoders(self, path: str | Path) -> tuple[Path, Path]:
        """Both halves as stock SAELens folders, `<path>/query` and `<path>/key`; see `sae_lens_qk.pretrained.folder`."""
        from sae_lens_qk.pretrained.folder import export_transcoders

        return export_transcoders(self, path)

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights, config, and beside them figures, run settings, model card and SHA256SUMS.

        Raises:
            ValueError: `metrics` or `runner_cfg` cannot be put into a card; nothing is written.
        """
        from sae_lens_qk.pretrained.folder import documents, write_documents

        beside = documents(self, Path(path).resolve().name)
        paths = super().save_model(path)
        write_documents(path, beside)
        return paths

    @classmethod
    def load_from_disk(  # type: ignore[override]
        cls, path: str | Path, device: str = "cpu", dtype: str | None = None, **kwargs: Any
    ) -> Any:
        """Load a folder written by `save_model`.

        Raises:
            FileNotFoundError: no cfg.json or sae_weights.safetensors there.
            ValueError: the file is truncated, corrupted or does not fit its config.
        """
        from sae_lens_qk.pretrained.folder import METRICS, RUNNER_CONFIG, read_document

        torch.device(device)  # a wrong name is not the file's fault
        for name in ("cfg.json", "sae_weights.safetensors"):
            if not (Path(path) / name).is_file():
                raise FileNotFoundError(f"{path} is not a dictionary folder: {name} is missing.")
        try:
            dictionary = super().load_from_disk(path, device=device, dtype=dtype, **kwargs)
        except _NO_CONFIG as error:
            raise ValueError(
                f"{path}/cfg.json is not the config of a dictionary ({error!r:.200})."
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"{path}/sae_weights.safetensors is truncated or corrupted ({error})."
            ) from error
        dictionary.metrics, dictionary.runner_cfg = (
            read_document(path, name) for name in (METRICS, RUNNER_CONFIG)
        )
        return dictionary
