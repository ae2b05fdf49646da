"""What the Hub client raises, as built-in exceptions that say what to do; and what to try again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential


def retrying(may_help: Callable[[BaseException], bool]) -> Retrying:
    """Three more attempts, after 0.5, 1 and 2 seconds, where the client itself makes only one."""
    return Retrying(
        stop=stop_after_attempt(4),
        wait=wait_exponential(multiplier=0.5),
        retry=retry_if_exception(may_help),
        reraise=True,
    )


def is_transient(error: BaseException) -> bool:
    """Whether trying again may help: no connection, a server error, too many requests."""
    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        return status in (408, 429) or status >= 500
    return isinstance(error, HTTPError) or _is_short(error)


@contextmanager
def explained(
    repo_id: str,
    revision: str,
    path: str = "",
) -> Iterator[None]:
    """Turn the client's errors into built-in exceptions of one line that says what to do.

    docs/publishing.md lists them.
    """
    try:
        yield
    except (HTTPError, OSError, RuntimeError) as error:  # those of the client among them
        explanation = _explanation(_cause(error), repo_id, revision, path)
        if explanation is None:
            raise
        raise explanation from error


def _cause(error: BaseException) -> BaseException:
    """What lies behind the RuntimeError in which the client wraps a failed upload."""
    return error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error


def _is_short(error: BaseException) -> bool:
    """A file of another length than announced, for which the client has no exception of its own."""
    return type(error) is OSError and str(error).startswith("Consistency check failed")


def _explanation(
    error: BaseException,
    repo_id: str,
    revision: str,
    path: str,
) -> OSError | None:
    if _is_short(error):
        return OSError(
            f"{repo_id} sends {path} cut short, after several attempts: try again later."
        )
    # before RepositoryNotFoundError, its base class
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{repo_id} is gated: accept its terms on its page, then pass token= or log in with "
            "`hf auth login`."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo_id} has no revision {revision!r}.")
    if isinstance(error, RemoteEntryNotFoundError):
        return FileNotFoundError(f"{repo_id} has no file {path} at revision {revision!r}.")
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"There is no repository {repo_id}, or it is private and the token does not open it: "
            "check the name, pass token= or log in with `hf auth login`."
        )
    if isinstance(error, HfHubHTTPError):
        return _refusal(error, repo_id)
    if isinstance(error, HTTPError | OfflineModeIsEnabled | LocalEntryNotFoundError):
        return ConnectionError(
            f"The Hub cannot be reached for {repo_id} ({type(error).__name__}); without it only "
            "what is in the cache can be loaded. HF_HUB_OFFLINE must not be set."
        )
    return None


def _refusal(
    error: HfHubHTTPError,
    repo_id: str,
) -> OSError:
    """An answer of the Hub that has only its status."""
    status = error.response.status_code
    reason = error.server_message or "no reason given"
    if status in (401, 403):
        return PermissionError(f"The Hub refuses this token for {repo_id} ({status}): {reason}")
    if is_transient(error):
        return ConnectionError(
            f"The Hub fails on {repo_id} ({status}), after several attempts: try again later."
        )
    return OSError(f"The Hub refuses a request for {repo_id} ({status}): {reason}")
