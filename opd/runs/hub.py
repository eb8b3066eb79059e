"""Upload of a trained model to the Hugging Face hub."""

from pathlib import Path
from typing import Any

from diagnostics.errors import InvalidInput, MissingFile, OperationFailed
from diagnostics.io.packages import load_package


def check_push(name: str) -> None:
    """Refuse, before a run starts, an upload that cannot succeed after it.

    Args:
        name: Repository, OWNER/MODEL or MODEL of the user who is logged in.

    Raises:
        InvalidInput: The name is not that of a repository, or nobody is logged in.
        MissingPackage: huggingface_hub is not installed.
    """
    hub = load_package("huggingface_hub", "--push", "train")
    try:
        load_package("huggingface_hub.utils", "--push", "train").validate_repo_id(name)
    except ValueError as error:
        raise InvalidInput(
            f"--push {name!r} is not the name of a repository; write OWNER/MODEL or MODEL"
        ) from error
    if hub.get_token() is None:
        raise InvalidInput(
            f"--push {name} needs a token with write access: run `hf auth login`, or set HF_TOKEN"
        )
    if hub.is_offline_mode():
        raise InvalidInput(f"--push {name} needs the hub, but HF_HUB_OFFLINE is set; unset it")


def push_model(run: Path, name: str) -> str:
    """Upload the trained model of a run, with its card, tokenizer and adapters.

    A repository that does not exist yet is created as a private one.

    Args:
        run: Run folder.
        name: Repository, OWNER/MODEL or MODEL of the user who is logged in.

    Returns:
        Address of the commit.

    Raises:
        MissingFile: The run has no final/.
        InvalidInput: As `check_push`.
        OperationFailed: The hub cannot be reached, or refuses; the model stays in final/.
    """
    final = run / "final"
    if not final.is_dir():
        raise MissingFile(f"{final} does not exist; finish the run first")
    check_push(name)
    hub: Any = load_package("huggingface_hub", "--push", "train")
    api = hub.HfApi()
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository.repo_id,
            folder_path=final,
            commit_message=f"Upload the model of {run.name}",
        )
    except Exception as error:  # of httpx, of the hub, or of the disk
        reason = " ".join(str(error).split())[:300]
        raise OperationFailed(
            f"{final} could not be uploaded to {name} ({type(error).__name__}: {reason}); it is "
            f"complete, and the same command with --push {name} uploads it again"
        ) from error
    return str(commit.commit_url)
