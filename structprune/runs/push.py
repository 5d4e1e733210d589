"""A checkpoint directory uploaded to the Hub, with its card pointing at its new place."""

import re
from pathlib import Path

from structprune.checkpoint.export import CODE_FILES
from structprune.checkpoint.recovered import CARRIED
from structprune.checkpoint.save import CARRIED as SETTINGS
from structprune.errors import UserError
from structprune.files import first_line
from structprune.models.checkpoint_files import is_weights

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
KNOWN = {"config.json", "report.json", "README.md", *SETTINGS, *CARRIED, *CODE_FILES}
READ = re.compile(r"(pytorch_)?model.*\.(safetensors|bin)(\.index\.json)?")  # by transformers, whichever comes first
LICENCE = re.compile(r"(licen[cs]e|notice)(\.\w+)?", re.IGNORECASE)


def check_push(repo: str, directory: Path | None, contacts: bool = True) -> None:
    """Check that an upload can begin, before long work.

    Args:
        directory: what will be uploaded; None: an output that does not exist yet.
        contacts: also ask the Hub who uploads.
    Raises:
        UserError: a name that cannot be one of a repository, no directory, no login, or no Hub.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo} is no name of a repository: give USER/NAME ({first_line(error)})") from error
    if repo.count("/") != 1:
        raise UserError(f"--push {repo} has no owner: give USER/NAME")
    if directory is not None and not directory.is_dir():
        raise UserError(f"--push uploads a directory, and '{directory}' is none: give one, or add --out DIR")
    if not contacts:
        return
    try:
        HfApi().whoami()
    except Exception as error:  # the Hub client raises a dozen types
        raise UserError(f"--push {repo}: {_explained(error, 'leave out --push')}") from error


def _explained(error: Exception, remedy: str) -> str:
    """Why the Hub took nothing, and what helps: logging in, or `remedy`."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if isinstance(error, LocalTokenNotFoundError):
        return f"the Hub does not know you (no token): {LOG_IN}"
    if not isinstance(error, HfHubHTTPError):  # of connections, by several libraries
        return f"the Hub cannot be reached ({first_line(error)}): go online, or {remedy}"
    if getattr(error.response, "status_code", None) in (401, 403):
        return f"the Hub does not know you, or not as an owner ({first_line(error)}): {LOG_IN}"
    return f"the Hub refuses ({first_line(error)}): {remedy}"


def push_directory(directory: Path, repo: str, private: bool = False) -> tuple[str, list[str]]:
    """Upload a checkpoint directory, and make the repository where there is none.

    Weights, settings, tokenizer, code, reports, card and licence go; other files are left out. Weights that the
    repository has from before and this checkpoint has not are deleted there. The uploaded card names the repository in
    its examples; the one in the directory stays as it is.

    Returns:
        The address of the repository, and the names of files that were left out.
    Raises:
        UserError: no checkpoint is there, or the Hub refuses; the directory stays.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    if not (directory / "config.json").is_file():
        raise UserError(f"--push uploads a checkpoint directory, and '{directory}' is none: give one, or add --out DIR")
    names = sorted(path.name for path in directory.iterdir() if not path.name.startswith(".") and path.is_file())
    known = [name for name in names if belongs(name)]
    added = [CommitOperationAdd(name, _content(directory / name, repo)) for name in known]
    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        stale = [name for name in api.list_repo_files(repo) if READ.fullmatch(name) and name not in known]
        deleted = [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo, [*added, *deleted], commit_message="Upload a checkpoint by structprune")
    except Exception as error:  # the Hub client raises a dozen types
        remedy = f"push '{directory}' again, which stays"
        raise UserError(f"--push {repo}: {_explained(error, remedy)}") from error
    return str(url), [name for name in names if name not in known]


def belongs(name: str) -> bool:
    """Whether a file of that name is one of a checkpoint's."""
    return name in KNOWN or is_weights(name) or name.endswith(".py") or bool(LICENCE.fullmatch(name))


def _content(path: Path, repo: str) -> str | bytes:
    if path.name != "README.md":
        return str(path)
    return path.read_text(encoding="utf-8").replace('"PATH"', f'"{repo}"').encode()
