"""An exported folder to the Hub, when asked and not before: everything is written and verified by then."""

import re
from pathlib import Path

from distill.errors import UserError

MESSAGE = "Export by distill-ssm"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repository: str) -> None:
    """Whether it can be tried, asked before hours of writing.

    Raises:
        UserError: it is no id, there is no token, or the Hub's client is told to stay offline.
    """
    from huggingface_hub import constants, get_token

    if not _ID.fullmatch(repository):
        raise UserError(f"--push is {repository!r}; give ORG/NAME")
    if constants.HF_HUB_OFFLINE:
        raise UserError("--push needs the network, and HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if get_token() is None:
        raise UserError("--push needs a token that may write: run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload every file of ``folder`` to a model repository, which is made if it is not there.

    Args:
        folder: whole; what it holds is what is uploaded.
        repository: ORG/NAME.
        private: make a new repository private; else it is what its organisation makes new ones. One that is there
            stays what it is.

    Returns:
        Where it is now.

    Raises:
        UserError: the Hub cannot be reached, or refuses; the folder stays as it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()  # at HF_ENDPOINT, if that is set
    try:
        place = api.create_repo(repository, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=MESSAGE)
    except HfHubHTTPError as error:
        status = error.response.status_code
        why = {401: "the token is not known to it", 403: "the token may not write there"}.get(status, _said(error))
        raise UserError(f"{api.endpoint} refuses {repository}: {why}. {_kept(folder, repository)}") from error
    except Exception as error:  # whatever the Hub's client, its HTTP library or the network raise
        what = f"{repository} was not uploaded to {api.endpoint}: {_said(error)}"
        raise UserError(f"{what}. {_kept(folder, repository)}") from error
    return str(place)


def _kept(folder: Path, repository: str) -> str:
    return f"The export is whole in {folder}; `hf upload {repository} {folder}` tries again"


def _said(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
