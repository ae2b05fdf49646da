"""Published dictionaries for tests of loading and pushing; loading in processes of their own."""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from tiny_dictionaries import LAYER, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model

REPO = "org/repo"
FOLDER = "tiny-L1"
WEIGHTS = "sae_weights.safetensors"
SUMS = "SHA256SUMS"
FILES = ("README.md", SUMS, "cfg.json", "metrics.json", "runner_cfg.json", WEIGHTS)
"""Of a published dictionary."""

Files = Mapping[str, bytes]
Change = Callable[[Files], Files]
Job = Callable[[], Any]


def measured_dictionary(
    model: Model,
    seed: int = 0,
    **changes: Any,
) -> BilinearQKDictionary:
    """A random dictionary that knows its metrics and how it was trained."""
    d = tiny_dictionary(model, seed=seed, **changes)
    d.metrics = qk.evaluate(d, model, tiny_tokens(3, 17), baselines=())
    cfg = qk.BilinearQKRunnerConfig(
        model_name="org/model",
        layer=LAYER,
        dataset_path="org/texts",
        card=qk.CardConfig(license="mit"),
    )
    d.runner_cfg = json.loads(json.dumps(cfg.to_dict()))
    return d


def files_of(d: BilinearQKDictionary) -> dict[str, bytes]:
    """What `save_model` writes."""
    with tempfile.TemporaryDirectory() as folder:
        d.save_model(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def with_sums(files: Files) -> dict[str, bytes]:
    """With sums that fit."""
    lines = []
    for name, data in files.items():
        if name != SUMS:
            lines.append(f"{sha256(data).hexdigest()}  {name}\n")
    return {**files, SUMS: "".join(lines).encode()}


def without(name: str) -> Change:
    return lambda files: {other: data for other, data in files.items() if other != name}


@dataclass
class Versions:
    """Two versions of one dictionary, as they are and as files."""

    old: BilinearQKDictionary
    new: BilinearQKDictionary
    old_files: Files
    new_files: Files


def two_versions(model: Model) -> Versions:
    old = measured_dictionary(model, seed=0)
    new = measured_dictionary(model, seed=1)
    return Versions(old, new, files_of(old), files_of(new))


def publish(
    hub: LoopbackHub,
    files: Files,
    folder: str = FOLDER,
    repo_id: str = REPO,
    **options: Any,
) -> str:
    """Commit the files as they are, on the server's side; the repository has to exist."""
    paths = {f"{folder}/{name}": data for name, data in files.items()}
    return hub.commit(repo_id, paths, **options)


def served(hub: LoopbackHub) -> list[str]:
    """Method, file (or the call's last part) and status of every request since the last look."""
    lines = []
    for request in hub.requests:
        name = PurePosixPath(urlsplit(request.path).path).name
        lines.append(f"{request.method} {name} {request.status}")
    hub.requests.clear()
    return lines


def tree(folder: Path) -> dict[str, str | bytes]:
    """Every folder, link and file below, with where it points and what it holds."""
    entries: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            entries[name] = f"-> {path.readlink()}"
        else:
            entries[name] = "folder" if path.is_dir() else path.read_bytes()
    return entries


def same(
    one: BilinearQKDictionary,
    other: BilinearQKDictionary,
) -> bool:
    """Whether every tensor has the same bits, and the config the same values."""
    tensors = one.state_dict()
    other_tensors = other.state_dict()
    if tensors.keys() != other_tensors.keys() or one.cfg.to_dict() != other.cfg.to_dict():
        return False
    for name, tensor in tensors.items():
        other_tensor = other_tensors[name]
        if tensor.dtype != other_tensor.dtype or not torch.equal(tensor, other_tensor):
            return False
    return True


def raised(job: Job) -> str:
    """Type and message of the error."""
    try:
        job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Address space that may be taken on top of what this process has; beyond it, MemoryError."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- in a process of its own (`python hub_cases.py CACHE`) and in forks of that one


def in_forks(*jobs: Job) -> list[Any]:
    """What the jobs return, each in its own process, all at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(jobs))
    results = [context.SimpleQueue() for _ in jobs]

    def work(
        job: Job,
        result: Any,
    ) -> None:
        barrier.wait(60)
        try:
            result.put((job(), None))
        except BaseException:
            result.put((None, traceback.format_exc()))

    for job, result in zip(jobs, results, strict=True):
        context.Process(target=work, args=(job, result)).start()
    values = []
    for result in results:
        value, error = result.get()
        assert error is None, error
        values.append(value)
    return values


def without_privileges(job: Job) -> Job:
    """The job as somebody who owns no files; root would write anywhere."""

    def work() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return job()

    return work


def summary(
    d: BilinearQKDictionary,
    model: Model,
) -> dict[str, Any]:
    """Hashes of every tensor and of both patterns, metrics anew and those that came along."""
    x = torch.randn(2, 11, d.cfg.d_in, generator=torch.Generator().manual_seed(7))
    tensors = dict(d.state_dict())
    for source in ("transcoders", "feature_map"):
        tensors[source] = d.pattern(x, source)
    hashes = {}
    for name, tensor in tensors.items():
        array = tensor.detach().contiguous().numpy()
        hashes[name] = sha256(array.tobytes()).hexdigest()
    return {
        "hashes": hashes,
        "new_metrics": qk.evaluate(d, model, tiny_tokens(3, 17), baselines=()).to_dict(),
        "metrics": d.metrics,
        "runner_cfg": d.runner_cfg,
        "cfg": d.cfg.to_dict(),
    }


def online(cache: Path) -> dict[str, Any]:
    """Publish, load twice at once into an empty cache, then load from caches nobody may write."""
    constants.HF_HUB_OFFLINE = False
    model = tiny_model("llama")
    load = partial(BilinearQKDictionary.from_pretrained, REPO, FOLDER, cache_dir=cache)

    def publication() -> dict[str, Any]:
        d = measured_dictionary(model)
        commit = d.push_to_hub(REPO, FOLDER, token="hf_owner")
        return {"commit": commit.oid, **summary(d, model)}

    (ours,) = in_forks(publication)
    commit = ours.pop("commit")
    summaries = in_forks(*[lambda: summary(load(), model)] * 2)
    before = tree(cache)
    return {
        "ours": ours,
        "commit": commit,
        "at_once": summaries,
        "cached": sorted(before),
        **read_only(load, commit, cache, model),
        "unchanged": tree(cache) == before,
    }


def read_only(
    load: Callable[..., BilinearQKDictionary], commit: str, cache: Path, model: Model
) -> dict[str, Any]:
    """Loading as somebody who may not write into the cache, or into the folders in it."""
    load = partial(load, token=False)
    empty = Path(tempfile.mkdtemp(dir=cache.parent))
    folders = [path for path in (cache, *cache.rglob("*"), empty) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    branch_summary, commit_summary, refusal = in_forks(
        without_privileges(lambda: summary(load(), model)),
        without_privileges(lambda: summary(load(revision=commit), model)),
        without_privileges(lambda: raised(lambda: load(cache_dir=empty))),
    )
    # but not what is in them: somebody else's files in a shared cache
    for path in (cache, empty):
        path.chmod(0o777)
    (refusal_below,) = in_forks(
        without_privileges(lambda: raised(lambda: load(force_download=True)))
    )
    for path in folders:
        path.chmod(0o755)
    return {
        "read_only": [branch_summary, commit_summary],
        "refused": refusal,
        "empty": str(empty),
        "refused_below": refusal_below,
    }


def offline(cache: Path) -> dict[str, Any]:
    """Load what is cached."""
    load = partial(BilinearQKDictionary.from_pretrained, REPO, cache_dir=cache)
    d = load(FOLDER)
    missing = raised(lambda: load("other"))
    return {"loaded": summary(d, tiny_model("llama")), "missing": missing}


if __name__ == "__main__":
    assert constants.HF_HUB_OFFLINE  # the forks of `online` are the exception
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(json.dumps(in_forks(lambda: online(place))[0]), flush=True)
    sys.stdin.readline()  # now the Hub is gone
    print(json.dumps(offline(place)), flush=True)
