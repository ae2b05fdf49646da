"""`push_to_hub`: one commit or none, and a repository that no mishap changes."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_cases import FILES, FOLDER, REPO, SUMS, measured_dictionary, same, served
from huggingface_hub import CommitInfo, HfApi, ModelCard
from loopback_hub import LoopbackHub
from tiny_dictionaries import D_KEY, D_QUERY, N_DEAD
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.pretrained.push import registry_entry

OWNER = "hf_owner"

Event = Callable[[], Any]


@pytest.fixture(scope="module")
def originals(gpt2_bridge) -> list[BilinearQKDictionary]:
    return [measured_dictionary(gpt2_bridge, seed) for seed in (0, 1)]


@pytest.fixture
def dictionary(originals) -> BilinearQKDictionary:
    """With metrics and settings; a test may change it."""
    return copy.deepcopy(originals[0])


@pytest.fixture
def other(originals) -> BilinearQKDictionary:
    """Of other weights and metrics."""
    return copy.deepcopy(originals[1])


@pytest.fixture
def pushed(
    hub: LoopbackHub,
    dictionary: BilinearQKDictionary,
) -> LoopbackHub:
    """The Hub with the dictionary in FOLDER, and an empty log."""
    push(dictionary)
    hub.requests.clear()
    return hub


def push(
    d: BilinearQKDictionary,
    folder: str = FOLDER,
    **options: Any,
) -> CommitInfo:
    options.setdefault("token", OWNER)
    return d.push_to_hub(REPO, folder, **options)


def load(
    cache: Path,
    folder: str = FOLDER,
    **options: Any,
) -> BilinearQKDictionary:
    options.setdefault("token", OWNER)
    return BilinearQKDictionary.from_pretrained(
        REPO,
        folder,
        dtype=None,
        verify="strict",
        cache_dir=cache,
        **options,
    )


def published(
    hub: LoopbackHub,
    revision: str = "main",
) -> set[str]:
    """All but what the Hub itself puts into a repository."""
    return hub.files(REPO, revision).keys() - {".gitattributes"}


def repository_files(*folders: str) -> set[str]:
    """Every file of a repository that holds dictionaries in these folders."""
    paths = {"README.md"}
    for folder in folders:
        paths |= {f"{folder}/{name}" for name in FILES}
    return paths


def tokens_sent(hub: LoopbackHub) -> set[str | None]:
    """To the Hub itself; its storage needs none."""
    return {request.token for request in hub.requests if request.method != "PUT"}


def read_card(
    hub: LoopbackHub,
    path: str = "README.md",
) -> ModelCard:
    return ModelCard(hub.files(REPO)[path].decode())


# One commit


def test_one_commit_holds_everything(hub, dictionary, hub_cache):
    info = push(dictionary)
    newest, first = hub.commits(REPO)
    assert newest.oid == info.oid
    assert newest.parent == first.oid
    assert newest.author == "owner"
    assert newest.message == f"Publish {FOLDER}"
    assert published(hub) == repository_files(FOLDER)
    assert tokens_sent(hub) == {OWNER}

    copy_of_it = load(hub_cache, revision=info.oid)
    assert same(copy_of_it, dictionary)
    assert copy_of_it.metrics == dictionary.metrics
    assert copy_of_it.runner_cfg == dictionary.runner_cfg


def test_documents_and_sums(pushed, dictionary):
    files = {name: pushed.files(REPO)[f"{FOLDER}/{name}"] for name in FILES}
    assert json.loads(files["metrics.json"]) == dictionary.metrics
    assert json.loads(files["runner_cfg.json"]) == dictionary.runner_cfg
    lines = files.pop(SUMS).decode().splitlines()
    expected = [f"{sha256(data).hexdigest()}  {name}" for name, data in files.items()]
    assert sorted(lines) == sorted(expected)


def test_the_cards(pushed, dictionary):
    card = read_card(pushed, f"{FOLDER}/README.md")
    listing = read_card(pushed)
    kl = dictionary.metrics["sources"]["feature_map"]["pattern_kl"]
    assert f"# {FOLDER}" in card.text
    assert f"{kl['value']:.4f} ({kl['low']:.4f}, {kl['high']:.4f})" in card.text
    row = f"| [{FOLDER}]({FOLDER}/README.md) | tiny | 1 | {D_QUERY} / {D_KEY} | 200 |"
    assert f"{row} {kl['value']:.4f} |" in listing.text
    for model_card in (card, listing):
        model_card.validate()
        assert f'from_pretrained("{REPO}", "{FOLDER}")' in model_card.text
        header = model_card.data.to_dict()
        assert header["license"] == "mit"
        assert header["library_name"] == "saelens"
        assert header["datasets"] == ["org/texts"]
        assert "bilinear-qk" in header["tags"]


def test_a_second_push_makes_no_commit(pushed, dictionary):
    before = pushed.commits(REPO)
    assert push(dictionary).oid == before[0].oid
    assert pushed.commits(REPO) == before


def test_a_changed_dictionary_makes_one_commit_and_takes_old_files_away(
    pushed, dictionary, hub_cache
):
    old_files = {
        f"{FOLDER}/sparsity.safetensors": b"of an older version",
        f"{FOLDER}/deeper/notes.txt": b"of a folder below",
    }
    pushed.commit(REPO, old_files)
    before = pushed.commits(REPO)
    dictionary.set_feature_map(dictionary.feature_map.select(dictionary.feature_map.weights > 0.5))
    assert dictionary.metrics is None
    push(dictionary)
    assert pushed.commits(REPO)[1:] == before
    expected = repository_files(FOLDER) | {f"{FOLDER}/deeper/notes.txt"}
    assert published(pushed) == expected - {f"{FOLDER}/metrics.json"}
    assert f"| {len(dictionary.feature_map)} | - | - | - |" in read_card(pushed).text
    assert same(load(hub_cache), dictionary)


def test_several_dictionaries_in_nested_folders(pushed, dictionary, other, hub_cache):
    for folder in ("gpt2/L1", "gpt2/L1/wide", FOLDER + "-b"):
        before = pushed.commits(REPO)
        push(other, folder)
        _, *older = pushed.commits(REPO)
        assert older == before
    folders = [FOLDER, FOLDER + "-b", "gpt2/L1", "gpt2/L1/wide"]
    assert published(pushed) == repository_files(*folders)
    links = re.findall(r"^\| \[(.*?)\]\((.*?)\)", read_card(pushed).text, re.MULTILINE)
    assert links == [(folder, f"{folder}/README.md") for folder in sorted(folders)]
    assert "# wide\n" in read_card(pushed, "gpt2/L1/wide/README.md").text
    for folder in folders:
        expected = dictionary if folder == FOLDER else other
        assert same(load(hub_cache, folder), expected)
    push(other)
    assert published(pushed) == repository_files(*folders)


HEADERS = {
    "plain": "license: apache-2.0\ntags: [mine]\ndatasets: theirs/texts\ncustom: {deep: [1, 2]}",
    "results": """license: other
license_name: special
model-index:
- name: m
  results:
  - task: {type: t}
    dataset: {type: d, name: D}
    metrics: [{type: accuracy, value: 0.5}]""",
    "none": "",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_readme_somebody_else_wrote_keeps_text_and_header(hub, dictionary, other, header):
    hub.create_repo(REPO)
    text = "# Ours\n\nWords, ---, | tables | and `code`.\n\n## More\n\nThe end."
    readme = f"---\n{HEADERS[header]}\n---\n\n{text}\n" if HEADERS[header] else f"{text}\n"
    hub.commit(REPO, {"README.md": readme.encode()})
    push(dictionary)
    grown = hub.files(REPO)["README.md"]
    hub.commit(REPO, {"README.md": grown + b"\nWritten after it.\n"})
    push(other, "second")
    card = read_card(hub)
    assert text in card.text
    assert card.text.endswith("Written after it.\n")
    assert card.text.count("QK dictionaries, loaded by folder") == 1
    for folder in (FOLDER, "second"):
        assert f"[{folder}]({folder}/README.md)" in card.text
    if HEADERS[header]:
        check_header(card.data.to_dict(), ModelCard(readme).data.to_dict())
    before = hub.commits(REPO)
    push(other, "second")
    assert hub.commits(REPO) == before


def check_header(
    ours: dict[str, Any],
    theirs: dict[str, Any],
) -> None:
    """Tags and datasets grow, everything else stays."""
    for name, value in theirs.items():
        if name in ("tags", "datasets"):
            values = [value] if isinstance(value, str) else value
            assert set(ours[name]) > set(values)
        else:
            assert ours[name] == value


@pytest.mark.parametrize(
    "theirs",
    [
        {"sae/cfg.json": b'{"architecture": "standard"}', "sae/sae_weights.safetensors": b"theirs"},
        {"sae/cfg.json": b"not JSON"},
        {"sae/cfg.json": b"[1]", "cfg.json": b"{}"},
        {"sae/cfg.json": b"\xff\xfe not text"},
        {"sae/cfg.json": b'{"architecture": "bilinear_qk"}'},
        {"sae/cfg.json": b'{"architecture": "bilinear_qk"}', "sae/README.md": b"---\na: [\n---\n"},
    ],
    ids=["stock", "no JSON", "no object", "no text", "incomplete", "bad card"],
)
def test_other_peoples_folders_do_not_stop_a_push(hub, dictionary, theirs):
    hub.create_repo(REPO)
    hub.commit(REPO, theirs)
    push(dictionary)
    assert published(hub) == repository_files(FOLDER) | theirs.keys()
    assert f"[{FOLDER}]({FOLDER}/README.md)" in read_card(hub).text


@pytest.mark.parametrize("header", ["a: [", "- a", "tags: 3"])
def test_a_readme_with_a_broken_header_is_named(hub, dictionary, header):
    hub.create_repo(REPO)
    before = hub.commit(REPO, {"README.md": f"---\n{header}\n---\n# Ours\n".encode()})
    with pytest.raises(ValueError, match=r"README\.md") as error:
        push(dictionary)
    assert "\n" not in str(error.value)
    assert hub.commits(REPO)[0].oid == before


# Options


def test_private(hub, dictionary, hub_cache):
    push(dictionary, private=True)
    assert HfApi(token=OWNER).model_info(REPO).private
    assert same(load(hub_cache), dictionary)
    with pytest.raises(FileNotFoundError):
        load(hub_cache / "other", token="hf_stranger")


def test_a_public_repository_is_not_pushed_to_as_private(pushed, other):
    before = pushed.commits(REPO)
    with pytest.raises(ValueError, match=f"{REPO} exists and is public"):
        push(other, private=True)
    assert pushed.commits(REPO) == before


def test_branch(pushed, other, dictionary, hub_cache):
    main = pushed.commits(REPO)
    push(other, revision="dev")
    assert pushed.commits(REPO) == main
    assert pushed.commits(REPO, "dev")[1:] == main
    assert same(load(hub_cache, revision="dev"), other)
    assert same(load(hub_cache), dictionary)
    push(other, "second", revision="dev")
    assert published(pushed, "dev") == repository_files(FOLDER, "second")


@pytest.mark.parametrize("token", [OWNER, "hf_stranger"])
def test_pull_request(pushed, other, dictionary, hub_cache, token):
    main = pushed.commits(REPO)
    info = push(
        other,
        token=token,
        create_pr=True,
        commit_message="Better",
    )
    assert info.pr_revision == "refs/pr/1"
    assert pushed.commits(REPO) == main
    newest = pushed.commits(REPO, "refs/pr/1")[0]
    assert newest.oid == info.oid
    assert newest.message == "Better"
    assert newest.parent == main[0].oid
    assert same(load(hub_cache, revision="refs/pr/1"), other)
    assert same(load(hub_cache), dictionary)


def test_message_and_token_of_the_environment(hub, dictionary, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    dictionary.push_to_hub(REPO, FOLDER, commit_message="Our first\n\nat last")
    assert hub.commits(REPO)[0].message == "Our first\n\nat last"
    assert tokens_sent(hub) == {OWNER}


def test_a_warning_without_metrics(hub, dictionary, caplog):
    dictionary.metrics = None
    push(dictionary)
    assert "the card will say 'not measured': set d.metrics" in caplog.text
    assert "Not measured yet" in read_card(hub, f"{FOLDER}/README.md").text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fewer_bits(hub, dictionary, hub_cache, dtype, gpt2_bridge):
    push(dictionary.to(getattr(torch, dtype)))
    half_precision = load(hub_cache)
    assert same(half_precision, dictionary)
    assert half_precision.cfg.dtype == dtype
    assert f"Stored in {dtype}." in read_card(hub, f"{FOLDER}/README.md").text


def test_a_compacted_dictionary(hub, dictionary, hub_cache, gpt2_bridge):
    live_query = torch.arange(D_QUERY) < D_QUERY - N_DEAD
    live_key = torch.arange(D_KEY) < D_KEY - N_DEAD
    compact = dictionary.compact(live_query, live_key)
    compact.metrics = qk.evaluate(compact, gpt2_bridge, tiny_tokens(3, 17), baselines=())
    push(compact)
    copy_of_it = load(hub_cache)
    assert same(copy_of_it, compact)
    assert copy_of_it.cfg.query_numbers == list(range(D_QUERY - N_DEAD))
    card = read_card(hub, f"{FOLDER}/README.md")
    assert f"{D_QUERY} query and {D_KEY} key features were trained" in card.text


def test_the_lines_for_a_registry(pushed, dictionary, hub_cache, tmp_path, monkeypatch):
    commit = pushed.commits(REPO)[0]
    file = tmp_path / "registry.yaml"
    file.write_text(registry_entry(REPO, FOLDER, commit.oid))
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(file))
    copy_of_it = BilinearQKDictionary.from_pretrained(FOLDER, cache_dir=hub_cache)
    assert same(copy_of_it, dictionary)


# Meanwhile and afterwards


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Event, int], None]:
    """Let something happen just before each of the first `times` commits of the client."""

    def arrange(
        event: Event,
        times: int,
    ) -> None:
        events = iter([event] * times)
        original = HfApi.create_commit

        def create_commit(self, *args, **kwargs):
            if happens := next(events, None):
                happens()
            return original(self, *args, **kwargs)

        monkeypatch.setattr(HfApi, "create_commit", create_commit)

    return arrange


@pytest.mark.parametrize("times", [1, 3])
def test_somebody_elses_commit_meanwhile_survives(
    pushed, other, meanwhile, waits, hub_cache, times
):
    """Another dictionary, and a line in the README."""
    before = pushed.commits(REPO)

    def event() -> None:
        files = pushed.files(REPO)
        theirs = {f"theirs/{name}": files[f"{FOLDER}/{name}"] for name in FILES}
        pushed.commit(REPO, {**theirs, "README.md": files["README.md"] + b"A line of theirs.\n"})

    meanwhile(event, times)
    push(other, "second")
    assert len(pushed.commits(REPO)) == len(before) + times + 1
    assert published(pushed) == repository_files(FOLDER, "theirs", "second")
    card = read_card(pushed).text
    assert card.count("A line of theirs.\n") == times
    assert "[theirs](theirs/README.md)" in card
    assert same(load(hub_cache, "second"), other)
    assert waits == [0.5, 1, 2][:times]


def test_somebody_who_never_stops_committing(pushed, other, meanwhile, waits):
    meanwhile(lambda: pushed.commit(REPO, {"theirs": b"x"}), 9)
    with pytest.raises(OSError, match=r"org/repo \(412\): A commit has happened since") as error:
        push(other)
    assert type(error.value) is OSError
    for commit in pushed.commits(REPO)[:4]:
        assert commit.author == "system"
    assert waits == [0.5, 1, 2]


@pytest.mark.parametrize("revision", ["main", "dev"])
def test_a_commit_whose_answer_is_lost_is_made_once(pushed, other, waits, revision, hub_cache):
    before = pushed.commits(REPO)
    pushed.fault("POST", "/commit/", drop=True, truncate=0)
    info = push(other, revision=revision)
    newest, *older = pushed.commits(REPO, revision)
    assert older == before
    assert info.oid == newest.oid
    assert waits == [0.5]


# What went wrong leaves the repository as it was


@dataclass
class Mishap:
    error: type[Exception]
    message: str
    call: str = ""
    """A request of which every one is spoilt."""
    fault: dict[str, Any] = field(default_factory=dict)
    """How."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of `push_to_hub`."""
    stopped: bool = False
    waits: list[float] = field(default_factory=list)


OURS = [0.5, 1, 2]
FAILS = r"The Hub fails on org/repo \(503\)"
UNREACHED = r"The Hub cannot be reached for org/repo \(\w+\)"
CALLS = {
    "create": ("POST", "/api/repos/create"),
    "info": ("GET", "/api/models/org/repo/revision/main"),
    "listing": ("GET", "/tree/"),
    "reading": ("GET", "/resolve/"),
    "preupload": ("POST", "/preupload/"),
    "batch": ("POST", "/objects/batch"),
    "upload": ("PUT", "/lfs/"),
    "verify": ("POST", "/objects/verify"),
    "commit": ("POST", "/commit/"),
}
"""Method and pattern of every request of a push."""


def refusal(
    status: int,
    call: str,
    message: str,
    error: type[Exception] = OSError,
) -> Mishap:
    """The Hub answers every such call with this status and message."""
    expected = rf"org/repo \({status}\): {message}"
    fault = {"status": status, "message": message}
    return Mishap(error, expected, call, fault)


def bad_token(
    token: str | bool,
    message: str,
    **options: Any,
) -> Mishap:
    return Mishap(PermissionError, message, options={"token": token, **options})


MISHAPS = {
    "bad token": bad_token("hf_x", r"refuses this token for org/repo \(401\): Invalid cred"),
    "no token": bad_token(False, "org/repo can be written with a token of its owner"),
    "stranger": bad_token("hf_stranger", r"org/repo \(403\): "),
    "branch": bad_token("hf_stranger", r"org/repo \(403\): ", revision="dev"),
    "stopped": Mishap(ConnectionError, UNREACHED, stopped=True, waits=OURS),
    "spoilt upload": refusal(400, "upload", "No such"),
    "spoilt object": refusal(422, "verify", "Size differs"),
    "full": refusal(403, "batch", "Storage limit", PermissionError),
}
for call in CALLS:
    # after "verify" the object has arrived: the next attempt does not send it again, and commits
    if call != "verify":
        fault = {"status": 503}
        MISHAPS[f"{call} fails"] = Mishap(ConnectionError, FAILS, call, fault, waits=OURS)
for call in ("create", "upload", "commit"):
    fault = {"drop": True}
    MISHAPS[f"{call} drops"] = Mishap(ConnectionError, UNREACHED, call, fault, waits=OURS)


@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_leaves_the_repository_as_it_was(name, pushed, other, waits):
    mishap = MISHAPS[name]
    before = pushed.commits(REPO)
    branches = HfApi(token=OWNER).list_repo_refs(REPO).branches
    if mishap.call:
        pushed.fault(*CALLS[mishap.call], times=None, **mishap.fault)
    if mishap.stopped:
        pushed.stop()
    with pytest.raises(mishap.error, match=mishap.message) as caught:
        push(other, **mishap.options)
    assert type(caught.value) is mishap.error
    assert "\n" not in str(caught.value)
    assert waits == mishap.waits
    pushed.start()
    assert pushed.commits(REPO) == before
    assert HfApi(token=OWNER).list_repo_refs(REPO).branches == branches


@pytest.mark.parametrize("call", CALLS)
def test_a_hub_that_fails_for_a_moment(pushed, other, waits, hub_cache, call):
    method, pattern = CALLS[call]
    before = pushed.commits(REPO)
    pushed.fault(method, pattern, status=503)
    pushed.fault(method, pattern, drop=True)
    push(other)
    assert pushed.commits(REPO)[1:] == before
    assert same(load(hub_cache), other)
    assert waits in ([], [0.5], [0.5, 1])  # some calls the client repeats by itself


@pytest.mark.parametrize(
    "folder", ["..", "../x", "a/../b", "/abs", "", ".", "a//b", "a/", "a\\b", "a\0b"]
)
def test_bad_folders_are_refused_before_anything_is_sent(hub, dictionary, folder):
    with pytest.raises(ValueError, match="folder must be a plain path") as error:
        push(dictionary, folder)
    assert "\n" not in str(error.value)
    assert hub.requests == []


@pytest.mark.parametrize("repo_id", ["../repo", "org/repo/x", "org/re\\po", ""])
def test_bad_repositories_are_refused_before_anything_is_sent(hub, dictionary, repo_id):
    with pytest.raises(ValueError, match=r"Repo id|repo_id"):
        dictionary.push_to_hub(repo_id, FOLDER, token=OWNER)
    assert hub.requests == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_broken_dictionary_is_refused_before_anything_is_sent(hub, dictionary, value):
    dictionary.query.W_dec[3, 5] = value
    with pytest.raises(ValueError, match=r"not finite, first in query\.W_dec"):
        push(dictionary)
    assert hub.requests == []


def test_what_is_sent(pushed, other):
    """What is unchanged is not sent again, and cards are read at the commit that is built upon."""
    push(other, "second")
    lines = served(pushed)
    assert sum(line.startswith("PUT") for line in lines) == 1
    assert lines[0] == "POST create 409"
    assert lines[-1] == "POST main 200"
    commit = pushed.commits(REPO)[1].oid
    names = ["main", commit, "cfg.json", "README.md", "metrics.json", "README.md"]
    downloads = [line for line in lines if line.startswith("GET")]
    assert downloads == [f"GET {name} 200" for name in names]
