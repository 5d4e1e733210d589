"""A checkpoint directory uploaded to the Hub, with its card pointing at its new place."""

from pathlib import Path

from structprune.errors import UserError
from structprune.files import first_line

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


def check_push(repo: str, directory: Path, contacts: bool = True) -> None:
    """Check that an upload can begin, before long work.

    Args:
        directory: what will be uploaded; an output need not exist yet.
        contacts: also ask the Hub who uploads.
    Raises:
        UserError: a name that cannot be one of a repository, a Hub id instead of a directory, or no login.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push {repo} is no name of a repository: give USER/NAME ({first_line(error)})") from error
    if repo.count("/") != 1:
        raise UserError(f"--push {repo} has no owner: give USER/NAME")
    if not contacts:
        return
    try:
        HfApi().whoami()
    except Exception as error:  # the Hub client raises a dozen types
        reason = "no token" if isinstance(error, LocalTokenNotFoundError) else first_line(error)
        raise UserError(f"--push {repo}: the Hub does not know you ({reason}): {LOG_IN}") from error


def push_directory(directory: Path, repo: str, private: bool = False) -> str:
    """Upload a checkpoint directory, and make the repository where there is none.

    The uploaded card names the repository in its examples; the one in the directory stays as it is.

    Returns:
        The address of the repository.
    Raises:
        UserError: no checkpoint is there, or the Hub refuses; the directory stays.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not (directory / "config.json").is_file():
        raise UserError(f"--push uploads a checkpoint directory, and '{directory}' is none: give one, or add --out DIR")
    operations = []
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and not _hidden(path, directory)):
        name = path.relative_to(directory).as_posix()
        content: str | bytes = str(path)
        if name == "README.md":
            content = path.read_text(encoding="utf-8").replace('"PATH"', f'"{repo}"').encode()
        operations.append(CommitOperationAdd(name, content))
    try:
        api = HfApi()
        url = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, operations, commit_message="Upload a checkpoint by structprune")
    except Exception as error:  # the Hub client raises a dozen types
        reason = first_line(error)
        raise UserError(f"--push {repo} failed ({reason}): '{directory}' stays; {LOG_IN}, and push it again") from error
    return str(url)


def _hidden(path: Path, directory: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(directory).parts)
