"""`Pretrained`: saving, loading and publishing a dictionary, verified."""

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

import torch
from huggingface_hub import CommitInfo
from sae_lens.saes.transcoder import Transcoder
from safetensors import SafetensorError
from torch import Tensor

from sae_lens_qk.config import BilinearQKConfig
from sae_lens_qk.pretrained.checksums import (
    CONFIG,
    METRICS,
    RUNNER_CONFIG,
    WEIGHTS,
    Verify,
    check_verify,
    verify_folder,
)
from sae_lens_qk.pretrained.folder import documents, read_document, write_documents
from sae_lens_qk.pretrained.hub import Token, check_folder_name, hub_cache
from sae_lens_qk.pretrained.loading import located
from sae_lens_qk.pretrained.push import publish

logger = logging.getLogger("sae_lens_qk")

_CONFIG_ERRORS = (
    KeyError,
    TypeError,
    AttributeError,
    RecursionError,
    NotImplementedError,
    UnicodeDecodeError,
    json.JSONDecodeError,
)
"""What SAELens raises on a cfg.json that is no dictionary's."""


class TranscoderFolders(NamedTuple):
    query: Path
    key: Path


class Pretrained:
    """Mixin of a dictionary: to and from a folder or the Hugging Face Hub.

    It stands before SAELens's `SAE` among the base classes, whose saving and loading it extends.
    """

    cfg: BilinearQKConfig
    query: Transcoder
    key: Transcoder
    fold_W_dec_norm: Callable[[], None]
    runner_cfg: dict[str, Any] | None
    _metrics: dict[str, Any] | None

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What `evaluate` measured, as a dict; it travels with the dictionary.

        An `Evaluation` can be assigned.
        """
        return self._metrics

    @metrics.setter
    def metrics(self, evaluation: Any) -> None:
        has_dict = hasattr(evaluation, "to_dict")
        self._metrics = evaluation.to_dict() if has_dict else evaluation

    @classmethod
    def from_pretrained(
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
        token: Token = None,
        cache_dir: str | Path | None = None,
        verify: Verify = True,
    ) -> Self:
        """Load a dictionary; the parameters of `SAE.from_pretrained` in its order, then ours.

        Args:
            release: a name of `pretrained_dictionaries()`, a folder written by `save_model`, or a
                Hub repository "org/repo".
            sae_id: folder in the repository (or in the local folder); None for names and folders.
            device, dtype: where, and in what precision; dtype None: as stored (float32 with a
                converter).
            force_download: download even what is cached.
            converter: loads through SAELens with this converter, which cannot verify.
            fold_W_dec_norm: fold decoder norms into the encoders.
            revision: branch, tag or commit of the repository. Default: the registry's commit for a
                name, else main.
            token, cache_dir: as in huggingface_hub.
            verify: True checks every file against SHA256SUMS and warns where there is none;
                "strict" refuses that; False checks nothing.
        Raises:
            ValueError: an unknown or unpublished name, a file that is damaged, or weights that do
                not fit their config.
            FileNotFoundError, PermissionError, ConnectionError, OSError: see
                `sae_lens_qk.pretrained.hub.fetched`.
        """
        check_verify(verify)
        # a release without a slash, with an sae_id, is one of SAELens's own registry
        is_path = "/" in release or Path(release).is_dir()
        is_host_release = sae_id is not None and not is_path
        if converter is not None or is_host_release:
            if verify == "strict" or revision or token or cache_dir:
                raise ValueError(
                    "SAELens's own loader takes no revision, token, cache_dir or verify='strict': "
                    "give a Hub repository as release and its folder as sae_id, without a "
                    "converter."
                )
            host: Any = super()
            dictionary, _, _ = host.from_pretrained_with_cfg_and_sparsity(
                release,
                sae_id,
                device,
                dtype or "float32",
                force_download,
                converter,
                fold_W_dec_norm,
            )
            return dictionary
        # a download enters the cache only when the body ends well: verified and loaded
        cache = hub_cache(cache_dir)
        with located(release, sae_id, revision, token, cache, force_download) as location:
            verify_folder(location.folder, verify, location.sums_sha256)
            dictionary = cls.load_from_disk(location.folder, device=device, dtype=dtype)
        if fold_W_dec_norm:
            dictionary.fold_W_dec_norm()
        return dictionary

    @classmethod
    def from_pretrained_with_cfg_and_sparsity(
        cls, release: str, sae_id: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[Self, dict[str, Any], Tensor | None]:
        """`from_pretrained`, with the config as a dict, and None: no sparsity is stored."""
        dictionary = cls.from_pretrained(release, sae_id, *args, **kwargs)
        return dictionary, dictionary.cfg.to_dict(), None

    @classmethod
    def load_from_disk(
        cls, path: str | Path, device: str = "cpu", dtype: str | None = None, **kwargs: Any
    ) -> Self:
        """Load a folder written by `save_model`, unverified.

        Args:
            kwargs: as in SAELens's `SAE.load_from_disk`.
        Raises:
            FileNotFoundError: no cfg.json or sae_weights.safetensors there.
            ValueError: the file is truncated, corrupted or does not fit its config.
        """
        torch.device(device)  # a wrong name is not the file's fault
        for name in (CONFIG, WEIGHTS):
            if not (Path(path) / name).is_file():
                raise FileNotFoundError(f"{path} is not a dictionary folder: {name} is missing.")
        host: Any = super()
        try:
            dictionary = host.load_from_disk(path, device=device, dtype=dtype, **kwargs)
        except _CONFIG_ERRORS as error:
            raise ValueError(
                f"{path}/{CONFIG} is not the config of a dictionary ({error!r:.200})."
            ) from error
        except SafetensorError as error:
            raise ValueError(f"{path}/{WEIGHTS} is truncated or corrupted ({error}).") from error
        dictionary.metrics = read_document(path, METRICS)
        dictionary.runner_cfg = read_document(path, RUNNER_CONFIG)
        return dictionary

    def save_model(self, path: str | Path) -> tuple[Path, Path]:
        """Save weights, config, and next to them metrics, run settings, model card and SHA256SUMS.

        Returns:
            Paths of the weights and of the config.
        Raises:
            ValueError: `metrics` or `runner_cfg` cannot be put into a card; nothing is written.
        """
        # before the weights: what cannot be put into a card leaves the folder as it was
        texts = documents(self, Path(path).resolve().name)
        host: Any = super()
        paths = host.save_model(path)
        write_documents(path, texts)
        return paths

    def push_to_hub(
        self,
        repo_id: str,
        folder: str,
        *,
        private: bool = False,
        revision: str = "main",
        token: Token = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Publish as `<repo_id>/<folder>`: weights, config, metrics, sums, and both cards.

        Everything goes into one commit, so a reader sees either the old folder or the new one; what
        has not changed makes no commit. The repository's README lists all its dictionaries and
        keeps whatever else it says. Stored in the dictionary's present dtype
        (`d.to(torch.float16)` halves it).

        Args:
            repo_id: "org/repo", created if need be.
            folder: where in it; other folders stay as they are.
            private: of a repository that is created here.
            revision: branch, created from main if need be.
            token: as in huggingface_hub.
            commit_message: default "Publish <folder>".
            create_pr: open a pull request against `revision` instead of committing to it.
        Returns:
            The Hub client's CommitInfo; `oid` is the commit to pin with
            `from_pretrained(..., revision=oid)`.
        Raises:
            ValueError: a bad folder name, or a dictionary that does not survive saving and loading;
                nothing is sent.
            FileNotFoundError, PermissionError, ConnectionError, OSError: see
                `sae_lens_qk.pretrained.errors`; the repository is as it was, though a new one or a
                new branch may have been created, empty.
        """
        check_folder_name(folder)
        if self.metrics is None:
            logger.warning(
                "the card will say 'not measured': set d.metrics = qk.evaluate(d, model, tokens) "
                "before pushing"
            )
        # the heading of the card
        name = PurePosixPath(folder).name
        with tempfile.TemporaryDirectory() as scratch:
            staged = Path(scratch) / name
            self.save_model(staged)
            # the card's snippet names the repository instead of a path
            write_documents(staged, documents(self, name, source=f'"{repo_id}", "{folder}"'))
            # what cannot be loaded again (pairs out of range, NaN) is not sent
            type(self).load_from_disk(staged)
            return publish(
                staged,
                repo_id,
                folder,
                private=private,
                revision=revision,
                token=token,
                commit_message=commit_message or f"Publish {folder}",
                create_pr=create_pr,
            )

    def export_transcoders(self, path: str | Path) -> TranscoderFolders:
        """Write both halves as stock SAELens folders, for people without this package.

        `SAE.load_from_disk` reads `<path>/query` and `<path>/key`. On a `SAETransformerBridge`,
        `add_sae` attaches query and key together: they name different hooks (`attn.q.hook_in` ->
        `attn.q.hook_out`, and `k`). Their metadata has the `model_mode`: halves of a processed
        model need `model.enable_compatibility_mode()` first. Stored in half precision they have to
        be loaded with `dtype="float32"` for a float32 model.
        """
        folders = TranscoderFolders(Path(path) / "query", Path(path) / "key")
        self.query.save_model(folders.query)
        self.key.save_model(folders.key)
        return folders
