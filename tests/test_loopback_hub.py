"""The loopback Hub as the real client sees it."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path, PosixPath

import httpx2
import pytest
from hub_calls import (
    FILES,
    REPO,
    WEIGHTS,
    commit,
    download,
    git_oid,
    nobody,
    owner,
    serve_files,
    served,
    stranger,
    tokens_sent,
    unknown,
    upload,
    write_files,
)
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from loopback_hub import LoopbackHub


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    """A bar that an error interrupts would be drawn again when the process ends."""
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture
def repo(hub: LoopbackHub) -> LoopbackHub:
    return serve_files(hub)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_files(tmp_path / "folder")


# --- the environment of the tests


def test_the_client_knows_only_the_loopback_hub(hub):
    assert hub.url == constants.ENDPOINT
    assert not constants.is_offline_mode()
    assert constants.HF_HUB_DISABLE_XET
    assert constants.HF_HUB_CACHE.startswith(os.environ["HF_HOME"])
    assert get_token() is None


def test_so_does_a_process_started_by_a_test(hub):
    code = "from huggingface_hub import HfApi; HfApi().create_repo('theirs')"
    environment = {**os.environ, "HF_TOKEN": "hf_stranger"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    assert stranger.model_info("stranger/theirs").author == "stranger"


# --- repositories and users


def test_create_repo(hub):
    assert owner.create_repo("org/new", private=True) == f"{hub.url}/org/new"
    assert owner.create_repo("mine").repo_id == "owner/mine"
    assert list(hub.files("org/new")) == [".gitattributes"]
    assert [commit.message for commit in hub.commits("org/new")] == ["initial commit"]
    assert owner.model_info("org/new").private
    assert not owner.model_info("owner/mine").private

    with pytest.raises(HfHubHTTPError, match="You already created this model repo") as error:
        owner.create_repo("org/new")
    assert error.value.response.status_code == 409
    assert owner.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    assert len(hub.commits("org/new")) == 1


@pytest.mark.parametrize(
    ("api", "status", "message"),
    [
        (stranger, 403, 'namespace "org"'),
        (nobody, 401, "Invalid username or password"),
        (unknown, 401, "Invalid credentials"),
    ],
)
def test_create_repo_refused(hub, api, status, message):
    with pytest.raises(HfHubHTTPError, match=message) as error:
        api.create_repo("org/new")
    assert error.value.response.status_code == status
    assert not isinstance(error.value, RepositoryNotFoundError)
    with pytest.raises(RepositoryNotFoundError):
        owner.model_info("org/new")


def test_private_repositories_are_missing_to_others(hub, hub_cache):
    hub.create_repo(REPO, private=True)
    hub.commit(REPO, FILES)
    assert download(hub_cache, token="hf_owner") == FILES["cfg.json"]
    for api, status in ((stranger, 404), (nobody, 401)):
        for call in (api.model_info, api.list_repo_files, api.list_repo_refs):
            with pytest.raises(RepositoryNotFoundError) as error:
                call(REPO)
            assert error.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            download(hub_cache / "other", token=api.token)
        with pytest.raises(RepositoryNotFoundError):
            upload(api, "x", b"x")


def test_gated_repositories_list_their_files_but_keep_them(hub, hub_cache):
    hub.create_repo(REPO, gated=True)
    hub.commit(REPO, FILES)
    for api, status in ((stranger, 403), (nobody, 401)):
        assert api.model_info(REPO).gated == "manual"
        assert "cfg.json" in api.list_repo_files(REPO)
        for filename in ("cfg.json", "missing.json"):
            with pytest.raises(GatedRepoError) as error:
                download(hub_cache, filename, token=api.token)
            assert error.value.response.status_code == status
        with pytest.raises(GatedRepoError):
            snapshot_download(REPO, cache_dir=hub_cache, token=api.token)
    assert download(hub_cache, token="hf_owner") == FILES["cfg.json"]


def test_an_unknown_token_is_refused_where_none_is_needed(repo, hub_cache):
    calls = [
        lambda: unknown.model_info(REPO),
        lambda: unknown.list_repo_files(REPO),
        lambda: download(hub_cache, token="hf_unknown"),
        lambda: upload(unknown, "x", b"x"),
    ]
    for call in calls:
        with pytest.raises(HfHubHTTPError, match="Invalid credentials") as error:
            call()
        assert error.value.response.status_code == 401
        assert not isinstance(error.value, RepositoryNotFoundError)
    assert len(repo.commits(REPO)) == 2


def test_writing_needs_a_token_of_the_namespace(repo, folder):
    with pytest.raises(RepositoryNotFoundError) as error:  # the client's reading of a 401
        nobody.upload_folder(repo_id=REPO, folder_path=folder)
    assert error.value.response.status_code == 401
    with pytest.raises(HfHubHTTPError, match="create_pr=1") as error:
        stranger.upload_folder(repo_id=REPO, folder_path=folder)
    assert error.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError, match="403"):
        stranger.create_branch(REPO, branch="dev")
    assert repo.files(REPO).keys() == {".gitattributes", *FILES}


def test_the_token_of_the_environment_is_used(repo, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    upload(HfApi(), "x", b"x")
    assert {request.token for request in repo.requests} == {"hf_owner"}


# --- uploads


def test_upload_folder(hub, folder):
    owner.create_repo(REPO)
    (folder / "empty.safetensors").touch()
    served(hub)
    info = owner.upload_folder(
        repo_id=REPO, folder_path=folder, commit_message="Summary", commit_description="More"
    )
    assert hub.files(REPO) == {
        **FILES,
        "empty.safetensors": b"",
        ".gitattributes": hub.files(REPO)[".gitattributes"],
    }
    newest, first = hub.commits(REPO)
    assert newest.oid == info.oid
    assert newest.message == "Summary\n\nMore"
    assert newest.parent == first.oid
    assert newest.author == "owner"
    assert info.commit_url == f"{hub.url}/org/repo/commit/{info.oid}"
    assert served(hub) == [
        "POST /api/models/R/preupload/main 200",
        "POST /R.git/info/lfs/objects/batch 200",
        f"PUT /lfs/R/{sha256(WEIGHTS).hexdigest()} 200",
        "POST /R.git/info/lfs/objects/verify 200",
        "POST /api/models/R/commit/main 200",
    ]


def test_the_storage_sees_no_token(repo):
    upload(owner, "other.safetensors", b"other")
    assert tokens_sent(repo, "PUT") == {None}
    assert tokens_sent(repo, "POST") == {"hf_owner"}


def test_a_repeated_upload_makes_no_second_commit(hub, folder):
    owner.create_repo(REPO)
    first = owner.upload_folder(repo_id=REPO, folder_path=folder)
    served(hub)
    assert owner.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert len(hub.commits(REPO)) == 2
    assert served(hub) == [
        "POST /api/models/R/preupload/main 200",
        "POST /R.git/info/lfs/objects/batch 200",  # nothing is sent: the object is there
        "GET /api/models/R/revision/main 200",
    ]


def test_known_objects_are_not_sent_again(repo):
    upload(owner, "copy.safetensors", WEIGHTS)
    assert not any(line.startswith("PUT") for line in served(repo))
    assert repo.files(REPO)["copy.safetensors"] == WEIGHTS


def test_the_storage_checks_the_sum(repo, tmp_path):
    """The client's own mistake: the file changes between the sum and the upload."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"before")
    operation = CommitOperationAdd("weights.safetensors", path)
    assert operation.upload_info.sha256
    path.write_bytes(b"after!")
    with pytest.raises(RuntimeError, match=r"Error while uploading 'weights.safetensors'") as error:
        owner.create_commit(REPO, [operation], commit_message="m")
    assert isinstance(error.value.__cause__, BadRequestError)
    assert len(repo.commits(REPO)) == 2


def test_verification_checks_the_size(repo):
    operation = CommitOperationAdd("weights.safetensors", b"content")
    operation.upload_info.size += 1
    with pytest.raises(RuntimeError) as error:
        owner.create_commit(REPO, [operation], commit_message="m")
    assert "has 7 bytes, not 8" in str(error.value.__cause__)
    assert len(repo.commits(REPO)) == 2


def test_a_commit_needs_its_objects(repo):
    operation = CommitOperationAdd("weights.safetensors", b"never sent")
    operation._upload_mode = "lfs"
    operation._is_uploaded = True
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        owner.create_commit(REPO, [operation], commit_message="m")
    assert len(repo.commits(REPO)) == 2


def test_deletion(repo):
    operations = [CommitOperationDelete("cfg.json")]
    owner.create_commit(REPO, operations, commit_message="m")
    assert repo.files(REPO).keys() == {".gitattributes", *FILES} - {"cfg.json"}
    operations = [CommitOperationAdd("new", b"x"), CommitOperationDelete("cfg.json")]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        owner.create_commit(REPO, operations, commit_message="m")
    assert "new" not in repo.files(REPO)


def test_parent_commit(repo):
    first = repo.commits(REPO)[0].oid
    second = repo.commit(REPO, {"theirs": b"x"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        commit("ours", parent_commit=first)
    assert error.value.response.status_code == 412
    assert "ours" not in repo.files(REPO)
    commit("ours", parent_commit=second)
    assert {"ours", "theirs"} < repo.files(REPO).keys()


def test_pull_requests(repo, hub_cache):
    first = repo.commits(REPO)[0].oid
    repo.commit(REPO, {"theirs": b"x"})
    info = commit("cfg.json", b"{}", stranger, create_pr=True, parent_commit=first)
    assert info.pr_num == 1
    assert info.pr_revision == "refs/pr/1"
    assert info.pr_url == f"{repo.url}/org/repo/discussions/1"
    assert repo.files(REPO)["cfg.json"] == FILES["cfg.json"]
    assert repo.commits(REPO, "refs/pr/1")[0].parent == first
    assert download(hub_cache, revision="refs/pr/1") == b"{}"
    second = upload(owner, "new.safetensors", b"y", create_pr=True)
    assert second.pr_num == 2
    refs = nobody.list_repo_refs(REPO, include_pull_requests=True)
    assert [pull.ref for pull in refs.pull_requests or []] == ["refs/pr/1", "refs/pr/2"]


def test_branches(repo, hub_cache):
    first = repo.commits(REPO)[1].oid
    owner.create_branch(REPO, branch="feature/one")
    owner.create_branch(REPO, branch="old", revision=first)
    with pytest.raises(HfHubHTTPError, match="409"):
        owner.create_branch(REPO, branch="old")
    owner.create_branch(REPO, branch="old", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        owner.create_branch(REPO, branch="new", revision="nowhere")
    with pytest.raises(BadRequestError):
        owner.create_branch(REPO, branch="refs/pr/5")

    upload(owner, "cfg.json", b"{}", revision="feature/one")
    refs = nobody.list_repo_refs(REPO)
    tips = {branch.name: branch.target_commit for branch in refs.branches}
    assert tips.keys() == {"main", "feature/one", "old"}
    assert tips["old"] == first
    assert repo.files(REPO)["cfg.json"] == FILES["cfg.json"]
    assert download(hub_cache, revision="feature/one") == b"{}"
    assert list(repo.files(REPO, "old")) == [".gitattributes"]
    for revision in ("nowhere", first):  # a commit is no branch
        with pytest.raises(RevisionNotFoundError):
            commit("x", revision=revision)


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("---\nlicense: [mit\n---\n", "YAML metadata error"),
        ("---\n- mit\n---\n", "must be a mapping, not list"),
    ],
)
def test_a_card_with_invalid_metadata_stops_the_upload_before_it_starts(
    repo, folder, card, problem
):
    (folder / "README.md").write_text(card)
    (folder / "new.safetensors").write_bytes(b"new")
    with pytest.raises(ValueError, match=rf"Invalid metadata in README.md.\n- .*{problem}"):
        owner.upload_folder(repo_id=REPO, folder_path=folder)
    assert served(repo) == ["POST /api/validate-yaml 400"]


def test_cards(repo):
    card = ModelCard("---\nlicense: mit\n---\n# A model\n")
    card.validate()
    card.data.weights = PosixPath("a")
    with pytest.raises(ValueError, match="could not determine a constructor"):
        card.validate()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        upload(owner, "README.md", b"---\ntags: [a]\n---\n")
        assert not caught
        upload(owner, "README.md", b"# No metadata")
    assert "empty or missing yaml metadata" in str(caught[0].message)


# --- downloads and listings


def test_hf_hub_download(repo, hub_cache):
    oid = repo.commits(REPO)[0].oid
    blobs = {
        "cfg.json": git_oid(FILES["cfg.json"]),
        "half/sae_weights.safetensors": sha256(WEIGHTS).hexdigest(),
    }
    for name, blob in blobs.items():
        path = Path(hf_hub_download(REPO, name, cache_dir=hub_cache))
        assert path.read_bytes() == FILES[name]
        assert path == hub_cache / "models--org--repo" / "snapshots" / oid / name
        assert path.resolve().name == blob
        address = f"/R/resolve/main/{name}"
        assert served(repo) == [f"HEAD {address} 200", f"GET {address} 200"]
        hf_hub_download(REPO, name, cache_dir=hub_cache)
        assert served(repo) == [f"HEAD {address} 200"]
        hf_hub_download(REPO, name, revision=oid, cache_dir=hub_cache)
        assert served(repo) == []


def test_only_what_changed_is_downloaded_again(repo, hub_cache):
    hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    repo.commit(REPO, {"other": b"x"})
    served(repo)
    hf_hub_download(REPO, "cfg.json", cache_dir=hub_cache)
    assert served(repo) == ["HEAD /R/resolve/main/cfg.json 200"]
    repo.commit(REPO, {"cfg.json": b"{}"}, delete=["other"])
    assert download(hub_cache) == b"{}"
    assert "other" not in repo.files(REPO)


def test_names_are_quoted(repo, hub_cache):
    repo.commit(REPO, {"a folder/100% é?#.txt": b"x"})
    assert download(hub_cache, "a folder/100% é?#.txt") == b"x"


def test_snapshot_download(repo, hub_cache):
    oid = repo.commits(REPO)[0].oid
    path = Path(snapshot_download(REPO, cache_dir=hub_cache))
    for name, data in repo.files(REPO).items():
        assert (path / name).read_bytes() == data
    lines = served(repo)
    assert lines[:2] == [
        "GET /api/models/R/revision/main 200",
        f"GET /api/models/R/tree/{oid}?recursive=true&expand=false 200",
    ]
    assert len(lines) == 2 + 2 * len(repo.files(REPO))
    snapshot_download(REPO, cache_dir=hub_cache)
    assert served(repo) == ["GET /api/models/R/revision/main 200"]
    snapshot_download(REPO, revision=oid, cache_dir=hub_cache)
    assert served(repo) == []


def test_listings(repo):
    first = repo.commits(REPO)[1].oid
    assert nobody.list_repo_files(REPO) == [".gitattributes", *sorted(FILES)]
    assert nobody.list_repo_files(REPO, revision=first) == [".gitattributes"]
    assert nobody.file_exists(REPO, "cfg.json")
    assert not nobody.file_exists(REPO, "nowhere")
    assert not nobody.file_exists("org/nowhere", "cfg.json")
    assert nobody.revision_exists(REPO, first)
    assert not nobody.revision_exists(REPO, first[:7])


def test_model_info(repo):
    info = nobody.model_info(REPO)
    assert info.id == REPO
    assert info.author == "org"
    assert info.gated is False
    assert info.sha == repo.commits(REPO)[0].oid
    names = [file.rfilename for file in info.siblings or []]
    assert names == [".gitattributes", *sorted(FILES)]


@pytest.mark.parametrize(
    ("repo_id", "filename", "revision", "error"),
    [
        ("org/nowhere", "cfg.json", "main", RepositoryNotFoundError),
        (REPO, "cfg.json", "nowhere", RevisionNotFoundError),
        (REPO, "nowhere.json", "main", RemoteEntryNotFoundError),
    ],
)
@pytest.mark.parametrize("token", ["hf_owner", False])
def test_what_is_missing(repo, hub_cache, repo_id, filename, revision, error, token):
    api = HfApi(token=token)
    with pytest.raises(error) as raised:
        hf_hub_download(
            repo_id,
            filename,
            revision=revision,
            cache_dir=hub_cache,
            token=token,
        )
    is_unknown = error is RepositoryNotFoundError and not token
    assert raised.value.response.status_code == (401 if is_unknown else 404)
    notes = list(hub_cache.glob("*/.no_exist/*/nowhere.json"))
    assert len(notes) == (error is RemoteEntryNotFoundError)
    if error is RemoteEntryNotFoundError:
        return
    for call in (api.model_info, api.list_repo_files):
        with pytest.raises(error):
            call(repo_id, revision=revision)
    if token:
        with pytest.raises(error):
            commit(
                "x",
                api=api,
                repo_id=repo_id,
                revision=revision,
            )


def test_times_and_order_of_faults(repo):
    repo.fault("GET|POST", "/api/", status=418, times=2)
    repo.fault("GET", "models", status=410, times=None)
    address = f"{repo.url}/api/models/{REPO}"
    codes = [httpx2.get(address).status_code for _ in range(4)]
    assert codes == [418, 418, 410, 410]


def test_a_hub_of_its_own_starts_and_ends():
    with LoopbackHub() as other:
        other.create_repo(REPO)
        assert HfApi(endpoint=other.url).model_info(REPO).id == REPO
    with pytest.raises(httpx2.ConnectError):
        HfApi(endpoint=other.url).model_info(REPO)
    with pytest.raises(ValueError, match="org/repo exists"):
        other.create_repo(REPO)


def test_what_the_loopback_hub_does_not_know(repo):
    assert httpx2.get(f"{repo.url}/api/nothing").status_code == 404
    owner_header = {"Authorization": "Bearer hf_owner"}
    answer = httpx2.post(f"{repo.url}/api/repos/create", headers=owner_header)
    assert answer.status_code == 501
