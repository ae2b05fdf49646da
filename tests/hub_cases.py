"""Published dictionaries for the tests of loading and pushing, and loading in processes of their own."""

import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from tiny_dictionaries import LAYER, tiny_dictionary
from tiny_models import tiny_model, tiny_tokens

import sae_lens_qk as qk
import sae_lens_qk.pretrained.loading  # what loading imports, while Python's own files can be read; see without_privileges
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.host.support import Model

REPO, FOLDER = "org/repo", "tiny-L1"
WEIGHTS, SUMS = "sae_weights.safetensors", "SHA256SUMS"
FILES = ("README.md", SUMS, "cfg.json", "metrics.json", "runner_cfg.json", WEIGHTS)
"""Of a published dictionary."""

Files = Mapping[str, bytes]
Job = Callable[[], Any]


def measured_dictionary(model: Model, seed: int = 0, **changes: Any) -> BilinearQKDictionary:
    """A random dictionary that knows its figures and how it was trained; JumpReLU halves and 200 pairs."""
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
    lines = [
        f"{sha256(data).hexdigest()}  {name}\n" for name, data in files.items() if name != SUMS
    ]
    return {**files, SUMS: "".join(lines).encode()}


def publish(
    hub: LoopbackHub, files: Files, folder: str = FOLDER, repo_id: str = REPO, **options: Any
) -> str:
    """Commit the files as they are, on the server's side; the repository has to exist."""
    return hub.commit(
        repo_id, {f"{folder}/{name}": data for name, data in files.items()}, **options
    )


def served(hub: LoopbackHub) -> list[str]:
    """Method, file (or the call's last part) and status of every request since the last look."""
    lines = [
        f"{r.method} {r.path.partition('?')[0].rsplit('/', 1)[-1]} {r.status}" for r in hub.requests
    ]
    hub.requests.clear()
    return lines


def tree(folder: Path) -> dict[str, str | bytes]:
    """Every folder, link and file below, with where it points and what it holds."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        held = (
            f"-> {path.readlink()}"
            if path.is_symlink()
            else "folder"
            if path.is_dir()
            else path.read_bytes()
        )
        found[path.relative_to(folder).as_posix()] = held
    return found


def same(one: BilinearQKDictionary, other: BilinearQKDictionary) -> bool:
    """Whether every tensor has the same bits, and the config the same values."""
    mine, theirs = one.state_dict(), other.state_dict()
    return (
        mine.keys() == theirs.keys()
        and all(
            tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
            for name, tensor in mine.items()
        )
        and one.cfg.to_dict() == other.cfg.to_dict()
    )


def raised(job: Job) -> str:
    """Type and message of the error."""
    try:
        job()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@contextmanager
def memory_limit(megabytes: int) -> Iterator[None]:
    """Address space that may be taken on top of what this process has; beyond it allocations fail."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- in a process of its own (`python hub_cases.py CACHE`) and in processes forked from that one


def in_forks(*jobs: Job) -> list[Any]:
    """What the jobs return, each in its own process, all at once."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(len(jobs))
    results = [context.SimpleQueue() for _ in jobs]

    def work(job: Job, result: Any) -> None:
        barrier.wait(60)
        try:
            result.put((job(), None))
        except BaseException:
            result.put((None, traceback.format_exc()))

    for job, result in zip(jobs, results, strict=True):
        context.Process(target=work, args=(job, result)).start()
    outcomes = [result.get() for result in results]
    assert not any(error for _, error in outcomes), outcomes
    return [value for value, _ in outcomes]


def without_privileges(job: Job) -> Job:
    """The job as somebody who owns no files; root would write anywhere."""

    def work() -> Any:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        return job()

    return work


def summary(d: BilinearQKDictionary, model: Model) -> dict[str, Any]:
    """Hashes of every tensor and of both patterns, the figures `evaluate` finds, and those that came along."""
    x = torch.randn(2, 11, d.cfg.d_in, generator=torch.Generator().manual_seed(7))
    tensors = {
        **d.state_dict(),
        **{source: d.pattern(x, source) for source in ("transcoders", "feature_map")},
    }
    arrays = {name: tensor.detach().contiguous().numpy() for name, tensor in tensors.items()}
    return {
        "hashes": {name: sha256(array.tobytes()).hexdigest() for name, array in arrays.items()},
        "figures": qk.evaluate(d, model, tiny_tokens(3, 17), baselines=()).to_dict(),
        "metrics": d.metrics,
        "runner_cfg": d.runner_cfg,
        "cfg": d.cfg.to_dict(),
    }


def online(cache: Path) -> dict[str, Any]:
    """Publish, load twice at once into an empty cache, then load from caches that cannot be written."""
    constants.HF_HUB_OFFLINE = False
    model = tiny_model("llama")
    load = BilinearQKDictionary.from_pretrained

    def published() -> dict[str, Any]:
        d = measured_dictionary(model)
        return {"commit": d.push_to_hub(REPO, FOLDER, token="hf_owner").oid, **summary(d, model)}

    (ours,) = in_forks(published)
    commit = ours.pop("commit")
    at_once = in_forks(*[lambda: summary(load(REPO, FOLDER, cache_dir=cache), model)] * 2)
    before, empty = tree(cache), Path(tempfile.mkdtemp(dir=cache.parent))
    folders = [path for path in (cache, *cache.rglob("*"), empty) if path.is_dir()]
    for path in folders:
        path.chmod(0o555)
    by_branch, by_commit, refused = in_forks(
        without_privileges(
            lambda: summary(load(REPO, FOLDER, cache_dir=cache, token=False), model)
        ),
        without_privileges(
            lambda: summary(
                load(REPO, FOLDER, cache_dir=cache, token=False, revision=commit), model
            )
        ),
        without_privileges(
            lambda: raised(lambda: load(REPO, FOLDER, cache_dir=empty, token=False))
        ),
    )
    for path in (cache, empty):
        path.chmod(0o777)  # but not what is in it: somebody else's files in a shared cache
    (refused_below,) = in_forks(
        without_privileges(
            lambda: raised(
                lambda: load(REPO, FOLDER, cache_dir=cache, token=False, force_download=True)
            )
        )
    )
    for path in folders:
        path.chmod(0o755)
    return {
        "ours": ours,
        "commit": commit,
        "at_once": at_once,
        "cached": sorted(before),
        "unchanged": tree(cache) == before,
        "read_only": [by_branch, by_commit],
        "refused": refused,
        "empty": str(empty),
        "refused_below": refused_below,
    }


def offline(cache: Path) -> dict[str, Any]:
    """Load what is cached."""
    d = BilinearQKDictionary.from_pretrained(REPO, FOLDER, cache_dir=cache)
    missing = raised(lambda: BilinearQKDictionary.from_pretrained(REPO, "other", cache_dir=cache))
    return {"loaded": summary(d, tiny_model("llama")), "missing": missing}


if __name__ == "__main__":
    assert constants.HF_HUB_OFFLINE  # the forks of `online` are the exception
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    print(json.dumps(in_forks(lambda: online(place))[0]), flush=True)
    sys.stdin.readline()  # now the Hub is gone
    print(json.dumps(offline(place)), flush=True)
