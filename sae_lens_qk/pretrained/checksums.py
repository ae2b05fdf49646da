"""SHA256SUMS: what makes a dictionary folder verifiable, in the format of `sha256sum -c`.

The Hub client checks the length of a download, not its content, so a dictionary carries its own
sums.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import Literal

SUMS = "SHA256SUMS"
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"
METRICS = "metrics.json"
RUNNER_CONFIG = "runner_cfg.json"
CARD = "README.md"

Verify = bool | Literal["strict"]
"""How to verify.

True: check what has sums, warn where there are none; "strict": refuse a folder without sums;
False: check nothing.
"""

_LINE = re.compile(r"([0-9a-f]{64}) [ *]([^/\\\0]+)")


def check_verify(verify: Verify) -> None:
    if verify not in (True, False, "strict"):
        raise ValueError(f"verify must be True, False or 'strict', got {verify!r}.")


def sha256_of(path: Path) -> str:
    # in pieces: weights need not fit into memory
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over every other file of the folder."""
    files = [path for path in folder.iterdir() if path.is_file()]
    # a file cannot hold its own sum
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(files) if path.name != SUMS]
    (folder / SUMS).write_text("".join(lines))


def read_sums(path: Path) -> dict[str, str]:
    """File names and their sums.

    Raises:
        ValueError: a line that is not a sum and a plain file name (names with directories are
            refused), or config or weights are not listed.
    """
    try:
        lines = path.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not text ({error}).") from error
    sums = {}
    for line in lines:
        # names of files elsewhere would let the sums make us read them
        match = _LINE.fullmatch(line)
        if match is None or match[2] in (".", "..", SUMS):
            raise ValueError(
                f"{path} is damaged: {line[:90]!r} is not a SHA-256 sum and the name of a file "
                "in its folder."
            )
        sums[match[2]] = match[1]
    for name in (CONFIG, WEIGHTS):
        if name not in sums:
            raise ValueError(
                f"{path} does not list {name}: the folder mixes files of two dictionaries."
            )
    return sums


def verify_folder(
    folder: Path,
    verify: Verify,
    sums_sha256: str | None = None,
) -> None:
    """Check a dictionary folder against its SHA256SUMS, and that against the registry's sum of it.

    Args:
        sums_sha256: the expected sum of SHA256SUMS itself; None: not known.
    Raises:
        ValueError: a file is missing, was changed or is not listed, or (verify="strict") there are
            no sums.
    Warns:
        UserWarning: there are no sums.
    """
    check_verify(verify)
    if not verify:
        return
    if not (folder / SUMS).is_file():
        message = f"{folder} has no {SUMS}: its files cannot be verified"
        if verify == "strict" or sums_sha256:
            raise ValueError(f"{message}, and verification was asked for.")
        warnings.warn(f"{message}. Load with verify='strict' to refuse such folders.", stacklevel=2)
        return
    # whoever changes a file with its sum does not pass this
    if sums_sha256 and sha256_of(folder / SUMS) != sums_sha256:
        raise ValueError(
            f"{folder / SUMS} is not the file the registry names (SHA-256 {sums_sha256})."
        )
    sums = read_sums(folder / SUMS)
    # optional, so that an unlisted one may be left over from another dictionary
    for name in (METRICS, RUNNER_CONFIG):
        if name not in sums and (folder / name).is_file():
            raise ValueError(
                f"{folder / SUMS} does not list {name}: the folder mixes files of two dictionaries."
            )
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is incomplete: {name} is listed in {SUMS} and missing.")
        if sha256_of(folder / name) != expected:
            raise ValueError(
                f"{folder / name} does not have the SHA-256 sum that {SUMS} states: it is damaged "
                "or was changed. Download it again (force_download=True), or save the dictionary "
                "again if the change was yours."
            )
