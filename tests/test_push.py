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
from huggingface_hub import HfApi, ModelCard
from loopback_hub import LoopbackHub
from tiny_dictionaries import D_KEY, D_QUERY, N_DEAD
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.dictionary import BilinearQKDictionary
from sae_lens_qk.pretrained.push import registry_entry

OWNER = "hf_owner"


@pytest.fixture(scope="module")
def originals(gpt2_bridge) -> list[BilinearQKDictionary]:
    return [measured_dictionary(gpt2_bridge, seed) for seed in (0, 1)]


@pytest.fixture
def dictionary(originals) -> BilinearQKDictionary:
    """With figures and settings; a test may change it."""
    return copy.deepcopy(originals[0])


@pytest.fixture
def other(originals) -> BilinearQKDictionary:
    """Of other weights and figures."""
    return copy.deepcopy(originals[1])


@pytest.fixture
def pushed(hub: LoopbackHub, dictionary: BilinearQKDictionary) -> LoopbackHub:
    """The Hub with the dictionary in FOLDER, and an empty log."""
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    hub.requests.clear()
    return hub


def published(hub: LoopbackHub, revision: str = "main") -> set[str]:
    """All but what the Hub itself puts into a repository."""
    return hub.files(REPO, revision).keys() - {".gitattributes"}


def in_folder(folder: str = FOLDER) -> set[str]:
    return {f"{folder}/{name}" for name in FILES}


def loaded(cache: Path, folder: str = FOLDER, **options: Any) -> BilinearQKDictionary:
    options = {"dtype": None, "verify": "strict", "token": OWNER, **options}
    return BilinearQKDictionary.from_pretrained(REPO, folder, cache_dir=cache, **options)


def card_of(hub: LoopbackHub, path: str = "README.md") -> ModelCard:
    return ModelCard(hub.files(REPO)[path].decode())


# One commit


def test_one_commit_holds_everything(hub, dictionary, hub_cache):
    info = dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    newest, first = hub.commits(REPO)
    assert (newest.oid, newest.parent, newest.author, newest.message) == (
        info.oid,
        first.oid,
        "owner",
        f"Publish {FOLDER}",
    )
    assert published(hub) == {"README.md", *in_folder()}
    files = hub.files(REPO)
    assert json.loads(files[f"{FOLDER}/metrics.json"]) == dictionary.metrics
    assert json.loads(files[f"{FOLDER}/runner_cfg.json"]) == dictionary.runner_cfg
    sums = dict(
        reversed(line.split("  ")) for line in files[f"{FOLDER}/{SUMS}"].decode().splitlines()
    )
    assert sums == {
        name: sha256(files[f"{FOLDER}/{name}"]).hexdigest() for name in FILES if name != SUMS
    }
    found = loaded(hub_cache, revision=info.oid)
    assert same(found, dictionary)
    assert (found.metrics, found.runner_cfg) == (dictionary.metrics, dictionary.runner_cfg)
    assert {request.token for request in hub.requests if request.method != "PUT"} == {OWNER}


def test_the_cards(pushed, dictionary):
    card, listing = card_of(pushed, f"{FOLDER}/README.md"), card_of(pushed)
    kl = dictionary.metrics["sources"]["feature_map"]["pattern_kl"]
    for text in (
        f"# {FOLDER}",
        f'from_pretrained("{REPO}", "{FOLDER}")',
        f"{kl['value']:.4f} ({kl['low']:.4f}, {kl['high']:.4f})",
    ):
        assert text in card.text
    assert (
        f"| [{FOLDER}]({FOLDER}/README.md) | tiny | 1 | {D_QUERY} / {D_KEY} | 200 | {kl['value']:.4f} |"
        in listing.text
    )
    assert f'from_pretrained("{REPO}", "{FOLDER}")' in listing.text
    for made in (card, listing):
        made.validate()
        header = made.data.to_dict()
        assert (header["license"], header["library_name"], header["datasets"]) == (
            "mit",
            "saelens",
            ["org/texts"],
        )
        assert "bilinear-qk" in header["tags"]


def test_a_second_push_makes_no_commit(pushed, dictionary):
    before = pushed.commits(REPO)
    assert dictionary.push_to_hub(REPO, FOLDER, token=OWNER).oid == before[0].oid
    assert pushed.commits(REPO) == before


def test_a_changed_dictionary_makes_one_commit_and_takes_old_files_away(
    pushed, dictionary, hub_cache
):
    pushed.commit(
        REPO,
        {
            f"{FOLDER}/sparsity.safetensors": b"of an older version",
            f"{FOLDER}/deeper/notes.txt": b"kept",
        },
    )
    before = pushed.commits(REPO)
    dictionary.set_feature_map(dictionary.feature_map.select(dictionary.feature_map.weights > 0.5))
    assert dictionary.metrics is None
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    assert pushed.commits(REPO)[1:] == before
    gone = {f"{FOLDER}/metrics.json"}
    assert published(pushed) == {"README.md", *in_folder(), f"{FOLDER}/deeper/notes.txt"} - gone
    assert f"| {len(dictionary.feature_map)} | - | - | - |" in card_of(pushed).text
    assert same(loaded(hub_cache), dictionary)


def test_several_dictionaries_in_nested_folders(pushed, dictionary, other, hub_cache):
    for folder in ("gpt2/L1", "gpt2/L1/wide", FOLDER + "-b"):
        before = pushed.commits(REPO)
        other.push_to_hub(REPO, folder, token=OWNER)
        assert pushed.commits(REPO)[1:] == before
    folders = (FOLDER, FOLDER + "-b", "gpt2/L1", "gpt2/L1/wide")
    assert published(pushed) == {"README.md"}.union(*map(in_folder, folders))
    listed = re.findall(r"^\| \[(.*?)\]\((.*?)\)", card_of(pushed).text, re.MULTILINE)
    assert listed == [(folder, f"{folder}/README.md") for folder in sorted(folders)]
    assert "# wide\n" in card_of(pushed, "gpt2/L1/wide/README.md").text
    for folder in folders:
        assert same(loaded(hub_cache, folder), dictionary if folder == FOLDER else other)
    other.push_to_hub(REPO, FOLDER, token=OWNER)
    assert published(pushed) == {"README.md"}.union(*map(in_folder, folders))


HEADERS = {
    "plain": "license: apache-2.0\ntags: [mine]\ndatasets: theirs/texts\ncustom: {deep: [1, 2]}",
    "results": (
        "license: other\nlicense_name: special\nmodel-index:\n- name: m\n  results:\n  - task: {type: t}\n    dataset: "
        "{type: d, name: D}\n    metrics: [{type: accuracy, value: 0.5}]"
    ),
    "none": "",
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_readme_somebody_else_wrote_keeps_text_and_header(hub, dictionary, other, header):
    hub.create_repo(REPO)
    text = "# Ours\n\nWords, ---, | tables | and `code`.\n\n## More\n\nThe end."
    written = f"---\n{HEADERS[header]}\n---\n\n{text}\n" if HEADERS[header] else f"{text}\n"
    hub.commit(REPO, {"README.md": written.encode()})
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    hub.commit(REPO, {"README.md": hub.files(REPO)["README.md"] + b"\nWritten after it.\n"})
    other.push_to_hub(REPO, "second", token=OWNER)
    card = card_of(hub)
    assert text in card.text
    assert card.text.endswith("Written after it.\n")
    assert card.text.count("QK dictionaries, loaded by folder") == 1
    assert all(f"[{folder}]({folder}/README.md)" in card.text for folder in (FOLDER, "second"))
    found, theirs = (
        card.data.to_dict(),
        ModelCard(written).data.to_dict() if HEADERS[header] else {},
    )
    lists = {"tags": ["mine"], "datasets": ["theirs/texts"]} if header == "plain" else {}
    assert all(set(found[name]) > set(values) for name, values in lists.items())
    assert {name: found[name] for name in theirs.keys() - lists} == {
        name: theirs[name] for name in theirs.keys() - lists
    }
    before = hub.commits(REPO)
    other.push_to_hub(REPO, "second", token=OWNER)
    assert hub.commits(REPO) == before


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
    """Today no text, incomplete configs and bad cards do, with errors about codecs and keys (`_Repository`, `_listing`)."""
    hub.create_repo(REPO)
    hub.commit(REPO, theirs)
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    assert published(hub) == {"README.md", *in_folder(), *theirs}
    assert f"[{FOLDER}]({FOLDER}/README.md)" in card_of(hub).text


@pytest.mark.parametrize("header", ["a: [", "- a", "tags: 3"])
def test_a_readme_with_a_broken_header_is_named(hub, dictionary, header):
    """Today a ParserError of many lines, a ValueError that does not say where, a TypeError (`repository_card`)."""
    hub.create_repo(REPO)
    before = hub.commit(REPO, {"README.md": f"---\n{header}\n---\n# Ours\n".encode()})
    with pytest.raises(ValueError, match=r"README\.md") as error:
        dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    assert "\n" not in str(error.value)
    assert hub.commits(REPO)[0].oid == before


# Options


def test_private(hub, dictionary, hub_cache):
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER, private=True)
    assert HfApi(token=OWNER).model_info(REPO).private
    assert same(loaded(hub_cache), dictionary)
    with pytest.raises(FileNotFoundError):
        loaded(hub_cache / "other", token="hf_stranger")


def test_a_public_repository_is_not_pushed_to_as_private(pushed, other):
    before = pushed.commits(REPO)
    with pytest.raises(ValueError, match=f"{REPO} exists and is public"):
        other.push_to_hub(REPO, FOLDER, token=OWNER, private=True)
    assert pushed.commits(REPO) == before


def test_branch(pushed, other, dictionary, hub_cache):
    main = pushed.commits(REPO)
    other.push_to_hub(REPO, FOLDER, token=OWNER, revision="dev")
    assert pushed.commits(REPO) == main
    assert pushed.commits(REPO, "dev")[1:] == main
    assert same(loaded(hub_cache, revision="dev"), other)
    assert same(loaded(hub_cache), dictionary)
    other.push_to_hub(REPO, "second", token=OWNER, revision="dev")
    assert published(pushed, "dev") == {"README.md", *in_folder(), *in_folder("second")}


@pytest.mark.parametrize("token", [OWNER, "hf_stranger"])
def test_pull_request(pushed, other, dictionary, hub_cache, token):
    main = pushed.commits(REPO)
    info = other.push_to_hub(REPO, FOLDER, token=token, create_pr=True, commit_message="Better")
    assert (info.pr_revision, pushed.commits(REPO)) == ("refs/pr/1", main)
    newest = pushed.commits(REPO, "refs/pr/1")[0]
    assert (newest.oid, newest.message, newest.parent) == (info.oid, "Better", main[0].oid)
    assert same(loaded(hub_cache, revision="refs/pr/1"), other)
    assert same(loaded(hub_cache), dictionary)


def test_message_and_token_of_the_environment(hub, dictionary, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", OWNER)
    dictionary.push_to_hub(REPO, FOLDER, commit_message="Our first\n\nat last")
    assert hub.commits(REPO)[0].message == "Our first\n\nat last"
    assert {request.token for request in hub.requests if request.method != "PUT"} == {OWNER}


def test_a_warning_without_figures(hub, dictionary, caplog):
    dictionary.metrics = None
    dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    assert "the card will say 'not measured': set d.metrics" in caplog.text
    assert "Not measured yet" in card_of(hub, f"{FOLDER}/README.md").text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_fewer_bits(hub, dictionary, hub_cache, dtype, gpt2_bridge):
    dictionary.to(getattr(torch, dtype)).push_to_hub(REPO, FOLDER, token=OWNER)
    found = loaded(hub_cache)
    assert same(found, dictionary)
    assert found.cfg.dtype == dtype
    assert f"Stored in {dtype}." in card_of(hub, f"{FOLDER}/README.md").text


def test_a_compacted_dictionary(hub, dictionary, hub_cache, gpt2_bridge):
    live = [torch.arange(n) < n - N_DEAD for n in (D_QUERY, D_KEY)]
    made = dictionary.compact(*live)
    made.metrics = qk.evaluate(made, gpt2_bridge, tiny_tokens(3, 17), baselines=())
    made.push_to_hub(REPO, FOLDER, token=OWNER)
    found = loaded(hub_cache)
    assert same(found, made)
    assert found.cfg.query_numbers == list(range(D_QUERY - N_DEAD))
    assert (
        f"{D_QUERY} query and {D_KEY} key features were trained"
        in card_of(hub, f"{FOLDER}/README.md").text
    )


def test_the_lines_for_a_registry(pushed, dictionary, hub_cache, tmp_path, monkeypatch):
    commit = pushed.commits(REPO)[0].oid
    (tmp_path / "registry.yaml").write_text(registry_entry(REPO, FOLDER, commit))
    monkeypatch.setenv("SAE_LENS_QK_REGISTRY", str(tmp_path / "registry.yaml"))
    assert same(BilinearQKDictionary.from_pretrained(FOLDER, cache_dir=hub_cache), dictionary)


# Meanwhile and afterwards


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any], int], None]:
    """Let something happen just before each of the first `times` commits of the client."""

    def arrange(event: Callable[[], Any], times: int) -> None:
        left = iter(range(times))
        original = HfApi.create_commit

        def create_commit(self, *args, **kwargs):
            if next(left, None) is not None:
                event()
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
    other.push_to_hub(REPO, "second", token=OWNER)
    assert len(pushed.commits(REPO)) == len(before) + times + 1
    assert published(pushed) == {
        "README.md",
        *in_folder(),
        *in_folder("theirs"),
        *in_folder("second"),
    }
    card = card_of(pushed).text
    assert card.count("A line of theirs.\n") == times
    assert "[theirs](theirs/README.md)" in card
    assert same(loaded(hub_cache, "second"), other)
    assert waits == [0.5, 1, 2][:times]


def test_somebody_who_never_stops_committing(pushed, other, meanwhile, waits):
    meanwhile(lambda: pushed.commit(REPO, {"theirs": b"x"}), 9)
    with pytest.raises(OSError, match=r"org/repo \(412\): A commit has happened since") as error:
        other.push_to_hub(REPO, FOLDER, token=OWNER)
    assert type(error.value) is OSError
    assert [commit.author for commit in pushed.commits(REPO)[:4]] == ["system"] * 4
    assert waits == [0.5, 1, 2]


@pytest.mark.parametrize("revision", ["main", "dev"])
def test_a_commit_whose_answer_is_lost_is_made_once(pushed, other, waits, revision, hub_cache):
    before = pushed.commits(REPO)
    pushed.fault("POST", "/commit/", drop=True, truncate=0)
    info = other.push_to_hub(REPO, FOLDER, token=OWNER, revision=revision)
    assert pushed.commits(REPO, revision)[1:] == before
    assert info.oid == pushed.commits(REPO, revision)[0].oid
    assert waits == [0.5]


# What went wrong leaves the repository as it was


@dataclass
class Mishap:
    error: type[Exception]
    message: str
    call: tuple[str, str] = ("", "")
    """Method and pattern of a request of which every one is spoilt."""
    how: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of `push_to_hub`."""
    stopped: bool = False
    waits: list[float] = field(default_factory=list)


OURS = [0.5, 1, 2]
FAILS = r"The Hub fails on org/repo \(503\), after several attempts: try again later\.$"
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
MISHAPS = {
    "bad token": Mishap(
        PermissionError,
        r"refuses this token for org/repo \(401\): Invalid cred",
        options={"token": "hf_x"},
    ),
    # Today a FileNotFoundError: "There is no repository org/repo, or it is private and the token does not open it".
    "no token": Mishap(PermissionError, "org/repo", options={"token": False}),
    "stranger": Mishap(PermissionError, r"org/repo \(403\): ", options={"token": "hf_stranger"}),
    "branch": Mishap(
        PermissionError, r"org/repo \(403\): ", options={"token": "hf_stranger", "revision": "dev"}
    ),
    "stopped": Mishap(ConnectionError, UNREACHED, stopped=True, waits=OURS),
    "spoilt upload": Mishap(
        OSError, r"org/repo \(400\): No", CALLS["upload"], {"status": 400, "message": "No such"}
    ),
    "spoilt object": Mishap(
        OSError,
        r"org/repo \(422\): Size",
        CALLS["verify"],
        {"status": 422, "message": "Size differs"},
    ),
    "full": Mishap(
        PermissionError,
        r"\(403\): Storage limit",
        CALLS["batch"],
        {"status": 403, "message": "Storage limit"},
    ),
    **{
        f"{name} fails": Mishap(ConnectionError, FAILS, call, {"status": 503}, waits=OURS)
        for name, call in CALLS.items()
        if name
        != "verify"  # the object has arrived: the next attempt does not send it again, and commits
    },
    **{
        f"{name} drops": Mishap(ConnectionError, UNREACHED, CALLS[name], {"drop": True}, waits=OURS)
        for name in ("create", "upload", "commit")
    },
}


@pytest.mark.parametrize("name", MISHAPS)
def test_a_mishap_leaves_the_repository_as_it_was(name, pushed, other, waits):
    mishap = MISHAPS[name]
    before, branches = pushed.commits(REPO), HfApi(token=OWNER).list_repo_refs(REPO).branches
    if mishap.how:
        pushed.fault(*mishap.call, times=None, **mishap.how)
    if mishap.stopped:
        pushed.stop()
    with pytest.raises(mishap.error, match=mishap.message) as caught:
        other.push_to_hub(REPO, FOLDER, **{"token": OWNER, **mishap.options})
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
    other.push_to_hub(REPO, FOLDER, token=OWNER)
    assert pushed.commits(REPO)[1:] == before
    assert same(loaded(hub_cache), other)
    assert waits in ([], [0.5], [0.5, 1])  # some calls the client repeats by itself


@pytest.mark.parametrize(
    "folder", ["..", "../x", "a/../b", "/abs", "", ".", "a//b", "a/", "a\\b", "a\0b"]
)
def test_bad_folders_are_refused_before_anything_is_sent(hub, dictionary, folder):
    with pytest.raises(
        ValueError, match="The folder must be a plain path inside the repository"
    ) as error:
        dictionary.push_to_hub(REPO, folder, token=OWNER)
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
        dictionary.push_to_hub(REPO, FOLDER, token=OWNER)
    assert hub.requests == []


def test_what_is_sent(pushed, other):
    """What is unchanged is not sent again, and cards are read at the commit that is built upon."""
    other.push_to_hub(REPO, "second", token=OWNER)
    lines = served(pushed)
    assert sum(line.startswith("PUT") for line in lines) == 1
    assert lines[0] == "POST create 409"
    assert lines[-1] == "POST main 200"
    read = ("cfg.json", "README.md", "metrics.json", "README.md")
    assert [line for line in lines if line.startswith("GET")] == [
        "GET main 200",
        f"GET {pushed.commits(REPO)[1].oid} 200",
        *(f"GET {name} 200" for name in read),
    ]
