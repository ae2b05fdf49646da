"""SHA256SUMS: what `sha256sum -c` reads and writes, and every way a folder can differ from it."""

import re
import subprocess
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from tiny_dictionaries import tiny_dictionary
from tiny_models import tiny_tokens

import sae_lens_qk as qk
from sae_lens_qk.pretrained.checksums import (
    METRICS,
    RUNNER_CONFIG,
    SUMS,
    read_sums,
    sha256_of,
    verify_folder,
    write_sums,
)

DOCUMENTS = {
    "cfg.json": b'{"d_in": 24}\n',
    "metrics.json": b"{}",
    "runner_cfg.json": b'{"seed": 42}',
    "sae_weights.safetensors": bytes(range(256)),
}
"""What has to be listed where it is there."""
FILES = DOCUMENTS | {"README.md": "Größe\n".encode(), "notes of mine.txt": b"", "Größe.md": b"\r\n"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Files with their sums, and a folder inside, which is not summed."""
    path = tmp_path / "dictionary"
    (path / "query").mkdir(parents=True)
    (path / "query" / "cfg.json").write_text("{}")
    for name, content in FILES.items():
        (path / name).write_bytes(content)
    write_sums(path)
    return path


def sha256sum(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sha256sum", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def refusal(folder: Path, **options) -> str:
    """The message, the same with and without "strict"."""
    messages = set()
    for verify in (True, "strict"):
        with pytest.raises(ValueError, match=re.escape(str(folder))) as error:
            verify_folder(folder, verify, **options)
        messages.add(str(error.value))
    verify_folder(folder, False, **options)
    (message,) = messages
    return message


def test_sha256sum_accepts_what_is_written(folder):
    process = sha256sum(folder, "--check", "--strict", SUMS)
    assert process.returncode == 0
    assert process.stderr == ""
    assert process.stdout.splitlines() == [f"{name}: OK" for name in sorted(FILES)]
    expected = {name: sha256(content).hexdigest() for name, content in FILES.items()}
    assert read_sums(folder / SUMS) == expected
    (folder / "cfg.json").write_bytes(b"[]")
    assert sha256sum(folder, "--check", SUMS).returncode == 1


@pytest.mark.parametrize("mode", ["--text", "--binary"])
def test_what_sha256sum_writes_is_accepted(mode, folder):
    (folder / SUMS).write_text(sha256sum(folder, mode, *FILES).stdout)
    verify_folder(folder, "strict", sha256_of(folder / SUMS))


def test_writing_twice_changes_nothing(folder):
    before = (folder / SUMS).read_bytes()
    write_sums(folder)
    assert (folder / SUMS).read_bytes() == before


@pytest.mark.parametrize("documented", [False, True])
def test_a_saved_dictionary_is_verifiable(documented, gpt2_bridge, tmp_path):
    d = tiny_dictionary(gpt2_bridge)
    names = {"README.md", "cfg.json", "sae_weights.safetensors"}
    if documented:
        d.metrics = qk.evaluate(d, gpt2_bridge, tiny_tokens(2, 7))
        d.runner_cfg = qk.BilinearQKRunnerConfig().to_dict()
        names |= {"metrics.json", "runner_cfg.json"}
    d.save_model(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names | {SUMS}
    assert set(read_sums(tmp_path / SUMS)) == names
    assert sha256sum(tmp_path, "--check", "--strict", SUMS).returncode == 0
    verify_folder(tmp_path, "strict")


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: content[:-1] + bytes([content[-1] ^ 128]),
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content + b"\n",
    ],
    ids=["first bit", "last bit", "truncated", "emptied", "longer"],
)
def test_a_changed_file_is_refused(damage, name, folder):
    (folder / name).write_bytes(damage(FILES[name]))
    message = refusal(folder)
    assert message.startswith(f"{folder / name} does not have the SHA-256 sum")
    assert "force_download=True" in message


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(name, folder):
    (folder / name).unlink()
    message = f"{folder} is incomplete: {name} is listed in SHA256SUMS and missing."
    assert refusal(folder) == message
    (folder / name).mkdir()
    assert refusal(folder) == message


@pytest.mark.parametrize("name", DOCUMENTS)
def test_an_unlisted_document_is_refused(name, folder):
    """As when weights of another dictionary, or metrics of another run, are copied there."""
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))
    mixed = "the folder mixes files of two dictionaries"
    assert refusal(folder) == f"{folder / SUMS} does not list {name}: {mixed}."
    (folder / name).unlink()
    if name in (METRICS, RUNNER_CONFIG):  # which a dictionary may lack
        verify_folder(folder, "strict")
    else:
        assert "does not list" in refusal(folder)


def test_other_files_may_be_unlisted(folder):
    (folder / "my notes.txt").write_text("good one")
    verify_folder(folder, "strict")


def test_empty_sums_are_refused(folder):
    (folder / SUMS).write_bytes(b"")
    assert "does not list cfg.json" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/b", r"a\b", r"..\secret", "..", ".", "", SUMS, "a\0b"],
    ids=repr,
)
def test_hostile_names_are_refused(name, folder):
    """Even with the right sum: nothing outside the folder is read."""
    (folder.parent / "secret").write_bytes(b"secret")
    line = f"{sha256(b'secret').hexdigest()}  {name}"
    with open(folder / SUMS, "a") as file:
        file.write(f"{line}\n")
    assert refusal(folder).startswith(f"{folder / SUMS} is damaged: {line!r} is not a SHA-256 sum")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[1:],
        lambda text: text.replace("  ", " ", 1),
        lambda text: text.replace(text[:64], text[:64].upper(), 1),
        lambda text: f"version https://git-lfs.github.com/spec/v1\n{text}",
        lambda text: f"<html>{'x' * 10_000}</html>",
        lambda text: f"{text}\n",
    ],
    ids=["digit missing", "one blank", "upper case", "LFS pointer", "HTML", "empty line"],
)
def test_damaged_sums_are_refused(change, folder):
    (folder / SUMS).write_text(change((folder / SUMS).read_text()))
    message = refusal(folder)
    assert message.startswith(f"{folder / SUMS} is damaged: ")
    assert message.endswith(" and the name of a file in its folder.")
    assert len(message) < 300 + len(str(folder))


@pytest.mark.parametrize(
    "garbage", [b"\xff\xfe\x00\x01", bytes(range(128, 256)), "Größe".encode("latin-1")]
)
def test_sums_that_are_not_text_are_refused(garbage, folder):
    with open(folder / SUMS, "ab") as file:
        file.write(garbage)
    assert refusal(folder).startswith(f"{folder / SUMS} is damaged: it is not text (")


def test_sums_are_checked_against_the_registry(folder):
    expected = sha256((folder / SUMS).read_bytes()).hexdigest()
    verify_folder(folder, True, expected)
    message = f"{folder / SUMS} is not the file the registry names (SHA-256 {expected})."
    (folder / "cfg.json").write_bytes(b"another one, with sums that fit")
    write_sums(folder)
    verify_folder(folder, "strict")
    assert refusal(folder, sums_sha256=expected) == message


def test_without_sums_there_is_a_warning_or_a_refusal(folder):
    (folder / SUMS).unlink()
    missing = f"{folder} has no SHA256SUMS: its files cannot be verified"
    warning = f"{missing}. Load with verify='strict' to refuse such folders."
    refused = f"{missing}, and verification was asked for."
    with pytest.warns(UserWarning, match=f"^{re.escape(warning)}$") as warned:
        verify_folder(folder, True)
    assert len(warned) == 1
    with pytest.raises(ValueError, match=f"^{re.escape(refused)}$"):
        verify_folder(folder, "strict")
    assert refusal(folder, sums_sha256=64 * "0") == refused


def silent(check: Callable[[], None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check()


def test_nothing_is_checked_when_that_is_asked_for(folder):
    for name in (SUMS, "cfg.json"):
        (folder / name).unlink()
    silent(lambda: verify_folder(folder, False))
    silent(lambda: verify_folder(folder / "nowhere", False, 64 * "0"))


def test_a_good_folder_passes_in_silence(folder):
    for verify in (True, "strict"):
        silent(lambda verify=verify: verify_folder(folder, verify))


@pytest.mark.parametrize("verify", ["yes", "True", "", None, 2, []])
def test_other_modes_are_refused(verify, folder):
    expected = re.escape(f"True, False or 'strict', got {verify!r}.")
    with pytest.raises(ValueError, match=f"{expected}$"):
        verify_folder(folder, verify)
